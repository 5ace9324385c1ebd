//! `vmctl list`: VMs, as `virsh list` shows domains.

use clap::Args;

use super::ViewArgs;
use crate::cli::error::Result;
use crate::cli::objects::{Status, VmStatus};
use crate::cli::session::Session;
use crate::name::Kind;
use crate::vmm::protocol::ExitReason;

/// List VMs as `virsh list` does: those that run, or `--all`
///
/// The id of a VM that runs is the number of its process. States: running, paused, in shutdown, shut off,
/// crashed; `no state` where its process doesn't answer.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  vmctl list
  vmctl list --all
  vmctl list --all -o name")]
pub struct Command {
    /// Those that don't run, too
    #[arg(long)]
    all: bool,
    /// Only those that don't run
    #[arg(long, conflicts_with = "all")]
    inactive: bool,
    #[command(flatten)]
    pub view: ViewArgs,
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        let seen = self.view.look(session);
        let rows = seen.of_kind(Kind::VirtualMachine).filter_map(|object| {
            let Status::VirtualMachine(vm) = &object.status else { return None };
            let active = vm.phase != "Stopped";
            let id = vm.pid.map_or("-".to_owned(), |pid| pid.to_string());
            let row = [id, object.id.name.to_string(), state(vm).to_owned()];
            (self.all || active != self.inactive).then_some((object, row))
        });
        self.view.objects(session, &seen, ["Id", "Name", "State"], rows.collect())
    }
}

fn state(vm: &VmStatus) -> &'static str {
    match (vm.phase, vm.last_exit.as_ref().map(|exit| exit.reason)) {
        ("Running", _) => "running",
        ("Paused", _) => "paused",
        ("Stopping", _) => "in shutdown",
        ("Stopped", Some(ExitReason::GuestFault | ExitReason::GuestPanicked | ExitReason::Internal)) => {
            "crashed"
        }
        ("Stopped", _) => "shut off",
        _ => "no state",
    }
}
