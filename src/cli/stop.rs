//! `vmctl stop`.

use std::time::Duration;

use clap::Args;

use super::args::parse_duration;
use super::error::Result;
use super::power::{VmArgs, stop_how};
use super::session::Session;
use crate::kinds::virtual_machine::power::Power;

/// Shut VMs down and hold them down
///
/// Presses the power button, and stops the VM by force when the guest has not shut down in time. `apply` and the
/// agent leave it down until `vmctl start`.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  vmctl stop web
  vmctl stop web --timeout 3m
  vmctl stop web --force              at once, as if the power failed")]
pub struct Command {
    #[command(flatten)]
    pub vms: VmArgs,
    /// Don't ask the guest
    #[arg(long, conflicts_with = "timeout")]
    force: bool,
    /// How long the guest has to shut down: 90s, 5m
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_duration)]
    timeout: Duration,
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        self.vms.run(session, Power::Stop(stop_how(self.force, self.timeout)), "vmctl stop")
    }
}
