//! What can be done to a host: closed values that leave no choice to who runs them.
//!
//! A step names objects and never holds an ifindex, a pid or a descriptor. Every step is safe to
//! repeat and safe to be killed in: what is half-made carries our mark, or is not there at all.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Lane;
use super::snapshot::{BridgeFacts, PortFacts, VlanProtocol, VmDefinition};
use crate::name::{IpPrefix, LinkName, MacAddress, Mark, ObjectName, Sha256, VlanId};
use crate::vmm::config::DiskFormat;

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
        source: PathBuf,
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
    /// A persistent tap with `IFF_VNET_HDR`, made of the mark's VM.
    Tap,
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

/// A file in a pool's image cache: `<pool>/.vmctl/images/<file>`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ImageFile {
    pub pool_path: PathBuf,
    /// `<sha256>.<format>`
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
    pub fn lane(&self) -> Lane {
        match self {
            Step::CreateLink(NewLink { kind: NewLinkKind::Tap, .. })
            | Step::CreateLink(_)
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
