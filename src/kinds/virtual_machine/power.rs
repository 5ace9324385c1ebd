//! Start, stop and restart of a VM as it is defined on the host, without its manifest: what people ask for
//! by `vmctl start` and `vmctl stop`. Leaves the host as a later plan wants it, so that the plan is empty.

use super::compare::{SHUTDOWN_TIMEOUT_MS, owner};
use super::definition::tap_mac;
use crate::host::Step;
use crate::host::snapshot::{Link, LinkKind, RunStrategy, Snapshot, Vm, VmDefinition};
use crate::host::step::{LinkChange, NewLink, NewLinkKind, StopHow};
use crate::kinds::action::{Action, Blocker, FieldChange, Impact, Verb};
use crate::name::{Kind, LinkName, Mark, ObjectId, ObjectName, SetName};
use crate::vmm::config::NicConfig;

/// What people ask of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Power {
    Start,
    Stop(StopHow),
    Restart(StopHow),
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
                    && link.kind == LinkKind::Tap
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
        for (nic, bridge) in definition.config.nics.iter().zip(&definition.bridges) {
            let tap = LinkName::parse(&nic.tap).map_err(|error| Blocker::new(error.to_string()))?;
            if !links.contains_key(bridge) {
                return Err(Blocker::new(format!("the bridge {bridge} is not there"))
                    .hint("apply the manifests that declare it"));
            }
            self.tap(nic, tap, bridge, links)?;
        }
        Ok(())
    }

    fn tap(
        &mut self,
        nic: &NicConfig,
        tap: LinkName,
        bridge: &LinkName,
        links: &std::collections::BTreeMap<LinkName, Link>,
    ) -> Result<(), Blocker> {
        let mark = Mark::part(self.mark.set.clone(), self.mark.owner.clone(), nic.name.clone());
        let Some(have) = links.get(&tap) else {
            self.action.step(Step::CreateLink(NewLink {
                name: tap,
                mark,
                kind: NewLinkKind::Tap,
                mtu: Some(nic.mtu.into()),
                mac_address: nic.mac_address.parse().ok().map(tap_mac),
                master: Some(bridge.clone()),
                port: None,
                up: true,
            }));
            return Ok(());
        };
        if have.kind != LinkKind::Tap || have.mark().as_ref() != Some(&mark) {
            return Err(Blocker::new(format!("the link {tap} exists and is not this VM's tap")));
        }
        if have.master.as_ref() != Some(bridge) {
            let change = LinkChange::Master(Some(bridge.clone()));
            self.action.step(Step::SetLink { link: tap.clone(), change });
        }
        if !have.up {
            self.action.step(Step::SetLink { link: tap, change: LinkChange::Up(true) });
        }
        Ok(())
    }
}
