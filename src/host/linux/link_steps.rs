//! Doing to the network links: a batch of steps becomes a few system calls.
//!
//! A batch goes through four rounds: read the links that the steps name; make each step's messages,
//! or find that it is done or must not be done; send them all; see to the few that found something in
//! their way. Nothing here touches a link that doesn't carry our mark, but to mark it.
//!
//! A link is created and marked within one system call, so that no crash can part the two. That takes
//! an index known in advance. It is drawn at random from a range that the kernel's own counter doesn't
//! reach: where two had agreed on the next free one, the second would mark the first one's link.

use std::collections::{BTreeSet, HashMap};
use std::io;

use netlink_packet_route::AddressFamily;
use netlink_packet_route::link::{InfoBridge, InfoData, InfoKind, LinkAttribute};

use super::link_failure::{Doing, failure};
use super::link_messages::{self as message, Request};
use super::link_owner::{
    alias_text, is_port_mark, not_ours, require_mark, require_ours, require_ours_or_port,
};
use super::links::{self, RawAddress, RawLink};
use super::netlink::{Answer, Group, Netlink, Refusal};
use super::tap::NewTap;
use crate::host::error::StepError;
use crate::host::snapshot::{Capability, LinkKind, PortFacts};
use crate::host::step::{LinkChange, NewLink, NewLinkKind, Step};
use crate::name::{IpPrefix, Kind, LinkName};

/// How often a creation is tried again, under other indexes, when something was in its way for a moment.
const CREATE_ATTEMPTS_MAX: u32 = 4;
/// New links get indexes in this range.
const INDEXES: std::ops::Range<u32> = 1 << 24..1 << 30;
/// Runs the steps of a batch that are about links; the results are in their order.
pub fn run(steps: &[&Step]) -> Vec<Result<(), StepError>> {
    match Batch::open().and_then(|mut batch| batch.run(steps)) {
        Ok(results) => results,
        Err(error) => {
            let broken = || StepError::failed("talk to the kernel about network links", &error);
            steps.iter().map(|_| Err(broken())).collect()
        }
    }
}

/// What is to be sent for one step.
#[derive(Default)]
struct Work {
    requests: Vec<(Doing, Request)>,
    /// A tap that becomes persistent when all of it succeeded, and then comes up.
    tap: Option<(NewTap, Option<Request>)>,
}

impl Work {
    fn one(doing: Doing, request: Request) -> Self {
        Self { requests: vec![(doing, request)], tap: None }
    }

    fn push(&mut self, doing: Doing, request: Request) {
        self.requests.push((doing, request));
    }
}

/// What a step came to before anything was sent.
enum Prepared<'a> {
    Done,
    Send(Work),
    /// The name or the index of a tap to be made is taken.
    Occupied(&'a NewLink),
}

struct Batch {
    netlink: Netlink,
    known: HashMap<LinkName, RawLink>,
    addresses: Vec<(u32, RawAddress)>,
    /// Addresses that this batch removes: not to be restored on the way.
    removed: BTreeSet<IpPrefix>,
    next_index: u32,
}

impl Batch {
    fn open() -> io::Result<Self> {
        Ok(Self {
            netlink: Netlink::open()?,
            known: HashMap::new(),
            addresses: Vec::new(),
            removed: BTreeSet::new(),
            next_index: random_index()?,
        })
    }

