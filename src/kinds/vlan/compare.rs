//! Vlan: differences to steps.

use super::Vlan;
use crate::host::Step;
use crate::host::snapshot::{Capability, Link, LinkKind, VlanProtocol};
use crate::host::step::{NewLink, NewLinkKind};
use crate::kinds::Context;
use crate::kinds::action::{Action, Blocker, Impact, Verb};
use crate::kinds::links::{self, Holder};
use crate::name::{LinkName, Mark, ObjectId};

pub fn compare(id: &ObjectId, want: &Vlan, context: &Context) -> Action {
    let mut action = Action::new(id, summary(want));
    let links = match links::all(context) {
        Ok(links) => links,
        Err(blocker) => return action.blocked(blocker),
    };
    if let Some(how) = context.snapshot.lacks.get(&Capability::Vlan) {
        return action.blocked(Blocker::lacks(Capability::Vlan, how));
    }
    let parent = links.get(&want.parent);
    let parent_owner = context.declared_owner(&want.parent);
    if let Err(blocker) = check_parent(want, parent, parent_owner.is_some()) {
        return action.blocked(blocker);
    }
    action.after.extend(parent_owner.cloned());
    let bridge = match bridge_link(want, context) {
        Ok(bridge) => bridge,
        Err(blocker) => return action.blocked(blocker),
    };
    let mark = Mark::new(context.declared.set.clone(), id.clone());
    let name = &want.interface_name;
    match links::holder(context, links, name, &mark) {
        Holder::Absent => {
            action.verb(Verb::Create, format!("{name} is not there"));
            create(&mut action, want, &mark, bridge);
        }
        Holder::Ours(have) => {
            action.usable = true;
            compare_fields(&mut action, want, have, parent, bridge.as_ref(), &mark);
        }
        Holder::Renamed(have, old) => {
            links::remark(&mut action, name, old, &mark);
            compare_fields(&mut action, want, have, parent, bridge.as_ref(), &mark);
        }
        Holder::Unmarked(have) => {
            compare_fields(&mut action, want, have, parent, bridge.as_ref(), &mark);
            if !action.changes.is_empty() || !action.blockers.is_empty() {
                let blocker = links::not_ours(name, &action);
                return action.blocked(blocker);
            }
            action.verb(Verb::Adopt, format!("{name} exists and already is what is declared"));
            action.step(Step::MarkLink { link: name.clone(), mark });
        }
        Holder::Others(blocker) => return action.blocked(blocker),
    }
    action.finish()
}

fn summary(want: &Vlan) -> String {
    let bridge = want.bridge.as_ref().map(|bridge| format!(", port of {bridge}")).unwrap_or_default();
    format!("{} on {}, VLAN {}{bridge}", want.interface_name, want.parent, want.id)
}

fn describe(protocol: VlanProtocol) -> &'static str {
    match protocol {
        VlanProtocol::Ieee8021Q => "802.1Q",
        VlanProtocol::Ieee8021Ad => "802.1ad",
    }
}

fn check_parent(want: &Vlan, parent: Option<&Link>, declared: bool) -> Result<(), Blocker> {
    let name = &want.parent;
    let Some(parent) = parent else {
        if declared {
            return Ok(());
        }
        return Err(Blocker::new(format!("its parent {name} is not there"))
            .hint("`ip -br link` lists what there is; vmctl goes on as soon as it shows"));
    };
    if let Some(mtu) = want.mtu.filter(|mtu| *mtu > parent.mtu && !declared) {
        return Err(Blocker::new(format!("mtu {mtu} is above the {} of its parent {name}", parent.mtu))
            .hint(format!("raise the parent's (`ip link set {name} mtu {mtu}`), or lower this one's")));
    }
    if let Some(master) = &parent.master
        && !declared
    {
        return Err(Blocker::new(format!(
            "its parent {name} is a port of {master}: the bridge would take the tagged frames before the VLAN does"
        ))
        .hint(format!("take {name} out of {master}, or use `vlanFiltering` on that bridge")));
    }
    if !parent.up && !declared {
        return Err(Blocker::new(format!("its parent {name} is down"))
            .hint(format!("`ip link set {name} up`; vmctl changes nothing that isn't its own")));
    }
    Ok(())
}

fn bridge_link(want: &Vlan, context: &Context) -> Result<Option<LinkName>, Blocker> {
    let Some(name) = &want.bridge else { return Ok(None) };
    let bridge = context.declared.bridge(name);
    match bridge.map(|bridge| bridge.link_name(name)) {
        Some(Ok(link)) => Ok(Some(link)),
        Some(Err(error)) => Err(Blocker::new(error.to_string())),
        None => Err(Blocker::new(format!("Bridge/{name} is not declared"))),
    }
}

fn create(action: &mut Action, want: &Vlan, mark: &Mark, bridge: Option<LinkName>) {
    let name = want.interface_name.clone();
    action.step(Step::CreateLink(NewLink {
        name: name.clone(),
        mark: mark.clone(),
        kind: NewLinkKind::Vlan { parent: want.parent.clone(), id: want.id, protocol: want.protocol },
        mtu: want.mtu,
        mac_address: None,
        master: bridge,
        port: None,
        up: true,
    }));
    for address in &want.addresses {
        action.step(Step::AddAddress { link: name.clone(), address: *address });
    }
}

fn compare_fields(
    action: &mut Action,
    want: &Vlan,
    have: &Link,
    parent: Option<&Link>,
    bridge: Option<&LinkName>,
    mark: &Mark,
) {
    let name = &want.interface_name;
    let LinkKind::Vlan { id, protocol } = &have.kind else {
        action.differs("kind", None, Some("vlan".into()), Impact::Replace);
        action.block(
            Blocker::new(format!("{name} is not a VLAN device")).hint("choose another `interfaceName`"),
        );
        return;
    };
    // What the kernel fixes at creation.
    let have_parent = have.parent.as_ref().map(ToString::to_string);
    let fixed = [
        ("parent", have_parent.unwrap_or_else(|| "none".into()), want.parent.to_string()),
        ("id", id.to_string(), want.id.to_string()),
        ("protocol", describe(*protocol).to_owned(), describe(want.protocol).to_owned()),
    ];
    for (field, from, to) in fixed.into_iter().filter(|(_, from, to)| from != to) {
        action.differs(field, Some(from), Some(to), Impact::Replace);
    }
    if action.changes.iter().any(|change| change.impact == Impact::Replace) {
        action.verb(Verb::Replace, "the kernel fixes these fields when the device is made");
        action.step(Step::DeleteLink { link: name.clone(), mark: mark.clone() });
        create(action, want, mark, bridge.cloned());
        return;
    }
    links::compare_master(action, "bridge", name, have.master.as_ref(), bridge);
    let mtu = want.mtu.or(parent.map(|parent| parent.mtu)).unwrap_or(have.mtu);
    links::compare_mtu_and_up(action, name, have, mtu);
    links::compare_addresses(action, name, &have.addresses, &want.addresses);
}
