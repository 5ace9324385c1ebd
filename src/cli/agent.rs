//! `vmctl agent`: the pipeline in a loop; see `crate::agent`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use super::args::{SetArg, parse_duration};
use super::error::{CliError, Result};
use super::exit::Exit;
use super::session::Session;
use crate::agent;

/// Keep the host as a directory of manifests declares it
///
/// Watches the directory and the host, and heals what differs within milliseconds. Removes what the directory
/// declares no more, within the guards. A source that is missing, empty or invalid changes nothing. VMs outlive
/// the agent.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  vmctl agent --source /etc/vmctl/manifests
  vmctl agent --source /srv/git-sync/current --set prod")]
pub struct Command {
    /// The directory of manifests, or a symlink to one that is swapped as a whole (git-sync)
    #[arg(long, value_name = "DIR", value_hint = clap::ValueHint::DirPath)]
    source: PathBuf,
    #[command(flatten)]
    set: SetArg,
    /// Look at everything again after so long, events or not
    #[arg(long, value_name = "TIME", default_value = "5m", value_parser = parse_resync)]
    resync: Duration,
}

fn parse_resync(text: &str) -> std::result::Result<Duration, String> {
    match parse_duration(text)? {
        short if short < Duration::from_secs(1) => Err("the shortest is 1s".to_owned()),
        resync => Ok(resync),
    }
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        let options = agent::Options { source: self.source, set: self.set.set, resync: self.resync };
        agent::run(&session.host(), options).map_err(|error| CliError::failed(error.to_string()))?;
        Ok(Exit::Ok)
    }
}
