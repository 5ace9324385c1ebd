//! `vmctl version`.

use clap::Args;
use serde_json::json;

use super::args::Format;
use super::error::Result;
use super::exit::Exit;
use super::session::Session;
use crate::load::API_VERSION;
use crate::vmm::protocol;

/// Print the version
#[derive(Debug, Args)]
pub struct Command {
    /// How to print it
    #[arg(short, long, value_name = "FORMAT", default_value = "text")]
    pub output: Format,
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        let version = env!("CARGO_PKG_VERSION");
        match self.output {
            Format::Text => session.out.print(&format!(
                "vmctl {version}\nmanifests {API_VERSION}\nVM protocol {}\n",
                protocol::VERSION
            )),
            Format::Json => session.out.json(&json!({
                "version": version,
                "apiVersion": API_VERSION,
                "vmProtocol": protocol::VERSION,
            }))?,
        }
        Ok(Exit::Ok)
    }
}
