//! The whole job in one sentence: load, resolve, observe, plan, execute.
//!
//! `diff` stops after [`diff`]; `apply` and the agent go on to [`apply`].

use std::collections::BTreeMap;
use std::sync::atomic::AtomicBool;

use crate::execute::{Outcomes, Progress, execute, execute_until};
use crate::host::Host;
use crate::load::{Diagnostic, Loaded, Manifest};
use crate::name::{ObjectId, SetName};
use crate::plan::{Plan, Policy, plan};
use crate::resolve::{self, Desired};

/// What a source declares, ready to be compared with a host.
#[derive(Debug)]
pub struct Declaration {
    pub desired: Desired,
    pub manifests: BTreeMap<ObjectId, Manifest>,
    /// Warnings: everything worse is an [`Invalid`].
    pub warnings: Vec<Diagnostic>,
}

/// Every problem of a source. Nothing of it is applied.
#[derive(Debug, thiserror::Error)]
#[error("the manifests have {}", problems(.0))]
pub struct Invalid(pub Vec<Diagnostic>);

fn problems(diagnostics: &[Diagnostic]) -> String {
    match diagnostics.iter().filter(|diagnostic| diagnostic.is_error()).count() {
        1 => "a problem".to_owned(),
        count => format!("{count} problems"),
    }
}

/// From loaded manifests to what is desired, or every problem at once.
pub fn declare(set: SetName, loaded: Loaded) -> Result<Declaration, Invalid> {
    let mut problems = loaded.problems;
    let manifests: BTreeMap<ObjectId, Manifest> =
        loaded.manifests.into_iter().map(|manifest| (manifest.id.clone(), manifest)).collect();
    let objects = manifests.iter().map(|(id, manifest)| (id.clone(), manifest.spec.clone())).collect();
    let resolved = resolve::resolve(set, objects, &loaded.unusable);
    if let Err(found) = &resolved {
        problems.extend(found.iter().map(|problem| locate(problem, &manifests)));
    }
    match resolved {
        Ok(desired) if loaded.complete && !problems.iter().any(Diagnostic::is_error) => {
            Ok(Declaration { desired, manifests, warnings: problems })
        }
        _ => Err(Invalid(problems)),
    }
}

/// Gives a problem between objects its places in the files.
fn locate(problem: &resolve::Problem, manifests: &BTreeMap<ObjectId, Manifest>) -> Diagnostic {
    let mut diagnostic = Diagnostic::error(format!("{}: {}", problem.object, problem.message));
    if let Some(manifest) = manifests.get(&problem.object) {
        diagnostic = diagnostic.at(manifest.origin.place(&in_spec(&problem.pointer)));
    }
    for (id, pointer, text) in &problem.related {
        if let Some(manifest) = manifests.get(id) {
            diagnostic = diagnostic.related(manifest.origin.at(&in_spec(pointer)), format!("{text} ({id})"));
        }
    }
    diagnostic.hint_maybe(problem.hint.clone())
}

/// From a pointer within a spec to one within its manifest.
fn in_spec(pointer: &str) -> String {
    format!("/spec{pointer}")
}

/// Compares what is desired with what the host has.
pub fn diff(desired: &Desired, host: &dyn Host, policy: &Policy) -> Plan {
    let snapshot = host.snapshot(&desired.scope());
    plan(desired, &snapshot, policy)
}

/// Runs a plan's steps. The answer to any failure is to look again.
pub fn apply(plan: &Plan, host: &dyn Host, progress: &mut dyn FnMut(Progress<'_>)) -> Outcomes {
    execute(plan, host, progress)
}

/// The same, until `cancel` is set: steps that run are finished, and no others begin.
pub fn apply_until(
    plan: &Plan,
    host: &dyn Host,
    cancel: &AtomicBool,
    progress: &mut dyn FnMut(Progress<'_>),
) -> Outcomes {
    execute_until(plan, host, cancel, progress)
}
