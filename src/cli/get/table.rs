//! Objects as tables: one a kind, columns as wide as what is in them.

use super::KINDS;
use crate::cli::objects::{Object, Status, VmStatus};
use crate::kinds::virtual_machine::changes::word;
use crate::report::text::Style;
use crate::report::units::{duration, size};

/// A column's name, and whether only `-o wide` shows it.
struct Column(&'static str, bool);

const fn column(name: &'static str) -> Column {
    Column(name, false)
}

const fn wide(name: &'static str) -> Column {
    Column(name, true)
}

const VM: &[Column] = &[
    column("PHASE"),
    column("CPUS"),
    column("MEMORY"),
    column("DISKS"),
    column("NETWORK"),
    column("PID"),
    column("UPTIME"),
    wide("STRATEGY"),
    wide("REBOOTS"),
    wide("TAPS"),
    wide("MACHINE"),
];
const HOST: &[Column] = &[
    column("CPUS"),
    column("VCPUS"),
    column("CPU-RATIO"),
    column("MEMORY"),
    column("FOR-GUESTS"),
    column("PROMISED"),
    column("MEMORY-RATIO"),
    column("AVAILABLE"),
    column("HUGEPAGES"),
    column("KSM"),
    wide("RESERVED"),
    wide("PRESSURE"),
];
const BRIDGE: &[Column] = &[
    column("STATE"),
    column("MTU"),
    column("PORTS"),
    column("ADDRESSES"),
    wide("INTERFACE"),
    wide("MAC"),
    wide("VLAN-FILTERING"),
    wide("STP"),
];
const VLAN: &[Column] = &[
    column("ID"),
    column("PARENT"),
    column("BRIDGE"),
    column("STATE"),
    column("MTU"),
    column("ADDRESSES"),
    wide("INTERFACE"),
    wide("MAC"),
];
const NETWORK: &[Column] = &[
    column("STATE"),
    column("BRIDGE"),
    column("ADDRESSES"),
    column("PORTS"),
    column("NAT"),
    column("FORWARDS"),
    column("LEASES"),
    wide("MTU"),
    wide("MAC"),
];
const POOL: &[Column] = &[
    column("STATE"),
    column("CAPACITY"),
    column("AVAILABLE"),
    column("USED"),
    column("VOLUMES"),
    column("IMAGES"),
    column("PATH"),
];
const IMAGE: &[Column] = &[
    column("POOL"),
    column("FORMAT"),
    column("SIZE"),
    column("ALLOCATION"),
    column("OVERLAYS"),
    column("SHA256"),
    wide("PATH"),
];
const VOLUME: &[Column] = &[
    column("POOL"),
    column("FORMAT"),
    column("CAPACITY"),
    column("ALLOCATION"),
    column("USED-BY"),
    column("RECLAIM"),
    wide("BACKING"),
    wide("PATH"),
];

/// All objects, a table for each kind. The set is a column where there are several, or much room.
pub fn tables(objects: &[&Object], is_wide: bool, style: Style) -> String {
    let sets: std::collections::BTreeSet<_> = objects.iter().map(|object| &object.set).collect();
    let with_set = is_wide || sets.len() > 1;
    let kinds = KINDS.iter().map(|kind| objects.iter().filter(|object| object.id.kind == *kind).collect());
    let several =
        KINDS.iter().filter(|kind| objects.iter().any(|object| object.id.kind == **kind)).count() > 1;
    let tables = kinds
        .filter(|of_kind: &Vec<&&Object>| !of_kind.is_empty())
        .map(|of_kind| table(&of_kind, is_wide, with_set, several, style));
    tables.collect::<Vec<_>>().join("\n")
}

fn table(objects: &[&&Object], is_wide: bool, with_set: bool, with_kind: bool, style: Style) -> String {
    let columns = columns(&objects[0].status);
    let shown = |index: &usize| is_wide || !columns[*index].1;
    let mut head = vec!["NAME".to_owned()];
    head.extend((0..columns.len()).filter(shown).map(|index| columns[index].0.to_owned()));
    if with_set {
        head.push("SET".to_owned());
    }
    let row = |object: &&&Object| {
        let name = if with_kind { object.id.to_string() } else { object.id.name.to_string() };
        let mut row = vec![name];
        let cells = cells(&object.status);
        row.extend(cells.into_iter().enumerate().filter(|(index, _)| shown(index)).map(|(_, cell)| cell));
        if with_set {
            row.push(object.set.to_string());
        }
        row
    };
    let rows: Vec<Vec<String>> = objects.iter().map(row).collect();
    let width = |column: usize| {
        let cells = std::iter::once(&head).chain(&rows).map(|row| row[column].chars().count());
        cells.max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |row: &[String]| -> String {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        cells.collect::<Vec<_>>().join("   ").trim_end().to_owned()
    };
    let mut out = format!("{}\n", style.bold(&line(&head)));
    for (row, object) in rows.iter().zip(objects) {
        let line = line(row);
        out.push_str(&if is_worrying(&object.status) { style.yellow(&line) } else { line });
        out.push('\n');
    }
    out
}

fn columns(status: &Status) -> &'static [Column] {
    match status {
        Status::HostPolicy(_) => HOST,
        Status::Bridge(_) => BRIDGE,
        Status::Vlan(_) => VLAN,
        Status::Network(_) => NETWORK,
        Status::StoragePool(_) => POOL,
        Status::Image(_) => IMAGE,
        Status::Volume(_) => VOLUME,
        Status::VirtualMachine(_) => VM,
    }
}

fn is_worrying(status: &Status) -> bool {
    match status {
        Status::HostPolicy(_) => false,
        Status::Bridge(bridge) => !bridge.link.up,
        Status::Vlan(vlan) => !vlan.link.up,
        Status::Network(network) => {
            let serves = network.service.as_ref().is_none_or(|service| service.running);
            !serves || !network.link.as_ref().is_some_and(|link| link.up)
        }
        Status::StoragePool(pool) => !pool.present || !pool.conditions.is_empty(),
        Status::Image(_) => false,
        Status::Volume(volume) => volume.unusable.is_some(),
        Status::VirtualMachine(vm) => {
            vm.problem.is_some() || vm.phase == "Paused" || !vm.conditions.is_empty()
        }
    }
}

fn or_dash(text: String) -> String {
    if text.is_empty() { "-".to_owned() } else { text }
}

fn maybe<T: ToString>(value: &Option<T>) -> String {
    value.as_ref().map_or("-".to_owned(), ToString::to_string)
}

fn list<T: ToString>(values: &[T]) -> String {
    or_dash(values.iter().map(ToString::to_string).collect::<Vec<_>>().join(","))
}

fn state(up: bool) -> String {
    if up { "up" } else { "down" }.to_owned()
}

/// As many as `columns` has, in its order.
fn cells(status: &Status) -> Vec<String> {
    match status {
        Status::HostPolicy(host) => {
            let limit = |now: &str, most: &Option<String>| match most {
                Some(most) => format!("{now}/{most}"),
                None => now.to_owned(),
            };
            vec![
                host.cpus.to_string(),
                host.promised_vcpus.to_string(),
                limit(&host.cpu_overcommit, &host.cpu_overcommit_max),
                size(host.memory_bytes),
                size(host.usable_bytes),
                size(host.promised_bytes),
                limit(&host.memory_overcommit, &host.memory_overcommit_max),
                size(host.available_bytes),
                host.pages_text(),
                host.ksm_text(),
                size(host.reserved_bytes),
                host.pressure
                    .map_or("-".to_owned(), |pressure| format!("{:.2}%", f64::from(pressure) / 100.0)),
            ]
        }
        Status::Bridge(bridge) => vec![
            state(bridge.link.up),
            bridge.link.mtu.to_string(),
            list(&bridge.ports),
            list(&bridge.link.addresses),
            bridge.link.interface.to_string(),
            maybe(&bridge.link.mac_address),
            bridge.vlan_filtering.to_string(),
            bridge.stp.to_string(),
        ],
        Status::Vlan(vlan) => vec![
            maybe(&vlan.vlan_id),
            maybe(&vlan.parent),
            maybe(&vlan.link.master),
            state(vlan.link.up),
            vlan.link.mtu.to_string(),
            list(&vlan.link.addresses),
            vlan.link.interface.to_string(),
            maybe(&vlan.link.mac_address),
        ],
        Status::Network(network) => {
            let link = network.link.as_ref();
            vec![
                link.map_or("missing".to_owned(), |link| state(link.up)),
                maybe(&network.bridge),
                or_dash(link.map_or(String::new(), |link| link.addresses.join(","))),
                network.ports.len().to_string(),
                network.nat.to_string(),
                network.port_forwards.len().to_string(),
                if network.service.is_some() { network.leases.len().to_string() } else { "-".to_owned() },
                maybe(&link.map(|link| link.mtu)),
                maybe(&link.and_then(|link| link.mac_address.clone())),
            ]
        }
        Status::StoragePool(pool) => vec![
            match pool.conditions.first() {
                Some(condition) => condition.kind,
                None if pool.present => "present",
                None => "missing",
            }
            .to_owned(),
            size(pool.capacity_bytes),
            size(pool.available_bytes),
            size(pool.used_bytes),
            pool.volumes.to_string(),
            pool.images.to_string(),
            pool.path.display().to_string(),
        ],
        Status::Image(image) => vec![
            image.pool.to_string(),
            format_name(image.format),
            size(image.virtual_size_bytes),
            size(image.allocated_bytes),
            image.used_by.len().to_string(),
            image.sha256.as_deref().map_or("-".to_owned(), |digest| digest.chars().take(12).collect()),
            image.path.display().to_string(),
        ],
        Status::Volume(volume) => vec![
            volume.pool.to_string(),
            format_name(volume.format),
            size(volume.capacity_bytes),
            size(volume.allocated_bytes),
            list(&volume.used_by),
            volume.reclaim_policy.to_owned(),
            maybe(&volume.backing.as_ref().map(|path| path.display())),
            volume.path.display().to_string(),
        ],
        Status::VirtualMachine(vm) => vm_cells(vm),
    }
}

pub fn format_name(format: crate::vmm::config::DiskFormat) -> String {
    format!("{format:?}").to_lowercase()
}

fn vm_cells(vm: &VmStatus) -> Vec<String> {
    let bridges: Vec<String> = vm.interfaces.iter().map(|nic| maybe(&nic.bridge)).collect();
    let taps: Vec<&str> = vm.interfaces.iter().map(|nic| nic.tap.as_str()).collect();
    vec![
        vm.phase_and_why(),
        vm.cpus.to_string(),
        size(vm.memory_bytes),
        vm.disks.len().to_string(),
        list(&bridges),
        maybe(&vm.pid),
        vm.uptime_seconds.map_or("-".to_owned(), duration),
        vm.run_strategy.map_or("-".to_owned(), |strategy| format!("{strategy:?}")),
        maybe(&vm.reboots),
        list(&taps),
        vm.machine.map_or("-".to_owned(), |machine| word(&machine)),
    ]
}
