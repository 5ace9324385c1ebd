//! What is done to a VM that is defined here: its records, its process, its way down.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::cgroup;
use super::vm_place::{SocketDirectory, VmPlace};
use super::vm_process::{self, HeldProcess, LOOK_TIMEOUT, LookError, chain};
use super::vm_start::{self, require_definition};
use crate::host::error::{ObserveError, StepError};
use crate::host::snapshot::VmDefinition;
use crate::host::step::{Step, StopHow};
use crate::name::{Mark, ObjectName};
use crate::vmm::client::{Control, ControlError, Watch};
use crate::vmm::protocol::{Condition, Verb};

/// A guest that is still booting doesn't hear the power button: it is pressed again.
const PRESS_INTERVAL: Duration = Duration::from_secs(5);
/// How long a VM process may take to flush its disks and go.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);
/// How long the kernel may take to clear away a killed process.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a VM process may take to take a command.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(10);

/// The VMs of one host.
#[derive(Clone, Debug)]
pub struct Vms {
    pub state_dir: PathBuf,
    pub run_dir: PathBuf,
    pub program: PathBuf,
}

impl Vms {
    pub fn place(&self, vm: &ObjectName) -> VmPlace {
        VmPlace::new(&self.state_dir, &self.run_dir, vm)
    }

    /// Runs one of the steps about VMs.
    pub fn run(&self, step: &Step) -> Result<(), StepError> {
        match step {
            Step::DefineVm { vm, definition } => define(&self.place(vm), vm, definition),
            Step::UndefineVm { vm, mark } => undefine(&self.place(vm), vm, mark),
            Step::StartVm { vm, definition } => {
                vm_start::start(&self.program, &self.place(vm), vm, definition)
            }
            Step::StopVm { vm, mark, how } => stop(&self.place(vm), vm, mark, *how),
            Step::HoldVm { vm, mark, held } => {
                let verb = if *held { "hold" } else { "release" };
                let what = || format!("{verb} the VM {vm}");
                require_definition(&self.place(vm), mark, &what)?;
                self.place(vm).set_held(*held).map_err(|error| StepError::failed(what(), error))
            }
            other => self.run_live(other),
        }
    }

    /// Becomes readable when the VM's process ends. `None`: none runs.
    pub fn watch(&self, vm: &ObjectName) -> Result<Option<HeldProcess>, ObserveError> {
        let failed = |error: LookError| ObserveError::new(format!("watch the process of the VM {vm}"), error);
        match self.place(vm).socket_directory() {
            Ok(Some(directory)) => HeldProcess::find(&directory, LOOK_TIMEOUT).map_err(failed),
            Ok(None) => Ok(None),
            Err(error) => Err(failed(error.into())),
        }
    }

    pub fn events(&self, vm: &ObjectName) -> Result<Option<Watch>, ObserveError> {
        let failed = |error: LookError| ObserveError::new(format!("watch the VM {vm}"), error);
        let Some(control) = self.look(vm).map_err(failed)? else { return Ok(None) };
        control.watch().map(Some).map_err(|error| failed(error.into()))
    }

    pub fn conditions(&self, vm: &ObjectName) -> Result<Vec<Condition>, ObserveError> {
        let failed = |error: LookError| ObserveError::new(format!("ask the process of the VM {vm}"), error);
        let Some(control) = self.look(vm).map_err(failed)? else { return Ok(Vec::new()) };
        Ok(control.state().map_err(|error| failed(error.into()))?.conditions)
    }

    /// A connection for looking only, which doesn't wait long.
    fn look(&self, vm: &ObjectName) -> Result<Option<Control>, LookError> {
        let Some(directory) = self.place(vm).socket_directory()? else { return Ok(None) };
        Ok(vm_process::connect(&directory, LOOK_TIMEOUT)?)
    }

    /// A connection to a VM of ours that runs.
    pub(super) fn control(
        &self,
        vm: &ObjectName,
        mark: &Mark,
        what: &dyn Fn() -> String,
    ) -> Result<Control, StepError> {
        let place = self.place(vm);
        require_definition(&place, mark, what)?;
        let failed = |error: &dyn ToString| StepError::failed(what(), error.to_string());
        let directory = place.socket_directory().map_err(|error| failed(&error))?;
        let connect = |directory: SocketDirectory| vm_process::connect(&directory, COMMAND_TIMEOUT);
        let control = directory.map_or(Ok(None), connect).map_err(|error| failed(&chain(&error)))?;
        control.ok_or_else(|| failed(&"it does not run"))
    }
}

fn define(place: &VmPlace, vm: &ObjectName, definition: &VmDefinition) -> Result<(), StepError> {
    let what = || format!("define the VM {vm}");
    // One that can't be read says nothing of whose it is: it isn't overwritten.
    match place.definition().map_err(|error| StepError::failed(what(), error))? {
        Some(there) if there == *definition => Ok(()),
        Some(there) if there.mark != definition.mark => {
            let why = format!("it is defined with the mark `{}`", there.mark);
            Err(StepError::NotOurs { what: what(), why })
        }
        _ => place.write_definition(definition).map_err(|error| StepError::failed(what(), error)),
    }
}

