//! VirtualMachine: differences to steps. What a running guest would notice is staged unless allowed.

use std::collections::BTreeMap;

use super::changes::Changes;
use super::definition::define;
use super::{Boot, CloudInit, VirtualMachine};
use crate::host::Step;
use crate::host::snapshot::{Capability, CpuShare, LinkKind, RunStrategy, Vm, VmDefinition, VmProcess};
use crate::host::step::StopHow;
use crate::kinds::Context;
use crate::kinds::action::{Action, Blocker, FieldChange, Impact, Verb};
use crate::kinds::links;
use crate::name::{LinkName, Mark, ObjectId};
use crate::vmm::config::VmConfig;
use crate::vmm::protocol::ExitReason;

/// How long a guest has to shut down where nothing was declared, in milliseconds.
pub const SHUTDOWN_TIMEOUT_MS: u64 = 60_000;

pub fn compare(id: &ObjectId, want: &VirtualMachine, context: &Context) -> Action {
    let action = Action::new(id, summary(want));
    let vms = match &context.snapshot.vms {
        Ok(vms) => vms,
        Err(error) => return action.blocked(Blocker::unseen(error)),
    };
    let nobody = Vm::default();
    let have = vms.get(&id.name).unwrap_or(&nobody);
    let mark = Mark::new(context.declared.set.clone(), id.clone());
    if let Some(other) = owner(have).filter(|other| *other != mark) {
        return action.blocked(Blocker::new(format!("the VM belongs to set {}", other.set)));
    }
    let process = match &have.process {
        Some(Ok(process)) => Some(process),
        Some(Err(error)) => {
            return action.blocked(
                Blocker::new(format!("its process doesn't answer: {error}"))
                    .hint(format!("`vmctl stop --force {}` ends it", id.name)),
            );
        }
        None => None,
    };
    let definition = match define(&id.name, want, mark.clone(), context) {
        Ok(definition) => definition,
        Err(blocker) => return action.blocked(blocker),
    };
    let mut changes =
        process.map(|process| Changes::between(&process.config, &definition.config)).unwrap_or_default();
    if let Some(most) = want.least_memory.and_then(|least| want.memory.0.checked_sub(least.0))
        && let Some(balloon) = process.and_then(|process| process.config.balloon)
        && context.balloons_follow_memory()
    {
        changes.allow_balloon(balloon.target_bytes, most);
    }
    let compare = Compare { action, id, want, have, process, definition, changes, mark, context };
    compare.run()
}

fn summary(want: &VirtualMachine) -> String {
    let plural = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
    format!(
        "{}, {}, {}, {}",
        plural(want.cpus.into(), "vCPU"),
        want.memory,
        plural(want.disks.len(), "disk"),
        plural(want.interfaces.len(), "NIC")
    )
}

/// Whose the VM is, by its definition or by its process.
pub fn owner(vm: &Vm) -> Option<Mark> {
    let by_process = || vm.process.as_ref()?.as_ref().ok()?.config.mark.parse().ok();
    vm.definition.as_ref().map(|definition| definition.mark.clone()).or_else(by_process)
}

/// Whether it should run, given how it ended and what people said.
fn should_run(strategy: RunStrategy, vm: &Vm, runs: bool) -> bool {
    match strategy {
        RunStrategy::Halted => false,
        RunStrategy::Manual => runs,
        RunStrategy::Always => !vm.held,
        RunStrategy::RerunOnFailure => {
            let done = vm
                .exit
                .as_ref()
                .is_some_and(|exit| matches!(exit.reason, ExitReason::GuestPowerOff | ExitReason::Stopped));
            runs || (!vm.held && !done)
        }
    }
}

pub(super) struct Compare<'a> {
    pub action: Action,
    pub id: &'a ObjectId,
    pub want: &'a VirtualMachine,
    have: &'a Vm,
    process: Option<&'a VmProcess>,
    pub definition: VmDefinition,
    /// Between what runs and what is declared.
    changes: Changes,
    pub mark: Mark,
    pub context: &'a Context<'a>,
}

impl<'a> Compare<'a> {
    fn run(mut self) -> Action {
        let should_run = should_run(self.want.run_strategy, self.have, self.process.is_some());
        if self.have.held && self.want.run_strategy != RunStrategy::Halted {
            self.action
                .note(format!("held down by `vmctl stop`; `vmctl start {}` lets it run", self.id.name));
        }
        match (self.process, should_run) {
            (None, true) => self.start(),
            (None, false) => self.stay_down(),
            (Some(process), true) => self.keep_running(process),
            (Some(process), false) => self.stop(process),
        }
        self.action.finish()
    }

