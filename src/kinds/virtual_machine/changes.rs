//! What differs between the configuration that a process runs and the one that it is to run, in the
//! manifest's words; and whether it can be mended while the guest runs, or takes a start.
//!
//! | differs | with machine pci | with machine micro |
//! |---|---|---|
//! | a disk or a NIC is there or not | live: plugged, unplugged | staged |
//! | what a disk or a NIC is (file, read-only, address) | live: unplugged and plugged | staged |
//! | … of the disk that the guest was booted from | staged | staged |
//! | the cloud-init seed | staged, and never a reason to restart | as with pci |
//! | limits, carrier, balloon target | live | live |
//! | everything else | staged | staged |

use serde::Serialize;

use crate::host::snapshot::{SEED_DISK, SEED_PATH};
use crate::kinds::action::{FieldChange, Impact};
use crate::name::ByteSize;
use crate::vmm::config::{
    BalloonConfig, BootConfig, Bucket, CpuTopology, DiskConfig, Limits, MachineKind, NicConfig, VmConfig,
};

#[derive(Debug, Default)]
pub struct Changes {
    /// These take effect at the next start.
    pub staged: Vec<FieldChange>,
    pub live: Vec<LiveChange>,
    /// The devices are the same and stand in another order, which a running guest doesn't see. With machine
    /// micro it is staged like everything else.
    pub order: Option<FieldChange>,
    /// The cloud-init seed is another one: a guest reads it when it boots, and needn't boot for it.
    pub seed: Option<FieldChange>,
}

#[derive(Debug)]
pub struct LiveChange {
    pub shown: FieldChange,
    pub work: Work,
}

/// How a difference is mended while the guest runs.
#[derive(Debug)]
pub enum Work {
    AddDisk(DiskConfig),
    AddNic(NicConfig),
    Remove { device: String },
    ReplaceDisk(DiskConfig),
    ReplaceNic(NicConfig),
    DiskLimits { disk: String, limits: Limits },
    NicLimits { nic: String, receive: Limits, transmit: Limits },
    Carrier { nic: String, up: bool },
    BalloonTarget { target_bytes: u64 },
}

impl Changes {
    pub fn between(have: &VmConfig, want: &VmConfig) -> Self {
        let mut changes = Self::default();
        changes.machine(have, want);
        changes.boot(&have.boot, &want.boot);
        changes.balloon(have.balloon, want.balloon);
        changes.disks(have, want);
        changes.nics(have, want);
        changes.order(have, want);
        changes.seed(have, want);
        changes
    }

    /// A balloon that the agent has filled, no further than it may, is no difference.
    pub fn allow_balloon(&mut self, have_bytes: u64, most_bytes: u64) {
        self.live.retain(|change| match change.work {
            Work::BalloonTarget { target_bytes } => have_bytes < target_bytes || have_bytes > most_bytes,
            _ => true,
        });
    }

    /// Every difference, however it is mended.
    pub fn into_shown(self) -> impl Iterator<Item = FieldChange> {
        let live = self.live.into_iter().map(|change| change.shown);
        self.staged.into_iter().chain(self.seed).chain(live).chain(self.order)
    }

    fn stage<T: Into<Option<String>>>(&mut self, field: impl Into<String>, from: T, to: T) {
        let (from, to) = (from.into(), to.into());
        if from != to {
            self.staged.push(FieldChange { field: field.into(), from, to, impact: Impact::Staged });
        }
    }

    fn live(&mut self, field: String, from: Option<String>, to: Option<String>, work: Work) {
        let shown = FieldChange { field, from, to, impact: Impact::Live };
        self.live.push(LiveChange { shown, work });
    }

