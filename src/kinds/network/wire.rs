//! The YAML form of a Network.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{BridgeName, Mode as InnerMode, Network as Inner, PortForward as InnerForward, Protocol, Subnet};
use super::{Dhcp as InnerDhcp, DhcpOption as InnerOption, Dns as InnerDns};
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
    /// Names for the network's guests: each VM's own, and what others know. Default: with `ipv4.dhcp` or
    /// `ipv6.routerAdvertisements`, by the host's resolvers.
    pub dns: Option<Dns>,
}

/// IPv4 addresses for guests that ask. A guest whose VM declares `interfaces[].addresses` gets that one.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Dhcp {
    /// The first address to give away. Default: the network's first.
    pub start: Option<String>,
    /// The last address to give away. Default: the network's last.
    pub end: Option<String>,
    /// How long a guest has its address before it asks again, 120 to 31536000 seconds. Default: 3600.
    #[schemars(range(min = 120, max = 31_536_000))]
    pub lease_seconds: Option<u32>,
    /// Further options for guests.
    pub options: Option<Vec<DhcpOption>>,
}

/// An option of DHCP.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DhcpOption {
    /// Its number, 1 to 254: 42 for NTP servers, 119 for search domains.
    #[schemars(range(min = 1, max = 254))]
    pub number: u8,
    /// Its value: an address, a name, or several with commas.
    pub value: String,
}

/// Names for the network's guests.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Dns {
    /// Default: true.
    pub enabled: Option<bool>,
    /// The domain that guests are in: `web` is also `web.lab.internal`. Default: none.
    pub domain: Option<String>,
    /// Who is asked for other names; an empty list: nobody. Default: the host's resolvers.
    pub forwarders: Option<Vec<String>>,
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
    /// Addresses for guests that ask. Default: none are given.
    pub dhcp: Option<Dhcp>,
}

/// IPv6 on the network.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Ipv6 {
    /// The host's own address, which is the guests' gateway, with prefix: `fd00:100::1/64`.
    pub address: String,
    /// Whether guests go out under the host's address. Only with mode nat. Default: true.
    pub nat: Option<bool>,
    /// Whether guests are told of the network and its gateway, to make themselves addresses (SLAAC); the
    /// prefix must have 64 bits. Default: false.
    pub router_advertisements: Option<bool>,
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
        let dhcp = self.ipv4.as_ref().and_then(|ip| ip.dhcp.clone());
        let router_advertisements =
            self.ipv6.as_ref().is_some_and(|ip| ip.router_advertisements == Some(true));
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
        let prefix = |family| subnets.get(&family).map(|subnet: &Subnet| subnet.address);
        let dhcp = match (dhcp, prefix(IpFamily::Ipv4)) {
            (Some(dhcp), Some(prefix)) => dhcp.decode(prefix, &mut problems),
            _ => None,
        };
        if let Some(prefix) =
            prefix(IpFamily::Ipv6).filter(|prefix| router_advertisements && prefix.prefix_len != 64)
        {
            let message = format!(
                "guests make themselves addresses only in a prefix of 64 bits, and this has {}",
                prefix.prefix_len
            );
            problems.add(SpecProblem::new("/ipv6/routerAdvertisements", message));
        }
        let dns = match self.dns {
            None => (dhcp.is_some() || router_advertisements).then(Default::default),
            Some(dns) => dns.decode(&mut problems),
        };
        if dns.is_some() && subnets.is_empty() {
            problems.add(
                SpecProblem::new("/dns", "there is no address that guests could ask")
                    .hint("declare `ipv4` or `ipv6`"),
            );
        }
        let mtu = self.mtu;
        problems.finish(Some(Inner {
            bridge,
            mode,
            mtu,
            subnets,
            port_forwards,
            dhcp,
            router_advertisements,
            dns,
        }))
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

impl Dhcp {
    fn decode(self, prefix: IpPrefix, problems: &mut Problems) -> Option<InnerDhcp> {
        let IpAddr::V4(network) = prefix.network().address else { return None };
        let last = u32::from(network) | (u32::MAX >> prefix.prefix_len);
        let (first, last) = (u32::from(network) + 1, last - 1);
        let mut bound = |field: &str, text: Option<String>, default: u32| {
            let Some(text) = text else { return Some(Ipv4Addr::from(default)) };
            let pointer = format!("/ipv4/dhcp/{field}");
            let wrong = |_| format!("`{text}` is not an IPv4 address");
            let address = problems.take(&pointer, text.parse::<Ipv4Addr>().map_err(wrong))?;
            if !(first..=last).contains(&u32::from(address)) {
                let message = format!("{address} is no guest's address in {}", prefix.network());
                problems.add(SpecProblem::new(pointer, message));
            }
            Some(address)
        };
        let (start, end) = (bound("start", self.start, first), bound("end", self.end, last));
        let options = self.options.unwrap_or_default();
        for (index, option) in options.iter().enumerate() {
            if option.value.chars().any(char::is_control) {
                let pointer = format!("/ipv4/dhcp/options/{index}/value");
                problems.add(SpecProblem::new(pointer, "a value is one line of printable text"));
            }
        }
        let options =
            options.into_iter().map(|option| InnerOption { number: option.number, value: option.value });
        let (start, end) = (start?, end?);
        if start > end {
            problems.add(SpecProblem::new("/ipv4/dhcp", format!("{start} is after {end}")));
        }
        let lease_seconds = self.lease_seconds.unwrap_or(3600);
        Some(InnerDhcp { start, end, lease_seconds, options: options.collect() })
    }
}

impl Dns {
    /// `None`: it is off.
    fn decode(self, problems: &mut Problems) -> Option<InnerDns> {
        if let Some(domain) = &self.domain {
            let is_label = |label: &str| crate::name::ObjectName::parse(label).is_ok();
            if domain.len() > 253 || !domain.split('.').all(is_label) {
                let problem = SpecProblem::new(
                    "/dns/domain",
                    format!("`{domain}` is not a domain such as lab.internal"),
                );
                problems.add(problem.hint("lower-case letters, digits and `-`, parted by dots"));
            }
        }
        let forwarders = self.forwarders.map(|texts| {
            let decode = |(index, text): (usize, &String)| {
                let wrong = |_| format!("`{text}` is not an IP address");
                problems.take(&format!("/dns/forwarders/{index}"), text.parse::<IpAddr>().map_err(wrong))
            };
            texts.iter().enumerate().filter_map(decode).collect()
        });
        self.enabled.unwrap_or(true).then_some(InnerDns { domain: self.domain, forwarders })
    }
}
