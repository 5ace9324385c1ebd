//! `vmctl start`.

use clap::Args;

use super::error::Result;
use super::power::VmArgs;
use super::session::Session;
use crate::kinds::virtual_machine::power::Power;

/// Start VMs that are defined on this host
///
/// Ends the hold of `vmctl stop`. Comes back when the guest's vCPUs run.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  vmctl start web
  vmctl start web db --set prod")]
pub struct Command {
    #[command(flatten)]
    pub vms: VmArgs,
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        self.vms.run(session, Power::Start, "vmctl start")
    }
}
