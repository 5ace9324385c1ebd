//! `vmctl apply`: look, plan, and only where something is to be done: lock, look again, do, look again.
//!
//! A host that is as declared is only read: no lock, no folder, no message to the kernel that writes.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;

use super::args::{Format, SetArg, SourceArgs, parse_duration};
use super::error::{CliError, Result};
use super::exit::Exit;
use super::progress::{Live, with_live};
use super::saved_plan::SavedPlan;
use super::selector::Selector;
use super::session::Session;
use super::{diff, interrupt};
use crate::execute::{Outcome, Outcomes};
use crate::host::snapshot::Snapshot;
use crate::host::step::StopHow;
use crate::host::{Host, Scope, Step};
use crate::load::Diagnostic;
use crate::pipeline::{self, Declaration};
use crate::plan::{Plan, Policy, Removal, Summary, plan};
use crate::report::text;
use crate::resolve::Desired;
use crate::vmm::protocol::Phase;

/// Some steps become possible only after others; more rounds than this are no progress.
const ROUNDS_MAX: usize = 3;
/// How often `--wait` looks.
const WAIT_INTERVAL: Duration = Duration::from_millis(250);

/// Make the host what the manifests declare
///
/// Creates, changes and starts what differs, in the right order and in parallel, and leaves all else alone.
/// Nothing is removed without --prune, no data without --approve. Running it again after any failure goes on
/// where it stopped.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  vmctl apply -f manifests/                       create and update
  vmctl apply -f manifests/ --prune               and remove what the set has and declares no more
  vmctl apply -f web.yaml --wait --timeout 2m     until it runs
  vmctl apply -R -f . -l tier=web                 a part of it
  vmctl apply --plan plan.json                    what `vmctl diff --out plan.json` saved
  generate | vmctl apply -f -

Manifests with any error change nothing. Ctrl-C finishes the steps that run and begins no others.")]
pub struct Command {
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    set: SetArg,
    #[command(flatten)]
    policy: PolicyArgs,

    /// Run a plan that `vmctl diff --out FILE` saved, if the host is still as it was
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath,
          conflicts_with_all = ["filename", "recursive", "set", "prune", "selector", "approve", "wait"])]
    plan: Option<PathBuf>,

    /// Print the plan, change nothing, exit 0
    #[arg(long)]
    dry_run: bool,

    /// Wait until everything is as declared and every VM that should run runs
    #[arg(long)]
    wait: bool,

    /// How long --wait waits: 500ms, 90s, 5m, 1h30m
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = parse_duration)]
    timeout: Duration,

    /// How long to wait for another run to end
    #[arg(long, value_name = "TIME", default_value = "0", value_parser = parse_duration)]
    lock_timeout: Duration,

    /// How to print the outcome
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: Format,
}

/// What may be done, as `diff` and `apply` are both told.
#[derive(Debug, Args)]
pub struct PolicyArgs {
    /// Remove what the set has on the host and declares no more; data is kept unless its reclaimPolicy was Delete
    #[arg(long)]
    prune: bool,

    /// Only objects with these labels: key=value, key!=value, 'key in (a,b)', key, '!key', joined by commas
    #[arg(short = 'l', long, value_name = "LABELS", conflicts_with = "prune")]
    selector: Option<Selector>,

    /// Allow what was refused in the plan with this hash, and only in that plan
    #[arg(long, value_name = "HASH", value_parser = parse_hash)]
    approve: Option<String>,
}

pub fn parse_hash(text: &str) -> std::result::Result<String, String> {
    if text.len() >= 8 && text.len() <= 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        Ok(text.to_ascii_lowercase())
    } else {
        Err("a plan's hash has at least 8 hexadecimal digits; `vmctl diff` prints it".to_owned())
    }
}

impl PolicyArgs {
    pub fn policy(&self, declaration: &Declaration) -> Result<Policy> {
        let only = match &self.selector {
            None => None,
            Some(selector) => {
                let matching =
                    declaration.manifests.values().filter(|manifest| selector.matches(&manifest.labels));
                let ids: std::collections::BTreeSet<_> =
                    matching.map(|manifest| manifest.id.clone()).collect();
                if ids.is_empty() {
                    return Err(CliError::usage(format!(
                        "none of the {} declared objects has these labels",
                        declaration.manifests.len()
                    )));
                }
                Some(ids)
            }
        };
        let removal = if self.prune { Removal::Prune } else { Removal::Keep };
        Ok(Policy { removal, only, approve: self.approve.clone() })
    }
}

/// What is to be done, however it was given.
pub struct Task<'a> {
    pub desired: &'a Desired,
    pub policy: &'a Policy,
    pub warnings: &'a [Diagnostic],
    pub dry_run: bool,
    pub lock_timeout: Duration,
    pub output: Format,
    /// What others are told while we hold the lock.
    pub command: &'a str,
    /// How VMs are stopped, if not as the plan has it.
    pub stop: Option<StopHow>,
}

