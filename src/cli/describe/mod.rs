//! `vmctl describe`: everything that is known of one object, for a person.

mod vm;

use std::fmt::Write;

use clap::Args;

use super::args::{Resource, parse_resources};
use super::error::{CliError, Result};
use super::exit::Exit;
use super::get::{not_found, table::format_name};
use super::objects::{LinkStatus, Object, Status, objects};
use super::session::Session;
use crate::host::snapshot::VlanProtocol;
use crate::host::{Host, Scope};
use crate::name::SetName;
use crate::report::text::Style;
use crate::report::units::size;

/// Say everything about objects on this host
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  vmctl describe vm/web
  vmctl describe vm web db
  vmctl describe pool                 all of a kind")]
pub struct Command {
    /// KIND/NAME, KIND NAME… or KIND
    #[arg(value_name = "KIND/NAME", required = true)]
    resources: Vec<String>,
    /// Only objects of this set [default: all sets]
    #[arg(long, value_name = "NAME", env = "VMCTL_SET", hide_env_values = true)]
    set: Option<SetName>,
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        let resources = parse_resources(&self.resources)?;
        let snapshot = session.host().snapshot(&Scope::default());
        let (all, unseen) = objects(&snapshot, self.set.as_ref());
        let (shown, missing) = super::get::select(&all, &resources);
        let texts: Vec<String> = shown.iter().map(|object| describe(object, session.out.style)).collect();
        session.out.print(&texts.join("\n"));
        for error in &unseen {
            session.out.error(&CliError::failed(format!("could not look: {error}")));
        }
        match (missing.is_empty(), resources.iter().any(|resource| !matches!(resource, Resource::Object(_))))
        {
            (false, _) => Err(not_found(&missing, self.set.as_ref())),
            (true, true) if shown.is_empty() => {
                session.out.note("There are none on this host.");
                Ok(Exit::Ok)
            }
            _ if unseen.is_empty() => Ok(Exit::Ok),
            _ => Ok(Exit::Failed),
        }
    }
}

/// Lines of a name and a value, the values in one column.
struct Page {
    text: String,
    style: Style,
}

impl Page {
    fn line(&mut self, name: &str, value: impl AsRef<str>) {
        let value = value.as_ref();
        // Writing to a String can't fail.
        let _ =
            writeln!(self.text, "{:<16}{}", format!("{name}:"), if value.is_empty() { "-" } else { value });
    }

    fn maybe<T: ToString>(&mut self, name: &str, value: Option<T>) {
        self.line(name, value.map_or(String::new(), |value| value.to_string()));
    }

