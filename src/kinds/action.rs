//! What a plan says of one object: the verb, the differences, the reasons, and the steps.

use serde::{Deserialize, Serialize};

use crate::host::Step;
use crate::host::error::ObserveError;
use crate::host::snapshot::Capability;
use crate::host::step::LvmStep;
use crate::name::ObjectId;

/// What happens to an object.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Verb {
    NoOp,
    Create,
    Update,
    /// An update that the guest notices as a restart.
    Restart,
    /// Deleted and made anew.
    Replace,
    Adopt,
    Delete,
    /// Forgotten; its data stays.
    Retain,
    Blocked,
    /// Would destroy data, or remove too much, without consent.
    Refused,
}

/// What a change means for what runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Impact {
    Live,
    /// Takes effect at the guest's next start.
    Staged,
    Restart,
    Replace,
    DataLoss,
}

impl Impact {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Staged => "staged",
            Self::Restart => "restart",
            Self::Replace => "replace",
            Self::DataLoss => "DATA LOSS",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FieldChange {
    /// As in the manifest: `mtu`, `interfaces[net0].bridge`.
    pub field: String,
    /// What the host has; `None`: nothing.
    pub from: Option<String>,
    /// What is declared; `None`: nothing.
    pub to: Option<String>,
    pub impact: Impact,
}

/// Why something can't be done now, and what a person can do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocker {
    pub because: String,
    pub hint: Option<String>,
}

impl Blocker {
    pub fn new(because: impl Into<String>) -> Self {
        Self { because: because.into(), hint: None }
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub fn unseen(error: &ObserveError) -> Self {
        Self::new(format!("could not look: {error}"))
    }

    pub fn lacks(capability: Capability, how_it_showed: &str) -> Self {
        Self::new(format!("this host lacks {} ({how_it_showed})", capability.name()))
            .hint(capability.remedy_for(how_it_showed))
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Action {
    pub object: ObjectId,
    pub verb: Verb,
    /// What it is, in a few words: `qcow2 20Gi in pool default, from image debian-12`.
    pub summary: String,
    /// Why this verb.
    pub because: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub changes: Vec<FieldChange>,
    /// True things that need nobody to act: `memory 4Gi takes effect at the next start`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub blockers: Vec<Blocker>,
    /// Run one after the other.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub steps: Vec<Step>,
    /// The object is on the host and can be used as it is, whatever becomes of this action: what depends on
    /// it need not wait for it.
    pub usable: bool,
    /// Objects whose steps must have succeeded before ours begin.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub after: Vec<ObjectId>,
}

impl Action {
    /// Begins an action; what is added to it settles the verb.
    pub fn new(object: &ObjectId, summary: impl Into<String>) -> Self {
        Self {
            object: object.clone(),
            verb: Verb::NoOp,
            summary: summary.into(),
            because: String::new(),
            changes: Vec::new(),
            notes: Vec::new(),
            blockers: Vec::new(),
            steps: Vec::new(),
            usable: false,
            after: Vec::new(),
        }
    }

    pub fn verb(&mut self, verb: Verb, because: impl Into<String>) -> &mut Self {
        self.verb = verb;
        self.because = because.into();
        self
    }

    pub fn step(&mut self, step: Step) -> &mut Self {
        self.steps.push(step);
        self
    }

    pub fn block(&mut self, blocker: Blocker) -> &mut Self {
        self.blockers.push(blocker);
        self
    }

    pub fn note(&mut self, note: impl Into<String>) -> &mut Self {
        self.notes.push(note.into());
        self
    }

    /// Notes a difference, without a step.
    pub fn differs(
        &mut self,
        field: impl Into<String>,
        from: Option<String>,
        to: Option<String>,
        impact: Impact,
    ) -> &mut Self {
        self.changes.push(FieldChange { field: field.into(), from, to, impact });
        self
    }

    /// Notes a live difference of a field, if there is one, and the step that mends it.
    pub fn field<T: PartialEq + ToString>(
        &mut self,
        field: &str,
        want: &T,
        have: &T,
        step: impl FnOnce() -> Step,
    ) -> &mut Self {
        if want != have {
            self.differs(field, Some(have.to_string()), Some(want.to_string()), Impact::Live);
            self.step(step());
        }
        self
    }

    /// Nothing can be done at all.
    pub fn blocked(mut self, blocker: Blocker) -> Self {
        self.steps.clear();
        self.verb = Verb::Blocked;
        self.blockers.push(blocker);
        self.finish()
    }

    /// Settles the verb from what was added, where nothing set it.
    pub fn finish(mut self) -> Self {
        if !self.blockers.is_empty() && self.steps.is_empty() {
            self.verb = Verb::Blocked;
        }
        if self.verb == Verb::Blocked && self.because.is_empty() {
            self.because = self.blockers.first().map(|blocker| blocker.because.clone()).unwrap_or_default();
        }
        if self.verb == Verb::NoOp && (!self.steps.is_empty() || !self.changes.is_empty()) {
            let restart = self.changes.iter().any(|change| change.impact == Impact::Restart);
            self.verb = if restart { Verb::Restart } else { Verb::Update };
        }
        self
    }

    /// Whether the host already is what is declared, and nothing is to be done but to mark it as vmctl's.
    pub fn only_marks(&self) -> bool {
        self.verb == Verb::Adopt
            && self.blockers.is_empty()
            && self.changes.iter().all(|change| change.field.ends_with(".mark"))
            && self.steps.iter().all(|step| match step {
                // Of a pool that is adopted, the directory or the group is there.
                Step::MarkLink { .. } | Step::AdoptVolume { .. } | Step::CreatePool { .. } => true,
                Step::Lvm(step) => matches!(step, LvmStep::Adopt { .. } | LvmStep::CreatePool(_)),
                _ => false,
            })
    }

    /// Whether it asks for anything: to be done, to be allowed, or to be unblocked.
    pub fn is_difference(&self) -> bool {
        self.verb != Verb::NoOp || !self.blockers.is_empty()
    }
}
