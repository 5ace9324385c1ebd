//! Plans and outcomes as text: one line an object, its differing fields below, one line of sums.

use std::fmt::Write;

use crate::execute::{Outcome, Outcomes};
use crate::kinds::action::{Action, Impact, Verb};
use crate::name::ObjectId;
use crate::plan::{Plan, Summary};

/// Escapes for a terminal, or nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Style {
    pub colour: bool,
}

impl Style {
    fn paint(self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    pub fn green(self, text: &str) -> String {
        self.paint("32", text)
    }

    pub fn yellow(self, text: &str) -> String {
        self.paint("33", text)
    }

    pub fn red(self, text: &str) -> String {
        self.paint("31", text)
    }

    pub fn dim(self, text: &str) -> String {
        self.paint("2", text)
    }

    pub fn bold(self, text: &str) -> String {
        self.paint("1", text)
    }
}

/// The sign that stands before an object.
pub fn sign(verb: Verb) -> &'static str {
    match verb {
        Verb::NoOp => " ",
        Verb::Create => "+",
        Verb::Update => "~",
        Verb::Restart => "~",
        Verb::Replace => "-/+",
        Verb::Adopt => "=",
        Verb::Delete => "-",
        Verb::Retain => ".",
        Verb::Blocked | Verb::Refused => "!",
    }
}

fn paint(style: Style, verb: Verb, text: &str) -> String {
    match verb {
        Verb::Create | Verb::Adopt => style.green(text),
        Verb::Update | Verb::Restart => style.yellow(text),
        Verb::Replace | Verb::Delete | Verb::Blocked | Verb::Refused => style.red(text),
        Verb::NoOp | Verb::Retain => style.dim(text),
    }
}

/// The plan, as `vmctl diff` prints it.
pub fn plan(plan: &Plan, style: Style) -> String {
    let mut out = String::new();
    let shown: Vec<&Action> =
        plan.actions.iter().filter(|action| action.is_difference() || !action.notes.is_empty()).collect();
    let width = shown.iter().map(|action| action.object.to_string().len()).max().unwrap_or(0).min(48);
    for action in shown {
        write_action(&mut out, action, width, style);
    }
    for refusal in refusals(plan, style) {
        out.push_str(&refusal);
    }
    let _ = writeln!(out, "{}", style.bold(&totals(plan)));
    out
}

fn write_action(out: &mut String, action: &Action, width: usize, style: Style) {
    // Writing to a String can't fail.
    let head = format!("{:<3} {:<width$}", sign(action.verb), action.object.to_string());
    let what = match action.verb {
        Verb::Create | Verb::NoOp => action.summary.clone(),
        Verb::Adopt => format!("adopt: {}", action.because),
        Verb::Delete => format!("delete: {}", action.because),
        Verb::Retain => format!("retain: {}", action.because),
        Verb::Blocked => format!("blocked: {}", action.because),
        Verb::Refused => format!("refused: {}", action.because),
        Verb::Update | Verb::Restart | Verb::Replace => action.because.clone(),
    };
    let _ = match what.is_empty() {
        true => writeln!(out, "{}", paint(style, action.verb, head.trim_end())),
        false => writeln!(out, "{}  {what}", paint(style, action.verb, &head)),
    };
    for change in &action.changes {
        let value = |value: &Option<String>| value.clone().unwrap_or_else(|| "none".to_owned());
        let text = format!("{}: {} → {}", change.field, value(&change.from), value(&change.to));
        let impact = match change.impact {
            Impact::Live => style.dim(change.impact.as_str()),
            Impact::DataLoss => style.red(change.impact.as_str()),
            _ => style.yellow(change.impact.as_str()),
        };
        let _ = writeln!(out, "      {text}  ({impact})");
    }
    for note in &action.notes {
        let _ = writeln!(out, "      {}", style.dim(&format!("note: {note}")));
    }
    for blocker in &action.blockers {
        if action.verb != Verb::Blocked || blocker.because != action.because {
            let _ = writeln!(out, "      {}", style.red(&format!("blocked: {}", blocker.because)));
        }
        if let Some(hint) = &blocker.hint {
            let _ = writeln!(out, "      {}", style.dim(&format!("hint: {hint}")));
        }
    }
}

