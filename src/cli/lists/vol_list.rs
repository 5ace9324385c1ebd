//! `vmctl vol-list`: the volumes of a pool, as virsh shows them.

use clap::Args;

use super::ViewArgs;
use crate::cli::args::parse_name;
use crate::cli::error::Result;
use crate::cli::get::not_found;
use crate::cli::objects::Status;
use crate::cli::session::Session;
use crate::name::{Kind, ObjectId};
use crate::report::units::size;

/// List the volumes of a pool, or of all pools, as `virsh vol-list` does
///
/// Files that no manifest made or adopted are not volumes of vmctl, and not shown.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  vmctl vol-list
  vmctl vol-list default --details")]
pub struct Command {
    /// The pool's name [default: all pools]
    #[arg(value_name = "POOL")]
    pool: Option<String>,
    /// With type, capacity and allocation
    #[arg(long)]
    details: bool,
    #[command(flatten)]
    pub view: ViewArgs,
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        let seen = self.view.look(session);
        let pool = self.pool.as_deref().map(parse_name).transpose()?;
        if let Some(name) = &pool {
            let id = ObjectId::new(Kind::StoragePool, name.clone());
            if !seen.objects.iter().any(|object| object.id == id) {
                return Err(not_found(&[id.to_string()], self.view.set.as_ref()));
            }
        }
        let volumes = || {
            seen.of_kind(Kind::Volume).filter_map(|object| match &object.status {
                Status::Volume(volume) if pool.as_ref().is_none_or(|pool| *pool == volume.pool) => {
                    Some((object, volume))
                }
                _ => None,
            })
        };
        if !self.details {
            let rows = volumes().map(|(object, volume)| {
                (object, [object.id.name.to_string(), volume.path.display().to_string()])
            });
            return self.view.objects(session, &seen, ["Name", "Path"], rows.collect());
        }
        let rows = volumes().map(|(object, volume)| {
            let kind = if volume.path.starts_with("/dev") { "block" } else { "file" };
            let row = [
                object.id.name.to_string(),
                volume.path.display().to_string(),
                kind.to_owned(),
                size(volume.capacity_bytes),
                size(volume.allocated_bytes),
            ];
            (object, row)
        });
        self.view.objects(session, &seen, ["Name", "Path", "Type", "Capacity", "Allocation"], rows.collect())
    }
}
