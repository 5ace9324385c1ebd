//! `plan(desired, snapshot, policy) -> Plan`: every decision, and nothing else. Pure, deterministic,
//! without I/O; the plan leaves no choice to who runs it.

mod admission;
pub mod balloon;
mod disks;
mod fingerprint;
mod guard;
mod removal;

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::host::Snapshot;
use crate::host::Step;
use crate::kinds::Context;
use crate::kinds::action::{Action, Blocker, Impact, Verb};
use crate::name::{ObjectId, SetName};
use crate::resolve::Desired;

pub use fingerprint::{Fingerprint, fingerprint};

/// What the caller wants and allows.
#[derive(Clone, Debug, Default)]
pub struct Policy {
    pub removal: Removal,
    /// Only these objects (of those declared).
    pub only: Option<BTreeSet<ObjectId>>,
    /// The hash of a plan whose refusals a person has read and allowed.
    pub approve: Option<String>,
}

/// What happens to objects of the set that are not declared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Removal {
    /// They are left alone.
    #[default]
    Keep,
    /// They are removed. The mass guard applies.
    Prune,
    /// These are removed, because a person named them.
    Only(BTreeSet<ObjectId>),
    /// Wanted, but the source could not be read whole: nothing is removed.
    Frozen,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Plan {
    pub set: SetName,
    /// One an object, in an order in which they can run.
    pub actions: Vec<Action>,
    /// Why a part is refused without consent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub refusals: Vec<Refusal>,
    /// Names this plan: the same desire on the same host gives the same hash.
    pub hash: String,
    /// Consent was given for exactly this plan.
    pub approved: bool,
    /// What the plan was made from: see [`fingerprint`].
    pub observed: Fingerprint,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Refusal {
    pub because: String,
    pub objects: Vec<ObjectId>,
}

/// How many of what; in the order in which people read it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Summary {
    pub create: usize,
    pub adopt: usize,
    /// Live changes of existing objects.
    pub update: usize,
    pub staged: usize,
    pub restart: usize,
    pub replace: usize,
    pub delete: usize,
    pub retain: usize,
    pub refused: usize,
    pub blocked: usize,
    pub unchanged: usize,
}

pub fn plan(desired: &Desired, snapshot: &Snapshot, policy: &Policy) -> Plan {
    let context = Context::new(&desired.declared, snapshot);
    let wanted = |id: &ObjectId| policy.only.as_ref().is_none_or(|only| only.contains(id));
    let mut actions: Vec<Action> = Vec::with_capacity(desired.order.len());
    for id in desired.order.iter().filter(|id| wanted(id)) {
        let spec = &desired.declared.objects[id];
        let mut action = spec.compare(id, &context);
        if !action.steps.is_empty() {
            action.after.extend(desired.dependencies[id].iter().cloned());
        }
        actions.push(action);
    }
    let mut removals = removal::removals(&context, &policy.removal);
    disks::settle(&context, &mut actions, &mut removals);
    admission::settle(Some(&desired.declared), snapshot, &mut actions, &removals);
    actions = sort(actions, removals);
    settle_blocks(&mut actions);

    let mut refusals = guard::refusals(&context, &policy.removal, &actions);
    let data_loss: Vec<ObjectId> =
        actions.iter().filter(|action| loses_data(action)).map(|action| action.object.clone()).collect();
    if !data_loss.is_empty() {
        refusals.push(Refusal { because: "data would be lost".to_owned(), objects: data_loss });
    }
    let overwritten: Vec<ObjectId> =
        actions.iter().filter(|action| takes_devices(action)).map(|action| action.object.clone()).collect();
    if !overwritten.is_empty() {
        refusals.push(Refusal { because: "a device would be written over".to_owned(), objects: overwritten });
    }
    let hash = hash(&actions, &refusals);
    let approved =
        policy.approve.as_deref().is_some_and(|approve| approve.len() >= 8 && hash.starts_with(approve));
    if !approved {
        refuse(&mut actions, &refusals);
    }
    let observed = fingerprint(snapshot, &actions);
    Plan { set: desired.declared.set.clone(), actions, refusals, hash, approved, observed }
}

/// Blocks starts of VMs for which the host's recorded policy has no room: for plans that a person asked for
/// by name, without manifests.
pub fn admit(snapshot: &Snapshot, actions: &mut [Action]) {
    admission::settle(None, snapshot, actions, &[]);
}

impl Plan {
    /// Whether there is anything to do, to allow or to unblock.
    pub fn is_empty(&self) -> bool {
        !self.actions.iter().any(Action::is_difference)
    }

    /// Whether no field on the host differs from what is declared, though some objects may yet have to be
    /// marked as vmctl's.
    pub fn is_in_sync(&self) -> bool {
        self.actions.iter().all(|action| !action.is_difference() || action.only_marks())
    }

    /// Whether running it would do anything.
    pub fn has_steps(&self) -> bool {
        self.actions.iter().any(|action| !action.steps.is_empty())
    }

    /// Takes the steps away from these objects and from what waits for them, for now.
    pub fn hold(&mut self, objects: &BTreeSet<ObjectId>) {
        if objects.is_empty() {
            return;
        }
        let mut held = objects.clone();
        for action in self.actions.iter_mut().filter(|action| !action.steps.is_empty()) {
            if held.contains(&action.object) || action.after.iter().any(|id| held.contains(id)) {
                held.insert(action.object.clone());
                action.steps.clear();
            }
        }
    }

    pub fn steps(&self) -> impl Iterator<Item = (&ObjectId, &Step)> {
        self.actions.iter().flat_map(|action| action.steps.iter().map(move |step| (&action.object, step)))
    }