    /// All that a machine is made of, but for its devices and its boot. (Taken apart, so that a field that
    /// is new can't be forgotten here.)
    fn machine(&mut self, have: &VmConfig, want: &VmConfig) {
        let VmConfig {
            // Whose it is has been looked at before.
            name: _,
            mark: _,
            machine,
            vcpus,
            cpu,
            memory_bytes,
            memory,
            boot: _,
            disks: _,
            nics: _,
            balloon: _,
            vsock,
            entropy,
            generation_id,
        } = want;
        self.stage("machine", word(&have.machine), word(machine));
        self.stage("cpus", have.vcpus.to_string(), vcpus.to_string());
        self.stage("cpu.model", word(&have.cpu.model), word(&cpu.model));
        let topology = |topology: Option<CpuTopology>| {
            topology.map(|CpuTopology { sockets, cores, threads }| format!("{sockets}×{cores}×{threads}"))
        };
        self.stage("cpu.topology", topology(have.cpu.topology), topology(cpu.topology));
        self.stage("cpu.pinning", pinning(&have.cpu.pinning), pinning(&cpu.pinning));
        self.stage("memory", ByteSize(have.memory_bytes).to_string(), ByteSize(*memory_bytes).to_string());
        self.stage("memoryBacking.hugepages", word(&have.memory.pages), word(&memory.pages));
        self.stage("memoryBacking.ksm", have.memory.ksm.to_string(), memory.ksm.to_string());
        self.stage(
            "memoryBacking.transparentHugepages",
            word(&have.memory.transparent_hugepages),
            word(&memory.transparent_hugepages),
        );
        let cid = |vsock: &Option<crate::vmm::config::VsockConfig>| vsock.map(|vsock| vsock.cid.to_string());
        self.stage("vsock.cid", cid(&have.vsock), cid(vsock));
        let drawn = |bucket: Option<Bucket>| bucket.map(bytes_per_second);
        self.stage("entropy.limit", drawn(have.entropy.limit), drawn(entropy.limit));
        self.stage("generationId", have.generation_id.clone(), generation_id.clone());
    }

    fn boot(&mut self, have: &BootConfig, want: &BootConfig) {
        let [from, to] = [have, want].map(boot_fields);
        for ((field, from), (_, to)) in from.into_iter().zip(to) {
            self.stage(field, from, to);
        }
    }

    fn balloon(&mut self, have: Option<BalloonConfig>, want: Option<BalloonConfig>) {
        let (Some(from), Some(to)) = (have, want) else {
            let shown = |balloon: Option<BalloonConfig>| balloon.map(|_| "present".to_owned());
            return self.stage("balloon", shown(have), shown(want));
        };
        self.stage(
            "balloon.freePageReporting",
            from.free_page_reporting.to_string(),
            to.free_page_reporting.to_string(),
        );
        self.stage("balloon.deflateOnOom", from.deflate_on_oom.to_string(), to.deflate_on_oom.to_string());
        if from.target_bytes != to.target_bytes {
            let [from, target] = [from, to].map(|balloon| Some(ByteSize(balloon.target_bytes).to_string()));
            let work = Work::BalloonTarget { target_bytes: to.target_bytes };
            self.live("balloon.target".into(), from, target, work);
        }
    }

    fn disks(&mut self, have: &VmConfig, want: &VmConfig) {
        let plugs = have.machine == MachineKind::Pci;
        let booted = |name: &str| matches!(&have.boot, BootConfig::Disk(boot) if boot.disk == name);
        for name in names(&have.disks, &want.disks, |disk| &disk.name) {
            if name == SEED_DISK {
                continue;
            }
            let find = |disks: &[DiskConfig]| disks.iter().find(|disk| disk.name == name).cloned();
            let (from, to) = (find(&have.disks), find(&want.disks));
            let field = format!("disks[{name}]");
            let live = plugs && !booted(&name);
            match (from, to) {
                (Some(from), Some(to)) if disk_identity(&from) == disk_identity(&to) => {
                    self.disk_settings(&field, &from, to);
                }
                (from, to) => {
                    let mut shown = [&from, &to].map(|disk| disk.as_ref().map(describe_disk));
                    if shown[0] == shown[1] {
                        shown = [&from, &to].map(|disk| disk.as_ref().map(describe_disk_in_full));
                    }
                    let [shown_from, shown_to] = shown;
                    let work = match (from, to) {
                        (None, Some(to)) => Work::AddDisk(to),
                        (Some(_), Some(to)) => Work::ReplaceDisk(to),
                        (_, None) => Work::Remove { device: name },
                    };
                    if live {
                        self.live(field, shown_from, shown_to, work);
                    } else {
                        self.stage(field, shown_from, shown_to);
                    }
                }
            }
        }
    }

