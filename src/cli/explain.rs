//! `vmctl explain`: what a kind or a field means.

use clap::Args;

use super::args::Format;
use super::error::{CliError, Result};
use super::exit::Exit;
use super::session::Session;
use crate::load::explain;

/// Say what a kind or a field of a manifest means
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  vmctl explain vm
  vmctl explain vm.disks
  vmctl explain bridge.spec.ports.pvid")]
pub struct Command {
    /// KIND or KIND.field.field
    #[arg(value_name = "KIND[.FIELD]", required = true)]
    paths: Vec<String>,
    /// How to print it
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: Format,
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        let mut answers = Vec::with_capacity(self.paths.len());
        for path in &self.paths {
            let wrong = |error: explain::ExplainError| CliError::usage(error.message).hint(error.hint);
            answers.push(explain::explain(path).map_err(wrong)?);
        }
        match (self.output, &answers[..]) {
            (Format::Json, [one]) => session.out.json(one)?,
            (Format::Json, several) => session.out.json(&several)?,
            (Format::Text, all) => {
                let texts: Vec<String> =
                    all.iter().map(|answer| answer.to_string().trim_end().to_owned()).collect();
                session.out.print(&format!("{}\n", texts.join("\n\n")));
            }
        }
        Ok(Exit::Ok)
    }
}
