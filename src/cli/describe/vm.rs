//! A VM, as `vmctl describe` tells of it.

use super::Page;
use crate::cli::get::table::format_name;
use crate::cli::objects::VmStatus;
use crate::host::snapshot::CpuShare;
use crate::kinds::virtual_machine::changes::{describe_directions, describe_limits, pinning, word};
use crate::report::units::{duration, size};
use crate::vmm::config::{BalloonConfig, BootConfig, CpuTopology, TransparentHugepages};

fn queues(count: u16) -> String {
    if count == 1 { "1 queue".to_owned() } else { format!("{count} queues") }
}

/// `4 (model host, 1 socket × 2 cores × 2 threads)`
fn describe_cpus(vm: &VmStatus) -> String {
    let topology = vm.cpu.topology.map(|CpuTopology { sockets, cores, threads }| {
        format!(", sockets × cores × threads: {sockets} × {cores} × {threads}")
    });
    format!("{} (model {}{})", vm.cpus, word(&vm.cpu.model), topology.unwrap_or_default())
}

fn describe_share(share: CpuShare) -> String {
    let quota = share.quota_percent.map(|percent| format!(", at most {percent} % of a CPU"));
    format!("weight {}{}", share.weight, quota.unwrap_or_default())
}

fn describe_memory(vm: &VmStatus) -> String {
    let backing = vm.memory_backing;
    let mut text = format!("{} in pages of {}", size(vm.memory_bytes), word(&backing.pages));
    if backing.ksm {
        text.push_str(", KSM");
    }
    if backing.transparent_hugepages != TransparentHugepages::Host {
        text.push_str(&format!(", transparent huge pages: {}", word(&backing.transparent_hugepages)));
    }
    text
}

fn describe_balloon(balloon: BalloonConfig) -> String {
    let mut text = format!("takes {}", size(balloon.target_bytes));
    if balloon.free_page_reporting {
        text.push_str(", free pages are reported");
    }
    if balloon.deflate_on_oom {
        text.push_str(", gives way before the guest kills");
    }
    text
}

pub(super) fn describe(page: &mut Page, vm: &VmStatus) {
    let style = page.style;
    page.line("Phase", vm.phase_and_why());
    if let Some(problem) = &vm.problem {
        page.line("Problem", style.red(problem));
    }
    if vm.held {
        page.line("Held", "yes, by `vmctl stop`; `vmctl start` lets it run");
    }
    for condition in &vm.conditions {
        let device = condition.device.as_ref().map(|device| format!(" ({device})")).unwrap_or_default();
        let age = duration(condition.age_seconds);
        page.line(
            "Condition",
            style.yellow(&format!("{}{device}, for {age}: {}", condition.kind, condition.message)),
        );
    }
    for change in &vm.staged_changes {
        let to = change.to.as_deref().unwrap_or("none");
        page.line("Staged", format!("{} {to}, at the next start", change.field));
    }
    page.maybe("Process", vm.pid.map(|pid| format!("pid {pid}")));
    page.maybe("Uptime", vm.uptime_seconds.map(duration));
    page.maybe("Reboots", vm.reboots);
    page.maybe("Run strategy", vm.run_strategy.map(|strategy| format!("{strategy:?}")));
    page.maybe("Machine", vm.machine.map(|machine| word(&machine)));
    page.line("vCPUs", describe_cpus(vm));
    page.maybe("CPU pinning", pinning(&vm.cpu.pinning));
    page.line("CPU share", describe_share(vm.cpu_share));
    page.line("Memory", describe_memory(vm));
    page.maybe("Balloon", vm.balloon.map(describe_balloon));
    page.maybe("vsock", vm.vsock_cid.map(|cid| format!("context id {cid}")));
    page.maybe("Generation id", vm.generation_id.as_ref());
    if let Some(boot) = &vm.boot {
        match boot {
            BootConfig::Kernel(boot) => {
                page.line("Kernel", &boot.kernel_path);
                page.line("Initrd", boot.initrd_path.as_deref().unwrap_or_default());
                page.line("Command line", &boot.cmdline);
            }
            BootConfig::Disk(boot) => {
                page.line("Boot", format!("from its disk {}", boot.disk));
                page.maybe("Boot entry", boot.entry.as_deref());
                page.line("Appended", &boot.append);
            }
        }
    }
    page.section("Disks");
    for disk in &vm.disks {
        let read_only = if disk.read_only { ", read-only" } else { "" };
        let capacity = disk.capacity_bytes.map(|bytes| format!(", {}", size(bytes))).unwrap_or_default();
        page.item(&format!(
            "{:<12}  {} ({}{capacity}{read_only}, cache {}, {})",
            disk.name,
            disk.path,
            format_name(disk.format),
            word(&disk.cache),
            queues(disk.queues)
        ));
        if let Some(limits) = describe_limits(disk.limits, "operations") {
            page.item(&format!("{:<12}  at most {limits}", ""));
        }
    }
    page.section("Interfaces");
    for nic in &vm.interfaces {
        let bridge = nic.bridge.as_ref().map_or("no bridge".to_owned(), |bridge| format!("bridge {bridge}"));
        let state = if nic.up { "up" } else { "not up" };
        let vlans = nic.vlans.as_ref().map(|vlans| format!(", VLANs {vlans}")).unwrap_or_default();
        let carrier = if nic.link_up { "" } else { ", link down" };
        page.item(&format!(
            "{:<12}  {}, tap {} ({state}), {bridge}{vlans}, {}{carrier}",
            nic.name,
            nic.mac_address,
            nic.tap,
            queues(nic.queues)
        ));
        if let Some(limits) = describe_directions((nic.receive_limits, nic.transmit_limits)) {
            page.item(&format!("{:<12}  at most {limits}", ""));
        }
    }
    if let Some(exit) = &vm.last_exit {
        page.line("Last exit", format!("{:?}: {}", exit.reason, exit.message));
    }
}
