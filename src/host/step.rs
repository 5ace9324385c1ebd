//! What can be done to a host: closed values that leave no choice to who runs them.
//!
//! A step names objects and never holds an ifindex, a pid or a descriptor. Every step is safe to
//! repeat and safe to be killed in: what is half-made carries our mark, or is not there at all.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Lane;
use super::limits::ProcessLimits;
pub use super::lvm::{LogicalContent, LvmStep, NewLogicalVolume, NewLvmPool};
use super::snapshot::{
    BridgeFacts, CpuShare, HostSetting, IpFamily, PolicyRules, PortFacts, ServiceConfig, Table, TableId,
    VlanProtocol, VmDefinition,
};
use crate::name::{IpPrefix, LinkName, MacAddress, Mark, ObjectName, Sha256, VlanId};
use crate::vmm::config::{DiskConfig, DiskFormat, Limits, NicConfig};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Step {
    /// The link and its mark come into being at once: a crash leaves both or neither.
    CreateLink(NewLink),
    /// The link must carry this mark, or the step fails.
    DeleteLink {
        link: LinkName,
        mark: Mark,
    },
    /// Writes the mark (`ifalias`) on a link that has none.
    MarkLink {
        link: LinkName,
        mark: Mark,
    },
    /// Removes the mark, if it is this one.
    UnmarkLink {
        link: LinkName,
        mark: Mark,
    },
    SetLink {
        link: LinkName,
        change: LinkChange,
    },
    AddAddress {
        link: LinkName,
        address: IpPrefix,
    },
    RemoveAddress {
        link: LinkName,
        address: IpPrefix,
    },

    /// Makes an nftables table exactly this, in one transaction, which writes only what differs.
    SetTable {
        id: TableId,
        table: Table,
    },
    DeleteTable {
        id: TableId,
    },
    /// Makes the network's dnsmasq run with this: started anew only for what it can't read again.
    SetService {
        mark: Mark,
        config: ServiceConfig,
    },
    RemoveService {
        mark: Mark,
    },
    /// Turns forwarding on for this object, and remembers how it was before the first.
    RequireForwarding {
        family: IpFamily,
        mark: Mark,
    },
    /// This object needs it no more: after the last one it becomes what it was.
    ReleaseForwarding {
        family: IpFamily,
        mark: Mark,
    },

    /// Makes the directory (and `.vmctl/` in it), marks it and registers it in the state directory.
    CreatePool {
        name: ObjectName,
        path: PathBuf,
        mark: Mark,
    },
    /// Takes the mark and the registration away; the directory and its files stay.
    ForgetPool {
        name: ObjectName,
        path: PathBuf,
        mark: Mark,
    },

    /// Copies into the pool's cache under the digest's name, verifying while copying.
    ImportImage {
        image: ImageFile,
        source: ImageSource,
        sha256: Sha256,
        mark: Mark,
    },
    /// Removes a cached image that carries this mark.
    DeleteImage {
        image: ImageFile,
        mark: Mark,
    },

    /// Makes the volume under a temporary name, marks it, and renames it into place.
    CreateVolume(NewVolume),
    /// Grows an image that no process uses. Never shrinks.
    GrowVolume {
        pool_path: PathBuf,
        file: String,
        format: DiskFormat,
        capacity_bytes: u64,
        mark: Mark,
    },
    /// Records on the file what removal may do.
    SetReclaim {
        pool_path: PathBuf,
        file: String,
        mark: Mark,
        delete: bool,
    },
    /// Marks an unmarked (or retained) file that already is what is declared.
    AdoptVolume {
        pool_path: PathBuf,
        file: String,
        mark: Mark,
        reclaim_delete: bool,
    },
    /// Turns the mark into a `retained` one; the data stays where it is.
    RetainVolume {
        pool_path: PathBuf,
        file: String,
        mark: Mark,
    },
    /// Moves the file to the pool's trash.
    TrashVolume {
        pool_path: PathBuf,
        file: String,
        mark: Mark,
    },
    /// A retained or marked image file becomes nobody's; for images that an overlay still needs.
    RetainImage {
        image: ImageFile,
        mark: Mark,
    },
    /// What is done to volume groups and logical volumes.
    Lvm(LvmStep),

    /// Writes the definition to the state directory.
    DefineVm {
        vm: ObjectName,
        definition: Box<VmDefinition>,
    },
    UndefineVm {
        vm: ObjectName,
        mark: Mark,
    },
    /// Opens the files and taps, locks the disks, and starts a VM process that outlives us.
    StartVm {
        vm: ObjectName,
        definition: Box<VmDefinition>,
    },
    StopVm {
        vm: ObjectName,
        mark: Mark,
        how: StopHow,
    },
    ResizeDisk {
        vm: ObjectName,
        mark: Mark,
        disk: String,
        capacity_bytes: u64,
    },
    /// Hands the VM process a fresh descriptor of the NIC's tap (the old device was deleted).
    ReplaceTap {
        vm: ObjectName,
        mark: Mark,
        nic: String,
        tap: LinkName,
    },
    /// Opens and locks the disk's files as [`Step::StartVm`] does, and plugs it into the running VM.
    AddDisk {
        vm: ObjectName,
        mark: Mark,
        disk: Box<DiskConfig>,
    },
    /// Plugs a NIC into the running VM; its tap must be there.
    AddNic {
        vm: ObjectName,
        mark: Mark,
        nic: Box<NicConfig>,
    },
    /// Asks the guest to let go of a disk or a NIC, and waits until it has. Fails if it doesn't: it may be
    /// asked again.
    RemoveDevice {
        vm: ObjectName,
        mark: Mark,
        device: String,
    },
    SetDiskLimits {
        vm: ObjectName,
        mark: Mark,
        disk: String,
        limits: Limits,
    },
    SetNicLimits {
        vm: ObjectName,
        mark: Mark,
        nic: String,
        receive: Limits,
        transmit: Limits,
    },
    /// The guest sees the carrier come or go.
    SetCarrier {
        vm: ObjectName,
        mark: Mark,
        nic: String,
        up: bool,
    },
    SetBalloon {
        vm: ObjectName,
        mark: Mark,
        target_bytes: u64,
    },
    /// Gives the running VM another part of the host's CPUs.
    SetCpuShare {
        vm: ObjectName,
        mark: Mark,
        share: CpuShare,
    },
    /// Holds the running VM's process to these limits.
    SetProcessLimits {
        vm: ObjectName,
        mark: Mark,
        limits: ProcessLimits,
    },
    /// Stops the vCPUs of a running VM, or lets them go on.
    PauseVm {
        vm: ObjectName,
        mark: Mark,
        paused: bool,
    },
    /// Writes down what the host's policy is, and whose.
    RecordHostPolicy {
        mark: Mark,
        rules: Box<PolicyRules>,
    },
    /// Changes a setting of the host, after what it was has been written down. Huge pages in use stay.
    SetHostSetting {
        mark: Mark,
        setting: HostSetting,
        value: u64,
    },
    /// Gives a setting the value back that it had before.
    RestoreHostSetting {
        mark: Mark,
        setting: HostSetting,
    },
    /// Forgets the policy, after its settings have been restored.
    ForgetHostPolicy {
        mark: Mark,
    },
    /// Sets or clears the hold of `vmctl stop`.
    HoldVm {
        vm: ObjectName,
        mark: Mark,
        held: bool,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewLink {
    pub name: LinkName,
    pub mark: Mark,
    pub kind: NewLinkKind,
    pub mtu: Option<u32>,
    pub mac_address: Option<MacAddress>,
    /// Set before the link comes up.
    pub master: Option<LinkName>,
    /// Port attributes, set before the link comes up; only with a master.
    pub port: Option<PortFacts>,
    pub up: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NewLinkKind {
    Bridge(BridgeFacts),
    Vlan {
        parent: LinkName,
        id: VlanId,
        protocol: VlanProtocol,
    },
    /// A persistent tap with `IFF_VNET_HDR`, made of the mark's VM. `multi_queue`: it may be opened several
    /// times, once for each queue pair of its NIC.
    Tap {
        #[serde(default)]
        multi_queue: bool,
    },
}

/// One attribute of an existing link.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LinkChange {
    Mtu(u32),
    Up(bool),
    Master(Option<LinkName>),
    MacAddress(MacAddress),
    Stp(bool),
    ForwardDelaySeconds(u32),
    AgeingSeconds(u32),
    VlanFiltering(bool),
    DefaultPvid(u16),
    MulticastSnooping(bool),
    /// Isolated, hairpin, BPDU guard, learning and flood flags of a bridge port; not its VLANs.
    PortFlags(PortFacts),
    /// The exact VLAN membership of a bridge port: others are removed.
    PortVlans(PortFacts),
}

/// Where an image comes from and what is made of it: its digest is that of the source as it lies there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSource {
    pub origin: ImageOrigin,
    pub compression: Option<Compression>,
    pub container: Container,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ImageOrigin {
    Path(PathBuf),
    Url(String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Compression {
    Gzip,
    Xz,
    Zstd,
}

/// What the image is in, once it is decompressed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Container {
    /// It is the file itself.
    Plain,
    /// A vmdk, of which a qcow2 image is made.
    Vmdk,
    /// A vmdk in an OVA: the one of this name, or the only one.
    Ova { disk: Option<String> },
}

impl ImageSource {
    /// Whether the cached image is the source byte for byte.
    pub fn is_plain(&self) -> bool {
        self.compression.is_none() && self.container == Container::Plain
    }
}

impl From<PathBuf> for ImageSource {
    fn from(path: PathBuf) -> Self {
        Self { origin: ImageOrigin::Path(path), compression: None, container: Container::Plain }
    }
}

impl std::fmt::Display for ImageSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.origin {
            ImageOrigin::Path(path) => path.display().fmt(f),
            ImageOrigin::Url(url) => f.write_str(url),
        }
    }
}

/// A file in a pool's image cache: `<pool>/.vmctl/images/<file>`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ImageFile {
    pub pool_path: PathBuf,
    /// `<sha256>.<format>`, with what it was made from between them, if that is another thing.
    pub file: String,
    pub format: DiskFormat,
}

