//! Plans and outcomes as text: one line an object, its differing fields below, one line of sums.

use std::fmt::Write;

use crate::execute::{Outcome, Outcomes};
use crate::kinds::action::{Action, Impact, Verb};
use crate::name::ObjectId;
use crate::plan::{Plan, Summary};

/// How text is made to fit where it is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Style {
    /// With escapes for a terminal.
    pub colour: bool,
    /// Columns of the terminal; `None`: lines are as long as they are.
    pub width: Option<usize>,
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
    let shown = |action: &&Action| action.is_difference() || !action.notes.is_empty();
    let mut out = actions(plan.actions.iter().filter(shown), style);
    for refusal in refusals(plan, style) {
        out.push_str(&refusal);
    }
    let _ = writeln!(out, "{}", style.bold(&totals(plan)));
    out
}

/// What of a plan won't be done and why, as `vmctl apply` prints it before it does the rest.
pub fn obstacles(plan: &Plan, style: Style) -> String {
    let stopped = |action: &&Action| !action.blockers.is_empty() || action.verb == Verb::Refused;
    let mut out = actions(plan.actions.iter().filter(stopped), style);
    for refusal in refusals(plan, style) {
        out.push_str(&refusal);
    }
    out
}

/// Names longer than this push their own line to the right, not all others.
const NAME_COLUMNS_MAX: usize = 40;
/// The same for what a change says, which its impact stands behind.
const CHANGE_COLUMNS_MAX: usize = 48;
/// Where the lines below an object begin.
const INDENT: &str = "      ";

fn actions<'a>(shown: impl Iterator<Item = &'a Action>, style: Style) -> String {
    let shown: Vec<&Action> = shown.collect();
    let columns = |action: &&Action| action.object.to_string().len();
    let names = shown.iter().map(columns).filter(|length| *length <= NAME_COLUMNS_MAX).max().unwrap_or(0);
    let signs = shown.iter().map(|action| sign(action.verb).len()).max().unwrap_or(0);
    let mut out = String::new();
    for action in shown {
        write_action(&mut out, action, (signs, names), style);
    }
    out
}

fn write_action(out: &mut String, action: &Action, (signs, names): (usize, usize), style: Style) {
    let head = format!("{:<signs$} {:<names$}", sign(action.verb), action.object.to_string());
    let what = headline(action);
    let room = style.width.map(|width| width.saturating_sub(head.chars().count() + 2).max(20));
    let what = cut(&what, room);
    // Writing to a String can't fail.
    let _ = writeln!(out, "{}", format!("{}  {what}", paint(style, action.verb, &head)).trim_end());
    write_changes(out, action, style);
    for note in &action.notes {
        let _ = writeln!(out, "{INDENT}{}", style.dim(&format!("note: {note}")));
    }
    for blocker in &action.blockers {
        if action.verb != Verb::Blocked || blocker.because != action.because {
            let _ = writeln!(out, "{INDENT}{}", style.red(&format!("blocked: {}", blocker.because)));
        }
        if let Some(hint) = &blocker.hint {
            let _ = writeln!(out, "{INDENT}{}", style.dim(&format!("hint: {hint}")));
        }
    }
}

/// What happens to the object, in a line.
fn headline(action: &Action) -> String {
    let because = &action.because;
    match action.verb {
        Verb::Create | Verb::NoOp => action.summary.clone(),
        Verb::Adopt => format!("adopt: {because}"),
        Verb::Delete => format!("delete: {because}"),
        Verb::Retain => format!("retain: {because}"),
        Verb::Blocked => format!("blocked: {because}"),
        Verb::Refused => format!("refused: {because}"),
        Verb::Update | Verb::Restart | Verb::Replace if because.is_empty() => action.summary.clone(),
        Verb::Update | Verb::Restart | Verb::Replace => because.clone(),
    }
}

/// One line a field: `memory  2Gi → 4Gi  live`, in columns.
fn write_changes(out: &mut String, action: &Action, style: Style) {
    let value = |value: &Option<String>| value.clone().unwrap_or_else(|| "none".to_owned());
    let fields = action.changes.iter().map(|change| change.field.chars().count()).max().unwrap_or(0);
    let fields = fields.min(NAME_COLUMNS_MAX);
    // Both values share what the terminal leaves beside the field, the arrow and the impact.
    let room =
        style.width.map(|width| width.saturating_sub(INDENT.len() + fields + 2 + 3 + 2 + 9).max(24) / 2);
    let lines: Vec<String> = action
        .changes
        .iter()
        .map(|change| format!("{} → {}", cut(&value(&change.from), room), cut(&value(&change.to), room)))
        .collect();
    let columns =
        lines.iter().map(|line| line.chars().count()).filter(|length| *length <= CHANGE_COLUMNS_MAX);
    let columns = columns.max().unwrap_or(0);
    for (change, line) in action.changes.iter().zip(lines) {
        let impact = match change.impact {
            Impact::Live => style.dim(change.impact.as_str()),
            Impact::DataLoss => style.red(change.impact.as_str()),
            _ => style.yellow(change.impact.as_str()),
        };
        let _ = writeln!(out, "{INDENT}{:<fields$}  {line:<columns$}  {impact}", change.field);
    }
}

/// A long value without its middle: of paths and digests both ends tell most.
fn cut(text: &str, room: Option<usize>) -> String {
    let length = text.chars().count();
    let Some(room) = room.filter(|room| length > *room && *room > 8) else { return text.to_owned() };
    let tail = (room - 1) / 2;
    let head = room - 1 - tail;
    let first: String = text.chars().take(head).collect();
    let last: String = text.chars().skip(length - tail).collect();
    format!("{first}…{last}")
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
        let count = plan.actions.len();
        return format!("No differences ({count} object{}).", if count == 1 { "" } else { "s" });
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
        Outcome::Cancelled => format!("{} {object} not done: the run was interrupted\n", style.yellow("–")),
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
