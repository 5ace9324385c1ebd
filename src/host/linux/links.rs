//! Looking at the network links: three bulk reads of the kernel, as one map.
//!
//! Only the attributes that we know are decoded, from the raw messages: a link carries sixty of them,
//! and decoding all would cost more than the kernel's own work. Nothing here changes a link.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::net::IpAddr;

use netlink_packet_core::{NlasIterator, Parseable};
use netlink_packet_route::address::{AddressAttribute, AddressHeader, AddressMessage, AddressProtocol};
use netlink_packet_route::link::{
    AfSpecBridge, BridgeVlanInfoFlags, InfoBridge, InfoBridgePort, InfoVlan, LinkAttribute, LinkExtentMask,
    LinkHeader, LinkMessage, VlanProtocol as WireVlanProtocol,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::netlink::{Group, Netlink, Refusal};
use crate::host::error::ObserveError;
use crate::host::snapshot::{BridgeFacts, Link, LinkKind, Observed, PortFacts, VlanFlags, VlanProtocol};
use crate::name::{IpPrefix, LinkName, MacAddress, Mark, VlanId};

/// The kernel counts bridge times in `USER_HZ`.
pub const CENTISECONDS: u32 = 100;

const LINK_HEADER_LEN: usize = 16;
/// `IFLA_TUN_TYPE`, `IFLA_TUN_PERSIST`, `IFLA_TUN_MULTI_QUEUE` and the value for a tap (linux/if_link.h, linux/if_tun.h).
const IFLA_TUN_TYPE: u16 = 3;
const IFLA_TUN_PERSIST: u16 = 6;
const IFLA_TUN_MULTI_QUEUE: u16 = 7;
const TUN_TYPE_TAP: u8 = 2;
/// Links whose `IFLA_LINK` is their peer and not a link below.
const PAIRED_KINDS: [&str; 3] = ["veth", "vxcan", "netkit"];

/// A link as the kernel lists it: its relatives by index, which are good for as long as we look.
#[derive(Clone, Debug)]
pub struct RawLink {
    pub index: u32,
    pub name: LinkName,
    pub mac_address: Option<MacAddress>,
    pub mtu: u32,
    pub up: bool,
    pub alias: Option<String>,
    pub master: Option<u32>,
    pub parent: Option<u32>,
    pub kind: LinkKind,
    pub port: Option<PortFacts>,
    /// A bridge of a kernel with VLAN filtering.
    pub can_filter: bool,
    /// A tap that outlives the processes that hold it.
    pub persistent: bool,
}

/// All links of this network namespace.
pub fn observe() -> Observed<BTreeMap<LinkName, Link>> {
    let failed = |what: &'static str| move |error: io::Error| ObserveError::new(what, error);
    let mut netlink = Netlink::open().map_err(failed("open a netlink socket"))?;
    let raw = dump_links(&mut netlink).map_err(failed("list the network links"))?;
    let addresses = dump_addresses(&mut netlink).map_err(failed("list the addresses of the links"))?;
    let mut vlans = HashMap::new();
    let filters = |link: &RawLink| matches!(&link.kind, LinkKind::Bridge(bridge) if bridge.vlan_filtering);
    if raw.iter().any(filters) {
        vlans = dump_port_vlans(&mut netlink).map_err(failed("list the VLANs of the bridge ports"))?;
    }
    let filtering: HashSet<u32> = raw.iter().filter(|link| filters(link)).map(|link| link.index).collect();
    let names: HashMap<u32, LinkName> = raw.iter().map(|link| (link.index, link.name.clone())).collect();

    let mut links: HashMap<u32, Link> = HashMap::with_capacity(raw.len());
    for link in raw {
        let index = link.index;
        let in_filter = link.master.is_some_and(|master| filtering.contains(&master));
        let mut link = finish(link, &names);
        if let (Some(port), true) = (&mut link.port, in_filter) {
            port.vlans = vlans.remove(&index).unwrap_or_default();
        }
        links.insert(index, link);
    }
    for (index, address) in addresses {
        if let Some(link) = links.get_mut(&index) {
            link.addresses.insert(address.prefix);
        }
    }
    Ok(links.into_iter().filter_map(|(index, link)| Some((names.get(&index)?.clone(), link))).collect())
}

fn finish(link: RawLink, names: &HashMap<u32, LinkName>) -> Link {
    Link {
        mac_address: link.mac_address,
        mtu: link.mtu,
        up: link.up,
        alias: link.alias,
        master: link.master.and_then(|index| names.get(&index).cloned()),
        parent: link.parent.and_then(|index| names.get(&index).cloned()),
        kind: link.kind,
        port: link.port,
        addresses: Default::default(),
    }
}

/// A request for links; counters are left out, for nobody here reads them.
pub fn link_query(family: AddressFamily, name: Option<&LinkName>) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.interface_family = family;
    message.attributes.extend(name.map(|name| LinkAttribute::IfName(name.as_str().to_owned())));
    message.attributes.push(LinkAttribute::ExtMask(vec![match family {
        AddressFamily::Bridge => LinkExtentMask::BrvlanCompressed,
        _ => LinkExtentMask::SkipStats,
    }]));
    RouteNetlinkMessage::GetLink(message)
}

