//! What people and programs are shown of plans and outcomes. Text for the former, JSON for the latter.

pub mod graph;
pub mod text;
pub mod units;
pub mod yaml_diff;

use serde::Serialize;

use crate::execute::Outcomes;
use crate::plan::{Plan, Summary};

/// A run as `-o json` prints it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report<'a> {
    pub plan: &'a Plan,
    pub summary: Summary,
    /// Absent where nothing was run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub outcomes: Option<&'a Outcomes>,
}

impl<'a> Report<'a> {
    pub fn new(plan: &'a Plan, outcomes: Option<&'a Outcomes>) -> Self {
        Self { plan, summary: plan.summary(), outcomes }
    }
}
