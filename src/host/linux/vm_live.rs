//! What is done to a VM while its guest runs: devices come and go, limits change. Each verb of the VM
//! process may be repeated, and so may each step.

use std::os::fd::{AsFd as _, OwnedFd};
use std::time::{Duration, Instant};

use super::cgroup;
use super::vm_control::Vms;
use super::vm_process::chain;
use super::vm_start;
use crate::host::error::StepError;
use crate::host::limits::ProcessLimits;
use crate::host::snapshot::CpuShare;
use crate::host::step::Step;
use crate::name::{LinkName, Mark, ObjectName};
use crate::vmm::client::{Control, ControlError};
use crate::vmm::config::{DiskConfig, NicConfig};
use crate::vmm::packet::PacketError;
use crate::vmm::protocol::{ConditionKind, Phase, Response, Verb, VmState};

/// How long a guest has to let go of a device, from when it was first asked.
const UNPLUG_TIMEOUT: Duration = Duration::from_secs(10);
/// The same for one that has been asked long ago, or can't answer: it is looked at, no more.
const UNPLUG_TIMEOUT_SHORT: Duration = Duration::from_secs(1);
/// A guest that is still booting doesn't hear that it is asked: it is asked again.
const UNPLUG_ASK_INTERVAL: Duration = Duration::from_secs(2);
const UNPLUG_POLL: Duration = Duration::from_millis(20);

/// One VM, and what a step does to it, for messages.
struct Live<'a> {
    control: Control,
    mark: &'a Mark,
    what: &'a dyn Fn() -> String,
}

impl Vms {
    /// Runs one of the steps about a VM that runs.
    pub(super) fn run_live(&self, step: &Step) -> Result<(), StepError> {
        let what = || step.to_string();
        let live = |vm: &ObjectName, mark| self.live(vm, mark, &what);
        match step {
            Step::AddDisk { vm, mark, disk } => live(vm, mark)?.add_disk(disk),
            Step::AddNic { vm, mark, nic } => live(vm, mark)?.add_nic(nic),
            Step::RemoveDevice { vm, mark, device } => live(vm, mark)?.remove_device(vm, device),
            Step::ReplaceTap { vm, mark, nic, tap } => live(vm, mark)?.replace_tap(nic, tap),
            Step::ResizeDisk { vm, mark, disk, capacity_bytes } => {
                let verb = Verb::ResizeDisk { disk: disk.clone(), capacity_bytes: *capacity_bytes };
                live(vm, mark)?.command(&verb)
            }
            Step::SetDiskLimits { vm, mark, disk, limits } => {
                live(vm, mark)?.command(&Verb::SetDiskLimits { disk: disk.clone(), limits: *limits })
            }
            Step::SetNicLimits { vm, mark, nic, receive, transmit } => live(vm, mark)?
                .command(&Verb::SetNicLimits { nic: nic.clone(), receive: *receive, transmit: *transmit }),
            Step::SetCarrier { vm, mark, nic, up } => {
                live(vm, mark)?.command(&Verb::SetLink { nic: nic.clone(), up: *up })
            }
            Step::SetBalloon { vm, mark, target_bytes } => {
                live(vm, mark)?.command(&Verb::SetBalloon { target_bytes: *target_bytes })
            }
            Step::SetCpuShare { vm, mark, share } => live(vm, mark)?.set_cpu_share(*share),
            Step::SetProcessLimits { vm, mark, limits } => live(vm, mark)?.set_limits(*limits),
            Step::PauseVm { vm, mark, paused } => {
                live(vm, mark)?.command(if *paused { &Verb::Pause } else { &Verb::Resume })
            }
            other => Err(StepError::failed(other.to_string(), "it is not about a VM that runs")),
        }
    }

    fn live<'a>(
        &self,
        vm: &ObjectName,
        mark: &'a Mark,
        what: &'a dyn Fn() -> String,
    ) -> Result<Live<'a>, StepError> {
        Ok(Live { control: self.control(vm, mark, what)?, mark, what })
    }
}

