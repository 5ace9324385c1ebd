//! The netlink messages that change links. Pure: builds messages and sends none.
//!
//! Every change of a link names it by its index, never by its name: a name may have come to mean
//! another link since we looked.

use std::collections::BTreeMap;
use std::net::IpAddr;

use netlink_packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    AfSpecBridge, BridgeStpState, BridgeVlanInfo, BridgeVlanInfoFlags, InfoBridge, InfoBridgePort, InfoData,
    InfoKind, InfoPortData, InfoPortKind, InfoVlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
    VlanProtocol as WireVlanProtocol,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::links::CENTISECONDS;
use crate::host::snapshot::{BridgeFacts, PortFacts, VlanFlags, VlanProtocol};
use crate::name::{IpPrefix, LinkName, MacAddress, VlanId};

/// A message and its flags beside those that every request has.
pub type Request = (RouteNetlinkMessage, u16);

/// Creates a link that must not be there yet, under an index that must be free.
pub fn create(name: &LinkName, index: u32, kind: InfoKind, data: InfoData) -> LinkMessage {
    let mut message = link(index);
    message.attributes.push(LinkAttribute::IfName(name.as_str().to_owned()));
    message.attributes.push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind), LinkInfo::Data(data)]));
    message
}

pub fn creation(message: LinkMessage) -> Request {
    (RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
}

/// What a new bridge is made with. The hooks that would let the host's iptables judge bridged frames
/// are pinned to off: another program's sysctl must not decide what our guests may send.
pub fn bridge_data(facts: &BridgeFacts) -> InfoData {
    let mut data = vec![
        stp(facts.stp),
        forward_delay(facts.forward_delay_seconds),
        ageing(facts.ageing_seconds),
        InfoBridge::MulticastSnooping(facts.multicast_snooping),
        InfoBridge::VlanDefaultPvid(facts.default_pvid),
        InfoBridge::NfCallIpTables(false),
        InfoBridge::NfCallIp6Tables(false),
        InfoBridge::NfCallArpTables(false),
    ];
    if facts.vlan_filtering {
        // Not sent when off, which it is: kernels without it refuse even that.
        data.push(InfoBridge::VlanFiltering(true));
    }
    InfoData::Bridge(data)
}

pub fn vlan_data(id: VlanId, protocol: VlanProtocol) -> InfoData {
    let protocol = match protocol {
        VlanProtocol::Ieee8021Q => WireVlanProtocol::Ieee8021Q,
        VlanProtocol::Ieee8021Ad => WireVlanProtocol::Ieee8021Ad,
    };
    InfoData::Vlan(vec![InfoVlan::Id(id.get()), InfoVlan::Protocol(protocol)])
}

pub fn stp(on: bool) -> InfoBridge {
    InfoBridge::StpState(if on { BridgeStpState::KernelStp } else { BridgeStpState::Disabled })
}

pub fn forward_delay(seconds: u32) -> InfoBridge {
    InfoBridge::ForwardDelay(seconds.saturating_mul(CENTISECONDS))
}

pub fn ageing(seconds: u32) -> InfoBridge {
    InfoBridge::AgeingTime(seconds.saturating_mul(CENTISECONDS))
}

fn link(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
}

fn set(index: u32, attribute: LinkAttribute) -> Request {
    let mut message = link(index);
    message.attributes.push(attribute);
    (RouteNetlinkMessage::SetLink(message), 0)
}

/// Without its final NUL, so that an empty one takes the alias away.
pub fn alias(index: u32, alias: &str) -> Request {
    set(index, LinkAttribute::Other(DefaultNla::new(libc::IFLA_IFALIAS, alias.as_bytes().to_vec())))
}

pub fn mtu(index: u32, mtu: u32) -> Request {
    set(index, LinkAttribute::Mtu(mtu))
}

pub fn mac_address(index: u32, mac: MacAddress) -> Request {
    set(index, LinkAttribute::Address(mac.0.to_vec()))
}

/// 0 takes it out of its master.
pub fn master(index: u32, master: u32) -> Request {
    set(index, LinkAttribute::Controller(master))
}

pub fn up(index: u32, up: bool) -> Request {
    let mut message = link(index);
    message.header.flags = if up { LinkFlags::Up } else { LinkFlags::empty() };
    message.header.change_mask = LinkFlags::Up;
    (RouteNetlinkMessage::SetLink(message), 0)
}

pub fn delete(index: u32) -> Request {
    (RouteNetlinkMessage::DelLink(link(index)), 0)
}

/// Changes settings of an existing bridge. (Without `NLM_F_CREATE` a new link never comes of it.)
pub fn change_bridge(index: u32, data: InfoData) -> Request {
    let mut message = link(index);
    message
        .attributes
        .push(LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge), LinkInfo::Data(data)]));
    (RouteNetlinkMessage::NewLink(message), 0)
}

/// The flags of a link that is a bridge's port.
pub fn port_flags(index: u32, port: &PortFacts) -> Request {
    let data = vec![
        InfoBridgePort::Isolated(port.isolated),
        InfoBridgePort::HairpinMode(port.hairpin),
        InfoBridgePort::Guard(port.bpdu_guard),
        InfoBridgePort::Learning(port.learning),
        InfoBridgePort::UnicastFlood(port.unicast_flood),
    ];
    let mut message = link(index);
    message.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::PortKind(InfoPortKind::Bridge),
        LinkInfo::PortData(InfoPortData::BridgePort(data)),
    ]));
    (RouteNetlinkMessage::NewLink(message), 0)
}