    fn run(&mut self, steps: &[&Step]) -> io::Result<Vec<Result<(), StepError>>> {
        self.read(steps.iter().flat_map(|step| links_read(step)).collect())?;
        let mut removed = steps.iter().filter_map(|step| match step {
            Step::RemoveAddress { address, .. } => Some(*address),
            _ => None,
        });
        if let Some(first) = removed.next() {
            self.removed = removed.chain([first]).collect();
            self.addresses = links::dump_addresses(&mut self.netlink)?;
        }

        let mut results: Vec<Option<Result<(), StepError>>> = Vec::with_capacity(steps.len());
        let mut work = Vec::new();
        let mut occupied = Vec::new();
        for (position, step) in steps.iter().enumerate() {
            results.push(None);
            match self.prepare(step) {
                Ok(Prepared::Done) => results[position] = Some(Ok(())),
                Ok(Prepared::Send(send)) => work.push((position, send)),
                Ok(Prepared::Occupied(new)) => occupied.push((position, new)),
                Err(error) => results[position] = Some(Err(error)),
            }
        }
        let (positions, work): (Vec<usize>, Vec<Work>) = work.into_iter().unzip();
        for (position, outcome) in positions.into_iter().zip(self.send(work)?) {
            match (outcome, steps[position]) {
                (Err(Failed { doing: Doing::Create, refusal, .. }), Step::CreateLink(new))
                    if matches!(refusal.errno, libc::EEXIST | libc::EBUSY) =>
                {
                    occupied.push((position, new));
                }
                (outcome, step) => results[position] = Some(self.judge(step, outcome)?),
            }
        }
        for (position, new) in occupied {
            results[position] = Some(self.settle(new, CREATE_ATTEMPTS_MAX)?);
        }
        let forgotten = || Err(StepError::failed("change a network link", "the step was lost on the way"));
        Ok(results.into_iter().map(|result| result.unwrap_or_else(forgotten)).collect())
    }

    /// Reads these links into `known`; those that aren't there are left out.
    fn read(&mut self, names: BTreeSet<&LinkName>) -> io::Result<()> {
        let ask =
            |name: &&LinkName| Group::from_iter([(links::link_query(AddressFamily::Unspec, Some(name)), 0)]);
        let answers = self.netlink.exchange(names.iter().map(ask).collect())?;
        for (name, answer) in names.into_iter().zip(answers.into_iter().flatten()) {
            self.known.remove(name);
            match answer {
                Ok(Some(payload)) => {
                    // A link that answers to the name as an alternative one is another link.
                    if let Some(link) = links::parse_link(&payload).filter(|link| link.name == *name) {
                        self.known.insert(name.clone(), link);
                    }
                }
                Ok(None) => return Err(io::Error::other(format!("no answer about the link {name}"))),
                Err(Refusal { errno: libc::ENODEV, .. }) => {}
                Err(refusal) => return Err(io::Error::other(format!("read the link {name}: {refusal}"))),
            }
        }
        Ok(())
    }