    fn start(&mut self) {
        if let Err(blocker) = self.check_startable() {
            self.action.block(blocker);
            return;
        }
        let is_new = self.have.definition.is_none();
        if is_new {
            self.action.verb(Verb::Create, "not defined on this host");
        } else {
            let because = match &self.have.exit {
                Some(exit) => format!("not running ({})", exit.message),
                None => "not running".to_owned(),
            };
            self.define_differences();
            self.action.differs("status.phase", Some("Stopped".into()), Some("Running".into()), Impact::Live);
            self.action.verb(Verb::Update, because);
        }
        self.cpu_share();
        self.prepare_taps();
        self.define_step();
        self.start_step();
    }

    fn stay_down(&mut self) {
        if self.have.definition.is_none() {
            self.action.verb(Verb::Create, "not defined on this host");
        } else {
            self.define_differences();
        }
        self.define_step();
        self.remove_taps(|_| true);
    }

    fn stop(&mut self, process: &VmProcess) {
        self.action.differs("status.phase", Some("Running".into()), Some("Stopped".into()), Impact::Restart);
        let because = if self.have.held { "`vmctl stop`" } else { "runStrategy" };
        self.action.verb(Verb::Update, format!("{because} says that it doesn't run (pid {})", process.pid));
        self.define_step();
        self.stop_step();
        self.remove_taps(|_| true);
    }

    fn keep_running(&mut self, process: &VmProcess) {
        let changes = std::mem::take(&mut self.changes);
        if !changes.staged.is_empty() && self.want.restart_allowed {
            self.restart(changes);
        } else {
            self.conditions(process);
            self.change_live(process, changes);
        }
    }

    fn restart(&mut self, changes: Changes) {
        if let Err(blocker) = self.check_startable() {
            self.action.block(blocker);
            return;
        }
        for change in changes.into_shown() {
            self.action.changes.push(FieldChange { impact: Impact::Restart, ..change });
        }
        self.action.verb(Verb::Restart, "the guest must restart for this, and restartPolicy allows it");
        self.cpu_share();
        self.stop_step();
        self.prepare_taps();
        self.define_step();
        self.start_step();
    }

    /// The part of the host's CPUs: of a VM that runs what its cgroup says, for somebody may have written
    /// there, else what the definition remembers.
    pub(super) fn cpu_share(&mut self) {
        let Some(stored) = self.have.definition.as_ref().map(|definition| definition.cpu_share) else {
            return;
        };
        let want = self.definition.cpu_share;
        let have = self.process.and_then(|process| process.cpu_share).unwrap_or(stored);
        if have == want {
            return;
        }
        let weight = |share: CpuShare| Some(share.weight.to_string());
        let quota = |share: CpuShare| share.quota_percent.map(|percent| percent.to_string());
        for (field, from, to) in
            [("cpu.weight", weight(have), weight(want)), ("cpu.quotaPercent", quota(have), quota(want))]
        {
            if from != to {
                self.action.differs(field, from, to, Impact::Live);
            }
        }
        if self.process.is_some() {
            let (vm, mark) = (self.id.name.clone(), self.mark.clone());
            self.action.step(Step::SetCpuShare { vm, mark, share: want });
        }
    }

    pub(super) fn definition_differs(&self) -> bool {
        self.have.definition.as_ref() != Some(&self.definition)
    }

    /// Differences between the stored definition and the declared one that are not shown yet.
    pub(super) fn define_differences(&mut self) {
        let Some(stored) = &self.have.definition else {
            if self.process.is_some() {
                self.action.differs("definition", None, Some("stored".into()), Impact::Live);
            }
            return;
        };
        let shown = Changes::between(&stored.config, &self.definition.config).into_shown();
        // What a running guest is short of has been shown: the rest it has already.
        let runs = self.process.is_some();
        let settle = |change: FieldChange| FieldChange {
            impact: if runs { Impact::Live } else { Impact::Staged },
            ..change
        };
        let mut changes: Vec<FieldChange> = shown.map(settle).collect();
        if stored.run_strategy != self.definition.run_strategy {
            changes.push(FieldChange {
                field: "runStrategy".into(),
                from: Some(format!("{:?}", stored.run_strategy)),
                to: Some(format!("{:?}", self.definition.run_strategy)),
                impact: Impact::Live,
            });
        }
        for (index, nic) in self.definition.config.nics.iter().enumerate() {
            let place = stored.config.nics.iter().position(|stored| stored.name == nic.name);
            let from = place.and_then(|place| stored.bridges.get(place));
            let to = self.definition.bridges.get(index);
            let mut differs = |field: &str, from: String, to: String| {
                let field = format!("interfaces[{}].{field}", nic.name);
                changes.push(FieldChange { field, from: Some(from), to: Some(to), impact: Impact::Live });
            };
            if let (Some(from), Some(to)) = (from, to)
                && from != to
            {
                differs("bridge", from.to_string(), to.to_string());
            }
            let none = BTreeMap::new();
            let from = place.and_then(|place| stored.vlans.get(place)).unwrap_or(&none);
            let to = self.definition.vlans.get(index).unwrap_or(&none);
            if place.is_some() && from != to {
                differs("vlan", links::describe_vlans(from), links::describe_vlans(to));
            }
        }
        for change in changes {
            if self.action.changes.iter().all(|shown| shown.field != change.field) {
                self.action.changes.push(change);
            }
        }
    }