    fn disk_settings(&mut self, field: &str, from: &DiskConfig, to: DiskConfig) {
        self.stage(format!("{field}.cache"), word(&from.cache), word(&to.cache));
        self.stage(format!("{field}.queues"), from.queues.to_string(), to.queues.to_string());
        if from.limits != to.limits {
            let [shown_from, shown_to] =
                [from.limits, to.limits].map(|limits| describe_limits(limits, "operations"));
            let work = Work::DiskLimits { disk: to.name, limits: to.limits };
            self.live(format!("{field}.limits"), shown_from, shown_to, work);
        }
    }

    fn nics(&mut self, have: &VmConfig, want: &VmConfig) {
        let plugs = have.machine == MachineKind::Pci;
        for name in names(&have.nics, &want.nics, |nic| &nic.name) {
            let find = |nics: &[NicConfig]| nics.iter().find(|nic| nic.name == name).cloned();
            let (from, to) = (find(&have.nics), find(&want.nics));
            let field = format!("interfaces[{name}]");
            match (from, to) {
                (Some(from), Some(to)) if from.mac_address == to.mac_address => {
                    self.nic_settings(&field, &from, to);
                }
                (from, to) => {
                    let [shown_from, shown_to] =
                        [&from, &to].map(|nic| nic.as_ref().map(|nic| nic.mac_address.clone()));
                    let work = match (from, to) {
                        (None, Some(to)) => Work::AddNic(to),
                        (Some(_), Some(to)) => Work::ReplaceNic(to),
                        (_, None) => Work::Remove { device: name },
                    };
                    if plugs {
                        self.live(field, shown_from, shown_to, work);
                    } else {
                        self.stage(field, shown_from, shown_to);
                    }
                }
            }
        }
    }

    fn nic_settings(&mut self, field: &str, from: &NicConfig, to: NicConfig) {
        self.stage(format!("{field}.mtu"), from.mtu.to_string(), to.mtu.to_string());
        self.stage(format!("{field}.queues"), from.queue_pairs.to_string(), to.queue_pairs.to_string());
        if from.link_up != to.link_up {
            let work = Work::Carrier { nic: to.name.clone(), up: to.link_up };
            let [shown_from, shown_to] = [from.link_up, to.link_up].map(|up| Some(up.to_string()));
            self.live(format!("{field}.linkUp"), shown_from, shown_to, work);
        }
        let [old, new] = [from, &to].map(|nic| (nic.receive_limits, nic.transmit_limits));
        if old != new {
            let (receive, transmit) = new;
            let work = Work::NicLimits { nic: to.name, receive, transmit };
            let [shown_from, shown_to] = [old, new].map(describe_directions);
            self.live(format!("{field}.limits"), shown_from, shown_to, work);
        }
    }

    fn seed(&mut self, have: &VmConfig, want: &VmConfig) {
        let [from, to] = [have, want].map(|config| {
            let seed = config.disks.iter().find(|disk| disk.name == SEED_DISK)?;
            Some(seed.path.strip_prefix(SEED_PATH).unwrap_or(&seed.path).to_owned())
        });
        if from != to {
            self.seed = Some(FieldChange { field: "cloudInit".into(), from, to, impact: Impact::Staged });
        }
    }

    fn order(&mut self, have: &VmConfig, want: &VmConfig) {
        let order = |config: &VmConfig, other: &VmConfig| -> Vec<String> {
            let disks = config.disks.iter().map(|disk| &disk.name).filter(|name| **name != SEED_DISK);
            let disks = disks.filter(|name| other.disks.iter().any(|disk| disk.name == **name));
            let nics = config.nics.iter().map(|nic| &nic.name);
            let nics = nics.filter(|name| other.nics.iter().any(|nic| nic.name == **name));
            disks.chain(nics).cloned().collect()
        };
        let (from, to) = (order(have, want), order(want, have));
        if from == to {
            return;
        }
        let [from, to] = [from, to].map(|names| Some(names.join(", ")));
        let field = "devices".to_owned();
        match have.machine {
            MachineKind::Micro => self.stage(field, from, to),
            MachineKind::Pci => {
                self.order = Some(FieldChange { field, from, to, impact: Impact::Staged });
            }
        }
    }
}

