//! VirtualMachine: a guest, its devices, and when it runs.

pub mod compare;
mod definition;
pub mod power;
pub mod wire;

use std::path::PathBuf;

use serde::Serialize;

use super::Reference;
use crate::host::snapshot::RunStrategy;
use crate::name::{ByteSize, Kind, MacAddress, ObjectId, ObjectName};

pub use definition::{default_mac, tap_name};

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VirtualMachine {
    pub cpus: u8,
    pub memory: ByteSize,
    pub boot: Boot,
    pub disks: Vec<Disk>,
    pub interfaces: Vec<Interface>,
    pub run_strategy: RunStrategy,
    pub restart_allowed: bool,
    pub shutdown_timeout_seconds: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Boot {
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    pub cmdline: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Disk {
    pub name: String,
    pub volume: ObjectName,
    pub read_only: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Interface {
    pub name: String,
    pub bridge: ObjectName,
    /// `None`: [`default_mac`].
    pub mac_address: Option<MacAddress>,
}

impl VirtualMachine {
    pub fn references(&self) -> Vec<Reference> {
        let volumes = self.disks.iter().enumerate().map(|(index, disk)| Reference {
            to: ObjectId::new(Kind::Volume, disk.volume.clone()),
            pointer: format!("/disks/{index}/volume"),
        });
        let bridges = self.interfaces.iter().enumerate().map(|(index, nic)| Reference {
            to: ObjectId::new(Kind::Bridge, nic.bridge.clone()),
            pointer: format!("/interfaces/{index}/bridge"),
        });
        volumes.chain(bridges).collect()
    }
}
