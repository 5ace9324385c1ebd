//! Network: a bridge with addresses of the host's, and what may pass between it and the world.

pub mod compare;
mod guards;
mod rules;
mod service;
pub mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use serde::Serialize;

use super::bridge::Bridge;
use super::stable::stable_hash;
use super::{Declared, Spec};
use crate::host::snapshot::{BridgeFacts, IpFamily};
use crate::name::{IpPrefix, Kind, LinkName, MacAddress, NameError, ObjectId, ObjectName, SetName};

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Network {
    /// A declared Bridge, or else the name of the network's own. `None`: the network's name.
    pub bridge: Option<BridgeName>,
    pub mode: Mode,
    pub mtu: Option<u32>,
    /// At most one of each family.
    pub subnets: BTreeMap<IpFamily, Subnet>,
    pub port_forwards: Vec<PortForward>,
    /// Of IPv4.
    pub dhcp: Option<Dhcp>,
    /// Guests make themselves IPv6 addresses.
    pub router_advertisements: bool,
    /// `None`: there is none.
    pub dns: Option<Dns>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Dhcp {
    pub start: Ipv4Addr,
    pub end: Ipv4Addr,
    pub lease_seconds: u32,
    pub options: Vec<DhcpOption>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DhcpOption {
    pub number: u8,
    /// As dnsmasq takes it, on one line.
    pub value: String,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Dns {
    pub domain: Option<String>,
    /// `None`: the host's own.
    pub forwarders: Option<Vec<IpAddr>>,
}

/// How far its guests get.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// To the world, under the host's address.
    Nat,
    /// To the world and back, under their own addresses.
    Routed,
    /// To one another and to the host.
    Isolated,
}

impl Mode {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Nat => "NAT",
            Self::Routed => "routed",
            Self::Isolated => "isolated",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Subnet {
    /// The host's own, which is the guests' gateway.
    pub address: IpPrefix,
    /// Guests go out under the host's address.
    pub nat: bool,
}

/// Connections to a port of the host that go on to a guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PortForward {
    pub protocol: Protocol,
    /// The host's; `None`: any of its own.
    pub address: Option<IpAddr>,
    pub port: u16,
    pub to: IpAddr,
    pub to_port: u16,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// What `bridge` says: it may suit as an object's name, as an interface's, or as both.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct BridgeName(String);

impl BridgeName {
    pub fn parse(text: &str) -> Result<Self, NameError> {
        match LinkName::parse(text) {
            Err(error) if ObjectName::parse(text).is_err() => Err(error),
            _ => Ok(Self(text.to_owned())),
        }
    }
}

/// The bridge of a network.
pub enum Place<'a> {
    /// A declared Bridge, which keeps its own settings.
    Declared(ObjectId, &'a Bridge),
    /// One that comes and goes with the network.
    Own(Box<Bridge>),
}

impl Network {
    /// The declared Bridge that it uses, if it does.
    pub fn declared_bridge(&self, objects: &BTreeMap<ObjectId, Spec>) -> Option<ObjectId> {
        let name = ObjectName::parse(&self.bridge.as_ref()?.0).ok()?;
        let id = ObjectId::new(Kind::Bridge, name);
        objects.contains_key(&id).then_some(id)
    }

    /// The name of its own bridge; an object's name may be too long for one.
    pub fn own_link(&self, name: &ObjectName) -> Result<LinkName, NameError> {
        LinkName::parse(self.bridge.as_ref().map_or(name.as_str(), |bridge| bridge.0.as_str()))
    }

    /// Whether something has to run for it.
    pub fn has_service(&self) -> bool {
        self.dhcp.is_some() || self.router_advertisements || self.dns.is_some()
    }

    pub fn addresses(&self) -> BTreeSet<IpPrefix> {
        self.subnets.values().map(|subnet| subnet.address).collect()
    }

    pub fn place<'a>(&self, name: &ObjectName, declared: &'a Declared) -> Result<Place<'a>, NameError> {
        if let Some(id) = self.declared_bridge(&declared.objects)
            && let Some(Spec::Bridge(bridge)) = declared.objects.get(&id)
        {
            return Ok(Place::Declared(id, bridge));
        }
        Ok(Place::Own(Box::new(Bridge {
            interface_name: Some(self.own_link(name)?),
            mtu: self.mtu.unwrap_or(1500),
            mac_address: Some(gateway_mac(&declared.set, name)),
            settings: BridgeFacts {
                stp: false,
                // What Linux has without STP, and what `Bridge` has.
                forward_delay_seconds: 15,
                ageing_seconds: 300,
                vlan_filtering: false,
                default_pvid: 0,
                multicast_snooping: true,
            },
            addresses: self.addresses(),
            ports: Vec::new(),
        })))
    }
}

impl Place<'_> {
    pub fn bridge(&self) -> &Bridge {
        match self {
            Self::Declared(_, bridge) => bridge,
            Self::Own(bridge) => bridge,
        }
    }

    pub fn link(&self, name: &ObjectName) -> Result<LinkName, NameError> {
        match self {
            Self::Declared(id, bridge) => bridge.link_name(&id.name),
            Self::Own(bridge) => bridge.link_name(name),
        }
    }
}

/// The gateway's address: always the same, or guests would lose their gateway whenever a port came or went.
fn gateway_mac(set: &SetName, network: &ObjectName) -> MacAddress {
    let hash = stable_hash(&[set.as_str(), "network", network.as_str()]).to_be_bytes();
    MacAddress([0x52, 0x54, 0x00, hash[0], hash[1], hash[2]])
}
