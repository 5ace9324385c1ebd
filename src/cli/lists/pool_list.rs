//! `vmctl pool-list`: storage pools, as virsh shows them.

use clap::Args;

use super::{ViewArgs, yes_no};
use crate::cli::error::Result;
use crate::cli::objects::Status;
use crate::cli::session::Session;
use crate::name::Kind;
use crate::report::units::size;

/// List storage pools as `virsh pool-list` does
///
/// A pool is active when it is there. All are persistent and start by themselves: they are found where they were
/// declared, after a reboot too.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  vmctl pool-list
  vmctl pool-list --details")]
pub struct Command {
    /// Those that are not there, too
    #[arg(long)]
    all: bool,
    /// With capacity, allocation and what is available
    #[arg(long)]
    details: bool,
    #[command(flatten)]
    pub view: ViewArgs,
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        let seen = self.view.look(session);
        let pools = || {
            seen.of_kind(Kind::StoragePool).filter_map(|object| match &object.status {
                Status::StoragePool(pool) if pool.present || self.all => Some((object, pool)),
                _ => None,
            })
        };
        let state = |present: bool| if present { "active" } else { "inactive" }.to_owned();
        if !self.details {
            let rows = pools().map(|(object, pool)| {
                (object, [object.id.name.to_string(), state(pool.present), yes_no(true)])
            });
            return self.view.objects(session, &seen, ["Name", "State", "Autostart"], rows.collect());
        }
        let rows = pools().map(|(object, pool)| {
            let row = [
                object.id.name.to_string(),
                state(pool.present),
                yes_no(true),
                yes_no(true),
                size(pool.capacity_bytes),
                size(pool.capacity_bytes.saturating_sub(pool.available_bytes)),
                size(pool.available_bytes),
            ];
            (object, row)
        });
        let head = ["Name", "State", "Autostart", "Persistent", "Capacity", "Allocation", "Available"];
        self.view.objects(session, &seen, head, rows.collect())
    }
}
