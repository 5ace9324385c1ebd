//! What a host has already, as manifests: from a snapshot and from libvirt's files, given as texts. Pure: nothing
//! here looks at the host, and nothing anywhere changes it.
//!
//! What a manifest can't say is a note on its object; what can't be an object at all is left out, with the
//! reason. Whether the manifests then are what the host has is the plan's to say, not ours.

pub mod libvirt;
mod links;
mod pools;

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Value, json};

use crate::host::snapshot::Snapshot;
use crate::kinds::action::Verb;
use crate::kinds::{Spec, decode};
use crate::name::{Kind, ObjectId, ObjectName, SetName};
use crate::plan::{Plan, Policy, plan};
use crate::resolve::{Desired, resolve};

/// An object that the host has, or that libvirt's files describe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    pub id: ObjectId,
    pub spec: Value,
    /// What its manifest does not say, or what will be different.
    pub notes: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Adoption {
    pub objects: Vec<Found>,
    /// What it is and why there is no manifest for it.
    pub left_out: Vec<(String, String)>,
}

impl Adoption {
    pub fn leave(&mut self, what: impl Into<String>, why: impl Into<String>) {
        self.left_out.push((what.into(), why.into()));
    }

    /// Adds an object under a name made from this text; gives the name. Field that are `null` are left out.
    fn add(&mut self, kind: Kind, text: &str, mut spec: Value, notes: Vec<String>) -> ObjectName {
        let name = self.free_name(kind, text);
        if let Value::Object(fields) = &mut spec {
            fields.retain(|_, value| !value.is_null());
        }
        self.objects.push(Found { id: ObjectId::new(kind, name.clone()), spec, notes });
        name
    }

    /// A name that is near to the text and that no other object of the kind has.
    pub fn free_name(&self, kind: Kind, text: &str) -> ObjectName {
        let stem = label(text);
        let names = (1u32..).map(|number| match number {
            1 => stem.clone(),
            number => format!("{}-{number}", &stem[..stem.len().min(56)]),
        });
        let taken = |name: &str| {
            self.objects.iter().any(|found| found.id.kind == kind && found.id.name.as_str() == name)
        };
        let free = names.into_iter().find(|name| !taken(name)).and_then(|name| ObjectName::parse(&name).ok());
        // `label` makes nothing else, and there are more numbers than objects.
        free.unwrap_or_else(|| self.free_name(kind, "x"))
    }

    /// The objects as what a set declares. What can't be so is left out, with each reason.
    pub fn declare(&mut self, set: &SetName) -> Desired {
        let mut specs: BTreeMap<ObjectId, Spec> = BTreeMap::new();
        for found in std::mem::take(&mut self.objects) {
            match decode(found.id.kind, found.spec.clone()) {
                Ok(spec) => {
                    specs.insert(found.id.clone(), spec);
                    self.objects.push(found);
                }
                Err(problems) => {
                    for problem in problems {
                        let place = problem.pointer.trim_start_matches('/').replace('/', ".");
                        let place = if place.is_empty() { place } else { format!("{place}: ") };
                        self.leave(found.id.to_string(), format!("{place}{}", problem.message));
                    }
                }
            }
        }
        loop {
            match resolve(set.clone(), specs.clone(), &BTreeSet::new()) {
                Ok(desired) => return desired,
                Err(problems) => {
                    let before = specs.len();
                    for problem in problems {
                        // A problem may name what another one has taken away already.
                        if specs.remove(&problem.object).is_some() {
                            self.leave(problem.object.to_string(), problem.message);
                        }
                    }
                    self.objects.retain(|found| specs.contains_key(&found.id));
                    if specs.len() == before {
                        // Nothing to blame: then nothing can be said of any.
                        self.objects.clear();
                        return Desired::nothing(set.clone());
                    }
                }
            }
        }
    }

    /// Compares the objects with the host, and notes on each what would be done to it, field by field.
    pub fn compare(&mut self, desired: &Desired, snapshot: &Snapshot) -> Plan {
        let plan = plan(desired, snapshot, &Policy::default());
        for action in &plan.actions {
            let Some(found) = self.objects.iter_mut().find(|found| found.id == action.object) else {
                continue;
            };
            // A mark is what adoption is; it differs from nothing that somebody has set.
            if action.only_marks() {
                continue;
            }
            for change in &action.changes {
                let shown = |value: &Option<String>| value.clone().unwrap_or_else(|| "none".to_owned());
                found.notes.push(format!(
                    "differs: {} is {}, `apply` makes it {} ({})",
                    change.field,
                    shown(&change.from),
                    shown(&change.to),
                    change.impact.as_str()
                ));
            }
            for blocker in &action.blockers {
                found.notes.push(format!("blocked: {}", blocker.because));
            }
            if action.changes.is_empty() && action.blockers.is_empty() && action.verb != Verb::NoOp {
                found.notes.push(format!("differs: {}", action.because));
            }
        }
        plan
    }
}

/// From a snapshot: bridges, VLAN devices, and the pools that were asked for.
pub fn host(snapshot: &Snapshot, pools: &[ObjectName]) -> Adoption {
    let mut adoption = Adoption::default();
    links::find(snapshot, &mut adoption);
    for pool in pools {
        pools::find(snapshot, pool, &mut adoption);
    }
    adoption
}

/// One document, its notes as comments above it.
pub fn document(found: &Found, yaml: &str) -> String {
    let mut text = String::from("---\n");
    for note in &found.notes {
        for (index, line) in note.lines().enumerate() {
            text.push_str(&format!("#{}{line}\n", if index == 0 { " " } else { "   " }));
        }
    }
    text.push_str(yaml.trim_end());
    text.push('\n');
    text
}

/// What the document says.
pub fn manifest(found: &Found) -> Value {
    json!({
        "apiVersion": crate::load::API_VERSION,
        "kind": found.id.kind.as_str(),
        "metadata": { "name": found.id.name.as_str() },
        "spec": found.spec,
    })
}

/// An RFC 1123 label that is near to the text.
fn label(text: &str) -> String {
    let mut label = String::new();
    for c in text.chars().flat_map(char::to_lowercase) {
        if c.is_ascii_alphanumeric() {
            label.push(c);
        } else if !label.ends_with('-') {
            label.push('-');
        }
    }
    label.truncate(63);
    let label = label.trim_matches('-');
    if label.is_empty() { "x".to_owned() } else { label.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_labels_and_unique() {
        for (text, expected) in [
            ("br0", "br0"),
            ("eth0.10", "eth0-10"),
            ("Web Server (old)", "web-server-old"),
            ("_", "x"),
            ("", "x"),
            ("ä", "x"),
            (&"a".repeat(80), &"a".repeat(63)),
        ] {
            assert_eq!(label(text), expected);
        }
        let mut adoption = Adoption::default();
        let mut add = |text: &str| adoption.add(Kind::Bridge, text, json!({}), vec![]).to_string();
        assert_eq!([add("br.0"), add("br_0"), add("br 0")], ["br-0", "br-0-2", "br-0-3"]);
    }
}
