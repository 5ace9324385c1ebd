//! The YAML form of a Network.

use std::collections::BTreeMap;
use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{BridgeName, Mode as InnerMode, Network as Inner, PortForward as InnerForward, Protocol, Subnet};
use crate::host::snapshot::IpFamily;
use crate::kinds::{Problems, SpecProblem};
use crate::name::IpPrefix;

/// A network for guests: a bridge with the host's addresses on it, and what may pass between it and the world.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Network {
    /// The Bridge that the network uses, if one of this name is declared; else the name of the network's own
    /// bridge on the host, 1 to 15 bytes. Default: its own, named as the object.
    pub bridge: Option<String>,
    /// How far guests get. `nat`: to the world, under the host's address. `routed`: to the world and back,
    /// under their own addresses, for which the world needs a route. `isolated`: to one another and to the
    /// host. Default: nat.
    pub mode: Option<Mode>,
    /// Of the network's own bridge and its guests' NICs: bytes, 68 to 65535. Default: 1500.
    #[schemars(range(min = 68, max = 65535))]
    pub mtu: Option<u32>,
    /// IPv4 on the network. Default: none.
    pub ipv4: Option<Ipv4>,
    /// IPv6 on the network. Default: none.
    pub ipv6: Option<Ipv6>,
    /// Connections to ports of the host that go on to guests. Only with mode nat.
    pub port_forwards: Option<Vec<PortForward>>,
}

/// How far guests get.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    Nat,
    Routed,
    Isolated,
}

/// IPv4 on the network.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Ipv4 {
    /// The host's own address, which is the guests' gateway, with prefix: `192.168.100.1/24`.
    pub address: String,
    /// Whether guests go out under the host's address. Only with mode nat. Default: true.
    pub nat: Option<bool>,
}

/// IPv6 on the network.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Ipv6 {
    /// The host's own address, which is the guests' gateway, with prefix: `fd00:100::1/64`.
    pub address: String,
    /// Whether guests go out under the host's address. Only with mode nat. Default: true.
    pub nat: Option<bool>,
}

/// Connections to a port of the host that go on to a guest.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct PortForward {
    /// Default: tcp.
    pub protocol: Option<ForwardProtocol>,
    /// The host's address. Default: any of its own.
    pub address: Option<String>,
    /// The host's port, 1 to 65535.
    #[schemars(range(min = 1, max = 65535))]
    pub port: u16,
    /// The guest's address, within the network.
    pub to: String,
    /// The guest's port, 1 to 65535. Default: the host's.
    #[schemars(range(min = 1, max = 65535))]
    pub to_port: Option<u16>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ForwardProtocol {
    Tcp,
    Udp,
}

impl Network {
    pub fn decode(self) -> Result<Inner, Vec<SpecProblem>> {
        let mut problems = Problems::default();
        let bridge = self.bridge.and_then(|text| problems.take("/bridge", BridgeName::parse(&text)));
        let mode = match self.mode {
            None | Some(Mode::Nat) => InnerMode::Nat,
            Some(Mode::Routed) => InnerMode::Routed,
            Some(Mode::Isolated) => InnerMode::Isolated,
        };
        let mut subnets = BTreeMap::new();
        let families = [
            (IpFamily::Ipv4, "/ipv4", self.ipv4.map(|ip| (ip.address, ip.nat))),
            (IpFamily::Ipv6, "/ipv6", self.ipv6.map(|ip| (ip.address, ip.nat))),
        ];
        for (family, pointer, declared) in families {
            let Some((address, nat)) = declared else { continue };
            if nat.is_some() && mode != InnerMode::Nat {
                let message = "`nat` has a meaning only with `mode: nat`";
                problems.add(SpecProblem::new(format!("{pointer}/nat"), message));
            }
            let pointer = format!("{pointer}/address");
            let Some(address) = decode_address(&address, family, &pointer, &mut problems) else { continue };
            subnets.insert(family, Subnet { address, nat: mode == InnerMode::Nat && nat.unwrap_or(true) });
        }
        let forwards = self.port_forwards.unwrap_or_default();
        if mode != InnerMode::Nat && !forwards.is_empty() {
            let message = "`portForwards` has a meaning only with `mode: nat`";
            problems.add(SpecProblem::new("/portForwards", message));
        }
        let port_forwards = forwards
            .into_iter()
            .enumerate()
            .filter_map(|(index, forward)| {
                forward.decode(&format!("/portForwards/{index}"), &subnets, &mut problems)
            })
            .collect();
        problems.finish(Some(Inner { bridge, mode, mtu: self.mtu, subnets, port_forwards }))
    }
}

