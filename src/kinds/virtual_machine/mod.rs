//! VirtualMachine: a guest, its devices, and when it runs.

mod bootable;
pub mod changes;
mod cloud_init;
pub mod compare;
mod definition;
mod live;
pub mod power;
mod taps;
pub mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;

use serde::Serialize;

use super::network::Place;
use super::{Declared, Reference};
use crate::host::snapshot::{CpuShare, RunStrategy, VlanFlags};
use crate::name::{ByteSize, IpPrefix, Kind, MacAddress, NameError, ObjectId, ObjectName, VlanId};
use crate::vmm::config::{
    BalloonConfig, CacheMode, CpuConfig, DiskBoot, EntropyConfig, Limits, MachineKind, MemoryConfig,
};

pub use cloud_init::CloudInit;
pub use definition::{default_cid, default_mac, tap_name};

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VirtualMachine {
    pub machine: MachineKind,
    pub cpus: u8,
    pub cpu: CpuConfig,
    pub cpu_share: CpuShare,
    pub memory: ByteSize,
    pub memory_backing: MemoryConfig,
    pub boot: Boot,
    pub disks: Vec<Disk>,
    pub interfaces: Vec<Interface>,
    pub balloon: Option<BalloonConfig>,
    /// What the guest keeps when the host's memory is short. `None`: all that `balloon` leaves it.
    pub least_memory: Option<ByteSize>,
    pub vsock: Option<Vsock>,
    pub entropy: EntropyConfig,
    pub cloud_init: Option<CloudInit>,
    pub run_strategy: RunStrategy,
    pub restart_allowed: bool,
    pub shutdown_timeout_seconds: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Boot {
    Kernel {
        kernel: PathBuf,
        initrd: Option<PathBuf>,
        cmdline: String,
    },
    /// What the named disk holds.
    Disk(DiskBoot),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Disk {
    pub name: String,
    pub volume: ObjectName,
    pub read_only: bool,
    /// `None`: what suits the volume's pool.
    pub cache: Option<CacheMode>,
    pub queues: u16,
    pub limits: Limits,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Interface {
    pub name: String,
    pub attachment: Attachment,
    /// Those that the guest has in its network.
    pub addresses: BTreeSet<IpAddr>,
    /// In its network the guest may only be who it is.
    pub anti_spoofing: bool,
    /// `None`: [`default_mac`].
    pub mac_address: Option<MacAddress>,
    /// `None`: what the bridge gives its ports. Only on a bridge that filters.
    pub vlans: Option<Vlans>,
    pub queues: u16,
    pub link_up: bool,
    pub receive_limits: Limits,
    pub transmit_limits: Limits,
    /// What cloud-init gives it in the guest.
    pub guest_network: GuestNetwork,
}

/// A NIC's addresses in the guest. None: it asks by DHCP.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct GuestNetwork {
    pub addresses: Vec<IpPrefix>,
    pub gateways: Vec<IpAddr>,
    pub nameservers: Vec<IpAddr>,
}

/// What a NIC is plugged into.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum Attachment {
    Bridge(ObjectName),
    Network(ObjectName),
}

impl Attachment {
    pub fn object(&self) -> ObjectId {
        match self {
            Self::Bridge(name) => ObjectId::new(Kind::Bridge, name.clone()),
            Self::Network(name) => ObjectId::new(Kind::Network, name.clone()),
        }
    }

    /// The manifest's field.
    pub fn field(&self) -> &'static str {
        match self {
            Self::Bridge(_) => "bridge",
            Self::Network(_) => "network",
        }
    }

    /// The bridge that its tap belongs to. `None`: what it names is not declared.
    pub fn place<'a>(&self, declared: &'a Declared) -> Option<Result<Place<'a>, NameError>> {
        match self {
            Self::Bridge(name) => Some(Ok(Place::Declared(self.object(), declared.bridge(name)?))),
            Self::Network(name) => Some(declared.network(name)?.place(name, declared)),
        }
    }
}

/// Which VLANs a guest has on its bridge.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Vlans {
    Access(AccessVlan),
    Trunk(TrunkVlans),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AccessVlan {
    pub access: VlanId,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TrunkVlans {
    pub trunk: BTreeSet<VlanId>,
    pub native: Option<VlanId>,
}

impl Vlans {
    /// As a bridge port has them.
    pub fn membership(&self) -> BTreeMap<VlanId, VlanFlags> {
        let untagged = VlanFlags { pvid: true, untagged: true };
        match self {
            Self::Access(vlan) => [(vlan.access, untagged)].into(),
            Self::Trunk(vlans) => {
                let tagged = vlans.trunk.iter().map(|id| (*id, VlanFlags::default()));
                tagged.chain(vlans.native.map(|id| (id, untagged))).collect()
            }
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Vsock {
    /// `None`: [`default_cid`].
    pub cid: Option<u32>,
}

impl VirtualMachine {
    pub fn references(&self) -> Vec<Reference> {
        let volumes = self.disks.iter().enumerate().map(|(index, disk)| Reference {
            to: ObjectId::new(Kind::Volume, disk.volume.clone()),
            pointer: format!("/disks/{index}/volume"),
        });
        let bridges = self.interfaces.iter().enumerate().map(|(index, nic)| Reference {
            to: nic.attachment.object(),
            pointer: format!("/interfaces/{index}/{}", nic.attachment.field()),
        });
        volumes.chain(bridges).collect()
    }

    /// Files of the host that it boots or takes its user data from.
    pub fn files(&self) -> Vec<PathBuf> {
        let boot = match &self.boot {
            Boot::Kernel { kernel, initrd, .. } => vec![Some(kernel), initrd.as_ref()],
            Boot::Disk(_) => Vec::new(),
        };
        let user_data = self.cloud_init.as_ref().and_then(CloudInit::file);
        boot.into_iter().chain([user_data]).flatten().cloned().collect()
    }
}