    pub fn is_refused(&self) -> bool {
        !self.approved && !self.refusals.is_empty()
    }

    pub fn is_blocked(&self) -> bool {
        self.actions.iter().any(|action| !action.blockers.is_empty())
    }

    pub fn summary(&self) -> Summary {
        let mut summary = Summary::default();
        for action in &self.actions {
            let count = match action.verb {
                Verb::NoOp => &mut summary.unchanged,
                Verb::Create => &mut summary.create,
                Verb::Adopt => &mut summary.adopt,
                Verb::Update if action.changes.iter().any(|change| change.impact == Impact::Staged) => {
                    &mut summary.staged
                }
                Verb::Update => &mut summary.update,
                Verb::Restart => &mut summary.restart,
                Verb::Replace => &mut summary.replace,
                Verb::Delete => &mut summary.delete,
                Verb::Retain => &mut summary.retain,
                Verb::Refused => &mut summary.refused,
                Verb::Blocked => &mut summary.blocked,
            };
            *count += 1;
        }
        summary
    }
}

/// Whether its steps destroy what can't be made again from the manifests.
fn loses_data(action: &Action) -> bool {
    action.steps.iter().any(|step| match step {
        Step::TrashVolume { .. } => true,
        Step::Lvm(step) => step.loses_data(),
        _ => false,
    })
}

/// Whether its steps make a volume group out of whole devices.
fn takes_devices(action: &Action) -> bool {
    action.steps.iter().any(|step| matches!(step, Step::Lvm(step) if step.takes_devices()))
}

/// Declared actions keep their order; each removal comes as early as what it waits for allows.
fn sort(actions: Vec<Action>, removals: Vec<Action>) -> Vec<Action> {
    let mut waiting: Vec<Action> = removals.into_iter().chain(actions).collect();
    let known: BTreeSet<ObjectId> = waiting.iter().map(|action| action.object.clone()).collect();
    for action in &mut waiting {
        let own = action.object.clone();
        action.after.retain(|id| known.contains(id) && *id != own);
        action.after.sort();
        action.after.dedup();
    }
    // Kahn's algorithm over the positions, the lowest ready position first.
    let position: BTreeMap<ObjectId, usize> =
        waiting.iter().enumerate().map(|(index, action)| (action.object.clone(), index)).collect();
    let mut dependents = vec![Vec::new(); waiting.len()];
    let mut open: Vec<usize> = Vec::with_capacity(waiting.len());
    for (index, action) in waiting.iter().enumerate() {
        open.push(action.after.len());
        for id in &action.after {
            dependents[position[id]].push(index);
        }
    }
    let mut ready: BTreeSet<usize> = (0..waiting.len()).filter(|index| open[*index] == 0).collect();
    let mut order = Vec::with_capacity(waiting.len());
    while let Some(index) = ready.pop_first() {
        order.push(index);
        for &dependent in &dependents[index] {
            open[dependent] -= 1;
            if open[dependent] == 0 {
                ready.insert(dependent);
            }
        }
    }
    let mut slots: Vec<Option<Action>> = waiting.into_iter().map(Some).collect();
    let mut sorted: Vec<Action> = order.into_iter().filter_map(|index| slots[index].take()).collect();
    // A circle of waits (a removal that waits for an update that waits for the removal) can't run.
    for action in slots.into_iter().flatten() {
        let waits: Vec<String> = action.after.iter().map(ToString::to_string).collect();
        sorted.push(action.blocked(Blocker::new(format!("waits in a circle for {}", waits.join(", ")))));
    }
    sorted
}

/// What depends on something that can't be had is blocked too, by name.
fn settle_blocks(actions: &mut [Action]) {
    let mut stuck: BTreeMap<ObjectId, ()> = BTreeMap::new();
    for action in actions {
        let by = action.after.iter().find(|id| stuck.contains_key(*id)).cloned();
        if let Some(by) = by
            && !action.steps.is_empty()
        {
            let taken = std::mem::replace(action, Action::new(&by, ""));
            *action = taken.blocked(Blocker::new(format!("waits for {by}, which is blocked")));
        }
        if action.verb == Verb::Blocked && !action.usable {
            stuck.insert(action.object.clone(), ());
        }
    }
}

/// Takes the steps away from what is refused and from what waits for it.
fn refuse(actions: &mut [Action], refusals: &[Refusal]) {
    let refused: BTreeMap<&ObjectId, &str> = refusals
        .iter()
        .rev()
        .flat_map(|refusal| refusal.objects.iter().map(|id| (id, refusal.because.as_str())))
        .collect();
    let mut stuck = BTreeSet::new();
    for action in actions {
        if let Some(because) = refused.get(&action.object) {
            action.because = format!("{}; refused without consent: {because}", action.because);
            action.verb = Verb::Refused;
            action.steps.clear();
            stuck.insert(action.object.clone());
        } else if let Some(by) = action.after.iter().find(|id| stuck.contains(*id)).cloned()
            && !action.steps.is_empty()
        {
            let taken = std::mem::replace(action, Action::new(&by, ""));
            *action = taken.blocked(Blocker::new(format!("waits for {by}, which is refused")));
            stuck.insert(action.object.clone());
        }
    }
}

fn hash(actions: &[Action], refusals: &[Refusal]) -> String {
    use sha2::Digest;
    let mut digest = sha2::Sha256::new();
    for action in actions.iter().filter(|action| action.is_difference()) {
        // Plain data with text keys: it serialises.
        digest.update(serde_json::to_vec(action).unwrap_or_default());
        digest.update(b"\n");
    }
    digest.update(serde_json::to_vec(refusals).unwrap_or_default());
    digest.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}
