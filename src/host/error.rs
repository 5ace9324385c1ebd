//! What can go wrong while looking and while doing.

use serde::{Deserialize, Serialize};

use super::snapshot::Capability;

/// "Could not look": not the same as "is not there". What depends on it is blocked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{what}: {why}")]
pub struct ObserveError {
    /// What was tried, on what.
    pub what: String,
    pub why: String,
}

impl ObserveError {
    pub fn new(what: impl Into<String>, why: impl ToString) -> Self {
        Self { what: what.into(), why: why.to_string() }
    }
}

/// Why a step failed.
#[derive(Debug, thiserror::Error)]
pub enum StepError {
    /// The kernel, a disk or a VM process refused. `what` says what was tried, on what.
    #[error("{what}: {why}")]
    Failed { what: String, why: String, hint: Option<String> },
    /// The host lacks an ability; see [`Capability::remedy`].
    #[error("{what}: this host lacks {}", capability.name())]
    Lacks { what: String, capability: Capability },
    /// The object is not (or no longer) what the plan saw: it carries another mark, or none.
    #[error("{what}: {why}")]
    NotOurs { what: String, why: String },
}

impl StepError {
    pub fn failed(what: impl Into<String>, why: impl ToString) -> Self {
        Self::Failed { what: what.into(), why: why.to_string(), hint: None }
    }

    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Failed { hint, .. } => hint.clone(),
            Self::Lacks { capability, .. } => Some(capability.remedy().to_owned()),
            Self::NotOurs { .. } => Some("look at it with `vmctl diff`, then apply again".to_owned()),
        }
    }
}
