//! Plans that a person asked for by name and no manifest declares: starts and stops.

use std::fmt::Write;

use super::args::Format;
use super::error::Result;
use super::exit::Exit;
use super::session::Session;
use crate::execute::Outcomes;
use crate::host::Snapshot;
use crate::kinds::action::Action;
use crate::name::SetName;
use crate::plan::{Plan, fingerprint};
use crate::report::Report;

/// These actions as a plan, so that they run and print as all others.
pub fn plan(set: &SetName, snapshot: &Snapshot, mut actions: Vec<Action>) -> Plan {
    crate::plan::admit(snapshot, &mut actions);
    let observed = fingerprint(snapshot, &actions);
    Plan { set: set.clone(), actions, refusals: Vec::new(), hash: String::new(), approved: false, observed }
}

/// What came of it, for each object that no progress line spoke of.
pub fn report(session: &Session, output: Format, plan: &Plan, outcomes: &Outcomes) -> Result {
    let failed = plan.is_blocked() || !outcomes.values().all(|outcome| outcome.is_done());
    let exit = if failed { Exit::Failed } else { Exit::Ok };
    if output == Format::Json {
        session.out.json(&Report::new(plan, Some(outcomes)))?;
        return Ok(exit);
    }
    let style = session.out.style;
    let mut text = String::new();
    for action in plan.actions.iter().filter(|action| action.steps.is_empty()) {
        // Writing to a String can't fail.
        if let Some(blocker) = action.blockers.first() {
            let _ = writeln!(text, "{} {}: {}", style.red("✗"), action.object, blocker.because);
            if let Some(hint) = &blocker.hint {
                let _ = writeln!(text, "  {}", style.dim(&format!("hint: {hint}")));
            }
        } else if !session.out.quiet {
            let _ = writeln!(text, "{} {} {}", style.dim("–"), action.object, action.summary);
        }
    }
    session.out.print(&text);
    Ok(exit)
}
