//! Bridge: differences to steps.

use super::{Bridge, Port};
use crate::host::Step;
use crate::host::snapshot::{Capability, Link, LinkKind};
use crate::host::step::{LinkChange, NewLink, NewLinkKind};
use crate::kinds::Context;
use crate::kinds::action::{Action, Blocker, Impact, Verb};
use crate::kinds::links::{self, Holder, set};
use crate::name::{LinkName, Mark, ObjectId, SetName};

pub fn compare(id: &ObjectId, want: &Bridge, context: &Context) -> Action {
    let mut action = Action::new(id, summary(want));
    let name = match want.link_name(&id.name) {
        Ok(name) => name,
        Err(error) => return action.blocked(Blocker::new(error.to_string())),
    };
    let links = match links::all(context) {
        Ok(links) => links,
        Err(blocker) => return action.blocked(blocker),
    };
    for capability in [Capability::Bridge, Capability::VlanFiltering] {
        let needed = capability == Capability::Bridge || want.settings.vlan_filtering;
        if let Some(how) = context.snapshot.lacks.get(&capability).filter(|_| needed) {
            return action.blocked(Blocker::lacks(capability, how));
        }
    }
    let mark = Mark::new(context.declared.set.clone(), id.clone());
    if let Err(blocker) = compare_link(&mut action, &name, want, &mark, links, context) {
        return action.blocked(blocker);
    }
    for port in &want.ports {
        compare_port(&mut action, id, &name, want, port, context);
    }
    release_ports(&mut action, id, want, context);
    action.finish()
}

/// The link itself, without its ports; for the bridges of networks too.
pub(in crate::kinds) fn compare_link<'a>(
    action: &mut Action,
    name: &LinkName,
    want: &Bridge,
    mark: &Mark,
    links: &'a std::collections::BTreeMap<LinkName, Link>,
    context: &Context<'a>,
) -> Result<(), Blocker> {
    match links::holder(context, links, name, mark) {
        Holder::Absent => create(action, name, want, mark),
        Holder::Ours(have) => {
            action.usable = matches!(have.kind, LinkKind::Bridge(_));
            compare_settings(action, name, want, have, context);
        }
        Holder::Renamed(have, old) => {
            links::remark(action, name, old, mark);
            compare_settings(action, name, want, have, context);
        }
        Holder::Unmarked(have) => {
            let before = (action.changes.len(), action.blockers.len());
            compare_settings(action, name, want, have, context);
            if (action.changes.len(), action.blockers.len()) != before {
                return Err(links::not_ours(name, action));
            }
            action.verb(Verb::Adopt, format!("{name} exists and already is what is declared"));
            action.step(Step::MarkLink { link: name.clone(), mark: mark.clone() });
        }
        Holder::Others(blocker) => return Err(blocker),
    }
    Ok(())
}

fn summary(want: &Bridge) -> String {
    let mut text = format!("bridge, mtu {}", want.mtu);
    if want.settings.vlan_filtering {
        text.push_str(", VLAN filtering");
    }
    for port in &want.ports {
        text.push_str(&format!(", port {}", port.interface));
    }
    text
}

fn create(action: &mut Action, name: &LinkName, want: &Bridge, mark: &Mark) {
    action.verb(Verb::Create, format!("{name} is not there"));
    action.step(Step::CreateLink(NewLink {
        name: name.clone(),
        mark: mark.clone(),
        kind: NewLinkKind::Bridge(want.settings.clone()),
        mtu: Some(want.mtu),
        mac_address: want.mac_address,
        master: None,
        port: None,
        up: true,
    }));
    for address in &want.addresses {
        action.step(Step::AddAddress { link: name.clone(), address: *address });
    }
}

fn compare_settings(action: &mut Action, name: &LinkName, want: &Bridge, have: &Link, context: &Context) {
    let LinkKind::Bridge(settings) = &have.kind else {
        action.differs("kind", Some(describe_kind(&have.kind)), Some("bridge".into()), Impact::Replace);
        action.block(
            Blocker::new(format!("{name} is a {}, not a bridge", describe_kind(&have.kind)))
                .hint("choose another `interfaceName`"),
        );
        return;
    };
    let wanted = &want.settings;
    action.field("stp", &wanted.stp, &settings.stp, || set(name, LinkChange::Stp(wanted.stp)));
    action.field(
        "forwardDelaySeconds",
        &wanted.forward_delay_seconds,
        &settings.forward_delay_seconds,
        || set(name, LinkChange::ForwardDelaySeconds(wanted.forward_delay_seconds)),
    );
    action.field("ageingSeconds", &wanted.ageing_seconds, &settings.ageing_seconds, || {
        set(name, LinkChange::AgeingSeconds(wanted.ageing_seconds))
    });
    if wanted.vlan_filtering {
        // The default PVID first: turned on the other way round, ports would sit in VLAN 1 for a moment.
        action.field("defaultPvid", &wanted.default_pvid, &settings.default_pvid, || {
            set(name, LinkChange::DefaultPvid(wanted.default_pvid))
        });
    }
    action.field("vlanFiltering", &wanted.vlan_filtering, &settings.vlan_filtering, || {
        set(name, LinkChange::VlanFiltering(wanted.vlan_filtering))
    });
    action.field("multicastSnooping", &wanted.multicast_snooping, &settings.multicast_snooping, || {
        set(name, LinkChange::MulticastSnooping(wanted.multicast_snooping))
    });
    if let Some(mac) = want.mac_address
        && have.mac_address != Some(mac)
    {
        let from = have.mac_address.map(|mac| mac.to_string());
        action.differs("macAddress", from, Some(mac.to_string()), Impact::Live);
        action.step(set(name, LinkChange::MacAddress(mac)));
    }
    links::compare_mtu_and_up(action, name, have, want.mtu);
    // Those that a network puts on it are the network's business.
    let lent = context.addresses_lent_to(name);
    let own =
        have.addresses.iter().filter(|address| !lent.contains(address) || want.addresses.contains(address));
    links::compare_addresses(action, name, &own.copied().collect(), &want.addresses);
}

