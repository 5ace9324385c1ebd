//! The mass guard: a broken generator must not empty a host.

use std::collections::BTreeMap;

use super::{Refusal, Removal};
use crate::kinds::Context;
use crate::kinds::action::{Action, Verb};
use crate::name::{Kind, ObjectId};

/// So many removals at once need nobody's consent, whatever their share.
const REMOVALS_FREE: usize = 3;
/// The share of a set's objects, in per cent, that may go at once.
const REMOVALS_SHARE_PERCENT: usize = 20;

pub fn refusals(context: &Context, removal: &Removal, actions: &[Action]) -> Vec<Refusal> {
    // Objects that a person named one by one are no accident.
    if *removal != Removal::Prune {
        return Vec::new();
    }
    let removed: Vec<&ObjectId> = actions
        .iter()
        .filter(|action| matches!(action.verb, Verb::Delete | Verb::Retain))
        .map(|action| &action.object)
        .collect();
    let on_host = super::removal::owned(context);
    let mut refusals = Vec::new();
    let most = REMOVALS_FREE.max(on_host.len() * REMOVALS_SHARE_PERCENT / 100);
    if removed.len() > most {
        refusals.push(Refusal {
            because: format!(
                "{} of the set's {} objects would go at once; {most} may",
                removed.len(),
                on_host.len()
            ),
            objects: removed.iter().map(|id| (*id).clone()).collect(),
        });
    }
    // One object of a kind is no mass: removing it by its manifest is everyday work.
    let mut per_kind: BTreeMap<Kind, (usize, usize)> = BTreeMap::new();
    for id in &on_host {
        per_kind.entry(id.kind).or_default().0 += 1;
    }
    for id in &removed {
        per_kind.entry(id.kind).or_default().1 += 1;
    }
    for (kind, (have, going)) in per_kind {
        if going >= 2 && going == have {
            refusals.push(Refusal {
                because: format!("every {kind} of the set ({have}) would go at once"),
                objects: removed.iter().filter(|id| id.kind == kind).map(|id| (*id).clone()).collect(),
            });
        }
    }
    refusals
}
