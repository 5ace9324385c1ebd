//! libvirt's domains, as VMs. They are declared `Halted`: who decides that they run here and no more there is a
//! person.

use std::collections::BTreeSet;
use std::path::Path;

use roxmltree::Node;
use serde_json::{Map, Value, json};

use super::network::Networks;
use super::{bridge_of_link, child, children, children_besides, text_of};
use crate::adopt::{Adoption, label};
use crate::host::snapshot::Pool;
use crate::name::{ByteSize, Kind, ObjectName};
use crate::vmm::config::DiskFormat;

/// What every guest of vmctl's is of.
const ARCHITECTURE: &str = "x86_64";

/// What a VM of vmctl does without being told, or what means nothing to its guest.
const SILENT: &[&str] = &[
    "name",
    "uuid",
    "title",
    "description",
    "metadata",
    "memory",
    "currentMemory",
    "vcpu",
    "os",
    "cpu",
    "devices",
    "on_poweroff",
    "on_reboot",
    "on_crash",
    "pm",
    "resource",
    "seclabel",
    "memoryBacking",
    "cputune",
    "features",
    "clock",
];
/// The same of devices.
const SILENT_DEVICES: &[&str] = &[
    "emulator",
    "disk",
    "interface",
    "controller",
    "serial",
    "console",
    "rng",
    "memballoon",
    "vsock",
    "panic",
];

struct Reader<'a> {
    adoption: &'a Adoption,
    networks: &'a Networks,
    notes: Vec<String>,
    /// Why there can be no VM of it.
    reasons: Vec<String>,
    spec: Map<String, Value>,
}

pub fn read((file, root): (&Path, Node), autostart: bool, networks: &Networks, adoption: &mut Adoption) {
    let name = text_of(root, "name").unwrap_or_default().to_owned();
    let mut reader =
        Reader { adoption: &*adoption, networks, notes: Vec::new(), reasons: Vec::new(), spec: Map::new() };
    reader.notes.push(format!(
        "from {}; libvirt's domain is left as it is: shut it down there before `runStrategy` is anything but Halted",
        file.display()
    ));
    if autostart {
        reader.note(format!(
            "libvirt starts it together with its daemon: `virsh autostart --disable {name}`, for two that run one disk ruin it"
        ));
    }
    reader.guest(root);
    reader.machine(root);
    let disks = reader.disks(root);
    reader.boot(root, &disks);
    reader.interfaces(root);
    reader.devices(root);
    reader.the_rest(root);
    reader.spec.insert("runStrategy".to_owned(), json!("Halted"));
    let Reader { notes, reasons, spec, .. } = reader;
    if reasons.is_empty() {
        adoption.add(Kind::VirtualMachine, &name, Value::Object(spec), notes);
        return;
    }
    for reason in reasons {
        adoption.leave(format!("libvirt's domain {name} ({})", file.display()), reason);
    }
}

/// A size with libvirt's unit, KiB where it says none.
fn bytes(node: Node) -> Option<u64> {
    let number: u64 = node.text()?.trim().parse().ok()?;
    let unit: u64 = match node.attribute("unit").unwrap_or("KiB") {
        "b" | "bytes" => 1,
        "KB" => 1000,
        "k" | "KiB" => 1 << 10,
        "MB" => 1_000_000,
        "M" | "MiB" => 1 << 20,
        "GB" => 1_000_000_000,
        "G" | "GiB" => 1 << 30,
        "T" | "TiB" => 1 << 40,
        _ => return None,
    };
    number.checked_mul(unit)
}

