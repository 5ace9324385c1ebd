//! HostPolicy: how much of the host guests may have, and how its memory is run.

pub mod capacity;
pub mod compare;
pub mod wire;

use serde::Serialize;

use crate::host::snapshot::PolicyRules;

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct HostPolicy {
    pub rules: PolicyRules,
}
