//! `vmctl resume`.

use clap::Args;

use super::error::Result;
use super::power::VmArgs;
use super::session::Session;
use crate::kinds::virtual_machine::power::Power;

/// Let paused VMs go on
///
/// A VM that is paused because the storage below one of its disks is full goes on by itself when there is room.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  vmctl resume web")]
pub struct Command {
    #[command(flatten)]
    pub vms: VmArgs,
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        self.vms.run(session, Power::Resume, "vmctl resume")
    }
}