/// One link, by its name.
pub fn read_link(netlink: &mut Netlink, name: &LinkName) -> io::Result<Option<RawLink>> {
    let group = Group::from_iter([(link_query(AddressFamily::Unspec, Some(name)), 0)]);
    match netlink.exchange(vec![group])?.into_iter().flatten().next() {
        // A link that has this as an alternative name is another link.
        Some(Ok(Some(payload))) => Ok(parse_link(&payload).filter(|link| link.name == *name)),
        Some(Err(Refusal { errno: libc::ENODEV, .. })) => Ok(None),
        Some(Err(refusal)) => Err(io::Error::other(refusal.to_string())),
        Some(Ok(None)) | None => Err(io::Error::other("the kernel gave no answer")),
    }
}

fn dump_links(netlink: &mut Netlink) -> io::Result<Vec<RawLink>> {
    let take = |links: &mut Vec<RawLink>, payload: &[u8]| links.extend(parse_link(payload));
    netlink.dump(&link_query(AddressFamily::Unspec, None), Vec::new, take)
}

/// Decodes one link. `None`: it has a name that no manifest can have, so it can't meet one of ours.
pub fn parse_link(payload: &[u8]) -> Option<RawLink> {
    let header = LinkHeader::parse(payload).ok()?;
    let mut name = None;
    let mut lower = None;
    let mut lower_is_elsewhere = false;
    let mut info = LinkInfo::default();
    let mut link = RawLink {
        index: header.index,
        name: LinkName::parse("placeholder").ok()?,
        mac_address: None,
        mtu: 0,
        up: header.flags.bits() & libc::IFF_UP as u32 != 0,
        alias: None,
        master: None,
        parent: None,
        kind: LinkKind::Other(String::new()),
        port: None,
        can_filter: false,
        persistent: false,
    };
    for nla in NlasIterator::new(payload.get(LINK_HEADER_LEN..)?).flatten() {
        let value = nla.value();
        match nla.kind() {
            libc::IFLA_IFNAME => name = LinkName::parse(&text(value)).ok(),
            libc::IFLA_IFALIAS => link.alias = Some(text(value)).filter(|alias| !alias.is_empty()),
            libc::IFLA_MTU => link.mtu = number(value)?,
            libc::IFLA_MASTER => link.master = number(value).filter(|&index| index != 0),
            libc::IFLA_LINK => lower = number(value).filter(|&index| index != 0),
            libc::IFLA_LINK_NETNSID => lower_is_elsewhere = true,
            libc::IFLA_ADDRESS => link.mac_address = <[u8; 6]>::try_from(value).ok().map(MacAddress),
            libc::IFLA_LINKINFO => info = parse_info(value),
            _ => {}
        }
    }
    link.name = name?;
    let paired = PAIRED_KINDS.contains(&info.kind.as_str());
    link.parent = lower.filter(|&index| !lower_is_elsewhere && !paired && index != link.index);
    link.port = info.port;
    link.can_filter = info.can_filter;
    link.persistent = info.persistent;
    link.kind = match info.known {
        Some(kind) => kind,
        None if !info.kind.is_empty() => LinkKind::Other(info.kind),
        // What has no kind is hardware, or the loopback; the kernel names those by their layer only.
        None => LinkKind::Other(header.link_layer_type.to_string().to_ascii_lowercase()),
    };
    Some(link)
}

