//! What the kinds that are network links share: whose is the link of this name, and what of it
//! differs.

use std::collections::{BTreeMap, BTreeSet};

use super::Context;
use super::action::{Action, Blocker, Impact};
use crate::host::Step;
use crate::host::snapshot::{Link, PortFacts, VlanFlags};
use crate::host::step::LinkChange;
use crate::name::{IpPrefix, LinkName, Mark, VlanId};

/// Whose the link is that an object wants.
pub(super) enum Holder<'a> {
    Absent,
    Ours(&'a Link),
    /// It carries the mark of an object of our set that is declared no more: a rename.
    Renamed(&'a Link, Mark),
    Unmarked(&'a Link),
    Others(Blocker),
}

pub(super) fn all<'a>(context: &Context<'a>) -> Result<&'a BTreeMap<LinkName, Link>, Blocker> {
    context.snapshot.links.as_ref().map_err(Blocker::unseen)
}

pub(super) fn holder<'a>(
    context: &Context<'a>,
    links: &'a BTreeMap<LinkName, Link>,
    name: &LinkName,
    mark: &Mark,
) -> Holder<'a> {
    let Some(link) = links.get(name) else { return Holder::Absent };
    match link.mark() {
        Some(found) if found == *mark => Holder::Ours(link),
        Some(found) if found.set == mark.set && !context.declared.objects.contains_key(&found.owner) => {
            Holder::Renamed(link, found)
        }
        // Its owner has another link now, and this one is declared to be of the object that asks.
        Some(found)
            if found.set == mark.set
                && found.part.is_none()
                && context.declared_owner(name) == Some(&mark.owner) =>
        {
            Holder::Renamed(link, found)
        }
        Some(found) => Holder::Others(
            Blocker::new(format!("{name} belongs to {} of set {}", found.owner, found.set))
                .hint("choose another `interfaceName`, or remove it from the other set first"),
        ),
        None => Holder::Unmarked(link),
    }
}

/// The answer to an unmarked link that isn't what is declared.
pub(super) fn not_ours(name: &LinkName, action: &Action) -> Blocker {
    let fields: Vec<_> = action.changes.iter().map(|change| change.field.as_str()).collect();
    Blocker::new(format!(
        "{name} exists, is not vmctl's, and differs from what is declared ({})",
        fields.join(", ")
    ))
    .hint(format!("make the manifest say what {name} is, or choose another `interfaceName`"))
}

/// Re-marks a link after a rename of its object.
pub(super) fn remark(action: &mut Action, name: &LinkName, old: Mark, new: &Mark) {
    action.differs("metadata.name", Some(old.owner.to_string()), Some(new.owner.to_string()), Impact::Live);
    action.step(Step::UnmarkLink { link: name.clone(), mark: old });
    action.step(Step::MarkLink { link: name.clone(), mark: new.clone() });
}

pub(super) fn compare_mtu_and_up(action: &mut Action, name: &LinkName, have: &Link, mtu: u32) {
    action.field("mtu", &mtu, &have.mtu, || set(name, LinkChange::Mtu(mtu)));
    if !have.up {
        action.differs("up", Some("false".into()), Some("true".into()), Impact::Live);
        action.step(set(name, LinkChange::Up(true)));
    }
}

pub(super) fn compare_addresses(
    action: &mut Action,
    name: &LinkName,
    have: &BTreeSet<IpPrefix>,
    want: &BTreeSet<IpPrefix>,
) {
    for address in have.difference(want) {
        action.differs("addresses", Some(address.to_string()), None, Impact::Live);
        action.step(Step::RemoveAddress { link: name.clone(), address: *address });
    }
    for address in want.difference(have) {
        action.differs("addresses", None, Some(address.to_string()), Impact::Live);
        action.step(Step::AddAddress { link: name.clone(), address: *address });
    }
}

pub(super) fn compare_master(
    action: &mut Action,
    field: &str,
    name: &LinkName,
    have: Option<&LinkName>,
    want: Option<&LinkName>,
) {
    if have != want {
        action.differs(field, have.map(ToString::to_string), want.map(ToString::to_string), Impact::Live);
        action.step(set(name, LinkChange::Master(want.cloned())));
    }
}

/// Port flags and, where the bridge filters, VLANs.
pub(super) fn compare_port(
    action: &mut Action,
    field: &str,
    name: &LinkName,
    have: Option<&PortFacts>,
    want: &PortFacts,
    vlan_filtering: bool,
) {
    // A port that is yet to be attached begins with the kernel's defaults.
    let fresh = PortFacts { learning: true, unicast_flood: true, ..PortFacts::default() };
    let have = have.unwrap_or(&fresh);
    let flags = [
        ("isolated", have.isolated, want.isolated),
        ("hairpin", have.hairpin, want.hairpin),
        ("bpduGuard", have.bpdu_guard, want.bpdu_guard),
        ("learning", have.learning, want.learning),
        ("flood", have.unicast_flood, want.unicast_flood),
    ];
    let before = action.changes.len();
    for (flag, have, want) in flags {
        if have != want {
            action.differs(
                format!("{field}.{flag}"),
                Some(have.to_string()),
                Some(want.to_string()),
                Impact::Live,
            );
        }
    }
    if action.changes.len() > before {
        action.step(set(name, LinkChange::PortFlags(want.clone())));
    }
    if vlan_filtering && have.vlans != want.vlans {
        action.differs(
            format!("{field}.vlans"),
            Some(describe_vlans(&have.vlans)),
            Some(describe_vlans(&want.vlans)),
            Impact::Live,
        );
        action.step(set(name, LinkChange::PortVlans(want.clone())));
    }
}

/// `10 pvid untagged, 20, 30-35`
pub fn describe_vlans(vlans: &BTreeMap<VlanId, VlanFlags>) -> String {
    let mut ranges: Vec<(u16, u16, VlanFlags)> = Vec::new();
    for (id, flags) in vlans {
        match ranges.last_mut() {
            Some((_, last, same)) if *last + 1 == id.get() && same == flags && !flags.pvid => {
                *last = id.get()
            }
            _ => ranges.push((id.get(), id.get(), *flags)),
        }
    }
    let texts: Vec<String> = ranges
        .into_iter()
        .map(|(first, last, flags)| {
            let mut text = if first == last { first.to_string() } else { format!("{first}-{last}") };
            if flags.pvid {
                text.push_str(" pvid");
            }
            if flags.untagged {
                text.push_str(" untagged");
            }
            text
        })
        .collect();
    if texts.is_empty() { "none".to_owned() } else { texts.join(", ") }
}

pub(super) fn set(link: &LinkName, change: LinkChange) -> Step {
    Step::SetLink { link: link.clone(), change }
}
