//! Which VMs fit: the host's policy bounds what all VMs that run may have together.
//!
//! Those that run come first and are never stopped for it, whatever the policy says; then those that are to
//! start, by their names. So the same manifests on the same host always start the same VMs.

use std::collections::BTreeMap;

use crate::host::Step;
use crate::host::snapshot::{PolicyRules, Snapshot, VmDefinition};
use crate::kinds::Declared;
use crate::kinds::action::{Action, Blocker};
use crate::kinds::host_policy::capacity::{Amount, Capacity, ratio, taken};
use crate::name::{ByteSize, Kind, ObjectId, ObjectName};

/// The declared policy, or the one that is recorded: another set's holds for this one, too.
fn rules<'a>(declared: Option<&'a Declared>, snapshot: &'a Snapshot) -> Option<&'a PolicyRules> {
    let declared = declared.and_then(Declared::host_policy).map(|policy| &policy.rules);
    let recorded = snapshot.host.as_ref().ok().and_then(|host| host.policy.as_ref());
    declared.or(recorded.map(|policy| &policy.rules))
}

/// Blocks what doesn't fit; lets what fits only once others have stopped wait for these.
pub fn settle(declared: Option<&Declared>, snapshot: &Snapshot, actions: &mut [Action], removals: &[Action]) {
    if !actions.iter().any(|action| starts(action).is_some()) {
        return;
    }
    let host = match &snapshot.host {
        Ok(host) => host,
        Err(error) => {
            // Whether there is a policy can't be told, nor what it would say.
            for action in actions.iter_mut().filter(|action| starts(action).is_some()) {
                block(action, vec![Blocker::unseen(error)]);
            }
            return;
        }
    };
    let Some(rules) = rules(declared, snapshot) else { return };
    let mut room = Room::new(Capacity::of(host, rules), rules, snapshot);
    for action in removals.iter().chain(&*actions).filter(|action| starts(action).is_none()) {
        room.note_stop(action);
    }
    let policy = actions.iter().find(|action| action.object.kind == Kind::HostPolicy);
    let policy =
        policy.filter(|action| action.steps.iter().any(|step| matches!(step, Step::SetHostSetting { .. })));
    let policy = policy.map(|action| action.object.clone());
    let mut order: Vec<usize> =
        (0..actions.len()).filter(|index| starts(&actions[*index]).is_some()).collect();
    order.sort_by_key(|index| {
        let id = &actions[*index].object;
        (!room.running.contains_key(&id.name), id.name.clone())
    });
    for index in order {
        let action = &mut actions[index];
        let Some(definition) = starts(action) else { continue };
        let wanted = Amount::of(&definition.config);
        match room.admit(&action.object.name, &wanted) {
            Ok(waits) => {
                let own = action.object.clone();
                action.after.extend(waits.into_iter().filter(|id| *id != own));
                if !wanted.hugepages.is_empty() {
                    action.after.extend(policy.clone());
                }
            }
            Err(blockers) => block(action, blockers),
        }
    }
}

fn starts(action: &Action) -> Option<&VmDefinition> {
    action.steps.iter().find_map(|step| match step {
        Step::StartVm { definition, .. } => Some(&**definition),
        _ => None,
    })
}

fn block(action: &mut Action, blockers: Vec<Blocker>) {
    let mut taken = std::mem::replace(action, Action::new(&action.object, ""));
    taken.changes.clear();
    for blocker in blockers {
        taken = taken.blocked(blocker);
    }
    *action = taken;
}

struct Room<'a> {
    capacity: Capacity,
    rules: &'a PolicyRules,
    /// What runs now, and what was admitted.
    running: BTreeMap<&'a ObjectName, Amount>,
    admitted: BTreeMap<ObjectName, Amount>,
    used: Amount,
    /// By VMs that this plan stops.
    freed: Amount,
    stopping: Vec<ObjectId>,
}

impl<'a> Room<'a> {
    fn new(capacity: Capacity, rules: &'a PolicyRules, snapshot: &'a Snapshot) -> Self {
        let vms = snapshot.vms.iter().flatten();
        let running: BTreeMap<&ObjectName, Amount> =
            vms.filter_map(|(name, vm)| Some((name, taken(vm)?))).collect();
        let mut used = Amount::default();
        running.values().for_each(|amount| used.add(amount));
        let admitted = running.iter().map(|(name, amount)| ((*name).clone(), amount.clone())).collect();
        Self { capacity, rules, running, admitted, used, freed: Amount::default(), stopping: Vec::new() }
    }

