//! Start, stop, restart and pause of a VM as it is defined on the host, without its manifest: what people ask for
//! by `vmctl start` and `vmctl stop`. Leaves the host as a later plan wants it, so that the plan is empty.

use super::compare::{SHUTDOWN_TIMEOUT_MS, owner};
use super::taps::Tap;
use crate::host::Step;
use crate::host::snapshot::{LinkKind, RunStrategy, Snapshot, Vm, VmDefinition};
use crate::host::step::StopHow;
use crate::kinds::action::{Action, Blocker, FieldChange, Impact, Verb};
use crate::name::{Kind, Mark, ObjectId, ObjectName, SetName};
use crate::vmm::protocol::Phase;

/// What people ask of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    Start,
    Stop(StopHow),
    Restart(StopHow),
    Pause,
    Resume,
}

impl Power {
    /// The guest has this long to shut down where nobody says otherwise.
    pub const SHUTDOWN_TIMEOUT_MS: u64 = SHUTDOWN_TIMEOUT_MS;
}

/// The steps to it, or what is in the way.
pub fn power(name: &ObjectName, set: &SetName, power: Power, snapshot: &Snapshot) -> Action {
    let id = ObjectId::new(Kind::VirtualMachine, name.clone());
    let action = Action::new(&id, "");
    let vms = match &snapshot.vms {
        Ok(vms) => vms,
        Err(error) => return action.blocked(Blocker::unseen(error)),
    };
    let Some(vm) = vms.get(name) else {
        return action.blocked(
            Blocker::new("there is no such VM on this host").hint("`vmctl get vm` lists those that are"),
        );
    };
    let mark = Mark::new(set.clone(), id);
    match owner(vm) {
        Some(other) if other == mark => {}
        Some(other) => {
            let blocker = Blocker::new(format!("the VM belongs to set {}", other.set));
            return action.blocked(blocker.hint(format!("`--set {}` means it", other.set)));
        }
        // A process that doesn't answer and has no definition: whose it is can't be told.
        None => return action.blocked(Blocker::new("it can't be told whose VM this is")),
    }
    let work = Work { action, name, vm, mark, snapshot };
    let action = match power {
        Power::Start => work.start(),
        Power::Stop(how) => work.stop(how),
        Power::Restart(how) => work.restart(how),
        Power::Pause => work.pause(true),
        Power::Resume => work.pause(false),
    };
    action.finish()
}

struct Work<'a> {
    action: Action,
    name: &'a ObjectName,
    vm: &'a Vm,
    mark: Mark,
    snapshot: &'a Snapshot,
}