    /// Another set's VM may have the context id: the sets don't know of one another.
    fn check_context_id(&self) -> Result<(), Blocker> {
        let Some(vsock) = self.definition.config.vsock else { return Ok(()) };
        let has_it = |config: &VmConfig| config.vsock.is_some_and(|there| there.cid == vsock.cid);
        let mut others =
            self.context.snapshot.vms.iter().flatten().filter(|(name, _)| **name != self.id.name);
        let taken = others.find(|(_, vm)| {
            let running = vm.process.as_ref().and_then(|process| process.as_ref().ok());
            running.is_some_and(|process| has_it(&process.config))
        });
        match taken {
            Some((name, _)) => Err(Blocker::new(format!(
                "vsock.cid: the context id {} is that of the running VM {name}",
                vsock.cid
            ))
            .hint("declare another `vsock.cid`")),
            None => Ok(()),
        }
    }

    fn check_startable(&self) -> Result<(), Blocker> {
        self.check_context_id()?;
        let snapshot = self.context.snapshot;
        for capability in [Capability::Kvm, Capability::Tun] {
            let needed = capability == Capability::Kvm || !self.want.interfaces.is_empty();
            if let Some(how) = snapshot.lacks.get(&capability).filter(|_| needed) {
                return Err(Blocker::lacks(capability, how));
            }
        }
        let mut files = Vec::new();
        match &self.want.boot {
            Boot::Kernel { kernel, initrd, .. } => {
                files.push(("boot.kernel", kernel));
                files.extend(initrd.iter().map(|path| ("boot.initrd", path)));
            }
            Boot::Disk(_) => super::bootable::check(self.want, self.context)?,
        }
        let user_data = self.want.cloud_init.as_ref().and_then(CloudInit::file);
        files.extend(user_data.map(|path| ("cloudInit.userDataFile", path)));
        for (field, path) in files {
            match snapshot.files.get(path) {
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(Blocker::unseen(error)),
                None => {
                    return Err(Blocker::new(format!("{field}: {} is not there", path.display()))
                        .hint("put the file there, or correct the path"));
                }
            }
        }
        Ok(())
    }

    pub(super) fn define_step(&mut self) {
        if self.definition_differs() {
            let definition = Box::new(self.definition.clone());
            self.action.step(Step::DefineVm { vm: self.id.name.clone(), definition });
        }
    }

    fn start_step(&mut self) {
        let definition = Box::new(self.definition.clone());
        self.action.step(Step::StartVm { vm: self.id.name.clone(), definition });
    }

    fn stop_step(&mut self) {
        let timeout_ms = u64::from(self.want.shutdown_timeout_seconds) * 1000;
        let how = if timeout_ms == 0 { StopHow::Forced } else { StopHow::Graceful { timeout_ms } };
        self.action.step(Step::StopVm { vm: self.id.name.clone(), mark: self.mark.clone(), how });
    }

    /// Taps of this VM for which `unused` holds.
    pub(super) fn remove_taps(&mut self, unused: impl Fn(&LinkName) -> bool) {
        let context = self.context;
        for (name, link, mark) in context.links_of(self.id) {
            if matches!(link.kind, LinkKind::Tap { .. }) && unused(name) {
                if !self.action.changes.iter().any(|change| change.field == "status.phase")
                    && self.action.verb != Verb::Restart
                {
                    self.action.differs("tap", Some(name.to_string()), None, Impact::Live);
                }
                self.action.step(Step::DeleteLink { link: (*name).clone(), mark: mark.clone() });
            }
        }
    }
}
