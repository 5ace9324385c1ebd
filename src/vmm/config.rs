//! What one VM process runs. This is the whole truth about a running VM: the process answers
//! `get` with it, and the reconciler compares it with what the manifests declare.
//!
//! Nothing here is opened by path: paths are kept to be shown and compared, and the open files
//! travel beside the configuration as descriptors (see [`crate::vmm::protocol::FdRole`]).
//!
//! A newer `vmctl` reads the configuration of an older process: a field that came later has a default,
//! and the default says what older processes did.

use serde::{Deserialize, Serialize};

/// Most vCPUs a VM may have.
pub const VCPUS_MAX: u8 = 16;
/// Most guest memory, in bytes.
pub const MEMORY_BYTES_MAX: u64 = 64 << 30;
/// Least guest memory, in bytes.
pub const MEMORY_BYTES_MIN: u64 = 16 << 20;
/// Most disks and NICs of a [`MachineKind::Micro`]: each takes one of its virtio-mmio slots.
pub const MICRO_DEVICES_MAX: usize = 12;
/// Most disks and NICs of a [`MachineKind::Pci`]: each takes one device number of the one bus.
pub const DEVICES_MAX: usize = 26;
/// Most queues of a disk, and most queue pairs of a NIC.
pub const QUEUES_MAX: u16 = 8;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// The VM's object name.
    pub name: String,
    /// Whose VM this is: the same mark that its links and files carry (`vmctl:<set>:<Kind>/<name>`).
    pub mark: String,
    #[serde(default = "MachineKind::before_pci")]
    pub machine: MachineKind,
    /// 1 to [`VCPUS_MAX`].
    pub vcpus: u8,
    #[serde(default)]
    pub cpu: CpuConfig,
    /// Between [`MEMORY_BYTES_MIN`] and [`MEMORY_BYTES_MAX`], a multiple of 1 MiB.
    pub memory_bytes: u64,
    #[serde(default)]
    pub memory: MemoryConfig,
    pub boot: BootConfig,
    pub disks: Vec<DiskConfig>,
    pub nics: Vec<NicConfig>,
    #[serde(default)]
    pub balloon: Option<BalloonConfig>,
    #[serde(default)]
    pub vsock: Option<VsockConfig>,
    #[serde(default)]
    pub entropy: EntropyConfig,
    /// VMGenID: 128 bits that stay the same as long as the guest's state isn't cloned or taken back.
    #[serde(default)]
    pub generation_id: Option<String>,
}

impl VmConfig {
    /// A machine with one vCPU and no devices.
    pub fn new(
        name: impl Into<String>,
        mark: impl Into<String>,
        memory_bytes: u64,
        boot: BootConfig,
    ) -> Self {
        Self {
            name: name.into(),
            mark: mark.into(),
            machine: MachineKind::default(),
            vcpus: 1,
            cpu: CpuConfig::default(),
            memory_bytes,
            memory: MemoryConfig::default(),
            boot,
            disks: Vec::new(),
            nics: Vec::new(),
            balloon: None,
            vsock: None,
            entropy: EntropyConfig::default(),
            generation_id: None,
        }
    }
}

/// How the guest finds its devices.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MachineKind {
    /// virtio over PCI, MSI-X, hot-plug.
    #[default]
    Pci,
    /// virtio over MMIO, no bus: the smallest machine, whose devices never change.
    Micro,
}

impl MachineKind {
    /// What processes ran that didn't say.
    fn before_pci() -> Self {
        Self::Micro
    }