#[derive(Default)]
struct LinkInfo {
    kind: String,
    /// A kind that we manage, fully decoded.
    known: Option<LinkKind>,
    port: Option<PortFacts>,
    can_filter: bool,
    persistent: bool,
}

fn parse_info(payload: &[u8]) -> LinkInfo {
    let mut info = LinkInfo::default();
    let mut port_of_bridge = false;
    // The kernel puts each kind before its data.
    for nla in NlasIterator::new(payload).flatten() {
        let value = nla.value();
        match nla.kind() {
            libc::IFLA_INFO_KIND => {
                info.kind = text(value);
            }
            libc::IFLA_INFO_DATA => match info.kind.as_str() {
                "bridge" => (info.known, info.can_filter) = parse_bridge(value),
                "vlan" => info.known = parse_vlan(value),
                "tun" => (info.known, info.persistent) = parse_tun(value),
                _ => {}
            },
            libc::IFLA_INFO_SLAVE_KIND => port_of_bridge = text(value) == "bridge",
            libc::IFLA_INFO_SLAVE_DATA if port_of_bridge => info.port = Some(parse_port(value)),
            _ => {}
        }
    }
    info
}

fn parse_bridge(payload: &[u8]) -> (Option<LinkKind>, bool) {
    let mut can_filter = false;
    let mut facts = BridgeFacts {
        stp: false,
        forward_delay_seconds: 0,
        ageing_seconds: 0,
        vlan_filtering: false,
        default_pvid: 0,
        multicast_snooping: false,
    };
    for nla in NlasIterator::new(payload).flatten() {
        match InfoBridge::parse(&nla) {
            Ok(InfoBridge::StpState(state)) => facts.stp = u32::from(state) != 0,
            Ok(InfoBridge::ForwardDelay(time)) => facts.forward_delay_seconds = time / CENTISECONDS,
            Ok(InfoBridge::AgeingTime(time)) => facts.ageing_seconds = time / CENTISECONDS,
            Ok(InfoBridge::VlanFiltering(on)) => facts.vlan_filtering = on,
            Ok(InfoBridge::VlanDefaultPvid(pvid)) => {
                facts.default_pvid = pvid;
                can_filter = true;
            }
            Ok(InfoBridge::MulticastSnooping(on)) => facts.multicast_snooping = on,
            _ => {}
        }
    }
    (Some(LinkKind::Bridge(facts)), can_filter)
}

/// `None` for a VLAN device that a manifest can't describe (id 0).
fn parse_vlan(payload: &[u8]) -> Option<LinkKind> {
    let (mut id, mut protocol) = (None, VlanProtocol::Ieee8021Q);
    for nla in NlasIterator::new(payload).flatten() {
        match InfoVlan::parse(&nla) {
            Ok(InfoVlan::Id(value)) => id = VlanId::new(value.into()).ok(),
            Ok(InfoVlan::Protocol(WireVlanProtocol::Ieee8021Ad)) => protocol = VlanProtocol::Ieee8021Ad,
            _ => {}
        }
    }
    id.map(|id| LinkKind::Vlan { id, protocol })
}

fn parse_tun(payload: &[u8]) -> (Option<LinkKind>, bool) {
    let (mut tap, mut persistent, mut multi_queue) = (false, false, false);
    for nla in NlasIterator::new(payload).flatten() {
        match nla.kind() {
            IFLA_TUN_TYPE => tap = nla.value() == [TUN_TYPE_TAP],
            IFLA_TUN_PERSIST => persistent = nla.value() == [1],
            IFLA_TUN_MULTI_QUEUE => multi_queue = nla.value() == [1],
            _ => {}
        }
    }
    (tap.then_some(LinkKind::Tap { multi_queue }), persistent)
}

