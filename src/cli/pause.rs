//! `vmctl pause`.

use clap::Args;

use super::error::Result;
use super::power::VmArgs;
use super::session::Session;
use crate::kinds::virtual_machine::power::Power;

/// Stop the vCPUs of VMs; memory and devices stay as they are
///
/// `apply` and the agent leave a paused VM paused. A stop lets it go on, so that the guest can shut down.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  vmctl pause web
  vmctl pause web db --set prod")]
pub struct Command {
    #[command(flatten)]
    pub vms: VmArgs,
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        self.vms.run(session, Power::Pause, "vmctl pause")
    }
}
