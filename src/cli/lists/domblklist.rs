//! `vmctl domblklist`: the disks of a VM, as virsh shows them.

use clap::Args;
use serde_json::json;

use super::ViewArgs;
use crate::cli::error::Result;
use crate::cli::session::Session;

/// List a VM's disks as `virsh domblklist` does
///
/// The target is the disk's name in the manifest, and its serial number in the guest: what `vda` is there depends
/// on the guest.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  vmctl domblklist web
  vmctl domblklist web --details")]
pub struct Command {
    /// The VM's name
    #[arg(value_name = "VM")]
    vm: String,
    /// With what kind of source, and what kind of device
    #[arg(long)]
    details: bool,
    #[command(flatten)]
    pub view: ViewArgs,
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        let seen = self.view.look(session);
        let (object, vm) = seen.vm(&self.vm, self.view.set.as_ref())?;
        let devices = (object, "disks", json!(vm.disks));
        if !self.details {
            let rows = vm.disks.iter().map(|disk| {
                let row = [disk.name.clone(), disk.path.clone()];
                (disk.name.clone(), row)
            });
            return self.view.devices(session, devices, ["Target", "Source"], rows.collect());
        }
        let rows = vm.disks.iter().map(|disk| {
            let kind = if disk.path.starts_with("/dev/") { "block" } else { "file" };
            let row = [kind.to_owned(), "disk".to_owned(), disk.name.clone(), disk.path.clone()];
            (disk.name.clone(), row)
        });
        self.view.devices(session, devices, ["Type", "Device", "Target", "Source"], rows.collect())
    }
}