fn describe_kind(kind: &LinkKind) -> String {
    match kind {
        LinkKind::Bridge(_) => "bridge".into(),
        LinkKind::Vlan { .. } => "VLAN device".into(),
        LinkKind::Tap { .. } => "tap".into(),
        LinkKind::Other(kind) if kind.is_empty() => "device".into(),
        LinkKind::Other(kind) => format!("{kind} device"),
    }
}

/// How a bridge marks a foreign interface that it was told to make its port.
fn port_mark(set: &SetName, id: &ObjectId, port: &LinkName) -> Mark {
    Mark::part(set.clone(), id.clone(), format!("port-{port}"))
}

fn compare_port(
    action: &mut Action,
    id: &ObjectId,
    bridge: &LinkName,
    want: &Bridge,
    port: &Port,
    context: &Context,
) {
    let Ok(links) = &context.snapshot.links else { return };
    let field = format!("ports[{}]", port.interface);
    let owner = context.declared_owner(&port.interface);
    let name = &port.interface;
    let mark = port_mark(&context.declared.set, id, name);
    let have = match (links.get(name), &owner) {
        (Some(have), _) => Some(have),
        // A declared Vlan that is yet to be made: it comes first.
        (None, Some(_)) => None,
        (None, None) => {
            action.block(
                Blocker::new(format!("port {name} is not there"))
                    .hint("plug the device in or load its driver; vmctl takes it as soon as it shows"),
            );
            return;
        }
    };
    let attached = have.is_some_and(|have| have.master.as_ref() == Some(bridge));
    let found = have.and_then(Link::mark);
    let ours = owner.is_some() || found.as_ref() == Some(&mark);
    if let (false, Some(have)) = (ours, have) {
        if let Some(found) = &found {
            action
                .block(Blocker::new(format!("port {name} belongs to {} of set {}", found.owner, found.set)));
            return;
        }
        if let Some(alias) = &have.alias {
            action.block(
                Blocker::new(format!("port {name} carries the alias `{alias}`, so vmctl can't mark it"))
                    .hint(format!("`ip link set {name} alias \"\"` makes room for the mark")),
            );
            return;
        }
        if let Some(master) = have.master.as_ref().filter(|_| !attached) {
            action.block(
                Blocker::new(format!("port {name} is a port of {master} already"))
                    .hint(format!("`ip link set {name} nomaster` frees it")),
            );
            return;
        }
        if !have.addresses.is_empty() {
            action.block(
                Blocker::new(format!("port {name} has addresses, which stop working on a bridge's port"))
                    .hint("move them to the Bridge's `addresses`"),
            );
            return;
        }
        action.step(Step::MarkLink { link: name.clone(), mark });
        if attached {
            action.differs(format!("{field}.mark"), None, Some("vmctl".into()), Impact::Live);
        }
    }
    if let Some(owner) = owner {
        action.after.push(owner.clone());
    }
    let master = have.and_then(|have| have.master.as_ref());
    if action.verb == Verb::Create {
        action.step(set(name, LinkChange::Master(Some(bridge.clone()))));
    } else {
        links::compare_master(action, &field, name, master, Some(bridge));
    }
    let facts = have.filter(|_| attached).and_then(|have| have.port.as_ref());
    let changes = action.changes.len();
    links::compare_port(action, &field, name, facts, &port.facts, want.settings.vlan_filtering);
    if action.verb == Verb::Create {
        // A new bridge has nothing to differ from.
        action.changes.truncate(changes);
    }
    if have.is_some_and(|have| !have.up) {
        action.step(set(name, LinkChange::Up(true)));
        if action.verb != Verb::Create {
            action.differs(format!("{field}.up"), Some("false".into()), Some("true".into()), Impact::Live);
        }
    }
}

/// Lets go of interfaces that we took as ports and that are declared no more.
fn release_ports(action: &mut Action, id: &ObjectId, want: &Bridge, context: &Context) {
    for (name, have, found) in context.links_of(id) {
        let mark = port_mark(&context.declared.set, id, name);
        let declared = want.ports.iter().any(|port| port.interface == **name);
        if declared || *found != mark {
            continue;
        }
        action.differs("ports", Some(name.to_string()), None, Impact::Live);
        if have.master.is_some() {
            action.step(set(name, LinkChange::Master(None)));
        }
        action.step(Step::UnmarkLink { link: (*name).clone(), mark });
    }
}