    /// Most disks and NICs together.
    pub fn devices_max(self) -> usize {
        match self {
            Self::Pci => DEVICES_MAX,
            Self::Micro => MICRO_DEVICES_MAX,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuConfig {
    pub model: CpuModel,
    /// Default: one socket with one thread per core.
    pub topology: Option<CpuTopology>,
    /// The host's CPUs that each vCPU may run on, in the order of the vCPUs. Empty: all.
    pub pinning: Vec<Vec<u16>>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CpuModel {
    /// What this host's processor and KVM can do.
    #[default]
    #[serde(rename = "host")]
    Host,
    /// The microarchitecture levels of the x86-64 psABI, and nothing above them.
    #[serde(rename = "x86-64-v2")]
    X86_64V2,
    #[serde(rename = "x86-64-v3")]
    X86_64V3,
}

/// The product is the number of vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuTopology {
    pub sockets: u8,
    pub cores: u8,
    pub threads: u8,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryConfig {
    /// What guest memory is made of.
    pub pages: PageKind,
    /// Equal pages of this guest and others may be shared (`MADV_MERGEABLE`).
    pub ksm: bool,
    pub transparent_hugepages: TransparentHugepages,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PageKind {
    #[default]
    #[serde(rename = "4Ki")]
    Small,
    /// From the host's reserved pool of hugetlbfs pages.
    #[serde(rename = "2Mi")]
    Huge2Mi,
    #[serde(rename = "1Gi")]
    Huge1Gi,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum TransparentHugepages {
    /// As the host's setting says.
    #[default]
    Host,
    Always,
    Never,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum BootConfig {
    Kernel(KernelBoot),
    Disk(DiskBoot),
}

/// Direct kernel boot. The kernel may be a bzImage or an uncompressed vmlinux with a PVH note.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelBoot {
    pub kernel_path: String,
    pub initrd_path: Option<String>,
    pub cmdline: String,
}

/// Kernel, initrd and command line are found on one of the disks, without firmware.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskBoot {
    /// The name of a disk of this VM.
    pub disk: String,
    /// Which of the boot entries, by title, id or version. Default: the one that the disk's own
    /// configuration names.
    pub entry: Option<String>,
    /// Appended to the entry's command line.
    pub append: String,
}

impl BootConfig {
    pub fn kernel(
        kernel_path: impl Into<String>,
        initrd_path: Option<String>,
        cmdline: impl Into<String>,
    ) -> Self {
        Self::Kernel(KernelBoot { kernel_path: kernel_path.into(), initrd_path, cmdline: cmdline.into() })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    Raw,
    Qcow2,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Unique among the VM's disks and NICs; also the virtio-blk serial (its first 20 bytes).
    pub name: String,
    pub path: String,
    pub format: DiskFormat,
    pub read_only: bool,
    /// The backing chain, nearest first. Each has its descriptor; nothing is opened implicitly.
    pub backing: Vec<BackingConfig>,
    #[serde(default)]
    pub cache: CacheMode,
    /// 1 to [`QUEUES_MAX`].
    #[serde(default = "one")]
    pub queues: u16,
    #[serde(default)]
    pub limits: Limits,
}

impl DiskConfig {
    pub fn new(name: impl Into<String>, path: impl Into<String>, format: DiskFormat) -> Self {
        Self {
            name: name.into(),
            path: path.into(),
            format,
            read_only: false,
            backing: Vec::new(),
            cache: CacheMode::default(),
            queues: 1,
            limits: Limits::default(),
        }
    }
}

/// Where a disk's data may linger.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// In the host's page cache until the guest flushes.
    #[default]
    Writeback,
    /// Past the host's page cache (O_DIRECT); still volatile until the guest flushes.
    Direct,
    /// Every write is on stable storage before the guest hears of it.
    Writethrough,
    /// Flushes are ignored: for data that a crash of the host may take.
    Unsafe,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackingConfig {
    pub path: String,
    pub format: DiskFormat,
}

/// Token buckets. `None`: no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// In bytes.
    pub bandwidth: Option<Bucket>,
    /// In requests of a disk, packets of a NIC.
    pub operations: Option<Bucket>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Bucket {
    /// At least 1.
    pub per_second: u64,
    /// What may pass at once after a rest, at least 1.
    pub burst: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NicConfig {
    /// Unique among the VM's disks and NICs.
    pub name: String,
    /// The tap's name on the host, to be shown and compared.
    pub tap: String,
    /// Lower-case, colon-separated.
    pub mac_address: String,
    /// What the guest is told (VIRTIO_NET_F_MTU), in bytes.
    pub mtu: u16,
    /// 1 to [`QUEUES_MAX`]. The tap is then a multi-queue one, with a descriptor for each pair.
    #[serde(default = "one")]
    pub queue_pairs: u16,
    /// Whether the guest sees a carrier, as far as it is for us to say.
    #[serde(default = "yes")]
    pub link_up: bool,
    /// From the host to the guest.
    #[serde(default)]
    pub receive_limits: Limits,
    /// From the guest to the host.
    #[serde(default)]
    pub transmit_limits: Limits,
}

impl NicConfig {
    pub fn new(name: impl Into<String>, tap: impl Into<String>, mac_address: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            tap: tap.into(),
            mac_address: mac_address.into(),
            mtu: 1500,
            queue_pairs: 1,
            link_up: true,
            receive_limits: Limits::default(),
            transmit_limits: Limits::default(),
        }
    }
}

/// virtio-balloon: memory that the guest gives back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonConfig {
    /// What the balloon is to hold at the start, in bytes, a multiple of 4 KiB. It may be changed.
    pub target_bytes: u64,
    /// The guest reports pages that it doesn't use, and the host gets them back.
    pub free_page_reporting: bool,
    /// The balloon gives way before the guest's kernel kills a process for want of memory.
    pub deflate_on_oom: bool,
}

/// virtio-vsock, between the guest and Unix sockets of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    /// The guest's context id, 3 and more.
    pub cid: u32,
}

/// virtio-rng. Every machine has one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EntropyConfig {
    /// In bytes.
    pub limit: Option<Bucket>,
}

fn one() -> u16 {
    1
}

fn yes() -> bool {
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a process before PCI answered with, and what definitions of that time hold.
    #[test]
    fn an_older_configuration_is_understood() {
        let old = r#"{
            "name": "web", "mark": "vmctl:default:VirtualMachine/web", "vcpus": 1, "memory_bytes": 33554432,
            "boot": {"kernel_path": "/k", "initrd_path": null, "cmdline": "quiet"},
            "disks": [{"name": "d", "path": "/d", "format": "raw", "read_only": false, "backing": []}],
            "nics": [{"name": "n", "tap": "t", "mac_address": "52:54:00:00:00:01", "mtu": 1500}]
        }"#;
        let config: VmConfig = serde_json::from_str(old).unwrap();
        assert_eq!(config.machine, MachineKind::Micro);
        assert_eq!(config.boot, BootConfig::kernel("/k", None, "quiet"));
        assert_eq!(config.disks, [DiskConfig::new("d", "/d", DiskFormat::Raw)]);
        assert_eq!(config.nics, [NicConfig::new("n", "t", "52:54:00:00:00:01")]);
        let again: VmConfig = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
        assert_eq!(again, config);
    }
}