/// What a process that runs this comes to be at its next start, in the manifest's words.
pub fn staged(have: &VmConfig, want: &VmConfig) -> Vec<FieldChange> {
    let changes = Changes::between(have, want);
    changes.staged.into_iter().chain(changes.seed).collect()
}

/// What can't change without another device.
fn disk_identity(disk: &DiskConfig) -> impl PartialEq + '_ {
    (&disk.path, disk.format, disk.read_only, &disk.backing)
}

fn describe_disk(disk: &DiskConfig) -> String {
    format!("{}{}", disk.path, if disk.read_only { " (read-only)" } else { "" })
}

fn describe_disk_in_full(disk: &DiskConfig) -> String {
    let backing: Vec<&str> = disk.backing.iter().map(|backing| backing.path.as_str()).collect();
    let on = if backing.is_empty() { String::new() } else { format!(" on {}", backing.join(" on ")) };
    format!("{} {}{on}", word(&disk.format), describe_disk(disk))
}

/// The names of both, sorted, each once.
fn names<T>(have: &[T], want: &[T], name: impl Fn(&T) -> &String) -> Vec<String> {
    let mut names: Vec<String> = have.iter().chain(want).map(|device| name(device).clone()).collect();
    names.sort_unstable();
    names.dedup();
    names
}