    fn list<T: ToString>(&mut self, name: &str, values: &[T]) {
        self.line(name, values.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "));
    }

    fn section(&mut self, name: &str) {
        let _ = writeln!(self.text, "{}", self.style.bold(&format!("{name}:")));
    }

    fn item(&mut self, text: &str) {
        let _ = writeln!(self.text, "  {text}");
    }
}

fn describe(object: &Object, style: Style) -> String {
    let mut page = Page { text: format!("{}\n", style.bold(&object.id.to_string())), style };
    page.line("Set", object.set.as_str());
    match &object.status {
        Status::HostPolicy(host) => {
            page.line("CPUs", host.cpu_text());
            page.line(
                "Memory",
                format!("{} in all, {} available", size(host.memory_bytes), size(host.available_bytes)),
            );
            page.line("Reserved", size(host.reserved_bytes));
            page.line("Guests", host.memory_text());
            page.line("Huge pages", host.pages_text());
            page.line("KSM", host.ksm_text());
            page.maybe(
                "Balloons",
                host.balloon.map(|balloon| {
                    format!(
                        "fill below {}, empty above {}",
                        size(balloon.low_bytes),
                        size(balloon.high_bytes)
                    )
                }),
            );
            for previous in &host.previous {
                page.line("Before", format!("{} {}", previous.setting, previous.value));
            }
        }
        Status::Bridge(bridge) => {
            link(&mut page, &bridge.link);
            page.list("Ports", &bridge.ports);
            page.line("Spanning tree", if bridge.stp { "on" } else { "off" });
            page.line("VLAN filtering", if bridge.vlan_filtering { "on" } else { "off" });
        }
        Status::Vlan(vlan) => {
            link(&mut page, &vlan.link);
            page.maybe("VLAN", vlan.vlan_id);
            page.maybe("Protocol", vlan.protocol.map(protocol));
            page.maybe("Parent", vlan.parent.as_ref());
            page.maybe("Bridge", vlan.link.master.as_ref());
        }
        Status::Network(network) => {
            page.maybe("Bridge", network.bridge.as_ref());
            match &network.link {
                Some(there) => link(&mut page, there),
                None => page.line("State", style.red("missing")),
            }
            page.list("Ports", &network.ports);
            page.line("NAT", if network.nat { "on" } else { "off" });
            page.list("Forwarding", &network.forwarding);
            page.list("Port forwards", &network.port_forwards);
            if let Some(service) = &network.service {
                let down = || style.red("not running");
                page.line("DHCP and DNS", service.pid.map_or_else(down, |pid| format!("dnsmasq, pid {pid}")));
            }
            if !network.leases.is_empty() {
                page.section("Leases");
            }
            for lease in &network.leases {
                let name = lease.host_name.as_deref().unwrap_or("-");
                let mac = lease.mac_address.map(|mac| format!("{mac}  ")).unwrap_or_default();
                page.item(&format!("{:<15}  {mac}{name}", lease.address));
            }
        }
        Status::StoragePool(pool) => {
            let state = if pool.present { "" } else { " (missing)" };
            page.line("Directory", format!("{}{state}", pool.path.display()));
            if let Some(group) = &pool.volume_group {
                page.line("Volume group", group);
            }
            if let Some(thin) = &pool.thin_pool {
                page.line("Thin pool", thin);
            }
            for condition in &pool.conditions {
                page.line(condition.kind, style.red(&condition.message));
            }
            page.line(
                "Capacity",
                format!("{} ({} available)", size(pool.capacity_bytes), size(pool.available_bytes)),
            );
            page.line("In use by us", size(pool.used_bytes));
            page.line("Volumes", pool.volumes.to_string());
            page.line("Images", pool.images.to_string());
        }
        Status::Image(image) => {
            page.line("Pool", image.pool.as_str());
            page.line("File", image.path.display().to_string());
            page.line("Format", format_name(image.format));
            page.line("Size", exact(image.virtual_size_bytes));
            page.line("Allocation", size(image.allocated_bytes));
            page.maybe("SHA-256", image.sha256.as_ref());
            page.list("Overlays", &image.used_by);
        }
        Status::Volume(volume) => {
            page.line("Pool", volume.pool.as_str());
            page.line("File", volume.path.display().to_string());
            page.line("Format", format_name(volume.format));
            page.line("Capacity", exact(volume.capacity_bytes));
            page.line("Allocation", size(volume.allocated_bytes));
            page.maybe("Backing file", volume.backing.as_ref().map(|path| path.display()));
            page.line("Reclaim policy", volume.reclaim_policy);
            page.maybe(
                "Boot signature",
                volume.boot_signature.map(|found| format!("{found:?}").to_lowercase()),
            );
            page.list("Used by", &volume.used_by);
            page.line("In use now", if volume.running { "yes" } else { "no" });
            if let Some(why) = &volume.unusable {
                page.line("Unusable", style.red(why));
            }
        }
        Status::VirtualMachine(vm) => vm::describe(&mut page, vm),
    }
    page.text
}

fn protocol(protocol: VlanProtocol) -> &'static str {
    match protocol {
        VlanProtocol::Ieee8021Q => "802.1Q",
        VlanProtocol::Ieee8021Ad => "802.1ad",
    }
}

/// `20Gi (21474836480 bytes)`
fn exact(bytes: u64) -> String {
    format!("{} ({bytes} bytes)", size(bytes))
}

fn link(page: &mut Page, link: &LinkStatus) {
    page.line("Interface", link.interface.as_str());
    page.line("State", if link.up { "up" } else { "down" });
    page.line("MTU", link.mtu.to_string());
    page.maybe("MAC address", link.mac_address.as_ref());
    page.list("Addresses", &link.addresses);
}
