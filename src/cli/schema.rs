//! `vmctl schema`: what editors and other programs check manifests with.

use clap::Args;

use super::args::parse_kind;
use super::error::Result;
use super::exit::Exit;
use super::session::Session;
use crate::load::schema;

/// Print the JSON Schema of manifests
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  vmctl schema > vmctl.schema.json        any manifest; then, at the top of a YAML file:
  # yaml-language-server: $schema=vmctl.schema.json
  vmctl schema vm                         one kind")]
pub struct Command {
    /// One kind instead of all
    kind: Option<String>,
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        let schema = match self.kind {
            Some(kind) => schema::document_schema(parse_kind(&kind)?),
            None => schema::all_schema(),
        };
        session.out.json(&schema)?;
        Ok(Exit::Ok)
    }
}