fn decode_address(text: &str, family: IpFamily, pointer: &str, problems: &mut Problems) -> Option<IpPrefix> {
    let prefix = problems.take(pointer, text.parse::<IpPrefix>())?;
    let (longest, example) = match family {
        IpFamily::Ipv4 => (30, "192.168.100.1/24"),
        IpFamily::Ipv6 => (126, "fd00:100::1/64"),
    };
    let mut wrong = |message: String, hint: String| {
        problems.add(SpecProblem::new(pointer, message).hint(hint));
        None
    };
    if IpFamily::of(prefix.address) != family {
        return wrong(format!("`{text}` is not {family}"), format!("such as {example}"));
    }
    if prefix.prefix_len > longest || prefix.prefix_len < 8 {
        let message = format!("`{text}`: a network of guests has a prefix of 8 to {longest} bits");
        return wrong(message, format!("such as {example}"));
    }
    if prefix.address == prefix.network().address {
        let hint = format!("the host needs an address in it, such as {example}");
        return wrong(format!("`{text}` is the network itself, and no address in it"), hint);
    }
    let broadcast = match prefix.address {
        IpAddr::V4(address) => u32::from(address) | (u32::MAX >> prefix.prefix_len) == u32::from(address),
        IpAddr::V6(_) => false,
    };
    if broadcast {
        return wrong(format!("`{text}` is the network's broadcast address"), format!("such as {example}"));
    }
    Some(prefix)
}

impl PortForward {
    fn decode(
        self,
        pointer: &str,
        subnets: &BTreeMap<IpFamily, Subnet>,
        problems: &mut Problems,
    ) -> Option<InnerForward> {
        let mut address = |field: &str, text: &str| {
            let wrong = |_| format!("`{text}` is not an IP address");
            problems.take(&format!("{pointer}/{field}"), text.parse::<IpAddr>().map_err(wrong))
        };
        let to = address("to", &self.to);
        let listens = self.address.as_deref().map(|text| address("address", text));
        let to = to?;
        let subnet = subnets.get(&IpFamily::of(to)).map(|subnet| subnet.address);
        if !subnet.is_some_and(|subnet| subnet.contains(to) && subnet.address != to) {
            let problem = SpecProblem::new(
                format!("{pointer}/to"),
                format!("{to} is no guest's address in this network"),
            );
            problems.add(match subnet {
                Some(subnet) => problem.hint(format!("the network is {}", subnet.network())),
                None => problem.hint(format!("the network has no {}", IpFamily::of(to))),
            });
        }
        let listens = match listens {
            Some(listens) => Some(listens?),
            None => None,
        };
        if let Some(listens) = listens.filter(|listens| listens.is_ipv4() != to.is_ipv4()) {
            let message = format!("{listens} and {to} are of two families");
            problems.add(SpecProblem::new(format!("{pointer}/address"), message));
        }
        let protocol = match self.protocol {
            None | Some(ForwardProtocol::Tcp) => Protocol::Tcp,
            Some(ForwardProtocol::Udp) => Protocol::Udp,
        };
        let to_port = self.to_port.unwrap_or(self.port);
        Some(InnerForward { protocol, address: listens, port: self.port, to, to_port })
    }
}