impl Reader<'_> {
    fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    fn set(&mut self, field: &str, value: Value) {
        self.spec.insert(field.to_owned(), value);
    }

    /// Whether a VM of vmctl can run such a guest at all.
    fn guest(&mut self, root: Node) {
        let kind = root.attribute("type").unwrap_or("kvm");
        if !matches!(kind, "kvm" | "qemu") {
            self.reasons.push(format!("it is a domain of type {kind}"));
        }
        let arch = child(root, "os").and_then(|os| child(os, "type")).and_then(|kind| kind.attribute("arch"));
        if let Some(arch) = arch.filter(|arch| *arch != ARCHITECTURE) {
            self.reasons.push(format!("its guest is of {arch}, and vmctl's are of {ARCHITECTURE}"));
        }
    }

    fn machine(&mut self, root: Node) {
        match child(root, "memory").and_then(bytes) {
            Some(memory) => {
                let whole = memory >> 20 << 20;
                if whole != memory {
                    self.note(format!(
                        "memory is {memory} bytes there; declared is the multiple of 1Mi below"
                    ));
                }
                self.set("memory", json!(ByteSize(whole).to_string()));
                let current = child(root, "currentMemory").and_then(bytes).filter(|current| *current < whole);
                if let Some(current) = current {
                    self.set(
                        "balloon",
                        json!({ "target": ByteSize((whole - current) >> 12 << 12).to_string() }),
                    );
                }
            }
            None => self.reasons.push("it says no memory that can be read".to_owned()),
        }
        let vcpus = child(root, "vcpu");
        let count = vcpus.and_then(|vcpu| vcpu.text()?.trim().parse::<u32>().ok()).unwrap_or(1);
        if let Some(current) = vcpus.and_then(|vcpu| vcpu.attribute("current")) {
            self.note(format!("it began with {current} of its {count} vCPUs; here it has all"));
        }
        self.set("cpus", json!(count));
        if let Some(cpu) = child(root, "cpu") {
            self.cpu(cpu);
        }
        self.pinning(root, count);
        if let Some(backing) = child(root, "memoryBacking") {
            self.memory_backing(backing);
        }
    }

    fn cpu(&mut self, cpu: Node) {
        let mode = cpu.attribute("mode").unwrap_or("custom");
        if !matches!(mode, "host-passthrough" | "maximum") {
            let model = text_of(cpu, "model").unwrap_or(mode);
            self.note(format!("its CPU model is {model} there; here it sees the host's"));
        }
        let topology = child(cpu, "topology").and_then(|topology| {
            let number = |name| topology.attribute(name).map_or(Some(1), |text| text.parse::<u32>().ok());
            let dies = number("dies")?;
            Some((dies, json!({ "sockets": number("sockets")?, "cores": number("cores")?, "threads": number("threads")? })))
        });
        match topology {
            Some((1, topology)) => {
                let fields = self.spec.entry("cpu").or_insert_with(|| json!({}));
                fields["topology"] = topology;
            }
            Some(_) => self.note("its CPU topology has dies: not declared"),
            None => {}
        }
        for other in ["numa", "feature", "cache", "maxphysaddr"] {
            if child(cpu, other).is_some() {
                self.note(format!("<cpu><{other}>: not declared"));
            }
        }
    }

    fn pinning(&mut self, root: Node, count: u32) {
        let Some(tune) = child(root, "cputune") else { return };
        let pins: Vec<(u32, &str)> = children(tune, "vcpupin")
            .filter_map(|pin| Some((pin.attribute("vcpu")?.parse().ok()?, pin.attribute("cpuset")?)))
            .collect();
        let of = |vcpu: u32| pins.iter().find(|(pinned, _)| *pinned == vcpu).map(|(_, cpus)| *cpus);
        let all: Option<Vec<&str>> = (0..count).map(of).collect();
        match all {
            Some(all) if pins.iter().all(|(_, cpus)| !cpus.contains('^')) => {
                let fields = self.spec.entry("cpu").or_insert_with(|| json!({}));
                fields["pinning"] = json!(all);
            }
            _ if pins.is_empty() => {}
            _ => {
                self.note("its <vcpupin> says not of each vCPU where it runs, or excludes CPUs: not declared")
            }
        }
        for other in children_besides(tune, &["vcpupin"]) {
            self.note(format!("<cputune><{other}>: not declared"));
        }
    }

    fn memory_backing(&mut self, backing: Node) {
        if let Some(pages) = child(backing, "hugepages") {
            let size = child(pages, "page").and_then(|page| {
                let number: u64 = page.attribute("size")?.parse().ok()?;
                Some(match page.attribute("unit").unwrap_or("KiB") {
                    "M" | "MiB" => number << 20,
                    "G" | "GiB" => number << 30,
                    _ => number << 10,
                })
            });
            match size.unwrap_or(2 << 20) {
                0x20_0000 => self.set("memoryBacking", json!({ "hugepages": "2Mi" })),
                0x4000_0000 => self.set("memoryBacking", json!({ "hugepages": "1Gi" })),
                other => self.note(format!("huge pages of {}: not declared", ByteSize(other))),
            }
        }
        for other in children_besides(backing, &["hugepages"]) {
            self.note(format!("<memoryBacking><{other}>: not declared"));
        }
    }

    /// The names of the disks, in the order in which they are booted from.
    fn disks(&mut self, root: Node) -> Vec<String> {
        let (mut disks, mut names) = (Vec::new(), Vec::new());
        let Some(devices) = child(root, "devices") else { return Vec::new() };
        for disk in children(devices, "disk") {
            let target = child(disk, "target");
            let name = target.and_then(|target| target.attribute("dev")).unwrap_or("disk").to_owned();
            let device = disk.attribute("device").unwrap_or("disk");
            if device != "disk" {
                self.note(format!("{name} is a {device}: not declared"));
                continue;
            }
            let Some(spec) = self.disk(disk, &name) else { continue };
            let order = child(disk, "boot").and_then(|boot| boot.attribute("order")?.parse().ok());
            disks.push(spec);
            names.push((order.unwrap_or(u32::MAX), name));
        }
        if !disks.is_empty() {
            self.set("disks", json!(disks));
        }
        // Stable: those without an order of their own keep that of the file.
        names.sort_by_key(|(order, _)| *order);
        names.into_iter().map(|(_, name)| name).collect()
    }

    fn disk(&mut self, disk: Node, name: &str) -> Option<Value> {
        let source = child(disk, "source");
        let attribute = |name| source.and_then(|source| source.attribute(name));
        let (path, volume) =
            match (attribute("file").or(attribute("dev")), attribute("pool"), attribute("volume")) {
                (Some(path), ..) => (path.to_owned(), self.volume_at(Path::new(path))),
                (None, Some(pool), Some(file)) => {
                    (format!("{file} in pool {pool}"), self.volume_in(pool, file))
                }
                _ => (format!("of type {}", disk.attribute("type").unwrap_or("unknown")), None),
            };
        let Some((volume, format)) = volume else {
            self.reasons.push(format!(
                "its disk {name} ({path}) is no volume that is adopted here; name its directory with `--pool DIR`, and see what was left out there"
            ));
            return None;
        };
        for (element, why) in [
            ("encryption", "is encrypted, which vmctl can't serve"),
            ("slices", "is a part of its file"),
            ("transient", "forgets what is written to it, and a volume keeps it"),
        ] {
            if disk.descendants().any(|node| node.has_tag_name(element)) {
                self.reasons.push(format!("its disk {name} {why}"));
                return None;
            }
        }
        let driver = child(disk, "driver");
        let of_driver = |name| driver.and_then(|driver| driver.attribute(name));
        if let Some(said) = of_driver("type")
            && said != format!("{format:?}").to_lowercase()
        {
            // Read in another format than it was written in, a disk is destroyed.
            self.reasons.push(format!("its disk {name} is {said} there, and {format:?} by its content"));
            return None;
        }
        let mut spec = json!({ "name": name, "volume": volume.as_str() });
        match of_driver("cache") {
            None | Some("default" | "writeback") => {}
            Some("none" | "directsync") => spec["cache"] = json!("direct"),
            Some(cache) => spec["cache"] = json!(cache),
        }
        if child(disk, "readonly").is_some() {
            spec["readOnly"] = json!(true);
        }
        let bus = child(disk, "target").and_then(|target| target.attribute("bus"));
        if let Some(bus) = bus.filter(|bus| *bus != "virtio") {
            self.note(format!("{name} is on {bus} there and on virtio here: the guest needs the driver, and finds it under another name"));
        }
        for other in children_besides(
            disk,
            &["driver", "source", "target", "readonly", "address", "alias", "boot", "backingStore"],
        ) {
            self.note(format!("{name}: <{other}> is not declared"));
        }
        Some(spec)
    }

    /// The volume whose file this is.
    fn volume_at(&self, path: &Path) -> Option<(ObjectName, DiskFormat)> {
        let path = &super::logical_volume(path).unwrap_or_else(|| path.to_owned());
        let pools = self.adoption.objects.iter().filter(|found| found.id.kind == Kind::StoragePool);
        for pool in pools {
            let text = |pointer| pool.spec.pointer(pointer).and_then(Value::as_str);
            let group = text("/lvm/volumeGroup").or(text("/lvmThin/volumeGroup"));
            let group = group.map(|group| format!("/dev/{group}"));
            let Some(directory) = text("/directory/path").map(str::to_owned).or(group) else { continue };
            if path.parent() == Some(Path::new(&directory)) {
                let found = self.volume_in(pool.id.name.as_str(), path.file_name()?.to_str()?);
                if found.is_some() {
                    return found;
                }
            }
        }
        None
    }

    fn volume_in(&self, pool: &str, file: &str) -> Option<(ObjectName, DiskFormat)> {
        let pool = label(pool);
        let volumes = self.adoption.objects.iter().filter(|found| found.id.kind == Kind::Volume);
        volumes
            .filter(|found| found.spec["pool"] == pool.as_str())
            .map(|found| {
                let raw = found.spec.get("format").and_then(Value::as_str) == Some("raw");
                (found.id.name.clone(), if raw { DiskFormat::Raw } else { DiskFormat::Qcow2 })
            })
            // A logical volume has its name alone.
            .find(|(name, format)| name.as_str() == file || Pool::volume_file(name, *format) == file)
    }

    fn boot(&mut self, root: Node, disks: &[String]) {
        let os = child(root, "os");
        let kernel = os.and_then(|os| text_of(os, "kernel"));
        if let (Some(os), Some(kernel)) = (os, kernel) {
            let mut boot = json!({ "kernel": kernel });
            for (field, name) in [("initrd", "initrd"), ("cmdline", "cmdline")] {
                if let Some(text) = text_of(os, name) {
                    boot[field] = json!(text);
                }
            }
            self.set("boot", boot);
        } else if let Some(first) = disks.first() {
            self.set("boot", json!({ "disk": first }));
            self.note("it boots through firmware there; here its kernel is read from the disk's own boot loader entries");
        } else if self.reasons.is_empty() {
            self.reasons.push("it boots from no kernel and no disk".to_owned());
        }
        let Some(os) = os else { return };
        if os.attribute("firmware").is_some() || child(os, "loader").is_some() {
            self.note("its firmware (and what it stored: <nvram>) is not declared");
        }
    }

    fn interfaces(&mut self, root: Node) {
        let Some(devices) = child(root, "devices") else { return };
        let mut interfaces = Vec::new();
        for (index, nic) in children(devices, "interface").enumerate() {
            let source = child(nic, "source");
            let of_source = |name| source.and_then(|source| source.attribute(name));
            let kind = nic.attribute("type").unwrap_or("unknown");
            let attachment = match (kind, of_source("network"), of_source("bridge")) {
                ("network", Some(network), _) => self.networks.attachment(network),
                ("bridge", _, Some(link)) => bridge_of_link(self.adoption, link)
                    .map(|bridge| ("bridge", bridge))
                    .ok_or_else(|| format!("the bridge {link} is not there, or vmctl's already")),
                _ => Err(format!("NICs of type {kind} have no bridge")),
            };
            let (field, name) = match attachment {
                Ok(attachment) => attachment,
                Err(why) => {
                    self.reasons.push(format!("its NIC {index}: {why}"));
                    continue;
                }
            };
            let mut spec = json!({ field: name.as_str() });
            if let Some(mac) = child(nic, "mac").and_then(|mac| mac.attribute("address")) {
                spec["macAddress"] = json!(mac.to_lowercase());
                let reserved = of_source("network").and_then(|network| self.networks.reserved(network, mac));
                if let Some(address) = reserved.filter(|_| field == "network") {
                    spec["addresses"] = json!([address]);
                }
            }
            if child(nic, "link").and_then(|link| link.attribute("state")) == Some("down") {
                spec["linkUp"] = json!(false);
            }
            if let Some(vlan) = child(nic, "vlan") {
                self.vlan(vlan, index, &mut spec);
            }
            let model = child(nic, "model").and_then(|model| model.attribute("type"));
            if let Some(model) = model.filter(|model| *model != "virtio") {
                self.note(format!(
                    "NIC {index} is a {model} there and virtio here: the guest needs the driver"
                ));
            }
            let known =
                ["source", "mac", "link", "vlan", "model", "address", "alias", "target", "boot", "driver"];
            for other in children_besides(nic, &known) {
                self.note(format!("NIC {index}: <{other}> is not declared"));
            }
            interfaces.push(spec);
        }
        if !interfaces.is_empty() {
            self.set("interfaces", json!(interfaces));
        }
    }

    fn vlan(&mut self, vlan: Node, index: usize, spec: &mut Value) {
        let tags: Vec<(u64, bool)> = children(vlan, "tag")
            .filter_map(|tag| {
                Some((tag.attribute("id")?.parse().ok()?, tag.attribute("nativeMode").is_some()))
            })
            .collect();
        match tags[..] {
            [(id, _)] if vlan.attribute("trunk") != Some("yes") => spec["vlan"] = json!({ "access": id }),
            [] => self.note(format!("NIC {index}: <vlan> without tags")),
            _ => {
                let trunk: Vec<u64> = tags.iter().filter(|(_, native)| !native).map(|(id, _)| *id).collect();
                spec["vlan"] = json!({ "trunk": trunk });
                if let Some((native, _)) = tags.iter().find(|(_, native)| *native) {
                    spec["vlan"]["native"] = json!(native);
                }
            }
        }
    }

    fn devices(&mut self, root: Node) {
        let Some(devices) = child(root, "devices") else { return };
        let balloon = child(devices, "memballoon").and_then(|balloon| balloon.attribute("model"));
        if balloon.is_some_and(|model| model != "none") {
            self.spec.entry("balloon").or_insert_with(|| json!({}));
        } else if self.spec.remove("balloon").is_some() {
            self.note("<currentMemory> without a balloon has no effect");
        }
        if let Some(vsock) = child(devices, "vsock") {
            let cid = child(vsock, "cid").and_then(|cid| cid.attribute("address")?.parse::<u32>().ok());
            self.set("vsock", cid.map_or(json!({}), |cid| json!({ "cid": cid })));
        }
        let others: BTreeSet<String> = children_besides(devices, SILENT_DEVICES).into_iter().collect();
        if !others.is_empty() {
            let others: Vec<String> = others.into_iter().collect();
            self.note(format!("devices that a VM of vmctl doesn't have: {}", others.join(", ")));
        }
    }

    fn the_rest(&mut self, root: Node) {
        if let Some(uuid) = text_of(root, "uuid") {
            self.note(format!("its UUID {uuid} is not kept: vmctl makes a generation id from its name"));
        }
        let clock = child(root, "clock").and_then(|clock| clock.attribute("offset"));
        if let Some(offset) = clock.filter(|offset| *offset != "utc") {
            self.note(format!("its clock is {offset} there; here it is UTC"));
        }
        for (element, expected) in
            [("on_poweroff", "destroy"), ("on_reboot", "restart"), ("on_crash", "destroy")]
        {
            if let Some(action) = text_of(root, element).filter(|action| *action != expected) {
                self.note(format!("<{element}> is {action} there; `runStrategy` decides here"));
            }
        }
        if let Some(features) = child(root, "features") {
            for other in children_besides(features, &["acpi", "apic", "pae", "vmport"]) {
                self.note(format!("<features><{other}>: not declared"));
            }
        }
        for other in children_besides(root, SILENT) {
            self.note(format!("<{other}>: not declared"));
        }
    }
}
