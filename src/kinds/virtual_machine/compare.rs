//! VirtualMachine: differences to steps. What a running guest would notice is staged unless allowed.

use super::VirtualMachine;
use super::definition::{define, tap_mac};
use crate::host::Step;
use crate::host::snapshot::{Capability, Link, LinkKind, RunStrategy, Vm, VmDefinition, VmProcess};
use crate::host::step::{NewLink, NewLinkKind, StopHow};
use crate::kinds::Context;
use crate::kinds::action::{Action, Blocker, FieldChange, Impact, Verb};
use crate::kinds::links;
use crate::name::{ByteSize, LinkName, Mark, ObjectId};
use crate::vmm::config::{BootConfig, KernelBoot, NicConfig, VmConfig};
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
    let changes =
        process.map(|process| config_changes(&process.config, &definition.config)).unwrap_or_default();
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

struct Compare<'a> {
    action: Action,
    id: &'a ObjectId,
    want: &'a VirtualMachine,
    have: &'a Vm,
    process: Option<&'a VmProcess>,
    definition: VmDefinition,
    /// Between what runs and what is declared.
    changes: Vec<FieldChange>,
    mark: Mark,
    context: &'a Context<'a>,
}

impl Compare<'_> {
    fn run(mut self) -> Action {
        let should_run = should_run(self.want.run_strategy, self.have, self.process.is_some());
        if self.have.held && self.want.run_strategy != RunStrategy::Halted {
            self.action
                .note(format!("held down by `vmctl stop`; `vmctl start {}` lets it run", self.id.name));
        }
        match (self.process, should_run) {
            (None, true) => self.start(),
            (None, false) => self.stay_down(),
            (Some(_), true) => self.keep_running(),
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
        self.taps(is_new);
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

    fn keep_running(&mut self) {
        if self.changes.is_empty() {
            self.taps(false);
            if self.definition_differs() {
                self.define_differences();
                self.define_step();
            }
            return;
        }
        if self.want.restart_allowed {
            if let Err(blocker) = self.check_startable() {
                self.action.block(blocker);
                return;
            }
            for change in std::mem::take(&mut self.changes) {
                self.action.changes.push(FieldChange { impact: Impact::Restart, ..change });
            }
            self.action.verb(Verb::Restart, "the guest must restart for this, and restartPolicy allows it");
            self.stop_step();
            self.taps(false);
            self.define_step();
            self.start_step();
        } else {
            let staged = self.definition_differs();
            for change in std::mem::take(&mut self.changes) {
                let to = change.to.as_deref().unwrap_or("none");
                if staged {
                    self.action.changes.push(FieldChange { impact: Impact::Staged, ..change });
                } else {
                    self.action.note(format!("{} {to} takes effect at the next start", change.field));
                }
            }
            self.taps(false);
            if staged {
                self.define_differences();
                self.action.verb(Verb::Update, "staged: restartPolicy is Never");
                self.define_step();
            }
        }
    }

    fn definition_differs(&self) -> bool {
        self.have.definition.as_ref() != Some(&self.definition)
    }

    /// Differences between the stored definition and the declared one that are not shown yet.
    fn define_differences(&mut self) {
        let Some(stored) = &self.have.definition else {
            if self.process.is_some() {
                self.action.differs("definition", None, Some("stored".into()), Impact::Live);
            }
            return;
        };
        let mut changes = config_changes(&stored.config, &self.definition.config);
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
            if let (Some(from), Some(to)) = (from, to)
                && from != to
            {
                changes.push(FieldChange {
                    field: format!("interfaces[{}].bridge", nic.name),
                    from: Some(from.to_string()),
                    to: Some(to.to_string()),
                    impact: Impact::Live,
                });
            }
        }
        for change in changes {
            if self.action.changes.iter().all(|shown| shown.field != change.field) {
                self.action.changes.push(change);
            }
        }
    }

    fn check_startable(&self) -> Result<(), Blocker> {
        let snapshot = self.context.snapshot;
        for capability in [Capability::Kvm, Capability::Tun] {
            let needed = capability == Capability::Kvm || !self.want.interfaces.is_empty();
            if let Some(how) = snapshot.lacks.get(&capability).filter(|_| needed) {
                return Err(Blocker::lacks(capability, how));
            }
        }
        let boot = &self.want.boot;
        for (field, path) in std::iter::once(("boot.kernel", &boot.kernel))
            .chain(boot.initrd.iter().map(|path| ("boot.initrd", path)))
        {
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

    fn define_step(&mut self) {
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

    /// Makes the taps what they should be, and removes those that nothing uses.
    fn taps(&mut self, is_new: bool) {
        let links = match &self.context.snapshot.links {
            Ok(links) => links,
            Err(error) => {
                self.action.steps.clear();
                self.action.block(Blocker::unseen(error));
                return;
            }
        };
        // A running guest keeps the NICs that it runs with until it restarts.
        let restarts = self.action.verb == Verb::Restart;
        let running: Vec<NicConfig> = match self.process {
            Some(process) if !restarts => process.config.nics.clone(),
            _ => self.definition.config.nics.clone(),
        };
        for nic in &running {
            let place = self.definition.config.nics.iter().position(|declared| declared.name == nic.name);
            let Some(bridge) = place.and_then(|place| self.definition.bridges.get(place).cloned()) else {
                continue;
            };
            let Ok(tap) = LinkName::parse(&nic.tap) else { continue };
            self.tap(nic, &tap, &bridge, links.get(&tap), is_new);
        }
        let used: Vec<String> = running.into_iter().map(|nic| nic.tap).collect();
        self.remove_taps(|tap| !used.iter().any(|used| used == tap.as_str()));
    }

    fn tap(&mut self, nic: &NicConfig, tap: &LinkName, bridge: &LinkName, have: Option<&Link>, is_new: bool) {
        let mark = Mark::part(self.mark.set.clone(), self.id.clone(), nic.name.clone());
        let field = format!("interfaces[{}]", nic.name);
        let Some(have) = have else {
            let mac = nic.mac_address.parse().ok().map(tap_mac);
            if !is_new && self.process.is_some() {
                self.action.differs(format!("{field}.tap"), None, Some(tap.to_string()), Impact::Live);
            }
            self.action.step(Step::CreateLink(NewLink {
                name: tap.clone(),
                mark,
                kind: NewLinkKind::Tap,
                mtu: Some(nic.mtu.into()),
                mac_address: mac,
                master: Some(bridge.clone()),
                port: None,
                up: true,
            }));
            if self.process.is_some() && self.action.verb != Verb::Restart {
                self.action.step(Step::ReplaceTap {
                    vm: self.id.name.clone(),
                    mark: self.mark.clone(),
                    nic: nic.name.clone(),
                    tap: tap.clone(),
                });
            }
            return;
        };
        if have.mark().as_ref() != Some(&mark) || have.kind != LinkKind::Tap {
            self.action.block(
                Blocker::new(format!("the link {tap} exists and is not this VM's tap"))
                    .hint(format!("remove or rename it (`ip link set {tap} name …`)")),
            );
            return;
        }
        links::compare_master(
            &mut self.action,
            &format!("{field}.bridge"),
            tap,
            have.master.as_ref(),
            Some(bridge),
        );
        if have.mtu != u32::from(nic.mtu) || !have.up {
            let before = self.action.changes.len();
            links::compare_mtu_and_up(&mut self.action, tap, have, nic.mtu.into());
            for change in &mut self.action.changes[before..] {
                change.field = format!("{field}.{}", change.field);
            }
        }
    }

    /// Taps of this VM for which `unused` holds.
    fn remove_taps(&mut self, unused: impl Fn(&LinkName) -> bool) {
        let context = self.context;
        for (name, link, mark) in context.links_of(self.id) {
            if link.kind == LinkKind::Tap && unused(name) {
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

/// What differs between two configurations, in the manifest's words. All of it needs a restart.
fn config_changes(have: &VmConfig, want: &VmConfig) -> Vec<FieldChange> {
    let mut changes = Vec::new();
    let mut differs = |field: String, from: Option<String>, to: Option<String>| {
        if from != to {
            changes.push(FieldChange { field, from, to, impact: Impact::Staged });
        }
    };
    differs("cpus".into(), Some(have.vcpus.to_string()), Some(want.vcpus.to_string()));
    differs(
        "memory".into(),
        Some(ByteSize(have.memory_bytes).to_string()),
        Some(ByteSize(want.memory_bytes).to_string()),
    );
    let kernel = |config: &VmConfig| match &config.boot {
        BootConfig::Kernel(boot) => Some(boot.clone()),
        BootConfig::Disk(_) => None,
    };
    let (from, to) = (kernel(have), kernel(want));
    let of = |field: fn(&KernelBoot) -> Option<String>| {
        (from.as_ref().and_then(field), to.as_ref().and_then(field))
    };
    for (name, (from, to)) in [
        ("boot.kernel", of(|boot| Some(boot.kernel_path.clone()))),
        ("boot.initrd", of(|boot| boot.initrd_path.clone())),
        ("boot.cmdline", of(|boot| Some(boot.cmdline.clone()))),
    ] {
        differs(name.into(), from, to);
    }
    let disk = |config: &VmConfig, name: &str| {
        let disk = config.disks.iter().find(|disk| disk.name == name)?;
        Some(format!("{}{}", disk.path, if disk.read_only { " (read-only)" } else { "" }))
    };
    let mut disks: Vec<&str> = have.disks.iter().chain(&want.disks).map(|disk| disk.name.as_str()).collect();
    disks.sort_unstable();
    disks.dedup();
    for name in disks {
        differs(format!("disks[{name}]"), disk(have, name), disk(want, name));
    }
    let nic = |config: &VmConfig, name: &str| {
        let nic = config.nics.iter().find(|nic| nic.name == name)?;
        Some(format!("{} mtu {}", nic.mac_address, nic.mtu))
    };
    let mut nics: Vec<&str> = have.nics.iter().chain(&want.nics).map(|nic| nic.name.as_str()).collect();
    nics.sort_unstable();
    nics.dedup();
    for name in nics {
        differs(format!("interfaces[{name}]"), nic(have, name), nic(want, name));
    }
    let order = |config: &VmConfig| -> Vec<String> {
        let disks = config.disks.iter().map(|disk| disk.name.clone());
        disks.chain(config.nics.iter().map(|nic| nic.name.clone())).collect()
    };
    let (from, to) = (order(have), order(want));
    if changes.is_empty() && from != to {
        changes.push(FieldChange {
            field: "devices".into(),
            from: Some(from.join(", ")),
            to: Some(to.join(", ")),
            impact: Impact::Staged,
        });
    }
    changes
}
