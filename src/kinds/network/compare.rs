//! Network: differences to steps.

use std::collections::BTreeSet;

use super::{Mode, Network, Place, guards, rules, service};
use crate::host::Step;
use crate::host::snapshot::{Capability, Family, IpFamily, Rule, Set, Table, TableId};
use crate::kinds::Context;
use crate::kinds::action::{Action, Blocker, Impact, Verb};
use crate::kinds::bridge;
use crate::kinds::links;
use crate::name::{LinkName, Mark, ObjectId};

pub fn compare(id: &ObjectId, want: &Network, context: &Context) -> Action {
    let mut action = Action::new(id, summary(want));
    for capability in [Capability::Bridge, Capability::Nftables] {
        if let Some(how) = context.snapshot.lacks.get(&capability) {
            return action.blocked(Blocker::lacks(capability, how));
        }
    }
    let mark = Mark::new(context.declared.set.clone(), id.clone());
    match compare_all(&mut action, id, want, &mark, context) {
        Ok(()) => action.finish(),
        Err(blocker) => action.blocked(blocker),
    }
}

fn compare_all(
    action: &mut Action,
    id: &ObjectId,
    want: &Network,
    mark: &Mark,
    context: &Context,
) -> Result<(), Blocker> {
    let invalid = |error: crate::name::NameError| Blocker::new(error.to_string());
    let place = want.place(&id.name, context.declared).map_err(invalid)?;
    let bridge = place.link(&id.name).map_err(invalid)?;
    let links = links::all(context)?;
    // What guards the network is there before the network, and what lets others in comes last.
    let guarded = guards::table(id, want, place.bridge().mac_address, context.declared);
    compare_table(action, TableId::of_network(mark), Some(rules::table(want, &bridge)), context)?;
    compare_table(action, TableId::of_guards(mark), guarded, context)?;
    remove_former_bridges(action, id, &place, &bridge, context);
    match &place {
        Place::Own(own) => bridge::compare::compare_link(action, &bridge, own, mark, links, context)?,
        Place::Declared(..) => {
            let none = BTreeSet::new();
            let have = links.get(&bridge).map_or(&none, |link| &link.addresses);
            for address in want.addresses().difference(have) {
                if action.verb != Verb::Create {
                    action.differs("addresses", None, Some(address.to_string()), Impact::Live);
                }
                action.step(Step::AddAddress { link: bridge.clone(), address: *address });
            }
        }
    }
    compare_forwarding(action, want, mark, context)?;
    compare_service(action, id, want, &bridge, mark, context)?;
    action.usable = action.verb != Verb::Create && links.contains_key(&bridge);
    Ok(())
}

fn summary(want: &Network) -> String {
    let mut text = format!("{} network", want.mode.as_str());
    for subnet in want.subnets.values() {
        text.push_str(&format!(", {}", subnet.address));
    }
    match want.port_forwards.len() {
        0 => {}
        1 => text.push_str(", 1 port forward"),
        count => text.push_str(&format!(", {count} port forwards")),
    }
    text
}

fn compare_table(
    action: &mut Action,
    id: TableId,
    want: Option<Table>,
    context: &Context,
) -> Result<(), Blocker> {
    let tables = context.snapshot.tables.as_ref().map_err(Blocker::unseen)?;
    let have = tables.get(&id);
    let Some(want) = want else {
        if have.is_some() {
            action.differs("nftables", Some(id.to_string()), None, Impact::Live);
            action.step(Step::DeleteTable { id });
        }
        return Ok(());
    };
    match have {
        Some(have) if *have == want => return Ok(()),
        Some(have) => differences(action, have, &want),
        None if id.family == Family::Inet && context.links_of(&id.owner.owner).is_empty() => {
            action.verb(Verb::Create, format!("the nftables table {id} is not there"));
        }
        None if action.verb == Verb::Create => {}
        None => {
            action.differs("nftables", None, Some(id.to_string()), Impact::Live);
        }
    }
    action.step(Step::SetTable { id, table: want });
    Ok(())
}

/// Each rule that comes or goes, by what it is for.
fn differences(action: &mut Action, have: &Table, want: &Table) {
    let names: BTreeSet<&String> = have.chains.keys().chain(want.chains.keys()).collect();
    let before = action.changes.len();
    for name in names {
        let rules =
            |table: &Table| table.chains.get(name).map(|chain| chain.rules.clone()).unwrap_or_default();
        let (from, to) = (rules(have), rules(want));
        let word =
            |rule: &Rule| if rule.comment.is_empty() { "a rule".to_owned() } else { rule.comment.clone() };
        let field = format!("nftables.{name}");
        for rule in from.iter().filter(|rule| !to.contains(rule)) {
            action.differs(&field, Some(word(rule)), None, Impact::Live);
        }
        for rule in to.iter().filter(|rule| !from.contains(rule)) {
            action.differs(&field, None, Some(word(rule)), Impact::Live);
        }
        let base = |table: &Table| table.chains.get(name).map(|chain| chain.base.clone());
        if base(have) != base(want) {
            let word = |table: &Table| {
                base(table).map(|base| match base {
                    Some(base) => format!("{} {} {} {}", base.kind, base.hook, base.priority, base.policy),
                    None => "not hooked in".to_owned(),
                })
            };
            action.differs(&field, word(have), word(want), Impact::Live);
        }
    }
    let names: BTreeSet<&String> = have.sets.keys().chain(want.sets.keys()).collect();
    for name in names {
        let field = format!("nftables.{name}");
        let elements =
            |table: &Table| table.sets.get(name).map(|set| set.elements.clone()).unwrap_or_default();
        let kind = |table: &Table| table.sets.get(name).map(Set::describe);
        if kind(have) != kind(want) {
            action.differs(&field, kind(have), kind(want), Impact::Live);
        }
        let (from, to) = (elements(have), elements(want));
        for element in from.iter().filter(|(key, value)| to.get(*key) != Some(*value)) {
            action.differs(&field, Some(element.0.clone()), None, Impact::Live);
        }
        for element in to.iter().filter(|(key, value)| from.get(*key) != Some(*value)) {
            action.differs(&field, None, Some(element.0.clone()), Impact::Live);
        }
    }
    for other in &have.others {
        action.differs("nftables", Some(other.clone()), None, Impact::Live);
    }
    if action.changes.len() == before {
        action.differs("nftables", Some("other order".into()), Some("order".into()), Impact::Live);
    }
}

