//! `vmctl domiflist`: the NICs of a VM, as virsh shows them.

use clap::Args;
use serde_json::json;

use super::ViewArgs;
use crate::cli::error::Result;
use crate::cli::session::Session;

/// List a VM's NICs as `virsh domiflist` does
///
/// The interface is the NIC's tap on the host, the source the bridge that it is a port of.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  vmctl domiflist web
  vmctl domiflist web -o json | jq -r '.interfaces[].macAddress'")]
pub struct Command {
    /// The VM's name
    #[arg(value_name = "VM")]
    vm: String,
    #[command(flatten)]
    pub view: ViewArgs,
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        let seen = self.view.look(session);
        let (object, vm) = seen.vm(&self.vm, self.view.set.as_ref())?;
        let rows = vm.interfaces.iter().map(|nic| {
            let source = nic.bridge.as_ref().map_or("-".to_owned(), ToString::to_string);
            // virsh shows no interface of a domain that doesn't run: there is none.
            let tap = if nic.up { nic.tap.clone() } else { "-".to_owned() };
            (
                nic.name.clone(),
                [tap, "bridge".to_owned(), source, "virtio".to_owned(), nic.mac_address.clone()],
            )
        });
        let head = ["Interface", "Type", "Source", "Model", "MAC"];
        let devices = (object, "interfaces", json!(vm.interfaces));
        self.view.devices(session, devices, head, rows.collect())
    }
}