    fn prepare<'a>(&mut self, step: &'a Step) -> Result<Prepared<'a>, StepError> {
        match step {
            Step::CreateLink(new) => self.create(new),
            Step::DeleteLink { link, mark } => {
                let Some(known) = self.known.get(link) else { return Ok(Prepared::Done) };
                let what = format!("delete the link {link}");
                require_mark(known, mark, &what)?;
                if is_port_mark(mark) {
                    return Err(StepError::NotOurs {
                        what,
                        why: "only its place in a bridge is ours".into(),
                    });
                }
                Ok(Prepared::Send(Work::one(Doing::Delete, message::delete(known.index))))
            }
            Step::MarkLink { link, mark } => {
                let what = || format!("mark the link {link}");
                let known = self.known.get(link).ok_or_else(|| missing(what()))?;
                match &known.alias {
                    Some(alias) if *alias == mark.to_string() => Ok(Prepared::Done),
                    Some(_) => Err(not_ours(known, what())),
                    None => {
                        let request = message::alias(known.index, &alias_text(mark, link)?);
                        Ok(Prepared::Send(Work::one(Doing::Mark, request)))
                    }
                }
            }
            Step::UnmarkLink { link, mark } => match self.known.get(link) {
                Some(known) if known.alias.as_ref() == Some(&mark.to_string()) => {
                    Ok(Prepared::Send(Work::one(Doing::Unmark, message::alias(known.index, ""))))
                }
                _ => Ok(Prepared::Done),
            },
            Step::SetLink { link, change } => self.set(link, change).map(Prepared::Send),
            Step::AddAddress { link, address } => {
                let doing = Doing::AddAddress(*address);
                let known = self.known.get(link).ok_or_else(|| missing(doing.phrase(link)))?;
                require_ours(known, doing.phrase(link))?;
                let is_gateway = known.mark().is_some_and(|mark| mark.owner.kind == Kind::Network);
                let request = message::add_address(known.index, *address, is_gateway);
                Ok(Prepared::Send(Work::one(doing, request)))
            }
            Step::RemoveAddress { link, address } => {
                let Some(known) = self.known.get(link) else { return Ok(Prepared::Done) };
                require_ours(known, Doing::RemoveAddress(*address).phrase(link))?;
                Ok(Prepared::Send(self.remove_address(known.index, *address)))
            }
            other => Err(StepError::failed(format!("run {other:?}"), "it is not about network links")),
        }
    }

    /// The messages that make a link: all in one group, the mark right after the creation, the way up
    /// last. The index must be free.
    fn create<'a>(&mut self, new: &'a NewLink) -> Result<Prepared<'a>, StepError> {
        let alias = alias_text(&new.mark, &new.name)?;
        let index = self.next_index();
        let mut work = Work::default();
        match &new.kind {
            NewLinkKind::Tap { multi_queue } => match NewTap::create(&new.name, index, *multi_queue) {
                Ok(tap) => {
                    work.push(Doing::Mark, message::alias(index, &alias));
                    work.tap = Some((tap, new.up.then(|| message::up(index, true))));
                }
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    return Ok(Prepared::Occupied(new));
                }
                Err(error) => return Err(tap_failure(new, error)),
            },
            NewLinkKind::Bridge(facts) => {
                let data = message::bridge_data(facts);
                let mut create = message::create(&new.name, index, InfoKind::Bridge, data);
                create.attributes.extend(new.mac_address.map(|mac| LinkAttribute::Address(mac.0.to_vec())));
                // A bridge takes its ports' least MTU unless it was once *changed*, not created, by
                // hand. So it begins with another.
                let other = |mtu: u32| if mtu > 68 { mtu - 1 } else { mtu + 1 };
                create.attributes.extend(new.mtu.map(|mtu| LinkAttribute::Mtu(other(mtu))));
                work.push(Doing::Create, message::creation(create));
                work.push(Doing::Mark, message::alias(index, &alias));
            }
            NewLinkKind::Vlan { parent, id, protocol } => {
                let parent = self.relative(parent, &Doing::Create, &new.name)?.index;
                let data = message::vlan_data(*id, *protocol);
                let mut create = message::create(&new.name, index, InfoKind::Vlan, data);
                create.attributes.push(LinkAttribute::Link(parent));
                create.attributes.extend(new.mac_address.map(|mac| LinkAttribute::Address(mac.0.to_vec())));
                work.push(Doing::Create, message::creation(create));
                work.push(Doing::Mark, message::alias(index, &alias));
            }
        }
        let up_now = new.up && work.tap.is_none();
        self.configure(new, index, &mut work, up_now)?;
        Ok(Prepared::Send(work))
    }

    /// Everything about a link beyond its being there and its mark; also for one that is there already.
    fn configure(&self, new: &NewLink, index: u32, work: &mut Work, up_now: bool) -> Result<(), StepError> {
        if let (NewLinkKind::Tap { .. }, Some(mac)) = (&new.kind, new.mac_address) {
            work.push(Doing::MacAddress(mac), message::mac_address(index, mac));
        }
        if let Some(mtu) = new.mtu {
            work.push(Doing::Mtu(mtu), message::mtu(index, mtu));
        }
        if let Some(master) = &new.master {
            let doing = Doing::Master(Some(master.clone()));
            let bridge = self.relative(master, &doing, &new.name)?;
            work.push(doing, message::master(index, bridge.index));
            if let Some(port) = &new.port {
                work.push(Doing::PortFlags, message::port_flags(index, port));
                let filters = matches!(&bridge.kind, LinkKind::Bridge(facts) if facts.vlan_filtering);
                if filters || !port.vlans.is_empty() {
                    push_vlans(work, index, port);
                }
            }
        }
        if up_now {
            work.push(Doing::Up(true), message::up(index, true));
        }
        Ok(())
    }

    fn set(&self, link: &LinkName, change: &LinkChange) -> Result<Work, StepError> {
        let doing = Doing::of(change);
        let known = self.known.get(link).ok_or_else(|| missing(doing.phrase(link)))?;
        let mark = require_ours_or_port(known, doing.phrase(link))?;
        let about_port = matches!(
            change,
            LinkChange::Master(_)
                | LinkChange::PortFlags(_)
                | LinkChange::PortVlans(_)
                | LinkChange::Up(true)
        );
        if is_port_mark(&mark) && !about_port {
            let why = "only its place in a bridge is ours".to_owned();
            return Err(StepError::NotOurs { what: doing.phrase(link), why });
        }
        let index = known.index;
        let bridge = |data: InfoBridge| match known.kind {
            LinkKind::Bridge(_) => Ok(message::change_bridge(index, InfoData::Bridge(vec![data]))),
            _ => Err(StepError::failed(doing.phrase(link), "it is not a bridge")),
        };
        let request = match change {
            LinkChange::Mtu(mtu) => message::mtu(index, *mtu),
            LinkChange::Up(up) => message::up(index, *up),
            LinkChange::MacAddress(mac) => message::mac_address(index, *mac),
            LinkChange::Master(None) => message::master(index, 0),
            LinkChange::Master(Some(master)) => {
                message::master(index, self.relative(master, &doing, link)?.index)
            }
            LinkChange::Stp(on) => bridge(message::stp(*on))?,
            LinkChange::ForwardDelaySeconds(seconds) => bridge(message::forward_delay(*seconds))?,
            LinkChange::AgeingSeconds(seconds) => bridge(message::ageing(*seconds))?,
            LinkChange::VlanFiltering(on) => bridge(InfoBridge::VlanFiltering(*on))?,
            LinkChange::DefaultPvid(_) if !known.can_filter && matches!(known.kind, LinkKind::Bridge(_)) => {
                // Such a kernel ignores it without a word.
                let capability = Capability::VlanFiltering;
                return Err(StepError::Lacks { what: doing.phrase(link), capability });
            }
            LinkChange::DefaultPvid(pvid) => bridge(InfoBridge::VlanDefaultPvid(*pvid))?,
            LinkChange::MulticastSnooping(on) => bridge(InfoBridge::MulticastSnooping(*on))?,
            LinkChange::PortFlags(port) => message::port_flags(index, port),
            LinkChange::PortVlans(port) => {
                let mut work = Work::default();
                push_vlans(&mut work, index, port);
                return Ok(work);
            }
        };
        Ok(Work::one(doing, request))
    }

    /// The kernel removes secondary IPv4 addresses with their primary; ours come back in the same call.
    fn remove_address(&self, index: u32, address: IpPrefix) -> Work {
        let mut work = Work::one(Doing::RemoveAddress(address), message::remove_address(index, address));
        let here = self.addresses.iter().filter(|(of, _)| *of == index).map(|(_, address)| address);
        let is_primary = here.clone().any(|raw| raw.prefix == address && !raw.secondary);
        for raw in here.filter(|raw| is_primary && raw.secondary && same_subnet(raw.prefix, address)) {
            if !self.removed.contains(&raw.prefix) {
                work.push(Doing::AddAddress(raw.prefix), message::restore_address(index, raw.prefix));
            }
        }
        work
    }

    /// A link that another one is about to be tied to.
    fn relative(&self, name: &LinkName, doing: &Doing, link: &LinkName) -> Result<&RawLink, StepError> {
        let failed = || StepError::failed(doing.phrase(link), format!("there is no link {name}"));
        self.known.get(name).ok_or_else(failed)
    }

    /// Sends all work, makes the taps of what succeeded persistent, and brings them up.
    fn send(&mut self, work: Vec<Work>) -> io::Result<Vec<Result<(), Failed>>> {
        let mut groups = Vec::with_capacity(work.len());
        let mut rest = Vec::with_capacity(work.len());
        for item in work {
            let (doings, requests): (Vec<Doing>, Vec<Request>) = item.requests.into_iter().unzip();
            groups.push(Group::from_iter(requests));
            rest.push((doings, item.tap));
        }
        let answers = self.netlink.exchange(groups)?;
        let mut outcomes = Vec::with_capacity(rest.len());
        let mut taps_up = Vec::new();
        for ((doings, tap), answers) in rest.into_iter().zip(answers) {
            let mut outcome = first_refusal(doings, answers);
            if let (Ok(()), Some((tap, up))) = (&outcome, tap) {
                match tap.persist() {
                    Ok(()) => taps_up.extend(up.map(|up| (outcomes.len(), up))),
                    Err(error) => outcome = Err(Failed::io(Doing::Persist, &error)),
                }
            }
            outcomes.push(outcome);
        }
        let (positions, ups): (Vec<usize>, Vec<Request>) = taps_up.into_iter().unzip();
        let answers = self.netlink.exchange(ups.into_iter().map(|up| Group::from_iter([up])).collect())?;
        for (position, answers) in positions.into_iter().zip(answers) {
            outcomes[position] = first_refusal(vec![Doing::Up(true)], answers);
        }
        Ok(outcomes)
    }

    /// What a step's outcome means: some refusals say that the work was done before.
    fn judge(&mut self, step: &Step, outcome: Result<(), Failed>) -> io::Result<Result<(), StepError>> {
        let (link, Err(failed)) = (step_link(step), outcome) else { return Ok(Ok(())) };
        let Some(link) = link else { return Ok(Err(StepError::failed("change a link", "it has no name"))) };
        match (&failed.doing, failed.refusal.errno) {
            (Doing::Delete | Doing::Unmark, libc::ENODEV) => return Ok(Ok(())),
            (Doing::RemoveAddress(_), libc::EADDRNOTAVAIL | libc::ENODEV) => return Ok(Ok(())),
            (Doing::AddAddress(address), libc::EEXIST) => {
                let index = self.known.get(link).map(|link| link.index);
                let list = links::dump_addresses(&mut self.netlink)?;
                if list.iter().any(|(of, raw)| Some(*of) == index && raw.prefix == *address) {
                    return Ok(Ok(()));
                }
            }
            _ => {}
        }
        Ok(Err(failure(step, link, &failed.doing, &failed.refusal)))
    }

    /// A creation found its name or index taken. If the link is the one that is to be made, it is
    /// brought to its declared state; if nothing is there any more, it is made.
    fn settle(&mut self, new: &NewLink, attempts: u32) -> io::Result<Result<(), StepError>> {
        let what = || Doing::Create.phrase(&new.name);
        self.read(links_of(new).collect())?;
        self.read(BTreeSet::from([&new.name]))?;
        let prepared = match self.known.get(&new.name) {
            Some(link) if link.mark().as_ref() != Some(&new.mark) => return Ok(Err(not_ours(link, what()))),
            Some(link) if !self.is_same_kind(link, &new.kind) => {
                let why = "a link of this name and mark, but of another kind, is there";
                return Ok(Err(StepError::failed(what(), why)));
            }
            Some(link) => {
                let (index, mut work) = (link.index, Work::default());
                if let NewLinkKind::Bridge(facts) = &new.kind {
                    let request = message::change_bridge(index, message::bridge_data(facts));
                    work.push(Doing::Configure, request);
                }
                if let (NewLinkKind::Bridge(_) | NewLinkKind::Vlan { .. }, Some(mac)) =
                    (&new.kind, new.mac_address)
                {
                    work.push(Doing::MacAddress(mac), message::mac_address(index, mac));
                }
                self.configure(new, index, &mut work, new.up).map(|()| Prepared::Send(work))
            }
            None if attempts == 0 => {
                let why = "its name or index is taken again and again";
                return Ok(Err(StepError::failed(what(), why)));
            }
            None => {
                self.next_index = random_index()?;
                self.create(new)
            }
        };
        let work = match prepared {
            Ok(Prepared::Send(work)) => work,
            Ok(_) => return self.settle(new, attempts - 1),
            Err(error) => return Ok(Err(error)),
        };
        let step = Step::CreateLink(new.clone());
        match self.send(vec![work])?.pop() {
            Some(Err(Failed { doing: Doing::Create, refusal, .. }))
                if refusal.errno == libc::EBUSY
                    || refusal.errno == libc::EEXIST && attempts > 1 && !refusal.is_vlan_twin() =>
            {
                self.settle(new, attempts - 1)
            }
            outcome => self.judge(&step, outcome.unwrap_or(Ok(()))),
        }
    }

    fn is_same_kind(&self, link: &RawLink, kind: &NewLinkKind) -> bool {
        match (kind, &link.kind) {
            (NewLinkKind::Bridge(_), LinkKind::Bridge(_)) => true,
            (NewLinkKind::Tap { multi_queue }, LinkKind::Tap { multi_queue: there }) => {
                link.persistent && multi_queue == there
            }
            (
                NewLinkKind::Vlan { parent, id, protocol },
                LinkKind::Vlan { id: id_there, protocol: there },
            ) => {
                let parent = self.known.get(parent).map(|parent| parent.index);
                id == id_there && protocol == there && link.parent == parent
            }
            _ => false,
        }
    }

    fn next_index(&mut self) -> u32 {
        let index = self.next_index;
        self.next_index = if index + 1 < INDEXES.end { index + 1 } else { INDEXES.start };
        index
    }
}