    fn note_stop(&mut self, action: &Action) {
        for step in &action.steps {
            if let Step::StopVm { vm, .. } = step
                && let Some(amount) = self.running.get(vm)
            {
                self.freed.add(amount);
                self.admitted.remove(vm);
                self.stopping.push(action.object.clone());
            }
        }
    }

    /// The VMs that must have stopped before, or why there is no room.
    fn admit(&mut self, vm: &ObjectName, wanted: &Amount) -> Result<Vec<ObjectId>, Vec<Blocker>> {
        let own = self.running.get(vm).cloned().unwrap_or_default();
        let mut others = self.used.clone();
        others.remove(&own);
        let mut later = others.clone();
        later.remove(&self.freed);
        let blockers = self.blockers(wanted, &own, &later);
        if !blockers.is_empty() {
            return Err(blockers);
        }
        let waits =
            if self.blockers(wanted, &own, &others).is_empty() { Vec::new() } else { self.stopping.clone() };
        self.used = others;
        self.used.add(wanted);
        self.admitted.insert(vm.clone(), wanted.clone());
        Ok(waits)
    }

    /// What doesn't fit beside the others. A VM that is restarted may always stay as large as it is.
    fn blockers(&self, wanted: &Amount, own: &Amount, others: &Amount) -> Vec<Blocker> {
        let mut blockers = Vec::new();
        if let Some(limit) = self.capacity.vcpus
            && wanted.vcpus > own.vcpus
            && others.vcpus + wanted.vcpus > limit
        {
            let factor = self.rules.cpu_overcommit_thousandths.map(ratio).unwrap_or_default();
            let because = format!(
                "its {} fit: {} of {limit} are taken{} (cpuOvercommit {factor})",
                if wanted.vcpus == 1 {
                    "1 vCPU doesn't".to_owned()
                } else {
                    format!("{} vCPUs don't", wanted.vcpus)
                },
                others.vcpus,
                self.by_whom(|amount| amount.vcpus)
            );
            blockers.push(Blocker::new(because).hint(hint("cpuOvercommit")));
        }
        if let Some(limit) = self.capacity.memory_bytes
            && wanted.memory_bytes > own.memory_bytes
            && others.memory_bytes + wanted.memory_bytes > limit
        {
            let factor = self.rules.memory_overcommit_thousandths.map(ratio).unwrap_or_default();
            let because = format!(
                "its {} of memory don't fit: {} of {} are taken{} ({} for guests, memoryOvercommit {factor})",
                size(wanted.memory_bytes),
                size(others.memory_bytes),
                size(limit),
                self.by_whom(|amount| amount.memory_bytes),
                size(self.capacity.usable_bytes)
            );
            blockers.push(Blocker::new(because).hint(hint("memoryOvercommit")));
        }
        for (page, count) in &self.capacity.hugepages {
            let (wanted, own, others) = (wanted.pages(*page), own.pages(*page), others.pages(*page));
            if wanted > own && others + wanted > *count {
                let shown = ByteSize(*page);
                let because = format!(
                    "its {wanted} huge pages of {shown} don't fit: {others} of {count} are taken{}",
                    self.by_whom(|amount| amount.pages(*page))
                );
                blockers.push(Blocker::new(because).hint(hint(&format!("hugepages.{shown}"))));
            }
        }
        blockers
    }

    /// ` by a, b and 3 more`
    fn by_whom(&self, share: impl Fn(&Amount) -> u64) -> String {
        const SHOWN_MAX: usize = 4;
        let names: Vec<&str> = self
            .admitted
            .iter()
            .filter(|(_, amount)| share(amount) > 0)
            .map(|(name, _)| name.as_str())
            .collect();
        match names.len() {
            0 => String::new(),
            many if many > SHOWN_MAX => {
                format!(" by {} and {} more", names[..SHOWN_MAX].join(", "), many - SHOWN_MAX)
            }
            _ => format!(" by {}", names.join(", ")),
        }
    }
}

fn hint(field: &str) -> String {
    format!(
        "stop another VM, make this one smaller, or raise `{field}` of the HostPolicy; those that run are never stopped for it"
    )
}

/// A size with a decimal, for a person: a host's is hardly ever a round number.
fn size(bytes: u64) -> String {
    let (value, unit) = if bytes >= 1 << 30 {
        (bytes as f64 / (1u64 << 30) as f64, "Gi")
    } else {
        (bytes as f64 / (1 << 20) as f64, "Mi")
    };
    let text = format!("{value:.1}");
    format!("{}{unit}", text.strip_suffix(".0").unwrap_or(&text))
}
