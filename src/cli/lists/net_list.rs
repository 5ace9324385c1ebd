//! `vmctl net-list`: what VMs can be plugged into, as virsh shows networks.

use clap::Args;

use super::{ViewArgs, yes_no};
use crate::cli::error::Result;
use crate::cli::objects::Status;
use crate::cli::session::Session;
use crate::name::Kind;

/// List the networks that VMs can be plugged into as `virsh net-list` does
///
/// Networks, and bridges that are none's own. A network is active when its bridge is up. The kernel forgets bridges at a reboot, and `vmctl apply` or the
/// agent makes them again: so none is persistent or starts by itself, in virsh's words.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  vmctl net-list
  vmctl net-list --all -o yaml")]
pub struct Command {
    /// Those that are down, too
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    pub view: ViewArgs,
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        let seen = self.view.look(session);
        let objects = seen.of_kind(Kind::Network).chain(seen.of_kind(Kind::Bridge));
        let rows = objects.filter_map(|object| {
            let up = match &object.status {
                Status::Bridge(bridge) => bridge.link.up,
                Status::Network(network) => network.link.as_ref().is_some_and(|link| link.up),
                _ => return None,
            };
            let state = if up { "active" } else { "inactive" }.to_owned();
            let row = [object.id.name.to_string(), state, yes_no(false), yes_no(false)];
            (up || self.all).then_some((object, row))
        });
        let head = ["Name", "State", "Autostart", "Persistent"];
        self.view.objects(session, &seen, head, rows.collect())
    }
}