impl Work<'_> {
    fn start(mut self) -> Action {
        match &self.vm.process {
            Some(Ok(process)) => {
                let pid = process.pid;
                self.release();
                self.action.summary = format!("runs already (pid {pid})");
                self.action
            }
            Some(Err(error)) => {
                let blocker = Blocker::new(format!("its process doesn't answer: {error}"));
                let hint = format!("`vmctl stop --force {}` ends it", self.name);
                self.action.blocked(blocker.hint(hint))
            }
            None => match self.launch() {
                Ok(()) => {
                    self.phase("Stopped", "Running", Impact::Live);
                    self.action
                }
                Err(blocker) => self.action.blocked(blocker),
            },
        }
    }

    fn stop(mut self, how: StopHow) -> Action {
        self.hold();
        if self.vm.process.is_some() {
            self.shut_down(how);
            self.phase("Running", "Stopped", Impact::Restart);
            self.action.verb(Verb::Update, "");
        } else {
            self.action.summary = "is stopped already".to_owned();
        }
        // A later plan would remove them too: nothing is behind them.
        if let Ok(links) = &self.snapshot.links {
            for (tap, link) in links {
                if let Some(mark) = link.mark()
                    && matches!(link.kind, LinkKind::Tap { .. })
                    && mark.set == self.mark.set
                    && mark.owner == self.mark.owner
                {
                    self.action.step(Step::DeleteLink { link: tap.clone(), mark });
                }
            }
        }
        self.action
    }

    fn restart(mut self, how: StopHow) -> Action {
        if self.vm.process.is_none() {
            return self.start();
        }
        self.shut_down(how);
        match self.launch() {
            Ok(()) => {
                self.action.verb(Verb::Restart, "");
                self.action
            }
            Err(blocker) => self.action.blocked(blocker),
        }
    }

    fn pause(mut self, paused: bool) -> Action {
        let process = match &self.vm.process {
            Some(Ok(process)) => process,
            Some(Err(error)) => {
                let blocker = Blocker::new(format!("its process doesn't answer: {error}"));
                let hint = format!("`vmctl stop --force {}` ends it", self.name);
                return self.action.blocked(blocker.hint(hint));
            }
            None => return self.action.blocked(Blocker::new("it does not run")),
        };
        let (from, to) = if paused { ("Running", "Paused") } else { ("Paused", "Running") };
        if (process.phase == Phase::Paused) == paused {
            self.action.summary = format!("is {} already", to.to_lowercase());
            return self.action;
        }
        self.phase(from, to, Impact::Live);
        self.action.step(Step::PauseVm { vm: self.name.clone(), mark: self.mark.clone(), paused });
        self.action
    }

    /// From here on it may run.
    fn release(&mut self) {
        if self.vm.held {
            self.held(false);
        }
    }

    /// It stays down until `vmctl start`. First of all: a crash after this leaves what was asked for.
    fn hold(&mut self) {
        let strategy = self.vm.definition.as_ref().map(|definition| definition.run_strategy);
        let restarts = matches!(strategy, Some(RunStrategy::Always | RunStrategy::RerunOnFailure));
        if restarts && !self.vm.held {
            self.held(true);
        }
    }

    fn held(&mut self, held: bool) {
        self.action.step(Step::HoldVm { vm: self.name.clone(), mark: self.mark.clone(), held });
    }

    fn shut_down(&mut self, how: StopHow) {
        self.action.step(Step::StopVm { vm: self.name.clone(), mark: self.mark.clone(), how });
    }

    fn phase(&mut self, from: &str, to: &str, impact: Impact) {
        let (from, to) = (Some(from.to_owned()), Some(to.to_owned()));
        self.action.changes.push(FieldChange { field: "status.phase".to_owned(), from, to, impact });
    }

    fn launch(&mut self) -> Result<(), Blocker> {
        let Some(definition) = &self.vm.definition else {
            return Err(Blocker::new("it has no definition on this host").hint("apply its manifest"));
        };
        if definition.run_strategy == RunStrategy::Halted {
            return Err(Blocker::new("its runStrategy is Halted: the next apply would stop it again")
                .hint("declare `runStrategy: Manual` or `Always`"));
        }
        self.release();
        self.taps(definition)?;
        let definition = Box::new(definition.clone());
        self.action.step(Step::StartVm { vm: self.name.clone(), definition });
        Ok(())
    }

    fn taps(&mut self, definition: &VmDefinition) -> Result<(), Blocker> {
        let links = self.snapshot.links.as_ref().map_err(Blocker::unseen)?;
        for nic in &definition.config.nics {
            let Some(tap) = Tap::of(nic, definition) else {
                return Err(Blocker::new(format!(
                    "its definition says not where the NIC {} belongs",
                    nic.name
                ))
                .hint("apply its manifest"));
            };
            if !links.contains_key(tap.bridge()) {
                return Err(Blocker::new(format!("the bridge {} is not there", tap.bridge()))
                    .hint("apply the manifests that declare it"));
            }
            // A person asked for a start, not for a list of what differs.
            let shown = self.action.changes.len();
            tap.prepare(&mut self.action, links)?;
            self.action.changes.truncate(shown);
        }
        Ok(())
    }
}
