//! From typed manifests to what is desired: references known to be good, rules between objects held,
//! and an order in which things can come into being. Pure.

mod graph;
mod networks;
mod pools;
mod rules;

use std::collections::{BTreeMap, BTreeSet};

use crate::host::Scope;
use crate::kinds::{Declared, Spec};
use crate::name::{ObjectId, SetName};

/// What is declared, in order.
#[derive(Clone, Debug)]
pub struct Desired {
    pub declared: Declared,
    /// Every object after those that it depends on; else by kind and name.
    pub order: Vec<ObjectId>,
    pub dependencies: BTreeMap<ObjectId, BTreeSet<ObjectId>>,
}

/// What is wrong between objects, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub object: ObjectId,
    /// RFC 6901, within the spec.
    pub pointer: String,
    pub message: String,
    pub hint: Option<String>,
    /// Other places that belong to the story.
    pub related: Vec<(ObjectId, String, String)>,
}

impl Problem {
    pub(crate) fn new(object: &ObjectId, pointer: impl Into<String>, message: impl Into<String>) -> Self {
        let (pointer, message) = (pointer.into(), message.into());
        Self { object: object.clone(), pointer, message, hint: None, related: Vec::new() }
    }

    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub(crate) fn related(mut self, object: &ObjectId, pointer: &str, text: &str) -> Self {
        self.related.push((object.clone(), pointer.to_owned(), text.to_owned()));
        self
    }
}

/// Checks everything between the objects and orders them, or names every problem. `unusable` objects are
/// declared but broken, which is reported elsewhere: a reference to one is not dangling.
pub fn resolve(
    set: SetName,
    objects: BTreeMap<ObjectId, Spec>,
    unusable: &BTreeSet<ObjectId>,
) -> Result<Desired, Vec<Problem>> {
    let mut problems = Vec::new();
    rules::check(&set, &objects, unusable, &mut problems);
    let dependencies = graph::dependencies(&objects);
    match graph::order(&dependencies) {
        Ok(order) if problems.is_empty() => {
            Ok(Desired { declared: Declared { set, objects }, order, dependencies })
        }
        Ok(_) => Err(problems),
        Err(cycles) => {
            problems.extend(cycles);
            Err(problems)
        }
    }
}

impl Desired {
    /// Nothing declared.
    pub fn nothing(set: SetName) -> Self {
        Self {
            declared: Declared { set, objects: BTreeMap::new() },
            order: Vec::new(),
            dependencies: BTreeMap::new(),
        }
    }

    /// What has to be looked at to compare this with the host.
    pub fn scope(&self) -> Scope {
        let mut scope = Scope::default();
        for (id, spec) in &self.declared.objects {
            if let Spec::StoragePool(pool) = spec {
                scope.pools.push((id.name.clone(), pool.place.clone()));
                if !pool.devices.is_empty() {
                    scope.devices.insert(id.name.clone(), pool.devices.clone());
                }
            }
            scope.tables |= matches!(spec, Spec::Network(_));
            scope.capabilities.extend(spec.capabilities());
            scope.files.extend(spec.files());
        }
        scope
    }
}
