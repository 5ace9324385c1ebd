//! libvirt's networks: a bridge each, or the name of one.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::Path;

use roxmltree::Node;
use serde_json::{Value, json};

use super::{bridge_of_link, child, children, text_of};
use crate::adopt::Adoption;
use crate::host::snapshot::Snapshot;
use crate::name::{Kind, ObjectName};

/// By libvirt's names: the Bridge or Network that stands for it, or why there is none.
#[derive(Default)]
pub struct Networks(BTreeMap<String, Result<Attachment, String>>);

/// The field of a NIC, and the object that it names.
pub type Attachment = (&'static str, ObjectName);

impl Networks {
    pub fn attachment(&self, network: &str) -> Result<Attachment, String> {
        match self.0.get(network) {
            Some(Ok(attachment)) => Ok(attachment.clone()),
            Some(Err(why)) => Err(why.clone()),
            None => Err(format!("libvirt's network {network} is in none of its files")),
        }
    }

    pub fn read(&mut self, file: &Path, root: Node, snapshot: &Snapshot, adoption: &mut Adoption) {
        let name = text_of(root, "name").unwrap_or_default().to_owned();
        let what = format!("libvirt's network {name} ({})", file.display());
        let mode = child(root, "forward").map(|forward| forward.attribute("mode").unwrap_or("nat"));
        let link = child(root, "bridge").and_then(|bridge| bridge.attribute("name"));
        let Some(link) = link else {
            let why = format!("a network of mode {} has no bridge of the host", mode.unwrap_or("none"));
            adoption.leave(what, why.clone());
            self.0.insert(name, Err(why));
            return;
        };
        if let Some(bridge) = bridge_of_link(adoption, link) {
            // It is there: the kernel's own word counts, and libvirt's part in it is what must be known.
            if let Some(found) = adoption
                .objects
                .iter_mut()
                .find(|found| found.id.kind == Kind::Bridge && found.id.name == bridge)
            {
                found.notes.extend(forwarding(mode, &name));
                found.notes.extend(rest(root, &name));
            }
            self.0.insert(name, Ok(("bridge", bridge)));
            return;
        }
        let is_there = snapshot.links.as_ref().is_ok_and(|links| links.contains_key(link));
        if mode == Some("bridge") || is_there {
            let why = if is_there {
                format!("its {link} is vmctl's already, or no bridge")
            } else {
                format!("its bridge {link} is not there")
            };
            adoption.leave(what, why.clone());
            self.0.insert(name, Err(why));
            return;
        }
        let own = adoption.free_name(Kind::Network, &name);
        let mode = match mode {
            None => "isolated",
            Some("nat") => "nat",
            Some("route") => "routed",
            Some(other) => {
                let why = format!("networks of mode {other} are not known here");
                adoption.leave(what, why.clone());
                self.0.insert(name, Err(why));
                return;
            }
        };
        let mtu = child(root, "mtu")
            .and_then(|mtu| mtu.attribute("size"))
            .and_then(|size| size.parse::<u32>().ok());
        let mut spec = json!({
            "bridge": if link == own.as_str() { Value::Null } else { json!(link) },
            "mode": mode,
            "mtu": mtu.filter(|mtu| *mtu != 1500),
        });
        let mut notes = vec![format!("from {}; the network is not active", file.display())];
        notes.extend(rest(root, &name));
        for (family, address) in addresses(root) {
            if spec.get(family).is_some() {
                notes.push(format!("a second {family} address, {address}: not declared"));
            } else {
                spec[family] = json!({ "address": address });
            }
        }
        let network = adoption.add(Kind::Network, &name, spec, notes);
        self.0.insert(name, Ok(("network", network)));
    }
}

/// What libvirt does for a network that is active, and a Bridge doesn't.
fn forwarding(mode: Option<&str>, name: &str) -> Option<String> {
    let mode = mode.filter(|mode| *mode != "bridge")?;
    Some(format!(
        "libvirt's network {name} forwards by {mode} here: a Bridge doesn't; declare a Network when libvirt's is gone"
    ))
}

/// What neither a Bridge nor a Network says.
fn rest(root: Node, name: &str) -> Vec<String> {
    let mut notes = Vec::new();
    for ip in children(root, "ip") {
        if let Some(dhcp) = child(ip, "dhcp") {
            let ranges = children(dhcp, "range").filter_map(|range| {
                Some(format!("{} to {}", range.attribute("start")?, range.attribute("end")?))
            });
            let hosts = children(dhcp, "host").count();
            let ranges: Vec<String> = ranges.collect();
            notes.push(format!(
                "libvirt's network {name} gives addresses by DHCP here ({}, {hosts} reserved): not declared",
                ranges.join(", ")
            ));
        }
    }
    for other in ["dns", "portgroup", "route", "bandwidth", "vlan", "domain"] {
        if child(root, other).is_some() {
            notes.push(format!("libvirt's network {name} has <{other}>: not declared"));
        }
    }
    notes
}

fn addresses(root: Node) -> Vec<(&'static str, String)> {
    let addresses = children(root, "ip").filter_map(|ip| {
        let address = ip.attribute("address")?;
        let prefix = match (ip.attribute("prefix"), ip.attribute("netmask")) {
            (Some(prefix), _) => prefix.to_owned(),
            (None, Some(mask)) => u32::from(mask.parse::<Ipv4Addr>().ok()?).leading_ones().to_string(),
            (None, None) => return None,
        };
        let family = if address.contains(':') { "ipv6" } else { "ipv4" };
        Some((family, format!("{address}/{prefix}")))
    });
    addresses.collect()
}