impl Live<'_> {
    fn failed(&self, why: impl ToString) -> StepError {
        StepError::failed((self.what)(), why)
    }

    fn control_failed(&self, error: &ControlError) -> StepError {
        let hint = match error {
            ControlError::Refused(message) if message.contains("malformed") => {
                Some("its process is of an older vmctl: it can do this after its next start".to_owned())
            }
            _ => None,
        };
        let why = match error {
            ControlError::Packet(PacketError::Closed) => "it ended meanwhile".to_owned(),
            error => chain(error),
        };
        StepError::Failed { what: (self.what)(), why, hint }
    }

    fn command(&self, verb: &Verb) -> Result<(), StepError> {
        self.control.command(verb).map_err(|error| self.control_failed(&error))
    }

    fn command_with(&self, verb: &Verb, fds: &[OwnedFd]) -> Result<(), StepError> {
        let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
        let refused = |message| Err(self.control_failed(&ControlError::Refused(message)));
        match self.control.request_with_fds(verb, &fds).map_err(|error| self.control_failed(&error))? {
            Response::Done => Ok(()),
            Response::Error { message } => refused(message),
            Response::State(_) | Response::Metrics(_) => {
                Err(self.failed("the VM process gave the wrong answer"))
            }
        }
    }

    /// Its process can't reach its own cgroup: this is done to it.
    fn set_cpu_share(&self, share: CpuShare) -> Result<(), StepError> {
        let set = self.control.peer_pid().and_then(|pid| cgroup::set_share(pid, share));
        set.map_err(|error| self.failed(error))
    }

    fn set_limits(&self, limits: ProcessLimits) -> Result<(), StepError> {
        let set = self.control.peer_pid().and_then(|pid| cgroup::set_limits(pid, limits));
        set.map_err(|error| self.failed(error))
    }

    fn state(&self) -> Result<VmState, StepError> {
        self.control.state().map_err(|error| self.control_failed(&error))
    }

    fn add_disk(&self, disk: &DiskConfig) -> Result<(), StepError> {
        let state = self.state()?;
        match state.config.disks.iter().find(|there| there.name == disk.name) {
            // Its settings may have been changed since.
            Some(there) if (&there.path, there.read_only) == (&disk.path, disk.read_only) => return Ok(()),
            Some(there) => {
                return Err(self.failed(format!("it has a disk of this name, on {}", there.path)));
            }
            None => {}
        }
        let fds = vm_start::open_disk(disk, self.what)?;
        if fds.first().is_some_and(cgroup::lies_in_memory) {
            let lifted = self.control.peer_pid().and_then(cgroup::lift_memory_limit);
            lifted.map_err(|error| self.failed(error))?;
        }
        self.command_with(&Verb::AddDisk { disk: disk.clone() }, &fds)
    }

    fn add_nic(&self, nic: &NicConfig) -> Result<(), StepError> {
        let state = self.state()?;
        match state.config.nics.iter().find(|there| there.name == nic.name) {
            Some(there) if (&there.tap, &there.mac_address) == (&nic.tap, &nic.mac_address) => return Ok(()),
            Some(there) => {
                let address = &there.mac_address;
                return Err(self.failed(format!("it has a NIC of this name, with the address {address}")));
            }
            None => {}
        }
        let mut fds = self.open_tap(&nic.tap, nic.queue_pairs)?;
        fds.extend(vm_start::open_vhost(nic.queue_pairs));
        self.command_with(&Verb::AddNic { nic: nic.clone() }, &fds)
    }

    fn open_tap(&self, tap: &str, queue_pairs: u16) -> Result<Vec<OwnedFd>, StepError> {
        let tap = LinkName::parse(tap).map_err(|error| self.failed(error))?;
        vm_start::open_tap(&tap, queue_pairs, self.mark, self.what)
    }

    fn replace_tap(&self, nic: &str, tap: &LinkName) -> Result<(), StepError> {
        let state = self.state()?;
        let Some(there) = state.config.nics.iter().find(|there| there.name == nic) else {
            return Err(self.failed("it has no such NIC"));
        };
        let fds = self.open_tap(tap.as_str(), there.queue_pairs)?;
        self.command_with(&Verb::ReplaceTap { nic: nic.to_owned() }, &fds)
    }

    /// The guest decides. What counts is that the device is gone from what the process says it runs.
    fn remove_device(&self, vm: &ObjectName, device: &str) -> Result<(), StepError> {
        let begin = Instant::now();
        let mut state = self.state()?;
        let timeout = unplug_timeout(&state, device);
        let mut asked: Option<Instant> = None;
        while has_device(&state, device) {
            if begin.elapsed() >= timeout {
                return Err(self.refused(vm, device, &state));
            }
            if asked.is_none_or(|asked| asked.elapsed() >= UNPLUG_ASK_INTERVAL) {
                self.command(&Verb::RemoveDevice { device: device.to_owned() })?;
                asked = Some(Instant::now());
            } else {
                std::thread::sleep(UNPLUG_POLL);
            }
            state = self.state()?;
        }
        Ok(())
    }

    fn refused(&self, vm: &ObjectName, device: &str, state: &VmState) -> StepError {
        let (why, hint) = if state.phase == Phase::Paused {
            (
                format!("the guest is paused, and can't let go of {device}"),
                format!("`vmctl resume {vm}`; the removal is asked again at the next apply"),
            )
        } else {
            let asked = unplug_age(state, device).unwrap_or(UNPLUG_TIMEOUT).as_secs();
            (
                format!("the guest has not let go of {device} within {asked} s"),
                "it may be mounted or in use, or the guest has no PCI hot-plug driver (yet); the removal is \
                 asked again at the next apply"
                    .to_owned(),
            )
        };
        StepError::Failed { what: (self.what)(), why, hint: Some(hint) }
    }
}

fn has_device(state: &VmState, device: &str) -> bool {
    state.config.disks.iter().any(|disk| disk.name == device)
        || state.config.nics.iter().any(|nic| nic.name == device)
}

/// Since when the guest has been asked for it.
fn unplug_age(state: &VmState, device: &str) -> Option<Duration> {
    let mut conditions = state.conditions.iter();
    let pending = conditions.find(|condition| {
        condition.kind == ConditionKind::UnplugPending && condition.device.as_deref() == Some(device)
    })?;
    Some(Duration::from_millis(pending.age_ms))
}

fn unplug_timeout(state: &VmState, device: &str) -> Duration {
    let left = UNPLUG_TIMEOUT.saturating_sub(unplug_age(state, device).unwrap_or_default());
    if state.phase == Phase::Paused { UNPLUG_TIMEOUT_SHORT } else { left.max(UNPLUG_TIMEOUT_SHORT) }
}