impl ImageFile {
    pub fn path(&self) -> PathBuf {
        super::snapshot::Pool::image_directory(&self.pool_path).join(&self.file)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewVolume {
    pub pool_path: PathBuf,
    pub file: String,
    pub format: DiskFormat,
    pub capacity_bytes: u64,
    pub content: NewVolumeContent,
    pub preallocate: bool,
    pub mark: Mark,
    pub reclaim_delete: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NewVolumeContent {
    Blank,
    /// A full copy (a reflink where the file system can), grown to the capacity.
    CopyOf(ImageFile),
    /// A qcow2 overlay.
    OverlayOn(ImageFile),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopHow {
    /// The power button, then by force when the time is over.
    Graceful {
        timeout_ms: u64,
    },
    Forced,
}

impl Step {
    /// The VM that it is about.
    pub fn vm(&self) -> Option<&ObjectName> {
        match self {
            Self::DefineVm { vm, .. }
            | Self::UndefineVm { vm, .. }
            | Self::StartVm { vm, .. }
            | Self::StopVm { vm, .. }
            | Self::ResizeDisk { vm, .. }
            | Self::ReplaceTap { vm, .. }
            | Self::AddDisk { vm, .. }
            | Self::AddNic { vm, .. }
            | Self::RemoveDevice { vm, .. }
            | Self::SetDiskLimits { vm, .. }
            | Self::SetNicLimits { vm, .. }
            | Self::SetCarrier { vm, .. }
            | Self::SetBalloon { vm, .. }
            | Self::SetCpuShare { vm, .. }
            | Self::SetProcessLimits { vm, .. }
            | Self::PauseVm { vm, .. }
            | Self::HoldVm { vm, .. } => Some(vm),
            _ => None,
        }
    }

    pub fn lane(&self) -> Lane {
        match self {
            Step::CreateLink(_)
            | Step::DeleteLink { .. }
            | Step::MarkLink { .. }
            | Step::UnmarkLink { .. }
            | Step::SetLink { .. }
            | Step::AddAddress { .. }
            | Step::RemoveAddress { .. } => Lane::Fast,
            _ => Lane::Slow,
        }
    }
}

/// What a step does, for a person: `create bridge brvlan10`.
impl std::fmt::Display for Step {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::CreateLink(new) => match &new.kind {
                NewLinkKind::Bridge(_) => write!(f, "create bridge {}", new.name),
                NewLinkKind::Vlan { parent, id, .. } => {
                    write!(f, "create {} as VLAN {id} on {parent}", new.name)
                }
                NewLinkKind::Tap { .. } => write!(f, "create tap {}", new.name),
            },
            Self::DeleteLink { link, .. } => write!(f, "delete {link}"),
            Self::MarkLink { link, .. } => write!(f, "mark {link} as vmctl's"),
            Self::UnmarkLink { link, .. } => write!(f, "take vmctl's mark off {link}"),
            Self::SetLink { link, change } => write!(f, "set {change} on {link}"),
            Self::AddAddress { link, address } => write!(f, "add {address} to {link}"),
            Self::RemoveAddress { link, address } => write!(f, "remove {address} from {link}"),
            Self::SetTable { id, .. } => write!(f, "write the nftables table {id}"),
            Self::DeleteTable { id } => write!(f, "delete the nftables table {id}"),
            Self::SetService { mark, .. } => write!(f, "run dnsmasq for {}", mark.owner),
            Self::RemoveService { mark } => write!(f, "stop dnsmasq of {}", mark.owner),
            Self::RequireForwarding { family, .. } => write!(f, "turn {family} forwarding on"),
            Self::ReleaseForwarding { family, .. } => write!(f, "let go of {family} forwarding"),
            Self::CreatePool { path, .. } => write!(f, "make {} a pool", path.display()),
            Self::ForgetPool { path, .. } => write!(f, "forget the pool {}", path.display()),
            Self::ImportImage { source, .. } => write!(f, "import {source}"),
            Self::DeleteImage { image, .. } => write!(f, "delete {}", image.path().display()),
            Self::RetainImage { image, .. } => write!(f, "let go of {}", image.path().display()),
            Self::CreateVolume(new) => write!(f, "create {}", new.pool_path.join(&new.file).display()),
            Self::GrowVolume { pool_path, file, .. } => write!(f, "grow {}", pool_path.join(file).display()),
            Self::SetReclaim { pool_path, file, .. } => {
                write!(f, "set the reclaim policy of {}", pool_path.join(file).display())
            }
            Self::AdoptVolume { pool_path, file, .. } => {
                write!(f, "adopt {}", pool_path.join(file).display())
            }
            Self::RetainVolume { pool_path, file, .. } => {
                write!(f, "let go of {}", pool_path.join(file).display())
            }
            Self::TrashVolume { pool_path, file, .. } => {
                write!(f, "move {} to the pool's trash", pool_path.join(file).display())
            }
            Self::Lvm(step) => step.fmt(f),
            Self::DefineVm { vm, .. } => write!(f, "define VM {vm}"),
            Self::UndefineVm { vm, .. } => write!(f, "forget VM {vm}"),
            Self::StartVm { vm, .. } => write!(f, "start VM {vm}"),
            Self::StopVm { vm, how: StopHow::Graceful { .. }, .. } => write!(f, "shut down VM {vm}"),
            Self::StopVm { vm, how: StopHow::Forced, .. } => write!(f, "stop VM {vm} by force"),
            Self::ResizeDisk { vm, disk, .. } => write!(f, "grow {disk} of VM {vm}"),
            Self::ReplaceTap { vm, nic, .. } => write!(f, "give {nic} of VM {vm} a new tap"),
            Self::AddDisk { vm, disk, .. } => write!(f, "plug the disk {} into VM {vm}", disk.name),
            Self::AddNic { vm, nic, .. } => write!(f, "plug the NIC {} into VM {vm}", nic.name),
            Self::RemoveDevice { vm, device, .. } => write!(f, "unplug {device} from VM {vm}"),
            Self::SetDiskLimits { vm, disk, .. } => write!(f, "set the limits of {disk} of VM {vm}"),
            Self::SetNicLimits { vm, nic, .. } => write!(f, "set the limits of {nic} of VM {vm}"),
            Self::SetCarrier { vm, nic, up, .. } => {
                write!(f, "set the link of {nic} of VM {vm} {}", if *up { "up" } else { "down" })
            }
            Self::SetBalloon { vm, target_bytes, .. } => {
                write!(f, "set the balloon of VM {vm} to {}", crate::name::ByteSize(*target_bytes))
            }
            Self::SetCpuShare { vm, .. } => write!(f, "set the CPU share of VM {vm}"),
            Self::RecordHostPolicy { .. } => f.write_str("record the host's policy"),
            Self::SetHostSetting { setting, value, .. } => write!(f, "set {setting} to {value}"),
            Self::RestoreHostSetting { setting, .. } => write!(f, "set {setting} back to what it was"),
            Self::ForgetHostPolicy { .. } => f.write_str("forget the host's policy"),
            Self::SetProcessLimits { vm, .. } => write!(f, "set the limits of the process of VM {vm}"),
            Self::PauseVm { vm, paused: true, .. } => write!(f, "pause VM {vm}"),
            Self::PauseVm { vm, paused: false, .. } => write!(f, "let VM {vm} go on"),
            Self::HoldVm { vm, held: true, .. } => write!(f, "hold VM {vm} down"),
            Self::HoldVm { vm, held: false, .. } => write!(f, "let VM {vm} run"),
        }
    }
}

impl std::fmt::Display for LinkChange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Mtu(mtu) => write!(f, "mtu {mtu}"),
            Self::Up(true) => f.write_str("up"),
            Self::Up(false) => f.write_str("down"),
            Self::Master(Some(bridge)) => write!(f, "master {bridge}"),
            Self::Master(None) => f.write_str("nomaster"),
            Self::MacAddress(mac) => write!(f, "address {mac}"),
            Self::Stp(on) => write!(f, "stp {on}"),
            Self::ForwardDelaySeconds(seconds) => write!(f, "forward delay {seconds} s"),
            Self::AgeingSeconds(seconds) => write!(f, "ageing {seconds} s"),
            Self::VlanFiltering(on) => write!(f, "vlan_filtering {on}"),
            Self::DefaultPvid(id) => write!(f, "default pvid {id}"),
            Self::MulticastSnooping(on) => write!(f, "multicast snooping {on}"),
            Self::PortFlags(_) => f.write_str("port flags"),
            Self::PortVlans(_) => f.write_str("port VLANs"),
        }
    }
}
