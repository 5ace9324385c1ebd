//! `vmctl diff`: what `apply` would do, and nothing done.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::apply::PolicyArgs;
use super::args::{SetArg, SourceArgs};
use super::error::Result;
use super::exit::Exit;
use super::saved_plan::SavedPlan;
use super::session::Session;
use crate::load::Diagnostic;
use crate::plan::Plan;
use crate::report::{Report, text, yaml_diff};
use crate::{host::Host, plan};

/// Show what apply would change
///
/// Compares the manifests with the host, field by field, and changes nothing. Exits 0 when there is no
/// difference and 1 when there are some. What already is as declared and only lacks vmctl's mark is no difference: it
/// is listed with `=`, and `apply` marks it.
#[derive(Debug, Args)]
#[command(
    visible_alias = "plan",
    after_long_help = "\
Examples:
  vmctl diff -f manifests/                        what apply would do
  vmctl diff -f manifests/ --prune                and what it would remove
  vmctl diff -f manifests/ --out plan.json        save it; apply exactly this with
  vmctl apply --plan plan.json
  vmctl diff -f web.yaml -o yaml-diff             as a unified text diff

Signs: + create   ~ change   -/+ replace   - delete   . keep the data, forget the object
       = adopt    ! blocked or refused"
)]
pub struct Command {
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    set: SetArg,
    #[command(flatten)]
    policy: PolicyArgs,
    /// How to print the differences
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: Format,
    /// Save the plan for `vmctl apply --plan FILE`, which refuses to run it once the host has changed
    #[arg(long, value_name = "FILE", value_hint = clap::ValueHint::FilePath)]
    out: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    #[default]
    Text,
    Json,
    YamlDiff,
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct JsonReport<'a> {
    #[serde(flatten)]
    report: Report<'a>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    warnings: &'a [Diagnostic],
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        let declaration = session.declare(&self.set.set, &self.source)?;
        let policy = self.policy.policy(&declaration)?;
        let scope = declaration.desired.scope();
        let snapshot = session.host().snapshot(&scope);
        let plan = plan::plan(&declaration.desired, &snapshot, &policy);
        match self.output {
            Format::Text => print_text(session, &plan),
            Format::Json => session
                .out
                .json(&JsonReport { report: Report::new(&plan, None), warnings: &declaration.warnings })?,
            Format::YamlDiff => session.out.print(&yaml_diff::plan(&plan)),
        }
        let exit = if plan.is_in_sync() { Exit::Ok } else { Exit::Differs };
        if let Some(file) = self.out {
            SavedPlan::new(scope, plan).write(&file)?;
            session
                .out
                .note(&format!("Saved: run exactly this with `vmctl apply --plan {}`", file.display()));
        }
        Ok(exit)
    }
}

/// The plan, with its steps where more was asked for.
pub fn print_text(session: &Session, plan: &Plan) {
    let out = &session.out;
    if out.quiet && plan.is_in_sync() {
        return;
    }
    out.print(&text::plan(plan, out.style));
    if out.verbose > 0 && plan.has_steps() {
        out.print("\nSteps:\n");
        for (object, step) in plan.steps() {
            out.print(&format!("  {object}: {step}\n"));
        }
    }
}
