//! A plan as a unified text diff, for people who read those all day.

use std::fmt::Write;

use similar::TextDiff;

use crate::kinds::action::{Action, Verb};
use crate::plan::Plan;

/// For each object that differs: its fields as they are against its fields as declared. A mark is no field.
pub fn plan(plan: &Plan) -> String {
    let mut out = String::new();
    for action in plan.actions.iter().filter(|action| action.is_difference() && !action.only_marks()) {
        let (before, after) = sides(action);
        let id = action.object.to_string();
        let diff = TextDiff::from_lines(&before, &after);
        let mut unified = diff.unified_diff();
        unified.context_radius(3).header(&format!("host/{id}"), &format!("manifest/{id}"));
        // Writing to a String can't fail.
        let _ = write!(out, "{unified}");
        for blocker in &action.blockers {
            let _ = writeln!(out, "# {id} is blocked: {}", blocker.because);
        }
        if action.verb == Verb::Refused {
            let _ = writeln!(out, "# {id} is refused: {}", action.because);
        }
    }
    out
}

fn sides(action: &Action) -> (String, String) {
    let head = format!("# {}\n", action.object);
    let whole = format!("{head}{}: {}\n", action.object.kind, action.summary);
    match action.verb {
        Verb::Create | Verb::Adopt => return (String::new(), whole),
        Verb::Delete | Verb::Retain => return (whole, String::new()),
        _ => {}
    }
    let side = |pick: fn(&crate::kinds::action::FieldChange) -> &Option<String>| {
        let fields = action
            .changes
            .iter()
            .filter_map(|change| pick(change).as_ref().map(|value| format!("{}: {value}\n", change.field)));
        format!("{head}{}", fields.collect::<String>())
    };
    (side(|change| &change.from), side(|change| &change.to))
}