/// What came of a run.
#[derive(Default)]
pub struct Run {
    /// The plan that was run first.
    first: Option<Plan>,
    outcomes: Outcomes,
    /// What there is to do, to allow or to unblock after it.
    remaining: Option<Plan>,
    interrupted: bool,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct JsonReport<'a> {
    plan: &'a Plan,
    summary: Summary,
    outcomes: &'a Outcomes,
    /// Absent where everything is as declared.
    #[serde(skip_serializing_if = "Option::is_none")]
    remaining: Option<&'a Plan>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    warnings: &'a [Diagnostic],
    exit_code: u8,
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        let host = session.host();
        if let Some(file) = &self.plan {
            return self.run_saved(session, &host, SavedPlan::read(file)?);
        }
        let declaration = session.declare(&self.set.set, &self.source)?;
        let policy = self.policy.policy(&declaration)?;
        let task = Task {
            desired: &declaration.desired,
            policy: &policy,
            warnings: &declaration.warnings,
            dry_run: self.dry_run,
            lock_timeout: self.lock_timeout,
            output: self.output,
            command: "vmctl apply",
            stop: None,
        };
        let deadline = self.wait.then(|| Instant::now() + self.timeout);
        task.perform(session, &host, deadline)
    }

    fn run_saved(&self, session: &Session, host: &dyn Host, saved: SavedPlan) -> Result {
        let scope = saved.scope();
        check_unchanged(host, &scope, &saved.plan)?;
        let plan = &saved.plan;
        if self.dry_run || !plan.has_steps() {
            print_plan(session, self.output, plan, &[])?;
            return Ok(if self.dry_run { Exit::Ok } else { settled(plan) });
        }
        let _lock = session.lock("vmctl apply --plan", self.lock_timeout)?;
        check_unchanged(host, &scope, plan)?;
        let silent = self.output == Format::Json;
        let cancel = interrupt::flag();
        print_obstacles(session, plan, silent);
        let outcomes = with_live(&session.out, silent, |live| {
            pipeline::apply_until(plan, host, cancel, &mut |p| live.hear(p))
        });
        let interrupted = cancel.load(Ordering::Relaxed);
        let remaining = (!matches!(settled(plan), Exit::Ok)).then(|| plan.clone());
        let run = Run { first: Some(plan.clone()), outcomes, remaining, interrupted };
        let exit = run.exit();
        run.print(session, self.output, &[], exit)?;
        Ok(exit)
    }
}

fn check_unchanged(host: &dyn Host, scope: &Scope, plan: &Plan) -> Result<()> {
    if plan.observed.matches(&host.snapshot(scope)) {
        return Ok(());
    }
    Err(CliError::new(Exit::HostChanged, "the host has changed since the plan was saved")
        .hint("look again with `vmctl diff --out FILE`"))
}

/// The exit code of a plan without steps.
fn settled(plan: &Plan) -> Exit {
    if plan.is_refused() {
        Exit::Refused
    } else if plan.is_blocked() {
        Exit::Failed
    } else {
        Exit::Ok
    }
}

fn print_plan(session: &Session, output: Format, plan: &Plan, warnings: &[Diagnostic]) -> Result<()> {
    match output {
        Format::Text => {
            diff::print_text(session, plan);
            Ok(())
        }
        Format::Json => {
            let remaining = (!plan.is_empty()).then(|| plan.clone());
            let run = Run { first: Some(plan.clone()), remaining, ..Run::default() };
            run.print(session, output, warnings, settled(plan))
        }
    }
}

/// What of a plan won't be done, before the rest is.
fn print_obstacles(session: &Session, plan: &Plan, silent: bool) {
    if !silent {
        session.out.print(&text::obstacles(plan, session.out.style));
    }
}

