//! `vmctl validate`: everything that can be said of manifests without looking at a host.

use std::collections::{BTreeMap, BTreeSet};

use clap::Args;
use serde_json::json;

use super::args::{Format, SetArg, SourceArgs};
use super::error::{CliError, Result};
use super::exit::Exit;
use super::session::Session;
use crate::load::Diagnostic;
use crate::name::Kind;
use crate::pipeline::Declaration;

/// Check manifests without looking at the host
///
/// Reports every problem of all files at once, each with its place. Needs no rights and changes nothing.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  vmctl validate -f manifests/
  vmctl validate -R -f . -o json          for editors and CI
  generate | vmctl validate -f -")]
pub struct Command {
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    set: SetArg,
    /// How to print the result
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: Format,
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        let declared = session.declare(&self.set.set, &self.source);
        if self.output == Format::Json {
            return json_result(session, declared);
        }
        let declaration = declared?;
        if !session.out.quiet {
            session.out.print(&summary(&declaration));
        }
        Ok(Exit::Ok)
    }
}

/// Problems are the result here, so they go to stdout.
fn json_result(session: &Session, declared: Result<Declaration>) -> Result {
    let value = |valid: bool, objects: Vec<String>, problems: &[Diagnostic], error: Option<&CliError>| json!({ "valid": valid, "objects": objects, "problems": problems, "error": error.map(|error| &error.message) });
    match declared {
        Ok(declaration) => {
            let objects = declaration.manifests.keys().map(ToString::to_string).collect();
            session.out.json(&value(true, objects, &declaration.warnings, None))?;
            Ok(Exit::Ok)
        }
        Err(error) => {
            session.out.json(&value(false, Vec::new(), &error.problems, Some(&error)))?;
            Ok(error.exit_code)
        }
    }
}

fn summary(declaration: &Declaration) -> String {
    let mut counts: BTreeMap<Kind, usize> = BTreeMap::new();
    for id in declaration.manifests.keys() {
        *counts.entry(id.kind).or_default() += 1;
    }
    let files: BTreeSet<&str> =
        declaration.manifests.values().map(|manifest| manifest.origin.file()).collect();
    let kinds: Vec<String> = counts.iter().map(|(kind, count)| format!("{count} {kind}")).collect();
    let plural = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
    format!(
        "Valid: {} in {} ({}).\n",
        plural(declaration.manifests.len(), "object"),
        plural(files.len(), "file"),
        kinds.join(", ")
    )
}
