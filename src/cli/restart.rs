//! `vmctl restart`.

use std::time::Duration;

use clap::Args;

use super::args::parse_duration;
use super::error::Result;
use super::power::{VmArgs, stop_how};
use super::session::Session;
use crate::kinds::virtual_machine::power::Power;

/// Shut VMs down and start them again
///
/// What was staged for the next start takes effect. A VM that doesn't run is started.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  vmctl restart web
  vmctl restart web --force           as if the power failed")]
pub struct Command {
    #[command(flatten)]
    pub vms: VmArgs,
    /// Don't ask the guest
    #[arg(long, conflicts_with = "timeout")]
    force: bool,
    /// How long the guest has to shut down before it is stopped by force: 90s, 5m
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration)]
    timeout: Duration,
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        self.vms.run(session, Power::Restart(stop_how(self.force, self.timeout)), "vmctl restart")
    }
}
