//! What the host has, as one value. Plain data: names and no kernel handles, so that it can be
//! made by hand in a test, hashed, and compared.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::error::ObserveError;
pub use super::facts::{
    BalloonRules, HostFacts, HostSetting, HugePages, Ksm, KsmRules, PolicyRules, Previous, RecordedPolicy,
};
pub use super::limits::ProcessLimits;
pub use super::lvm::{DeviceFacts, GroupFacts, LvmPlace, LvmPool, PoolPlace, ThinFacts};
pub use super::nftables::{BaseChain, Chain, Family, Rule, Set, Table, TableId, normalise};
use crate::name::{IpPrefix, LinkName, MacAddress, Mark, ObjectName, VlanId};
use crate::vmm::config::{DiskFormat, VmConfig};
use crate::vmm::protocol::{Condition, ConditionKind, ExitRecord, Phase};

/// Seen, or not to be seen. A missing object is `Ok` without it.
pub type Observed<T> = Result<T, ObserveError>;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// CPUs, memory, and the policy for both.
    pub host: Observed<HostFacts>,
    pub links: Observed<BTreeMap<LinkName, Link>>,
    /// The nftables tables that are ours by their names, and no others.
    pub tables: Observed<BTreeMap<TableId, Table>>,
    pub forwarding: Observed<BTreeMap<IpFamily, Forwarding>>,
    /// The DHCP and DNS service of each network that has one.
    pub services: Observed<BTreeMap<Mark, Service>>,
    /// Every pool in the scope, and every pool that is registered in the state directory.
    pub pools: BTreeMap<ObjectName, Observed<Pool>>,
    /// Every VM that is defined or runs.
    pub vms: Observed<BTreeMap<ObjectName, Vm>>,
    /// Of the files in the scope: those that are there.
    pub files: BTreeMap<PathBuf, Observed<FileFacts>>,
    /// Of the capabilities in the scope: those that this host lacks, and how that showed.
    pub lacks: BTreeMap<Capability, String>,
}

/// Begins the words of how it showed that a host lacks something for this user alone.
pub const ONLY_ROOT: &str = "this user may not";

/// An ability that not every host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Capability {
    Kvm,
    Bridge,
    Vlan,
    VlanFiltering,
    Tun,
    Nftables,
    Dnsmasq,
}