/// The first request of a step that was refused.
struct Failed {
    doing: Doing,
    refusal: Refusal,
}

impl Failed {
    fn io(doing: Doing, error: &io::Error) -> Self {
        let errno = error.raw_os_error().unwrap_or(libc::EIO);
        Self { doing, refusal: Refusal { errno, text: None } }
    }
}

fn first_refusal(doings: Vec<Doing>, answers: Vec<Answer>) -> Result<(), Failed> {
    for (doing, answer) in doings.into_iter().zip(answers) {
        match answer {
            Ok(_) => {}
            // Nothing that we would have taken the port out of.
            Err(refusal) if matches!(doing, Doing::OtherVlans) && refusal.errno == libc::ENOENT => {}
            Err(refusal) => return Err(Failed { doing, refusal }),
        }
    }
    Ok(())
}

pub fn random_index() -> io::Result<u32> {
    let mut bytes = [0; 4];
    rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
    Ok(INDEXES.start + u32::from_ne_bytes(bytes) % (INDEXES.end - INDEXES.start))
}

fn push_vlans(work: &mut Work, index: u32, port: &PortFacts) {
    // First in, then out: a VLAN that stays never loses a frame.
    if let Some(add) = message::add_vlans(index, &port.vlans) {
        work.push(Doing::Vlans, add);
    }
    if let Some(remove) = message::remove_other_vlans(index, &port.vlans) {
        work.push(Doing::OtherVlans, remove);
    }
}