fn undefine(place: &VmPlace, vm: &ObjectName, mark: &Mark) -> Result<(), StepError> {
    let what = || format!("remove the VM {vm}");
    let failed = |error: &dyn ToString| StepError::failed(what(), error.to_string());
    if place.definition().map_err(|error| failed(&error))?.is_some() {
        require_definition(place, mark, &what)?;
    }
    vm_process::settle(place).map_err(|error| failed(&error))?;
    if let Some(directory) = place.socket_directory().map_err(|error| failed(&error))? {
        match vm_process::connect(&directory, LOOK_TIMEOUT) {
            Ok(None) => {}
            Ok(Some(_)) => return Err(failed(&"it still runs")),
            Err(error) => return Err(failed(&chain(&error))),
        }
    }
    place.remove().map_err(|error| failed(&error))
}

fn stop(place: &VmPlace, vm: &ObjectName, mark: &Mark, how: StopHow) -> Result<(), StepError> {
    let what = || format!("stop the VM {vm}");
    let failed = |error: &dyn ToString| StepError::failed(what(), error.to_string());
    if place.definition().map_err(|error| failed(&error))?.is_some() {
        require_definition(place, mark, &what)?;
    }
    let Some(directory) = place.socket_directory().map_err(|error| failed(&error))? else { return Ok(()) };
    vm_process::settle(place).map_err(|error| failed(&error))?;
    let found = HeldProcess::find(&directory, LOOK_TIMEOUT).map_err(|error| failed(&error))?;
    require_marks(place, &directory, found.is_some(), mark, &what)?;
    if let Some(process) = found {
        let gone = end(&directory, &process, how).map_err(|error| failed(&error))?;
        if !gone {
            let why = format!("its process {} was killed and is still there", process.pid);
            let hint = "it waits for the kernel or a disk: look at /proc/<pid>/stack".to_owned();
            return Err(StepError::Failed { what: what(), why, hint: Some(hint) });
        }
    }
    cgroup::sweep(&|_| false);
    let again = vm_process::connect(&directory, LOOK_TIMEOUT).map_err(|error| failed(&chain(&error)))?;
    if again.is_some() {
        return Err(failed(&"somebody started it again meanwhile"));
    }
    directory.remove_socket().map_err(|error| failed(&error))?;
    place.remove_seed().map_err(|error| failed(&error))?;
    // It ended because we said so: a strategy that looks at how it ended must not be told of it, or a
    // restart that dies half-way would leave it down.
    place.remove_exit_record().map_err(|error| failed(&error))
}

/// Both the definition and the process must be ours, as far as they are there and answer.
fn require_marks(
    place: &VmPlace,
    directory: &SocketDirectory,
    runs: bool,
    mark: &Mark,
    what: &dyn Fn() -> String,
) -> Result<(), StepError> {
    let definition = place.definition().map_err(|error| StepError::failed(what(), error))?;
    if definition.is_some() {
        require_definition(place, mark, what)?;
    }
    if !runs {
        return Ok(());
    }
    match vm_process::connect(directory, LOOK_TIMEOUT).and_then(|control| match control {
        Some(control) => control.state().map(Some),
        None => Ok(None),
    }) {
        Ok(Some(state)) if state.config.mark != mark.to_string() => {
            let why = format!("its process carries the mark `{}`", state.config.mark);
            Err(StepError::NotOurs { what: what(), why })
        }
        Ok(_) => Ok(()),
        // A process that doesn't answer is ours by its definition, or nobody knows whose it is.
        Err(_) if definition.is_some() => Ok(()),
        Err(error) => {
            let why =
                format!("it has no definition, and its process doesn't say whose it is: {}", chain(&error));
            Err(StepError::NotOurs { what: what(), why })
        }
    }
}

/// From the gentlest to the last means; `true` when the process is gone.
fn end(directory: &SocketDirectory, process: &HeldProcess, how: StopHow) -> Result<bool, LookError> {
    if let StopHow::Graceful { timeout_ms } = how {
        let deadline = Instant::now() + Duration::from_millis(timeout_ms);
        // A guest that is paused hears nothing.
        let _ = command(directory, &Verb::Resume);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            // A process that doesn't take the command is ended by the next means.
            let _ = command(directory, &Verb::PowerButton);
            if process.wait(left.min(PRESS_INTERVAL))? {
                return Ok(true);
            }
        }
    }
    if command(directory, &Verb::Stop).is_ok() && process.wait(STOP_TIMEOUT)? {
        return Ok(true);
    }
    process.kill()?;
    Ok(process.wait(KILL_TIMEOUT)?)
}

/// Gives a command to whoever listens. Its end while it answers is no error: that is what we want.
fn command(directory: &SocketDirectory, verb: &Verb) -> Result<(), ControlError> {
    match vm_process::connect(directory, LOOK_TIMEOUT)? {
        Some(control) => match control.command(verb) {
            Err(ControlError::Packet(crate::vmm::packet::PacketError::Closed)) => Ok(()),
            other => other,
        },
        None => Ok(()),
    }
}