impl Capability {
    pub const ALL: [Capability; 7] =
        [Self::Kvm, Self::Bridge, Self::Vlan, Self::VlanFiltering, Self::Tun, Self::Nftables, Self::Dnsmasq];

    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "KVM (/dev/kvm)",
            Self::Bridge => "Linux bridges (module bridge)",
            Self::Vlan => "802.1Q VLANs (module 8021q)",
            Self::VlanFiltering => "VLAN filtering on bridges (CONFIG_BRIDGE_VLAN_FILTERING)",
            Self::Tun => "tap devices (module tun, /dev/net/tun)",
            Self::Dnsmasq => "DHCP and DNS for networks (the program `dnsmasq`)",
            Self::Nftables => "nftables (the program `nft`, module nf_tables)",
        }
    }

    /// What a person can do about its absence, which showed like this.
    pub fn remedy_for(self, how_it_showed: &str) -> &'static str {
        match self {
            Self::Kvm if how_it_showed.starts_with(ONLY_ROOT) => {
                "run vmctl as root, or have the user added to the group that may open /dev/kvm (Debian: kvm)"
            }
            _ if how_it_showed.starts_with(ONLY_ROOT) => {
                "run vmctl as root; another user's VMs have no NICs of the host"
            }
            _ => self.remedy(),
        }
    }

    /// The same where it may be there, and nobody could say.
    pub fn remedy(self) -> &'static str {
        match self {
            Self::Kvm => {
                "enable virtualisation in the firmware (or nested virtualisation), then `modprobe kvm_intel` or `modprobe kvm_amd`"
            }
            Self::Bridge => {
                "`modprobe bridge`; where there is no such module, install the distribution's full kernel"
            }
            Self::Vlan => {
                "`modprobe 8021q`; where there is no such module, install the distribution's full kernel"
            }
            Self::VlanFiltering => {
                "boot a kernel with CONFIG_BRIDGE_VLAN_FILTERING (every distribution's), or use Vlan objects with a bridge each"
            }
            Self::Tun => "`modprobe tun`; in a container, pass /dev/net/tun in",
            Self::Dnsmasq => {
                "install the package `dnsmasq-base` (Debian: `apt-get install dnsmasq-base`); a network without `dhcp`, `dns` and router advertisements needs none"
            }
            Self::Nftables => {
                "install the package `nftables` (Debian: `apt-get install nftables`; it need not be enabled)"
            }
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Link {
    pub mac_address: Option<MacAddress>,
    pub mtu: u32,
    /// Set up by its administrator (`IFF_UP`), with or without a carrier.
    pub up: bool,
    /// `ifalias`, verbatim.
    pub alias: Option<String>,
    /// The bridge (or other master) that it is a port of.
    pub master: Option<LinkName>,
    /// The link below (`eth0` of `eth0.10`).
    pub parent: Option<LinkName>,
    pub kind: LinkKind,
    /// Its attributes as a bridge port; only where the master is a bridge.
    pub port: Option<PortFacts>,
    pub addresses: BTreeSet<IpPrefix>,
}

impl Link {
    /// Our mark, if it carries one.
    pub fn mark(&self) -> Option<Mark> {
        self.alias.as_deref()?.parse().ok()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LinkKind {
    Bridge(BridgeFacts),
    Vlan {
        id: VlanId,
        protocol: VlanProtocol,
    },
    Tap {
        /// It may have several queues.
        multi_queue: bool,
    },
    /// A physical device, or any other kind (`veth`, `bond`, `dummy`…), by the kernel's name for it.
    Other(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VlanProtocol {
    #[serde(rename = "802.1Q")]
    Ieee8021Q,
    #[serde(rename = "802.1ad")]
    Ieee8021Ad,
}

/// A bridge's own settings. Also what a bridge is created with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BridgeFacts {
    pub stp: bool,
    pub forward_delay_seconds: u32,
    pub ageing_seconds: u32,
    pub vlan_filtering: bool,
    /// 0: ports get no VLAN by default.
    pub default_pvid: u16,
    pub multicast_snooping: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortFacts {
    pub isolated: bool,
    pub hairpin: bool,
    pub bpdu_guard: bool,
    pub learning: bool,
    pub unicast_flood: bool,
    /// VLAN membership; empty where the bridge doesn't filter.
    pub vlans: BTreeMap<VlanId, VlanFlags>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VlanFlags {
    pub pvid: bool,
    pub untagged: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IpFamily {
    Ipv4,
    Ipv6,
}

impl IpFamily {
    pub const ALL: [IpFamily; 2] = [Self::Ipv4, Self::Ipv6];

    pub fn of(address: std::net::IpAddr) -> Self {
        if address.is_ipv4() { Self::Ipv4 } else { Self::Ipv6 }
    }
}

impl std::fmt::Display for IpFamily {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
        })
    }
}

/// Whether this host forwards packets between its links.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Forwarding {
    pub on: bool,
    /// For whom we hold it on. When the last of them goes it becomes what it was.
    pub users: BTreeSet<Mark>,
    /// The host's default route is by router advertisements to this link, which a router doesn't heed: to turn
    /// forwarding on would cut the host off.
    pub default_route_by_ra: Option<LinkName>,
}

/// DHCP, DNS and router advertisements of a network.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// What its process was given. `None`: it was left half made, half changed or half removed.
    pub config: Option<ServiceConfig>,
    /// `None`: it doesn't run, or listens on a bridge that is no more.
    pub pid: Option<i32>,
    pub leases: Vec<Lease>,
}

/// What a dnsmasq is given. The first takes a new process; the others it reads again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceConfig {
    pub bridge: LinkName,
    /// Its configuration, without paths.
    pub main: String,
    /// Which guest gets which address, one a line: `52:54:00:12:34:56,192.168.122.10,web`.
    pub hosts: String,
    /// Names in the manner of /etc/hosts.
    pub names: String,
}

/// An address that a guest has for a time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// 0: never.
    pub expires_unix_seconds: u64,
    /// `None`: not told with DHCPv6, which knows its clients by other names.
    pub mac_address: Option<MacAddress>,
    pub address: std::net::IpAddr,
    pub host_name: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pool {
    /// The pool's directory; of a volume group `/dev/<group>`.
    pub path: PathBuf,
    /// `None`: the directory, the volume group or the thin pool is not there.
    pub directory: Option<PoolDirectory>,
    /// The set and object that registered this pool in the state directory.
    pub registered: Option<Mark>,
    /// What only a pool in a volume group has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lvm: Option<Box<LvmPool>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolDirectory {
    pub mark: Option<Mark>,
    pub capacity_bytes: u64,
    pub available_bytes: u64,
    /// Regular files directly in the directory, or the pool's logical volumes: volumes, and what others put
    /// there.
    pub files: BTreeMap<String, PoolFile>,
    /// Cached images: files in `.vmctl/images/`.
    pub images: BTreeMap<String, PoolFile>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PoolFile {
    pub mark: Option<Mark>,
    /// The mark that it carried before its manifest was removed and its data kept.
    pub retained: Option<Mark>,
    /// The file's length.
    pub size_bytes: u64,
    /// Blocks really in use.
    pub allocated_bytes: u64,
    /// What its first bytes say. A file that isn't qcow2 by its magic is `Raw`.
    pub header: ImageHeader,
    /// `Delete`, if a manifest with that policy was applied to it.
    pub reclaim_delete: bool,
    /// An image's verified digest, as stored when it was imported.
    pub sha256: Option<String>,
    /// What its first sectors say to who would boot from it. `None`: that can't be told by a glance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<BootFacts>,
    /// A logical volume whose maker died before it was whole: it is made anew.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub half_made: bool,
    /// A logical volume without a device: nothing can open it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub inactive: bool,
}

/// Whether there is anything to boot from: told by signatures alone, for what lies behind them is hostile.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BootFacts {
    pub signature: BootSignature,
    /// It begins with a file system of the kind that is booted from without a partition table (ext2/3/4).
    pub file_system: bool,
}

impl BootFacts {
    /// Of a volume of zeroes.
    pub const BLANK: Self = Self { signature: BootSignature::None, file_system: false };

    pub fn is_bootable(self) -> bool {
        self.signature != BootSignature::None || self.file_system
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BootSignature {
    /// The boot sector's 55 AA: a partition table, or the boot sector of a file system (FAT).
    Mbr,
    Gpt,
    None,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageHeader {
    pub format: DiskFormat,
    /// The size that a guest sees.
    pub virtual_size_bytes: u64,
    /// The backing file as written in the image.
    pub backing: Option<PathBuf>,
    pub encrypted: bool,
    /// External data file, dirty or corrupt bit, unknown incompatible feature: why it can't be used.
    pub unusable: Option<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vm {
    /// What `apply` left in the state directory; present for halted VMs too.
    pub definition: Option<VmDefinition>,
    /// What the VM process says of itself. An error: a process holds the socket and doesn't answer.
    pub process: Option<Observed<VmProcess>>,
    /// How the last process ended; `None` if it runs, never ran, or was killed.
    pub exit: Option<ExitRecord>,
    /// `vmctl stop` was the last word: it stays down until `vmctl start`.
    pub held: bool,
}

/// What a VM is defined as on this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmDefinition {
    pub mark: Mark,
    pub config: VmConfig,
    /// Of the taps, in the order of `config.nics`: the bridge each belongs to.
    pub bridges: Vec<LinkName>,
    /// Of the taps, in the same order: their VLANs on a bridge that filters, else empty.
    #[serde(default)]
    pub vlans: Vec<BTreeMap<VlanId, VlanFlags>>,
    #[serde(default)]
    pub cpu_share: CpuShare,
    pub run_strategy: RunStrategy,
    /// What its disk [`SEED_DISK`] is made of, anew at each start.
    #[serde(default)]
    pub seed: Option<Seed>,
}

/// The name of the disk that carries a cloud-init seed; nothing declared has it.
pub const SEED_DISK: &str = "cidata";
/// What the path of that disk begins with. It is no file of a pool: what follows changes with its content.
pub const SEED_PATH: &str = "cloud-init:";

/// A cloud-init seed for the data source NoCloud. Secrets are not in it: they are in the file that it names,
/// which is read when the seed is made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seed {
    pub meta_data: String,
    /// `None`: the guest configures its NICs as it sees fit.
    pub network_config: Option<String>,
    pub user_data: UserData,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum UserData {
    Text(String),
    File(PathBuf),
}

/// A VM's part of the host's CPU time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuShare {
    /// Against other VMs, 1 to 10000.
    pub weight: u16,
    /// Of one host CPU. `None`: no limit.
    pub quota_percent: Option<u16>,
}

impl Default for CpuShare {
    /// What the kernel gives a new control group.
    fn default() -> Self {
        Self { weight: 100, quota_percent: None }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub enum RunStrategy {
    /// Runs always: started again whenever it ends.
    #[default]
    Always,
    /// Doesn't run.
    Halted,
    /// Started again if it was killed or failed, not if the guest powered itself off.
    RerunOnFailure,
    /// `vmctl start` and `vmctl stop` decide.
    Manual,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmProcess {
    pub pid: i32,
    pub phase: Phase,
    pub uptime_ms: u64,
    pub reboots: u64,
    pub config: VmConfig,
    pub disk_capacity_bytes: Vec<u64>,
    /// What is not as it should be and lasts.
    pub conditions: Vec<Condition>,
    /// What its cgroup gives it. `None`: it has none of its own.
    pub cpu_share: Option<CpuShare>,
    /// What its cgroup lets it use. `None`: it has none of its own.
    #[serde(default)]
    pub limits: Option<ProcessLimits>,
    /// Its disks, or files that were its disks, lie in memory: their pages are charged to it and can't go.
    #[serde(default)]
    pub files_in_memory: bool,
}

impl VmProcess {
    /// Its condition of this kind about this device, if it has it.
    pub fn condition(&self, kind: ConditionKind, device: Option<&str>) -> Option<&Condition> {
        self.conditions.iter().find(|condition| {
            condition.kind == kind && (device.is_none() || condition.device.as_deref() == device)
        })
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileFacts {
    pub size_bytes: u64,
    pub modified_unix_ns: i128,
    pub header: ImageHeader,
    /// What else its first bytes say.
    #[serde(default)]
    pub kind: FileKind,
}

/// What a file is besides an image that a VM could use. Good for nothing but to refuse what is declared to be
/// something else.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileKind {
    #[default]
    Plain,
    Gzip,
    Xz,
    Zstd,
    Vmdk(Result<DiskFacts, String>),
    /// The disks of an OVA, or why they can't be told.
    Ova(Result<Vec<DiskFacts>, String>),
}

/// A disk in a file of another kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskFacts {
    pub name: String,
    pub capacity_bytes: u64,
    /// Why it can't be imported.
    pub unusable: Option<String>,
}

impl Pool {
    pub fn place(&self) -> PoolPlace {
        match &self.lvm {
            Some(lvm) => PoolPlace::Lvm(lvm.place.clone()),
            None => PoolPlace::Directory(self.path.clone()),
        }
    }

    /// Where a volume of this pool lives.
    pub fn volume_file(name: &ObjectName, format: DiskFormat) -> String {
        match format {
            DiskFormat::Raw => format!("{name}.raw"),
            DiskFormat::Qcow2 => format!("{name}.qcow2"),
        }
    }

    /// Where a cached image lives, relative to the pool's directory.
    pub fn image_directory(path: &Path) -> PathBuf {
        path.join(".vmctl/images")
    }
}
