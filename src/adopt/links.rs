//! Bridges and VLAN devices, as the kernel has them.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::Adoption;
use crate::host::snapshot::{BridgeFacts, Link, LinkKind, PortFacts, Snapshot, VlanProtocol};
use crate::name::{Kind, LinkName, ObjectName};

pub fn find(snapshot: &Snapshot, adoption: &mut Adoption) {
    let links = match &snapshot.links {
        Ok(links) => links,
        Err(error) => return adoption.leave("the host's network", error.to_string()),
    };
    bonds(links, adoption);
    let ours = |link: &Link| link.mark().is_some();
    let mut bridges: BTreeMap<&LinkName, ObjectName> = BTreeMap::new();
    // A bridge that is vmctl's already can still be what a VLAN device is a port of: by its object's name, of
    // whatever set, which the other set's manifests would have to say.
    for (name, link) in links.iter().filter(|(_, link)| !ours(link)) {
        if let LinkKind::Bridge(facts) = &link.kind {
            bridges.insert(name, bridge(links, name, link, facts, adoption));
        }
    }
    for (name, link) in links.iter().filter(|(_, link)| !ours(link)) {
        if let LinkKind::Vlan { id, protocol } = &link.kind {
            vlan(links, (name, link), (id.get(), *protocol), &bridges, adoption);
        }
    }
}

/// There is no kind for them. What is built on one names it, as it would a NIC.
fn bonds(links: &BTreeMap<LinkName, Link>, adoption: &mut Adoption) {
    for kind in ["bond", "team"] {
        let of_kind =
            links.iter().filter(|(_, link)| matches!(&link.kind, LinkKind::Other(other) if other == kind));
        for (name, _) in of_kind {
            let members = links.iter().filter(|(_, link)| link.master.as_ref() == Some(name));
            let members: Vec<&str> = members.map(|(member, _)| member.as_str()).collect();
            let members = if members.is_empty() { "no link".to_owned() } else { members.join(" and ") };
            let why = format!(
                "a {kind} (of {members}) has no manifest: it stays in the hands of what made it, and ports and VLANs name it as they name a NIC"
            );
            adoption.leave(name.to_string(), why);
        }
    }
}

/// Left out where it is what a manifest gets by default.
fn unless<T: PartialEq + Into<Value>>(value: T, default: T) -> Value {
    if value == default { Value::Null } else { value.into() }
}

fn list(values: impl Iterator<Item = String>) -> Value {
    let values: Vec<String> = values.collect();
    if values.is_empty() { Value::Null } else { json!(values) }
}

fn interface_name(object: &ObjectName, link: &LinkName) -> Value {
    if object.as_str() == link.as_str() { Value::Null } else { json!(link.as_str()) }
}

fn bridge(
    links: &BTreeMap<LinkName, Link>,
    name: &LinkName,
    link: &Link,
    facts: &BridgeFacts,
    adoption: &mut Adoption,
) -> ObjectName {
    let mut notes = Vec::new();
    let mut ports = Vec::new();
    for (port, port_link) in links.iter().filter(|(_, other)| other.master.as_ref() == Some(name)) {
        match &port_link.kind {
            // Its own manifest names the bridge.
            LinkKind::Vlan { .. } if port_link.mark().is_none() => {}
            LinkKind::Tap { .. } => {
                notes.push(format!(
                    "port {port} is a tap, which comes and goes with its program: not declared"
                ));
            }
            _ if port_link.mark().is_some() => {}
            _ => ports.push(port_spec(port, port_link.port.as_ref(), facts.vlan_filtering, &mut notes)),
        }
    }
    let object = adoption.free_name(Kind::Bridge, name.as_str());
    let filters = facts.vlan_filtering;
    let spec = json!({
        "interfaceName": interface_name(&object, name),
        "mtu": unless(link.mtu, 1500),
        "stp": unless(facts.stp, false),
        "forwardDelaySeconds": unless(facts.forward_delay_seconds, 15),
        "ageingSeconds": unless(facts.ageing_seconds, 300),
        "vlanFiltering": unless(filters, false),
        "defaultPvid": if filters { unless(facts.default_pvid, 0) } else { Value::Null },
        "multicastSnooping": unless(facts.multicast_snooping, true),
        "addresses": list(link.addresses.iter().map(ToString::to_string)),
        "ports": if ports.is_empty() { Value::Null } else { json!(ports) },
    });
    adoption.add(Kind::Bridge, name.as_str(), spec, notes)
}

fn port_spec(name: &LinkName, facts: Option<&PortFacts>, filters: bool, notes: &mut Vec<String>) -> Value {
    let mut port = json!({ "interface": name.as_str() });
    let Some(facts) = facts else { return port };
    let mut set = |field: &str, value: Value| {
        if !value.is_null() {
            port[field] = value;
        }
    };
    set("isolated", unless(facts.isolated, false));
    set("hairpin", unless(facts.hairpin, false));
    set("bpduGuard", unless(facts.bpdu_guard, false));
    set("learning", unless(facts.learning, true));
    set("flood", unless(facts.unicast_flood, true));
    if !filters {
        return port;
    }
    let (mut tagged, mut untagged) = (Vec::new(), Vec::new());
    for (id, flags) in &facts.vlans {
        match (flags.pvid, flags.untagged) {
            (true, true) => set("pvid", json!(id.get())),
            (true, false) => notes.push(format!(
                "port {name}: VLAN {id} is its pvid and leaves it tagged, which a manifest can't say"
            )),
            (false, true) => untagged.push(id.get()),
            (false, false) => tagged.push(id.get()),
        }
    }
    for (field, ids) in [("tagged", tagged), ("untagged", untagged)] {
        if !ids.is_empty() {
            set(field, json!(ids));
        }
    }
    port
}

fn vlan(
    links: &BTreeMap<LinkName, Link>,
    (name, link): (&LinkName, &Link),
    (id, protocol): (u16, VlanProtocol),
    bridges: &BTreeMap<&LinkName, ObjectName>,
    adoption: &mut Adoption,
) {
    let what = format!("VLAN device {name}");
    let Some(parent) = &link.parent else {
        return adoption.leave(what, "its parent is in another network namespace");
    };
    let mut notes = Vec::new();
    let bridge = match &link.master {
        None => Value::Null,
        Some(master) => match bridges.get(master) {
            Some(bridge) => json!(bridge.as_str()),
            None => {
                notes.push(format!("it is a port of {master}, which is not a bridge that is adopted here"));
                Value::Null
            }
        },
    };
    if !bridge.is_null() && !link.addresses.is_empty() {
        notes.push(format!(
            "it has addresses ({}), which a bridge's port can't use: not declared",
            link.addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
        ));
    }
    let default_name = format!("{parent}.{id}");
    let inherited = links.get(parent).map(|parent| parent.mtu);
    let addresses = link.addresses.iter().map(ToString::to_string);
    let spec = json!({
        "parent": parent.as_str(),
        "id": id,
        "interfaceName": if name.as_str() == default_name { Value::Null } else { json!(name.as_str()) },
        "protocol": match protocol {
            VlanProtocol::Ieee8021Q => Value::Null,
            VlanProtocol::Ieee8021Ad => json!("802.1ad"),
        },
        "mtu": if inherited == Some(link.mtu) { Value::Null } else { json!(link.mtu) },
        "addresses": if bridge.is_null() { list(addresses) } else { Value::Null },
        "bridge": bridge,
    });
    adoption.add(Kind::Vlan, name.as_str(), spec, notes);
}