fn boot_fields(boot: &BootConfig) -> [(&'static str, Option<String>); 6] {
    let (kernel, disk) = match boot {
        BootConfig::Kernel(boot) => (Some(boot), None),
        BootConfig::Disk(boot) => (None, Some(boot)),
    };
    [
        ("boot.kernel", kernel.map(|boot| boot.kernel_path.clone())),
        ("boot.initrd", kernel.and_then(|boot| boot.initrd_path.clone())),
        ("boot.cmdline", kernel.map(|boot| boot.cmdline.clone())),
        ("boot.disk", disk.map(|boot| boot.disk.clone())),
        ("boot.entry", disk.and_then(|boot| boot.entry.clone())),
        ("boot.append", disk.map(|boot| boot.append.clone())),
    ]
}

/// `0,1 2`: the CPUs of each vCPU.
pub fn pinning(cpus: &[Vec<u16>]) -> Option<String> {
    let one = |cpus: &Vec<u16>| cpus.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    (!cpus.is_empty()).then(|| cpus.iter().map(one).collect::<Vec<_>>().join(" "))
}

/// A closed choice, as manifests spell it.
pub fn word<T: Serialize>(choice: &T) -> String {
    match serde_json::to_value(choice) {
        Ok(serde_json::Value::String(word)) => word,
        other => format!("{other:?}"),
    }
}

fn bytes_per_second(bucket: Bucket) -> String {
    with_burst(format!("{}/s", ByteSize(bucket.per_second)), bucket, ByteSize(bucket.burst).to_string())
}

fn with_burst(rate: String, bucket: Bucket, burst: String) -> String {
    if bucket.burst == bucket.per_second { rate } else { format!("{rate} (burst {burst})") }
}

/// `50Mi/s, 1000 operations/s (burst 5000)`; `None`: no limits.
pub fn describe_limits(limits: Limits, operations: &str) -> Option<String> {
    let operations = |bucket: Bucket| {
        with_burst(format!("{} {operations}/s", bucket.per_second), bucket, bucket.burst.to_string())
    };
    let parts = [limits.bandwidth.map(bytes_per_second), limits.operations.map(operations)];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    (!parts.is_empty()).then(|| parts.join(", "))
}

/// `receive 50Mi/s; transmit 1000 packets/s`; `None`: no limits.
pub fn describe_directions((receive, transmit): (Limits, Limits)) -> Option<String> {
    let parts = [("receive", receive), ("transmit", transmit)];
    let parts: Vec<String> = parts
        .into_iter()
        .filter_map(|(direction, limits)| {
            Some(format!("{direction} {}", describe_limits(limits, "packets")?))
        })
        .collect();
    (!parts.is_empty()).then(|| parts.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::config::DiskFormat;

    fn config(machine: MachineKind) -> VmConfig {
        let mut config = VmConfig::new("web", "m", 1 << 30, BootConfig::kernel("/k", None, ""));
        config.machine = machine;
        config.disks.push(DiskConfig::new("root", "/root", DiskFormat::Qcow2));
        config.nics.push(NicConfig::new("net0", "web.net0", "52:54:00:00:00:01"));
        config
    }

    /// `staged: …` and `live: …` of what `edit` changes.
    fn check(machine: MachineKind, edit: impl Fn(&mut VmConfig), expected: &[&str]) {
        let have = config(machine);
        let mut want = have.clone();
        edit(&mut want);
        let changes = Changes::between(&have, &want);
        let text = |how: &str, change: &FieldChange| {
            let [from, to] = [&change.from, &change.to].map(|value| value.as_deref().unwrap_or("none"));
            format!("{how}: {} {from} → {to}", change.field)
        };
        let mut found: Vec<String> = changes.staged.iter().map(|change| text("staged", change)).collect();
        found.extend(changes.live.iter().map(|change| text("live", &change.shown)));
        found.extend(changes.order.iter().map(|change| text("order", change)));
        assert_eq!(found, expected);
    }

    #[test]
    fn devices_come_and_go_where_there_is_a_bus() {
        let more = |config: &mut VmConfig| {
            config.disks.push(DiskConfig::new("data", "/data", DiskFormat::Raw));
            config.nics.clear();
        };
        let (disk, nic) = ("disks[data] none → /data", "interfaces[net0] 52:54:00:00:00:01 → none");
        check(MachineKind::Pci, more, &[&format!("live: {disk}"), &format!("live: {nic}")]);
        check(MachineKind::Micro, more, &[&format!("staged: {disk}"), &format!("staged: {nic}")]);
        let read_only = |config: &mut VmConfig| config.disks[0].read_only = true;
        check(MachineKind::Pci, read_only, &["live: disks[root] /root → /root (read-only)"]);
        let rebased = |config: &mut VmConfig| {
            let backing =
                crate::vmm::config::BackingConfig { path: "/image".into(), format: DiskFormat::Raw };
            config.disks[0].backing.push(backing);
        };
        check(MachineKind::Micro, rebased, &["staged: disks[root] qcow2 /root → qcow2 /root on /image"]);
    }

    #[test]
    fn the_disk_that_was_booted_from_stays() {
        let mut have = config(MachineKind::Pci);
        let boot = crate::vmm::config::DiskBoot { disk: "root".into(), entry: None, append: String::new() };
        have.boot = BootConfig::Disk(boot);
        let mut want = have.clone();
        want.disks[0].path = "/other".into();
        let changes = Changes::between(&have, &want);
        assert_eq!((changes.staged.len(), changes.live.len()), (1, 0));
    }

    #[test]
    fn settings_are_named_one_by_one() {
        let settings = |config: &mut VmConfig| {
            config.disks[0].queues = 2;
            config.disks[0].limits.bandwidth = Some(Bucket { per_second: 50 << 20, burst: 100 << 20 });
            config.nics[0].link_up = false;
            config.nics[0].transmit_limits.operations = Some(Bucket { per_second: 1000, burst: 1000 });
            config.cpu.pinning = vec![vec![0, 1]];
            config.balloon =
                Some(BalloonConfig { target_bytes: 0, free_page_reporting: true, deflate_on_oom: true });
        };
        let expected = [
            "staged: cpu.pinning none → 0,1",
            "staged: balloon none → present",
            "staged: disks[root].queues 1 → 2",
            "live: disks[root].limits none → 50Mi/s (burst 100Mi)",
            "live: interfaces[net0].linkUp true → false",
            "live: interfaces[net0].limits none → transmit 1000 packets/s",
        ];
        check(MachineKind::Micro, settings, &expected);
        check(MachineKind::Pci, settings, &expected);
    }

    #[test]
    fn an_order_is_nothing_that_a_running_guest_sees() {
        let mut have = config(MachineKind::Pci);
        have.disks.push(DiskConfig::new("data", "/data", DiskFormat::Raw));
        let mut want = have.clone();
        want.disks.reverse();
        let changes = Changes::between(&have, &want);
        assert_eq!((changes.staged.len(), changes.live.len()), (0, 0));
        assert_eq!(changes.order.unwrap().to.unwrap(), "data, root, net0");
    }
}