fn refusals(plan: &Plan, style: Style) -> Vec<String> {
    let mut texts = Vec::new();
    for refusal in plan.refusals.iter().filter(|_| !plan.approved) {
        let names: Vec<String> = refusal.objects.iter().take(5).map(ToString::to_string).collect();
        let more = refusal.objects.len().saturating_sub(names.len());
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        texts.push(format!(
            "{}\n",
            style.red(&format!("Refused: {} ({}{more})", refusal.because, names.join(", ")))
        ));
    }
    if !texts.is_empty() {
        texts.push(format!("To allow exactly this plan: --approve {}\n", &plan.hash[..12]));
    }
    texts
}

/// `Plan: 1 to create, 1 live. Downtime: none.`
pub fn totals(plan: &Plan) -> String {
    let sums = sums(&plan.summary());
    if sums.is_empty() {
        return format!("No differences ({} objects).", plan.actions.len());
    }
    let restarts: Vec<String> = plan
        .actions
        .iter()
        .filter(|action| action.verb == Verb::Restart)
        .map(|action| action.object.name.to_string())
        .collect();
    let downtime =
        if restarts.is_empty() { "none".to_owned() } else { format!("{} restart", restarts.join(", ")) };
    format!("Plan: {}. Downtime: {downtime}.", sums.join(", "))
}

fn sums(summary: &Summary) -> Vec<String> {
    [
        (summary.create, "to create"),
        (summary.adopt, "to adopt"),
        (summary.update, "to update live"),
        (summary.staged, "staged"),
        (summary.restart, "to restart"),
        (summary.replace, "to replace"),
        (summary.delete, "to delete"),
        (summary.retain, "retained"),
        (summary.refused, "refused"),
        (summary.blocked, "blocked"),
    ]
    .into_iter()
    .filter(|(count, _)| *count > 0)
    .map(|(count, what)| format!("{count} {what}"))
    .collect()
}

/// One line for an object that came to its end, as `vmctl apply` prints it.
pub fn outcome(object: &ObjectId, verb: Verb, outcome: &Outcome, style: Style) -> String {
    match outcome {
        Outcome::Done { .. } => {
            let what = match verb {
                Verb::Create => "created",
                Verb::Adopt => "adopted",
                Verb::Restart => "restarted",
                Verb::Replace => "replaced",
                Verb::Delete => "deleted",
                Verb::Retain => "retained",
                _ => "updated",
            };
            format!("{} {object} {what}\n", style.green("✓"))
        }
        Outcome::Failed { step, error, hint } => {
            let mut text = format!("{} {object} failed: {step}: {error}\n", style.red("✗"));
            if let Some(hint) = hint {
                text.push_str(&format!("  {}\n", style.dim(&format!("hint: {hint}"))));
            }
            text
        }
        Outcome::NotReached { because } => {
            format!("{} {object} not reached: it waits for {because}, which failed\n", style.red("✗"))
        }
    }
}

/// The last line of a run: `Applied: 3 done, 1 failed.`
pub fn applied(plan: &Plan, outcomes: &Outcomes) -> String {
    let done = outcomes.values().filter(|outcome| outcome.is_done()).count();
    let failed = outcomes.len() - done;
    let summary = plan.summary();
    let mut parts = vec![format!("{done} done")];
    let rest = [
        (failed, "failed"),
        (summary.blocked, "blocked"),
        (summary.refused, "refused"),
        (summary.unchanged, "unchanged"),
    ];
    parts.extend(
        rest.into_iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")),
    );
    format!("Applied: {}.", parts.join(", "))
}