impl Task<'_> {
    fn plan(&self, snapshot: &Snapshot) -> Plan {
        let mut plan = plan(self.desired, snapshot, self.policy);
        if let Some(wanted) = self.stop {
            for step in plan.actions.iter_mut().flat_map(|action| &mut action.steps) {
                if let Step::StopVm { how, .. } = step {
                    *how = wanted;
                }
            }
        }
        plan
    }

    /// All of it: plan, run, wait, report.
    pub fn perform(&self, session: &Session, host: &dyn Host, deadline: Option<Instant>) -> Result {
        let scope = self.desired.scope();
        let first = self.plan(&host.snapshot(&scope));
        if self.dry_run {
            print_plan(session, self.output, &first, self.warnings)?;
            return Ok(Exit::Ok);
        }
        let silent = self.output == Format::Json;
        if !first.has_steps() && deadline.is_none() {
            print_plan(session, self.output, &first, self.warnings)?;
            return Ok(settled(&first));
        }
        let cancel = interrupt::flag();
        let run = with_live(&session.out, silent, |live| match deadline {
            None => self.converge(session, host, cancel, live),
            Some(deadline) => self.wait(session, host, cancel, live, deadline),
        });
        let (run, exit) = match run? {
            (run, true) => (run, Exit::TimedOut),
            (run, false) => {
                let exit = run.exit();
                (run, exit)
            }
        };
        run.print(session, self.output, self.warnings, exit)?;
        if exit == Exit::TimedOut && !silent {
            session.out.error(&CliError::new(exit, "not everything is as declared yet; the wait timed out"));
        }
        Ok(exit)
    }

    /// Under the lock: rounds of looking, planning and doing, until a plan has no steps. The flag is false.
    fn converge(
        &self,
        session: &Session,
        host: &dyn Host,
        cancel: &AtomicBool,
        live: &mut Live<'_>,
    ) -> Result<(Run, bool)> {
        let _lock = session.lock(self.command, self.lock_timeout)?;
        let scope = self.desired.scope();
        let mut run = Run::default();
        for _ in 0..ROUNDS_MAX {
            let plan = self.plan(&host.snapshot(&scope));
            if !plan.has_steps() {
                run.remaining = (!plan.is_empty()).then_some(plan.clone());
                run.first.get_or_insert(plan);
                return Ok((run, false));
            }
            if run.first.is_none() {
                print_obstacles(session, &plan, self.output == Format::Json);
            }
            let outcomes = pipeline::apply_until(&plan, host, cancel, &mut |progress| live.hear(progress));
            run.first.get_or_insert(plan);
            let done = outcomes.values().all(Outcome::is_done);
            run.outcomes.extend(outcomes);
            run.interrupted = cancel.load(Ordering::Relaxed);
            if !done || run.interrupted {
                break;
            }
        }
        let plan = self.plan(&host.snapshot(&scope));
        run.remaining = (!plan.is_empty()).then_some(plan);
        Ok((run, false))
    }

    /// Converges until nothing is left to be done and every VM is up. The flag: the time ran out.
    fn wait(
        &self,
        session: &Session,
        host: &dyn Host,
        cancel: &AtomicBool,
        live: &mut Live<'_>,
        deadline: Instant,
    ) -> Result<(Run, bool)> {
        let scope = self.desired.scope();
        let mut run = Run::default();
        loop {
            let snapshot = host.snapshot(&scope);
            let plan = self.plan(&snapshot);
            if plan.has_steps() {
                let (round, _) = self.converge(session, host, cancel, live)?;
                run.absorb(round);
                if run.exit_of_outcomes() != Exit::Ok {
                    return Ok((run, false));
                }
            } else {
                let done = plan.is_empty() && settled_vms(&snapshot);
                let refused = plan.is_refused();
                run.remaining = (!plan.is_empty()).then_some(plan.clone());
                run.first.get_or_insert(plan);
                if done || refused {
                    return Ok((run, false));
                }
                if cancel.load(Ordering::Relaxed) {
                    run.interrupted = true;
                    return Ok((run, false));
                }
            }
            if Instant::now() >= deadline {
                return Ok((run, true));
            }
            std::thread::sleep(WAIT_INTERVAL.min(deadline.saturating_duration_since(Instant::now())));
        }
    }
}

/// No VM is on its way up or down.
fn settled_vms(snapshot: &Snapshot) -> bool {
    let processes = snapshot.vms.iter().flat_map(|vms| vms.values()).filter_map(|vm| vm.process.as_ref());
    processes.flatten().all(|process| process.phase != Phase::Stopping)
}

impl Run {
    fn absorb(&mut self, other: Run) {
        if self.first.is_none() {
            self.first = other.first;
        }
        self.outcomes.extend(other.outcomes);
        self.remaining = other.remaining;
        self.interrupted |= other.interrupted;
    }

    fn exit_of_outcomes(&self) -> Exit {
        if self.interrupted {
            Exit::Interrupted
        } else if self.outcomes.values().all(Outcome::is_done) {
            Exit::Ok
        } else {
            Exit::Failed
        }
    }

    pub fn exit(&self) -> Exit {
        match (self.exit_of_outcomes(), &self.remaining) {
            (Exit::Ok, None) => Exit::Ok,
            (Exit::Ok, Some(remaining)) if remaining.has_steps() => Exit::Failed,
            (Exit::Ok, Some(remaining)) => settled(remaining),
            (exit, _) => exit,
        }
    }

    pub fn print(
        &self,
        session: &Session,
        output: Format,
        warnings: &[Diagnostic],
        exit: Exit,
    ) -> Result<()> {
        let Some(first) = &self.first else { return Ok(()) };
        if output == Format::Json {
            return session.out.json(&JsonReport {
                plan: first,
                summary: first.summary(),
                outcomes: &self.outcomes,
                remaining: self.remaining.as_ref(),
                warnings,
                exit_code: exit.code(),
            });
        }
        let out = &session.out;
        if self.outcomes.is_empty() {
            diff::print_text(session, first);
        } else if !out.quiet {
            out.print(&format!("{}\n", out.style.bold(&text::applied(first, &self.outcomes))));
        }
        if self.interrupted {
            out.note("Interrupted: the steps that ran were finished; running it again goes on from here.");
        }
        // What failed is still to do, and was said; anything else that is left is news.
        if let Some(remaining) = &self.remaining
            && self.exit_of_outcomes() == Exit::Ok
            && remaining.has_steps()
        {
            out.print("\nStill to do after this run:\n");
            out.print(&text::plan(remaining, out.style));
        }
        Ok(())
    }
}