/// The links that must be known before a step's messages can be made.
fn links_read(step: &Step) -> Vec<&LinkName> {
    match step {
        Step::CreateLink(new) => links_of(new).collect(),
        Step::SetLink { link, change: LinkChange::Master(Some(master)) } => vec![link, master],
        step => step_link(step).into_iter().collect(),
    }
}

fn links_of(new: &NewLink) -> impl Iterator<Item = &LinkName> {
    let parent = match &new.kind {
        NewLinkKind::Vlan { parent, .. } => Some(parent),
        _ => None,
    };
    parent.into_iter().chain(&new.master)
}

fn step_link(step: &Step) -> Option<&LinkName> {
    match step {
        Step::CreateLink(new) => Some(&new.name),
        Step::DeleteLink { link, .. }
        | Step::MarkLink { link, .. }
        | Step::UnmarkLink { link, .. }
        | Step::SetLink { link, .. }
        | Step::AddAddress { link, .. }
        | Step::RemoveAddress { link, .. } => Some(link),
        _ => None,
    }
}

fn missing(what: String) -> StepError {
    StepError::failed(what, "there is no such link")
}

fn tap_failure(new: &NewLink, error: io::Error) -> StepError {
    let what = Doing::Create.phrase(&new.name);
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
            StepError::Lacks { what, capability: Capability::Tun }
        }
        errno => failure(
            &Step::CreateLink(new.clone()),
            &new.name,
            &Doing::Create,
            &Refusal { errno: errno.unwrap_or(libc::EIO), text: None },
        ),
    }
}

fn same_subnet(one: IpPrefix, other: IpPrefix) -> bool {
    let (std::net::IpAddr::V4(a), std::net::IpAddr::V4(b)) = (one.address, other.address) else {
        return false;
    };
    let mask = u32::MAX.checked_shl(32 - u32::from(one.prefix_len)).unwrap_or(0);
    one.prefix_len == other.prefix_len && u32::from(a) & mask == u32::from(b) & mask
}
