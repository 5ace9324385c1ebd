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

/// By libvirt's names.
#[derive(Default)]
pub struct Networks {
    /// The Bridge or Network that stands for it, or why there is none.
    attachments: BTreeMap<String, Result<Attachment, String>>,
    /// The addresses that networks give to NICs, by network and MAC address.
    reserved: BTreeMap<(String, String), String>,
}

/// The field of a NIC, and the object that it names.
pub type Attachment = (&'static str, ObjectName);

impl Networks {
    pub fn attachment(&self, network: &str) -> Result<Attachment, String> {
        match self.attachments.get(network) {
            Some(Ok(attachment)) => Ok(attachment.clone()),
            Some(Err(why)) => Err(why.clone()),
            None => Err(format!("libvirt's network {network} is in none of its files")),
        }
    }

    /// What the NIC gets from the network whenever it asks.
    pub fn reserved(&self, network: &str, mac_address: &str) -> Option<&str> {
        let key = (network.to_owned(), mac_address.to_lowercase());
        self.reserved.get(&key).map(String::as_str)
    }

    pub fn read(
        &mut self,
        (file, root): (&Path, Node),
        autostart: bool,
        snapshot: &Snapshot,
        adoption: &mut Adoption,
    ) {
        let name = text_of(root, "name").unwrap_or_default().to_owned();
        let what = format!("libvirt's network {name} ({})", file.display());
        let mode = child(root, "forward").map(|forward| forward.attribute("mode").unwrap_or("nat"));
        let link = child(root, "bridge").and_then(|bridge| bridge.attribute("name"));
        let Some(link) = link else {
            let why = format!("a network of mode {} has no bridge of the host", mode.unwrap_or("none"));
            adoption.leave(what, why.clone());
            self.attachments.insert(name, Err(why));
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
            self.attachments.insert(name, Ok(("bridge", bridge)));
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
            self.attachments.insert(name, Err(why));
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
                self.attachments.insert(name, Err(why));
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
        if autostart {
            notes.push(format!(
                "libvirt starts it together with its daemon: `virsh net-autostart --disable {name}`, for two can't have one bridge"
            ));
        }
        notes.extend(of_bridge_and_forward(root));
        self.subnets(root, (&name, mode), &mut spec, &mut notes);
        let network = adoption.add(Kind::Network, &name, spec, notes);
        self.attachments.insert(name, Ok(("network", network)));
    }

    /// The addresses, and what the network's dnsmasq serves.
    fn subnets(&mut self, root: Node, (name, mode): (&str, &str), spec: &mut Value, notes: &mut Vec<String>) {
        for ip in children(root, "ip") {
            let Some((family, address, prefix_len)) = address(ip) else {
                notes.push("an <ip> without an address and a prefix: not declared".to_owned());
                continue;
            };
            if spec.get(family).is_some() {
                notes.push(format!("a second {family} address, {address}: not declared"));
                continue;
            }
            spec[family] = json!({ "address": format!("{address}/{prefix_len}") });
            let dhcp = child(ip, "dhcp");
            if family == "ipv6" {
                let translated = child(root, "forward").and_then(|forward| child(forward, "nat"));
                let translated = translated.and_then(|nat| nat.attribute("ipv6")) == Some("yes");
                if mode == "nat" && !translated {
                    spec[family]["nat"] = json!(false);
                }
                if prefix_len == 64 {
                    spec[family]["routerAdvertisements"] = json!(true);
                }
                if dhcp.is_some() {
                    notes.push("it gives IPv6 addresses by DHCP there: not declared".to_owned());
                }
            } else if let Some(dhcp) = dhcp {
                self.dhcp(dhcp, name, &mut spec[family], notes);
            }
        }
        dns(root, spec, notes);
    }

    fn dhcp(&mut self, dhcp: Node, name: &str, subnet: &mut Value, notes: &mut Vec<String>) {
        for (index, range) in children(dhcp, "range").enumerate() {
            let bounds = json!({ "start": range.attribute("start"), "end": range.attribute("end") });
            if index == 0 {
                subnet["dhcp"] = bounds;
            } else {
                notes.push(format!("a second range of DHCP, {bounds}: not declared"));
            }
            if child(range, "lease").is_some() {
                notes.push("<range><lease>: not declared".to_owned());
            }
        }
        for host in children(dhcp, "host") {
            let (mac, ip) = (host.attribute("mac"), host.attribute("ip"));
            if let (Some(mac), Some(ip)) = (mac, ip) {
                self.reserved.insert((name.to_owned(), mac.to_lowercase()), ip.to_owned());
                notes.push(format!(
                    "{ip} is reserved for {mac}: the NIC of an adopted VM that has it says so"
                ));
            } else {
                let host = host.attribute("name").or(mac).unwrap_or("without a name");
                notes.push(format!("its host {host} of DHCP has no MAC address or no address: not declared"));
            }
        }
        for other in super::children_besides(dhcp, &["range", "host"]) {
            notes.push(format!("<dhcp><{other}>: not declared"));
        }
    }
}

/// libvirt serves names wherever a network has an address, unless it is told not to.
fn dns(root: Node, spec: &mut Value, notes: &mut Vec<String>) {
    let dns = child(root, "dns");
    let mut fields = json!({});
    if dns.and_then(|dns| dns.attribute("enable")) == Some("no") {
        fields["enabled"] = json!(false);
    }
    if let Some(domain) = child(root, "domain").and_then(|domain| domain.attribute("name")) {
        if domain.split('.').all(|label| ObjectName::parse(label).is_ok()) {
            fields["domain"] = json!(domain);
        } else {
            notes.push(format!("its domain {domain} is not one of lower-case labels: not declared"));
        }
    }
    let forwarders: Vec<Node> = dns.iter().flat_map(|dns| children(*dns, "forwarder")).collect();
    if !forwarders.is_empty() {
        let whole = |node: &Node| node.attribute("domain").is_none();
        let all: Vec<&str> =
            forwarders.iter().filter(|node| whole(node)).filter_map(|node| node.attribute("addr")).collect();
        if all.len() < forwarders.len() {
            notes.push("<dns><forwarder> of a domain: not declared".to_owned());
        }
        if !all.is_empty() {
            fields["forwarders"] = json!(all);
        }
    }
    for other in dns.iter().flat_map(|dns| super::children_besides(*dns, &["forwarder"])) {
        notes.push(format!("<dns><{other}>: not declared"));
    }
    let is_default = fields == json!({});
    let served = spec.pointer("/ipv4/dhcp").or(spec.pointer("/ipv6/routerAdvertisements")).is_some();
    let has_address = spec.get("ipv4").or(spec.get("ipv6")).is_some();
    if has_address && (!is_default || !served) {
        spec["dns"] = fields;
    }
}

/// What the bridge of a Network doesn't have, and how a Network doesn't forward.
fn of_bridge_and_forward(root: Node) -> Vec<String> {
    let mut notes = Vec::new();
    let bridge = child(root, "bridge");
    if bridge.and_then(|bridge| bridge.attribute("stp")) == Some("on") {
        notes.push("its bridge has STP there and none here".to_owned());
    }
    if let Some(mac) = child(root, "mac").and_then(|mac| mac.attribute("address")) {
        notes.push(format!("its bridge's MAC address {mac} is not kept"));
    }
    let forward = child(root, "forward");
    if let Some(device) = forward.and_then(|forward| forward.attribute("dev")) {
        notes.push(format!("it forwards only through {device} there, and by the host's routes here"));
    }
    for other in forward.iter().flat_map(|forward| super::children_besides(*forward, &["nat", "interface"])) {
        notes.push(format!("<forward><{other}>: not declared"));
    }
    let nat = forward.and_then(|forward| child(forward, "nat"));
    for other in nat.iter().flat_map(|nat| super::children_besides(*nat, &[])) {
        notes.push(format!("<forward><nat><{other}>: not declared"));
    }
    let known = ["name", "uuid", "title", "description", "metadata", "bridge", "mac", "forward", "ip"];
    for other in super::children_besides(root, &[&known[..], &["dns", "domain", "mtu"]].concat()) {
        notes.push(format!("<{other}>: not declared"));
    }
    notes
}

/// What libvirt does for a network that is active, and a Bridge doesn't.
fn forwarding(mode: Option<&str>, name: &str) -> Option<String> {
    let mode = mode.filter(|mode| *mode != "bridge")?;
    Some(format!(
        "libvirt's network {name} forwards by {mode} here: a Bridge doesn't; declare a Network when libvirt's is gone"
    ))
}

/// What libvirt serves on the bridge of a network that is active.
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

/// The family as a Network's field, the host's address in it, and its prefix.
fn address<'a>(ip: Node<'a, '_>) -> Option<(&'static str, &'a str, u32)> {
    let address = ip.attribute("address")?;
    let prefix_len = match (ip.attribute("prefix"), ip.attribute("netmask")) {
        (Some(prefix), _) => prefix.parse().ok()?,
        (None, Some(mask)) => u32::from(mask.parse::<Ipv4Addr>().ok()?).leading_ones(),
        (None, None) => return None,
    };
    Some((if address.contains(':') { "ipv6" } else { "ipv4" }, address, prefix_len))
}
