//! What is true of a VM now.

use serde::Serialize;

use crate::host::snapshot::{CpuShare, RunStrategy, Snapshot, Vm};
use crate::kinds::action::FieldChange;
use crate::kinds::describe_vlans;
use crate::kinds::virtual_machine::changes::staged;
use crate::name::LinkName;
use crate::vmm::config::{
    BalloonConfig, CacheMode, CpuConfig, DiskFormat, Limits, MachineKind, MemoryConfig, VmConfig,
};
use crate::vmm::protocol::{Condition, ConditionKind, ExitRecord, Phase};

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VmStatus {
    pub phase: &'static str,
    pub pid: Option<i32>,
    pub uptime_seconds: Option<u64>,
    pub reboots: Option<u64>,
    pub run_strategy: Option<RunStrategy>,
    /// `vmctl stop` holds it down.
    pub held: bool,
    /// What is not as it should be and lasts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<ConditionStatus>,
    pub machine: Option<MachineKind>,
    pub cpus: u8,
    pub cpu: CpuConfig,
    pub cpu_share: CpuShare,
    pub memory_bytes: u64,
    pub memory_backing: MemoryConfig,
    pub balloon: Option<BalloonConfig>,
    pub vsock_cid: Option<u32>,
    pub generation_id: Option<String>,
    pub disks: Vec<DiskStatus>,
    pub interfaces: Vec<NicStatus>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_exit: Option<ExitRecord>,
    /// What is defined differs from what runs: it takes effect at the next start.
    pub staged: bool,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub staged_changes: Vec<FieldChange>,
    /// Why its process can't be asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    pub boot: Option<crate::vmm::config::BootConfig>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ConditionStatus {
    /// `DiskFull`, `UnplugPending`, `GuestPanicked`
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    pub message: String,
    pub age_seconds: u64,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DiskStatus {
    pub name: String,
    pub path: String,
    pub format: DiskFormat,
    pub read_only: bool,
    /// As the guest sees it; only of a VM that runs.
    pub capacity_bytes: Option<u64>,
    pub cache: CacheMode,
    pub queues: u16,
    pub limits: Limits,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NicStatus {
    pub name: String,
    pub mac_address: String,
    pub tap: String,
    pub bridge: Option<LinkName>,
    /// The tap is there and up.
    pub up: bool,
    /// The guest sees a carrier.
    pub link_up: bool,
    /// Of its tap, on a bridge that filters: `10 pvid untagged`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vlans: Option<String>,
    pub queues: u16,
    pub receive_limits: Limits,
    pub transmit_limits: Limits,
}

impl VmStatus {
    /// The phase, and why it is so where it isn't by choice: `Paused (disk full)`.
    pub fn phase_and_why(&self) -> String {
        let has = |kind: ConditionKind| self.conditions.iter().any(|there| there.kind == format!("{kind:?}"));
        match self.phase {
            "Paused" if has(ConditionKind::DiskFull) => "Paused (disk full)".to_owned(),
            "Running" if has(ConditionKind::GuestPanicked) => "Running (panicked)".to_owned(),
            "Stopped" if self.held => "Stopped (held)".to_owned(),
            phase if self.staged => format!("{phase} (staged)"),
            phase => phase.to_owned(),
        }
    }
}

pub(super) fn status(vm: &Vm, snapshot: &Snapshot) -> VmStatus {
    let process = vm.process.as_ref().and_then(|process| process.as_ref().ok());
    let problem = vm.process.as_ref().and_then(|process| process.as_ref().err());
    let defined = vm.definition.as_ref().map(|definition| &definition.config);
    let config = process.map(|process| &process.config).or(defined);
    let staged_changes =
        process.zip(defined).map_or(Vec::new(), |(process, defined)| staged(&process.config, defined));
    let phase = match (process.map(|process| process.phase), problem) {
        (Some(Phase::Running), _) => "Running",
        (Some(Phase::Paused), _) => "Paused",
        (Some(Phase::Stopping), _) => "Stopping",
        (None, Some(_)) => "Unknown",
        (None, None) => "Stopped",
    };
    VmStatus {
        phase,
        pid: process.map(|process| process.pid),
        uptime_seconds: process.map(|process| process.uptime_ms / 1000),
        reboots: process.map(|process| process.reboots),
        run_strategy: vm.definition.as_ref().map(|definition| definition.run_strategy),
        held: vm.held,
        conditions: process.map_or(Vec::new(), |process| process.conditions.iter().map(condition).collect()),
        machine: config.map(|config| config.machine),
        cpus: config.map_or(0, |config| config.vcpus),
        cpu: config.map(|config| config.cpu.clone()).unwrap_or_default(),
        cpu_share: vm.definition.as_ref().map(|definition| definition.cpu_share).unwrap_or_default(),
        memory_bytes: config.map_or(0, |config| config.memory_bytes),
        memory_backing: config.map(|config| config.memory).unwrap_or_default(),
        balloon: config.and_then(|config| config.balloon),
        vsock_cid: config.and_then(|config| config.vsock).map(|vsock| vsock.cid),
        generation_id: config.and_then(|config| config.generation_id.clone()),
        disks: config.map_or(Vec::new(), |config| {
            let capacity =
                |index: usize| process.and_then(|process| process.disk_capacity_bytes.get(index).copied());
            let disks = config.disks.iter().enumerate();
            disks
                .map(|(index, disk)| DiskStatus {
                    name: disk.name.clone(),
                    path: disk.path.clone(),
                    format: disk.format,
                    read_only: disk.read_only,
                    capacity_bytes: capacity(index),
                    cache: disk.cache,
                    queues: disk.queues,
                    limits: disk.limits,
                })
                .collect()
        }),
        interfaces: config.map_or(Vec::new(), |config| nics(config, vm, snapshot)),
        last_exit: vm.exit.clone(),
        staged: !staged_changes.is_empty(),
        staged_changes,
        problem: problem.map(ToString::to_string),
        boot: config.map(|config| config.boot.clone()),
    }
}

fn condition(condition: &Condition) -> ConditionStatus {
    ConditionStatus {
        kind: format!("{:?}", condition.kind),
        device: condition.device.clone(),
        message: condition.message.clone(),
        age_seconds: condition.age_ms / 1000,
    }
}

fn nics(config: &VmConfig, vm: &Vm, snapshot: &Snapshot) -> Vec<NicStatus> {
    let links = snapshot.links.as_ref().ok();
    let one = |nic: &crate::vmm::config::NicConfig| {
        let link = links.and_then(|links| links.get(nic.tap.as_str()));
        // Where the tap is; of a VM without taps, where it will be.
        let defined = || {
            let definition = vm.definition.as_ref()?;
            let place = definition.config.nics.iter().position(|defined| defined.name == nic.name)?;
            definition.bridges.get(place).cloned()
        };
        NicStatus {
            name: nic.name.clone(),
            mac_address: nic.mac_address.clone(),
            tap: nic.tap.clone(),
            bridge: link.map_or_else(defined, |link| link.master.clone()),
            up: link.is_some_and(|link| link.up),
            link_up: nic.link_up,
            vlans: link
                .and_then(|link| link.port.as_ref())
                .filter(|port| !port.vlans.is_empty())
                .map(|port| describe_vlans(&port.vlans)),
            queues: nic.queue_pairs,
            receive_limits: nic.receive_limits,
            transmit_limits: nic.transmit_limits,
        }
    };
    config.nics.iter().map(one).collect()
}