fn parse_port(payload: &[u8]) -> PortFacts {
    let mut port = PortFacts::default();
    for nla in NlasIterator::new(payload).flatten() {
        match InfoBridgePort::parse(&nla) {
            Ok(InfoBridgePort::Isolated(on)) => port.isolated = on,
            Ok(InfoBridgePort::HairpinMode(on)) => port.hairpin = on,
            Ok(InfoBridgePort::Guard(on)) => port.bpdu_guard = on,
            Ok(InfoBridgePort::Learning(on)) => port.learning = on,
            Ok(InfoBridgePort::UnicastFlood(on)) => port.unicast_flood = on,
            _ => {}
        }
    }
    port
}

/// An address of a link, and what matters when one of them is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawAddress {
    pub prefix: IpPrefix,
    /// An IPv4 address that the kernel removes along with its primary.
    pub secondary: bool,
}

/// All addresses but those that the kernel makes itself (IPv6 link-local, router announcements), by
/// the index of their link.
pub fn dump_addresses(netlink: &mut Netlink) -> io::Result<Vec<(u32, RawAddress)>> {
    let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let take = |list: &mut Vec<_>, payload: &[u8]| list.extend(parse_address(payload));
    netlink.dump(&request, Vec::new, take)
}

fn parse_address(payload: &[u8]) -> Option<(u32, RawAddress)> {
    const ADDRESS_HEADER_LEN: usize = 8;
    let header = AddressHeader::parse(payload).ok()?;
    let (mut local, mut peer, mut secondary) = (None, None, false);
    for nla in NlasIterator::new(payload.get(ADDRESS_HEADER_LEN..)?).flatten() {
        match AddressAttribute::parse(&nla) {
            Ok(AddressAttribute::Local(address)) => local = Some(address),
            Ok(AddressAttribute::Address(address)) => peer = Some(address),
            Ok(AddressAttribute::Flags(flags)) => secondary = flags.bits() & libc::IFA_F_SECONDARY != 0,
            Ok(AddressAttribute::Protocol(
                AddressProtocol::LinkLocal | AddressProtocol::RouterAnnouncement,
            )) => return None,
            _ => {}
        }
    }
    // On a point-to-point link IFA_ADDRESS is the other end's.
    let address: IpAddr = local.or(peer)?;
    let prefix = IpPrefix { address, prefix_len: header.prefix_len };
    Some((header.index, RawAddress { prefix, secondary: secondary && address.is_ipv4() }))
}

/// The VLANs of every bridge port, by the port's index.
fn dump_port_vlans(netlink: &mut Netlink) -> io::Result<HashMap<u32, BTreeMap<VlanId, VlanFlags>>> {
    let take = |ports: &mut HashMap<_, _>, payload: &[u8]| {
        ports.extend(parse_port_vlans(payload));
    };
    netlink.dump(&link_query(AddressFamily::Bridge, None), HashMap::new, take)
}

fn parse_port_vlans(payload: &[u8]) -> Option<(u32, BTreeMap<VlanId, VlanFlags>)> {
    let header = LinkHeader::parse(payload).ok()?;
    let mut vlans = BTreeMap::new();
    for nla in NlasIterator::new(payload.get(LINK_HEADER_LEN..)?).flatten() {
        if nla.kind() != libc::IFLA_AF_SPEC {
            continue;
        }
        let mut range_begin = None;
        for nla in NlasIterator::new(nla.value()).flatten() {
            let Ok(AfSpecBridge::VlanInfo(info)) = AfSpecBridge::parse(&nla) else { continue };
            if info.flags.contains(BridgeVlanInfoFlags::RangeBegin) {
                range_begin = Some(info.vid);
                continue;
            }
            let flags = VlanFlags {
                pvid: info.flags.contains(BridgeVlanInfoFlags::Pvid),
                untagged: info.flags.contains(BridgeVlanInfoFlags::Untagged),
            };
            for id in range_begin.take().unwrap_or(info.vid)..=info.vid {
                if let Ok(id) = VlanId::new(id.into()) {
                    vlans.insert(id, flags);
                }
            }
        }
    }
    Some((header.index, vlans))
}

/// A text attribute, up to its NUL.
fn text(value: &[u8]) -> String {
    let bytes = value.split(|&byte| byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(bytes).into_owned()
}

fn number(value: &[u8]) -> Option<u32> {
    value.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

impl RawLink {
    /// Our mark, if it carries one.
    pub fn mark(&self) -> Option<Mark> {
        self.alias.as_deref()?.parse().ok()
    }
}