/// Bridges of ours that it had under another name.
fn remove_former_bridges(
    action: &mut Action,
    id: &ObjectId,
    place: &Place,
    bridge: &LinkName,
    context: &Context,
) {
    for (name, _, mark) in context.links_of(id) {
        let kept = *name == bridge && matches!(place, Place::Own(_));
        // Another object takes it over as it is.
        let taken = context.declared_owner(name).is_some_and(|owner| owner != id);
        if kept || taken {
            continue;
        }
        action.differs("bridge", Some(name.to_string()), Some(bridge.to_string()), Impact::Live);
        action.step(Step::DeleteLink { link: (*name).clone(), mark: mark.clone() });
    }
}

fn compare_forwarding(
    action: &mut Action,
    want: &Network,
    mark: &Mark,
    context: &Context,
) -> Result<(), Blocker> {
    let forwarding = context.snapshot.forwarding.as_ref().map_err(Blocker::unseen)?;
    for family in IpFamily::ALL {
        let Some(have) = forwarding.get(&family) else { continue };
        let needed = want.mode != Mode::Isolated && want.subnets.contains_key(&family);
        let held = have.users.contains(mark);
        if needed && !(have.on && held) {
            if let Some(link) = &have.default_route_by_ra {
                return Err(Blocker::new(format!(
                    "{family} forwarding would cut this host off: its default route comes by router advertisements to {link}, which a router doesn't heed"
                ))
                .hint(format!("`sysctl net.ipv6.conf.{link}.accept_ra=2` lets it heed them all the same; or use `mode: isolated`, or no `ipv6`")));
            }
            if action.verb != Verb::Create {
                let (from, to) = match have.on {
                    true => ("not held", "held"),
                    false => ("off", "on"),
                };
                action.differs(
                    format!("forwarding.{family}"),
                    Some(from.into()),
                    Some(to.into()),
                    Impact::Live,
                );
            }
            action.step(Step::RequireForwarding { family, mark: mark.clone() });
        } else if held && !needed {
            action.differs(format!("forwarding.{family}"), Some("held".into()), None, Impact::Live);
            action.step(Step::ReleaseForwarding { family, mark: mark.clone() });
        }
    }
    Ok(())
}

/// DHCP, DNS and router advertisements. The network works without them for guests that need none, so a host
/// that can't have them has the rest.
fn compare_service(
    action: &mut Action,
    id: &ObjectId,
    want: &Network,
    bridge: &LinkName,
    mark: &Mark,
    context: &Context,
) -> Result<(), Blocker> {
    let services = context.snapshot.services.as_ref().map_err(Blocker::unseen)?;
    let have = services.get(mark);
    let Some(config) = service::config(id, want, bridge, context.declared) else {
        if have.is_some() {
            action.differs("dnsmasq", Some("running".into()), None, Impact::Live);
            action.step(Step::RemoveService { mark: mark.clone() });
        }
        return Ok(());
    };
    if let Some(how) = context.snapshot.lacks.get(&Capability::Dnsmasq) {
        action.block(Blocker::lacks(Capability::Dnsmasq, how));
        return Ok(());
    }
    let running = have.filter(|have| have.pid.is_some());
    let given = running.and_then(|have| have.config.as_ref());
    if given == Some(&config) {
        return Ok(());
    }
    if action.verb != Verb::Create {
        match given {
            Some(given) => {
                let parts = [
                    ("dnsmasq.settings", &given.main, &config.main),
                    ("dnsmasq.reservations", &given.hosts, &config.hosts),
                    ("dnsmasq.names", &given.names, &config.names),
                ];
                for (field, from, to) in parts {
                    for line in from.lines().filter(|line| !to.lines().any(|other| other == *line)) {
                        action.differs(field, Some(line.to_owned()), None, Impact::Live);
                    }
                    for line in to.lines().filter(|line| !from.lines().any(|other| other == *line)) {
                        action.differs(field, None, Some(line.to_owned()), Impact::Live);
                    }
                }
            }
            None => {
                let from = if running.is_some() { "half changed" } else { "not running" };
                action.differs("dnsmasq", Some(from.into()), Some("running".into()), Impact::Live);
            }
        }
    }
    action.step(Step::SetService { mark: mark.clone(), config });
    Ok(())
}
