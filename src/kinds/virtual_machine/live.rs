//! VirtualMachine: what changes while its guest runs, and in which order.

use super::changes::{Changes, LiveChange, Work};
use super::compare::Compare;
use super::taps::Tap;
use crate::host::Step;
use crate::host::snapshot::{ProcessLimits, VmProcess};
use crate::kinds::action::{FieldChange, Impact, Verb};
use crate::name::{ByteSize, LinkName, Mark};
use crate::vmm::config::NicConfig;
use crate::vmm::protocol::{ConditionKind, Phase};

impl Compare<'_> {
    /// What a person should know of a guest that runs: nothing here mends it.
    pub(super) fn conditions(&mut self, process: &VmProcess) {
        for condition in &process.conditions {
            self.action.note(condition.message.clone());
        }
        let full = process.condition(ConditionKind::DiskFull, None).is_some();
        if process.phase == Phase::Paused && !full {
            self.action.note(format!("paused; `vmctl resume {}` lets it go on", self.id.name));
        }
    }

    /// In this order: what stays, what comes, the definition, what goes. A guest that won't let go of a
    /// device holds up nothing else, and the next start is without that device already.
    pub(super) fn change_live(&mut self, process: &VmProcess, changes: Changes) {
        let staged = self.stage(&changes);
        // Nothing but a seed is staged where a restart is allowed.
        let restarts = self.want.restart_allowed || changes.staged.is_empty();
        let Changes { live, .. } = changes;
        let going = |name: &str| {
            live.iter().any(|change| match &change.work {
                Work::Remove { device } => device == name,
                Work::ReplaceNic(nic) => nic.name == name,
                _ => false,
            })
        };
        let staying: Vec<&NicConfig> = process.config.nics.iter().filter(|nic| !going(&nic.name)).collect();
        if let Err(blocker) = self.keep_taps(&staying) {
            self.action.steps.clear();
            self.action.block(blocker);
            return;
        }
        let (mut comes, mut goes) = (Vec::new(), Vec::new());
        for LiveChange { shown, work } in live {
            self.action.changes.push(shown);
            match work {
                Work::AddDisk(_) | Work::AddNic(_) => comes.push(work),
                Work::Remove { .. } | Work::ReplaceDisk(_) | Work::ReplaceNic(_) => goes.push(work),
                setting => self.set_live(setting),
            }
        }
        self.cpu_share();
        self.process_limits(process);
        self.remove_taps(|tap| {
            let runs = process.config.nics.iter().any(|nic| nic.tap == tap.as_str());
            !runs && !comes.iter().any(|work| matches!(work, Work::AddNic(nic) if nic.tap == tap.as_str()))
        });
        let devices = process.config.disks.len() + process.config.nics.len() + comes.len();
        let is_full = devices > process.config.machine.devices_max();
        // Where there is no slot left, something must go first.
        let late = if is_full { std::mem::take(&mut comes) } else { Vec::new() };
        comes.into_iter().for_each(|work| self.plug(work));
        if self.definition_differs() {
            self.define_differences();
            if staged {
                let because = if restarts {
                    "staged: cloud-init acts when a guest boots"
                } else {
                    "staged: restartPolicy is Never"
                };
                self.action.verb(Verb::Update, because);
            }
            self.define_step();
        }
        // What has been asked for before and isn't gone yet comes last: it may fail again.
        goes.sort_by_key(|work| {
            let device = removed_device(work);
            process.condition(ConditionKind::UnplugPending, device).is_some()
        });
        goes.into_iter().for_each(|work| self.unplug(process, work));
        late.into_iter().for_each(|work| self.plug(work));
    }

    /// Nobody declares these: whoever writes into the cgroup of a running VM is put right.
    fn process_limits(&mut self, process: &VmProcess) {
        let want = ProcessLimits::of(&process.config, process.files_in_memory);
        let Some(have) = process.limits.filter(|have| *have != want) else { return };
        let memory = |limits: ProcessLimits| limits.memory_bytes.map(|bytes| ByteSize(bytes).to_string());
        let threads = |limits: ProcessLimits| limits.threads.map(|threads| threads.to_string());
        for (field, from, to) in [
            ("process.memoryMax", memory(have), memory(want)),
            ("process.threadsMax", threads(have), threads(want)),
        ] {
            if from != to {
                self.action.differs(field, from, to, Impact::Live);
            }
        }
        let (vm, mark) = (self.id.name.clone(), self.mark.clone());
        self.action.step(Step::SetProcessLimits { vm, mark, limits: want });
    }

    /// Shows what waits for the next start. True: it is news to the definition.
    fn stage(&mut self, changes: &Changes) -> bool {
        let staged = || changes.staged.iter().chain(&changes.seed);
        let news = staged().next().is_some() && self.definition_differs();
        for change in staged() {
            if news {
                self.action.changes.push(change.clone());
            } else {
                let to = change.to.as_deref().unwrap_or("none");
                self.action.note(format!("{} {to} takes effect at the next start", change.field));
            }
        }
        if let Some(FieldChange { to: Some(to), .. }) = &changes.order {
            self.action.note(format!("the order {to} takes effect at the next start"));
        }
        news
    }

    fn set_live(&mut self, work: Work) {
        let (vm, mark) = (self.id.name.clone(), self.mark.clone());
        self.action.step(match work {
            Work::DiskLimits { disk, limits } => Step::SetDiskLimits { vm, mark, disk, limits },
            Work::NicLimits { nic, receive, transmit } => {
                Step::SetNicLimits { vm, mark, nic, receive, transmit }
            }
            Work::Carrier { nic, up } => Step::SetCarrier { vm, mark, nic, up },
            Work::BalloonTarget { target_bytes } => Step::SetBalloon { vm, mark, target_bytes },
            Work::AddDisk(_)
            | Work::AddNic(_)
            | Work::Remove { .. }
            | Work::ReplaceDisk(_)
            | Work::ReplaceNic(_) => return,
        });
    }

    fn plug(&mut self, work: Work) {
        let (vm, mark) = (self.id.name.clone(), self.mark.clone());
        match work {
            Work::AddDisk(disk) | Work::ReplaceDisk(disk) => {
                self.action.step(Step::AddDisk { vm, mark, disk: Box::new(disk) });
            }
            Work::AddNic(nic) | Work::ReplaceNic(nic) => {
                // It joins its bridge before the guest has it.
                match self.prepare_tap(&nic) {
                    Ok(()) => self.action.step(Step::AddNic { vm, mark, nic: Box::new(nic) }),
                    Err(blocker) => self.action.block(blocker),
                };
            }
            _ => {}
        }
    }

    fn unplug(&mut self, process: &VmProcess, work: Work) {
        let Some(device) = removed_device(&work).map(str::to_owned) else { return };
        let (vm, mark) = (self.id.name.clone(), self.mark.clone());
        self.action.step(Step::RemoveDevice { vm, mark, device: device.clone() });
        // Only now that the guest has let go of it may the tap go.
        let nic = process.config.nics.iter().find(|nic| nic.name == device);
        let part = Mark::part(self.mark.set.clone(), self.id.clone(), device);
        if let Some(nic) = nic
            && let Ok(link) = LinkName::parse(&nic.tap)
            && self.context.links_of(self.id).iter().any(|(name, ..)| **name == link)
        {
            self.action.step(Step::DeleteLink { link, mark: part });
        }
        match work {
            Work::ReplaceNic(nic) => {
                let (vm, mark) = (self.id.name.clone(), self.mark.clone());
                let tap = Tap::of(&nic, &self.definition).map(|tap| tap.create());
                self.action.steps.extend(tap);
                self.action.step(Step::AddNic { vm, mark, nic: Box::new(nic) });
            }
            Work::ReplaceDisk(_) => self.plug(work),
            _ => {}
        }
    }
}

/// What a step would unplug.
fn removed_device(work: &Work) -> Option<&str> {
    match work {
        Work::Remove { device } => Some(device),
        Work::ReplaceDisk(disk) => Some(&disk.name),
        Work::ReplaceNic(nic) => Some(&nic.name),
        _ => None,
    }
}
