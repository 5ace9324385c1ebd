//! Moves guests' balloons by what memory the host has: looks, asks `plan::balloon`, and sets what it says.
//!
//! Without the host's lock: a balloon is one number of one VM, and each step sets it whole. Nothing is kept;
//! an agent that begins anew goes on from what the VMs say.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::host::linux::LinuxHost;
use crate::host::{Host, Step};
use crate::kinds::virtual_machine::VirtualMachine;
use crate::kinds::{Declared, Spec};
use crate::name::{Kind, Mark, ObjectId, ObjectName};
use crate::plan::balloon::{Guest, Pressure, decide};
use crate::report::units::size;
use crate::vmm::protocol::Phase;

/// Often enough for memory that runs short within seconds; a look costs some small files and a packet for
/// each guest.
const INTERVAL: Duration = Duration::from_secs(2);

pub struct Balloons {
    next: Instant,
}

impl Default for Balloons {
    fn default() -> Self {
        Self { next: Instant::now() }
    }
}

/// The guests that may be pressed, and how far.
fn pressed(declared: &Declared) -> BTreeMap<&ObjectName, (&VirtualMachine, u64)> {
    let vms = declared.objects.iter().filter_map(|(id, spec)| match spec {
        Spec::VirtualMachine(vm) => Some((&id.name, (vm, vm.least_memory?.0))),
        _ => None,
    });
    vms.collect()
}

impl super::Agent<'_> {
    /// Where a policy says so, and it is time. Gives when it is time again.
    pub(super) fn move_balloons(&mut self, now: Instant) -> Option<Instant> {
        let (declaration, _) = self.declared.as_ref()?;
        let declared = &declaration.desired.declared;
        if self.balloons.due(declared)? <= now {
            match self.balloons.run(self.host, declared) {
                Ok(said) => {
                    self.log.forget("balloons");
                    said.iter().for_each(|line| self.log.say(line));
                }
                Err(why) => self.log.state("balloons", &format!("balloons stay as they are: {why}")),
            }
        }
        self.balloons.due(declared)
    }
}

impl Balloons {
    /// When to look next. `None`: there is nothing to move.
    pub fn due(&self, declared: &Declared) -> Option<Instant> {
        declared.host_policy()?.rules.balloon?;
        let has_guest = |spec: &Spec| matches!(spec, Spec::VirtualMachine(vm) if vm.least_memory.is_some());
        declared.objects.values().any(has_guest).then_some(self.next)
    }

    /// Looks and sets; gives what was done, for the log. `Err`: why it could not look.
    pub fn run(&mut self, host: &LinuxHost, declared: &Declared) -> Result<Vec<String>, String> {
        self.next = Instant::now() + INTERVAL;
        let Some(rules) = declared.host_policy().and_then(|policy| policy.rules.balloon) else {
            return Ok(Vec::new());
        };
        let facts = host.facts().map_err(|error| error.to_string())?;
        let pressed = pressed(declared);
        let names: Vec<ObjectName> = pressed.keys().map(|name| (*name).clone()).collect();
        let usage = host.vm_usage(&names).map_err(|error| error.to_string())?;
        let mark = |vm: &ObjectName| {
            Mark::new(declared.set.clone(), ObjectId::new(Kind::VirtualMachine, vm.clone()))
        };
        let mut guests = Vec::new();
        for (name, usage) in usage {
            // One that can't be asked is not pressed; that it can't is told elsewhere.
            let Ok(usage) = usage else { continue };
            let Some((vm, least_bytes)) = pressed.get(&name) else { continue };
            let config = &usage.state.config;
            let Some(balloon) = config.balloon else { continue };
            if config.mark != mark(&name).to_string() || usage.state.phase != Phase::Running {
                continue;
            }
            guests.push(Guest {
                memory_bytes: config.memory_bytes,
                least_bytes: *least_bytes,
                declared_bytes: vm.balloon.map_or(0, |balloon| balloon.target_bytes),
                target_bytes: balloon.target_bytes,
                actual_bytes: usage.metrics.and_then(|metrics| Some(metrics.balloon?.actual_bytes)),
                vm: name,
            });
        }
        let memory = Pressure { available_bytes: facts.available_bytes, stalled: facts.pressure };
        let mut said = Vec::new();
        for (vm, target_bytes) in decide(&rules, memory, &guests) {
            let before = guests.iter().find(|guest| guest.vm == vm).map_or(0, |guest| guest.target_bytes);
            let id = ObjectId::new(Kind::VirtualMachine, vm.clone());
            let step = Step::SetBalloon { mark: mark(&vm), vm, target_bytes };
            let done = host.run(&[&step]).into_iter().collect::<Result<(), _>>();
            said.push(match done {
                Ok(()) => format!(
                    "{id}: balloon {} → {} ({} of the host's memory available)",
                    size(before),
                    size(target_bytes),
                    size(facts.available_bytes)
                ),
                Err(error) => format!("! {id}: {error}"),
            });
        }
        Ok(said)
    }
}