/// Makes the port a member of these VLANs, with these flags. `None` where there are none.
pub fn add_vlans(index: u32, vlans: &BTreeMap<VlanId, VlanFlags>) -> Option<Request> {
    let mut ranges: Vec<(u16, u16, VlanFlags)> = Vec::new();
    for (&id, &flags) in vlans {
        match ranges.last_mut() {
            // The kernel takes no range with a PVID.
            Some((_, end, same)) if *end + 1 == id.get() && *same == flags && !flags.pvid => *end = id.get(),
            _ => ranges.push((id.get(), id.get(), flags)),
        }
    }
    Some((RouteNetlinkMessage::SetLink(port_vlans(index, &ranges)?), 0))
}

/// Takes the port out of every VLAN but these. Those that it is no member of don't matter to the kernel.
pub fn remove_other_vlans(index: u32, vlans: &BTreeMap<VlanId, VlanFlags>) -> Option<Request> {
    let mut ranges = Vec::new();
    let mut next = 1;
    for id in vlans.keys().map(|id| id.get()).chain([4095]) {
        if next < id {
            ranges.push((next, id - 1, VlanFlags::default()));
        }
        next = id + 1;
    }
    Some((RouteNetlinkMessage::DelLink(port_vlans(index, &ranges)?), 0))
}

fn port_vlans(index: u32, ranges: &[(u16, u16, VlanFlags)]) -> Option<LinkMessage> {
    let mut infos = Vec::new();
    for &(begin, end, vlan) in ranges {
        let mut flags = BridgeVlanInfoFlags::empty();
        flags.set(BridgeVlanInfoFlags::Pvid, vlan.pvid);
        flags.set(BridgeVlanInfoFlags::Untagged, vlan.untagged);
        let mut push = |vid, edge| {
            infos.push(AfSpecBridge::VlanInfo(BridgeVlanInfo { flags: flags | edge, vid }));
        };
        if begin == end {
            push(begin, BridgeVlanInfoFlags::empty());
        } else {
            push(begin, BridgeVlanInfoFlags::RangeBegin);
            push(end, BridgeVlanInfoFlags::RangeEnd);
        }
    }
    if infos.is_empty() {
        return None;
    }
    let mut message = link(index);
    message.header.interface_family = AddressFamily::Bridge;
    message.attributes.push(LinkAttribute::AfSpecBridge(infos));
    Some(message)
}

fn address_message(index: u32, address: IpPrefix) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    message.header.prefix_len = address.prefix_len;
    message.header.family = match address.address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    message.attributes.push(AddressAttribute::Local(address.address));
    message.attributes.push(AddressAttribute::Address(address.address));
    message
}

/// `is_gateway`: of a network of guests. It is not looked for on the link first (IPv6): a guest that claims it
/// would take it from the host, and a bridge without guests could never be sure of it.
pub fn add_address(index: u32, address: IpPrefix, is_gateway: bool) -> Request {
    let mut message = address_message(index, address);
    if is_gateway && address.address.is_ipv6() {
        message.header.flags = AddressHeaderFlags::Nodad;
    }
    (RouteNetlinkMessage::NewAddress(message), NLM_F_CREATE | NLM_F_EXCL)
}

/// The same for an address that may be there.
pub fn restore_address(index: u32, address: IpPrefix) -> Request {
    (RouteNetlinkMessage::NewAddress(address_message(index, address)), NLM_F_CREATE | NLM_F_REPLACE)
}

pub fn remove_address(index: u32, address: IpPrefix) -> Request {
    (RouteNetlinkMessage::DelAddress(address_message(index, address)), 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(request: Option<Request>) -> Vec<(u16, u16)> {
        let Some((RouteNetlinkMessage::SetLink(message) | RouteNetlinkMessage::DelLink(message), _)) =
            request
        else {
            return Vec::new();
        };
        let [LinkAttribute::AfSpecBridge(infos)] = &message.attributes[..] else { panic!("{message:?}") };
        infos
            .iter()
            .map(|info| match info {
                AfSpecBridge::VlanInfo(info) => (info.vid, info.flags.bits()),
                other => panic!("{other:?}"),
            })
            .collect()
    }

    fn vlans(ids: &[(u64, bool)]) -> BTreeMap<VlanId, VlanFlags> {
        let flags = |pvid| VlanFlags { pvid, untagged: pvid };
        ids.iter().map(|&(id, pvid)| (VlanId::new(id).unwrap(), flags(pvid))).collect()
    }

    #[test]
    fn neighbours_become_ranges_and_a_pvid_stands_alone() {
        let (begin, end) = (8, 16);
        let tagged = vlans(&[(10, false), (11, false), (12, false), (20, false)]);
        assert_eq!(ranges(add_vlans(1, &tagged)), [(10, begin), (12, end), (20, 0)]);
        let pvid = vlans(&[(9, false), (10, true), (11, false)]);
        assert_eq!(ranges(add_vlans(1, &pvid)), [(9, 0), (10, 2 | 4), (11, 0)]);
        assert!(add_vlans(1, &vlans(&[])).is_none());
    }

    #[test]
    fn all_other_vlans_are_removed() {
        let (begin, end) = (8, 16);
        assert_eq!(ranges(remove_other_vlans(1, &vlans(&[]))), [(1, begin), (4094, end)]);
        let some = vlans(&[(1, true), (3, false), (4094, false)]);
        assert_eq!(ranges(remove_other_vlans(1, &some)), [(2, 0), (4, begin), (4093, end)]);
        let all: Vec<_> = (1..=4094).map(|id| (id, false)).collect();
        assert!(remove_other_vlans(1, &vlans(&all)).is_none());
    }
}
