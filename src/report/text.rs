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
        .map(|change| {
            let (from, to) = (value(&change.from), value(&change.to));
            format!("{} → {}", cut_to_difference(&from, &to, room), cut_to_difference(&to, &from, room))
        })
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

/// A long value without what it has in common with the other: the difference is always to be seen.
fn cut_to_difference(text: &str, other: &str, room: Option<usize>) -> String {
    let chars: Vec<char> = text.chars().collect();
    let Some(room) = room.filter(|room| chars.len() > *room && *room > 8) else { return text.to_owned() };
    let others: Vec<char> = other.chars().collect();
    let before = chars.iter().zip(&others).take_while(|(a, b)| a == b).count();
    let after =
        chars[before..].iter().rev().zip(others[before..].iter().rev()).take_while(|(a, b)| a == b).count();
    let differing = chars.len() - before - after;
    // Room for an ellipsis at either end; what is left shows what stands around the difference.
    let Some(around) = (room - 2).checked_sub(differing) else { return cut(text, Some(room)) };
    let start = before.saturating_sub(around - around.min(after) / 2);
    let end = (start + room - 2).min(chars.len());
    let piece: String = chars[start..end].iter().collect();
    format!("{}{piece}{}", if start > 0 { "…" } else { "" }, if end < chars.len() { "…" } else { "" })
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
    let summary = plan.summary();
    if plan.is_in_sync() {
        let count = plan.actions.len();
        let same = format!("No differences ({count} object{}).", if count == 1 { "" } else { "s" });
        return match summary.adopt {
            0 => same,
            adopt => format!("{same} {adopt} to adopt: `apply` only marks what is there."),
        };
    }
    let sums = sums(&summary);
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
    let cancelled = outcomes.values().filter(|outcome| **outcome == Outcome::Cancelled).count();
    let failed = outcomes.len() - done - cancelled;
    let summary = plan.summary();
    let mut parts = vec![format!("{done} done")];
    let rest = [
        (failed, "failed"),
        (cancelled, "not begun"),
        (summary.blocked, "blocked"),
        (summary.refused, "refused"),
        (summary.unchanged, "unchanged"),
    ];
    parts.extend(
        rest.into_iter().filter(|(count, _)| *count > 0).map(|(count, what)| format!("{count} {what}")),
    );
    format!("Applied: {}.", parts.join(", "))
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;
    use crate::kinds::action::Blocker;
    use crate::plan::{Fingerprint, Refusal};

    fn action(id: &str, verb: Verb, because: &str) -> Action {
        let mut action = Action::new(&id.parse().unwrap(), "qcow2 20Gi in pool default");
        action.verb(verb, because);
        action
    }

    fn plan_of(actions: Vec<Action>, refusals: Vec<Refusal>) -> Plan {
        Plan {
            set: "default".parse().unwrap(),
            actions,
            refusals,
            hash: "0123456789abcdef".to_owned(),
            approved: false,
            observed: Fingerprint { sha256: String::new(), links: Default::default() },
        }
    }

    fn every_verb() -> Plan {
        let mut memory = action("VirtualMachine/web", Verb::Update, "");
        memory.summary = "2 vCPUs, 4Gi".to_owned();
        memory.differs("memory", Some("2Gi".into()), Some("4Gi".into()), Impact::Staged);
        memory.differs("interfaces[net0].bridge", None, Some("br0".into()), Impact::Live);
        let mut kernel = action("VirtualMachine/db", Verb::Restart, "restartPolicy allows it");
        let path = |version: &str| Some(format!("/srv/kernels/debian/12/amd64/{version}/boot/vmlinux-cloud"));
        kernel.differs("boot.kernel", path("6.1.0-31"), path("6.1.0-37"), Impact::Restart);
        let mut blocked = action("Bridge/br1", Verb::NoOp, "");
        blocked =
            blocked.blocked(Blocker::new("port eth1 belongs to another owner").hint("choose another port"));
        let mut noted = action("VirtualMachine/idle", Verb::NoOp, "");
        noted.note("held down by `vmctl stop`");
        let refused = action("Volume/scratch", Verb::Refused, "declared no more; refused without consent");
        let refusal = Refusal { because: "data would be lost".into(), objects: vec![refused.object.clone()] };
        let mut replaced = action("Volume/moved", Verb::Replace, "format raw → qcow2");
        replaced.differs("format", Some("raw".into()), Some("qcow2".into()), Impact::DataLoss);
        let actions = vec![
            action("Volume/web-root", Verb::Create, "not there"),
            action("Bridge/br0", Verb::Adopt, "it is as declared"),
            memory,
            kernel,
            replaced,
            action("Vlan/eth0-10", Verb::Delete, "declared no more"),
            action("Volume/old", Verb::Retain, "the data stays where it is"),
            refused,
            blocked,
            noted,
            action("Volume/same", Verb::NoOp, ""),
        ];
        plan_of(actions, vec![refusal])
    }

    #[track_caller]
    fn check(text: &str, expected: Expect) {
        expected.assert_eq(text);
    }

    #[test]
    fn every_verb_has_its_line() {
        check(
            &plan(&every_verb(), Style::default()),
            expect![[r#"
            +   Volume/web-root      qcow2 20Gi in pool default
            =   Bridge/br0           adopt: it is as declared
            ~   VirtualMachine/web   2 vCPUs, 4Gi
                  memory                   2Gi → 4Gi   staged
                  interfaces[net0].bridge  none → br0  live
            ~   VirtualMachine/db    restartPolicy allows it
                  boot.kernel  /srv/kernels/debian/12/amd64/6.1.0-31/boot/vmlinux-cloud → /srv/kernels/debian/12/amd64/6.1.0-37/boot/vmlinux-cloud  restart
            -/+ Volume/moved         format raw → qcow2
                  format  raw → qcow2  DATA LOSS
            -   Vlan/eth0-10         delete: declared no more
            .   Volume/old           retain: the data stays where it is
            !   Volume/scratch       refused: declared no more; refused without consent
            !   Bridge/br1           blocked: port eth1 belongs to another owner
                  hint: choose another port
                VirtualMachine/idle  qcow2 20Gi in pool default
                  note: held down by `vmctl stop`
            Refused: data would be lost (Volume/scratch)
            To allow exactly this plan: --approve 0123456789ab
            Plan: 1 to create, 1 to adopt, 1 staged, 1 to restart, 1 to replace, 1 to delete, 1 retained, 1 refused, 1 blocked. Downtime: db restart.
        "#]],
        );
    }

    #[test]
    fn long_values_lose_their_middle_on_a_terminal() {
        let style = Style { colour: false, width: Some(80) };
        let text = plan(&every_verb(), style);
        let kernel: Vec<&str> = text.lines().filter(|line| line.contains("boot.kernel")).collect();
        check(
            &kernel.join("\n"),
            expect!["      boot.kernel  …d64/6.1.0-31/boot/vml… → …d64/6.1.0-37/boot/vml…  restart"],
        );
        assert!(kernel.iter().all(|line| line.chars().count() <= 80));
    }

    #[test]
    fn what_stands_in_the_way_is_told_alone() {
        check(
            &obstacles(&every_verb(), Style::default()),
            expect![[r#"
            ! Volume/scratch  refused: declared no more; refused without consent
            ! Bridge/br1      blocked: port eth1 belongs to another owner
                  hint: choose another port
            Refused: data would be lost (Volume/scratch)
            To allow exactly this plan: --approve 0123456789ab
        "#]],
        );
    }

    #[test]
    fn colour_adds_escapes_and_nothing_else() {
        let coloured = plan(&every_verb(), Style { colour: true, width: None });
        let mut plain = String::new();
        let mut rest = coloured.as_str();
        while let Some(escape) = rest.find("\x1b[") {
            plain.push_str(&rest[..escape]);
            rest = rest[escape..].split_once('m').unwrap().1;
        }
        plain.push_str(rest);
        assert_ne!(coloured, plain);
        let trimmed: Vec<&str> = plain.lines().map(str::trim_end).collect();
        assert_eq!(trimmed.join("\n"), plan(&every_verb(), Style::default()).trim_end());
    }

    #[test]
    fn outcomes_are_a_line_each_and_a_sum() {
        let plan = every_verb();
        let id = |text: &str| text.parse::<ObjectId>().unwrap();
        let failed = Outcome::Failed {
            step: "create tap web.net0".into(),
            error: "no such device".into(),
            hint: Some("`modprobe tun`".into()),
        };
        let outcomes = Outcomes::from([
            (id("Volume/web-root"), Outcome::Done { steps: 1 }),
            (id("VirtualMachine/web"), failed),
            (id("VirtualMachine/db"), Outcome::NotReached { because: id("VirtualMachine/web") }),
            (id("Volume/old"), Outcome::Cancelled),
        ]);
        let lines: String = outcomes
            .iter()
            .map(|(object, ended)| outcome(object, Verb::Create, ended, Style::default()))
            .chain([applied(&plan, &outcomes)])
            .collect();
        check(
            &lines,
            expect![[r#"
            – Volume/old not done: the run was interrupted
            ✓ Volume/web-root created
            ✗ VirtualMachine/db not reached: it waits for VirtualMachine/web, which failed
            ✗ VirtualMachine/web failed: create tap web.net0: no such device
              hint: `modprobe tun`
            Applied: 1 done, 2 failed, 1 not begun, 1 blocked, 1 refused, 2 unchanged."#]],
        );
    }
}
