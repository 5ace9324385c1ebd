//! The YAML form of a Bridge.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Bridge as Inner, Port as InnerPort};
use crate::host::snapshot::{BridgeFacts, PortFacts, VlanFlags};
use crate::kinds::{Problems, SpecProblem};
use crate::name::{IpPrefix, LinkName, MacAddress, VlanId};

/// A Linux bridge.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Bridge {
    /// The interface's name on the host, 1 to 15 bytes. Default: the object's name.
    pub interface_name: Option<String>,
    /// Bytes, 68 to 65535. Default: 1500.
    #[schemars(range(min = 68, max = 65535))]
    pub mtu: Option<u32>,
    /// The bridge's own address. Default: the kernel chooses, and it may follow the ports.
    pub mac_address: Option<String>,
    /// Spanning tree (802.1D). Default: false.
    pub stp: Option<bool>,
    /// Seconds a port listens and learns before it forwards, 0 to 30, with `stp` at least 2; only matters with
    /// `stp`. Default: 15.
    #[schemars(range(min = 0, max = 30))]
    pub forward_delay_seconds: Option<u32>,
    /// Seconds a learned address is kept, 0 to 1000000. Default: 300.
    #[schemars(range(min = 0, max = 1_000_000))]
    pub ageing_seconds: Option<u32>,
    /// Whether the bridge looks at 802.1Q tags and keeps VLANs apart. Default: false.
    pub vlan_filtering: Option<bool>,
    /// The VLAN that a new port gets, 0 to 4094; 0 is none, so that nothing leaks before the port's own
    /// VLANs are set. Only with `vlanFiltering`. Default: 0.
    #[schemars(range(min = 0, max = 4094))]
    pub default_pvid: Option<u16>,
    /// Whether multicast goes only where it was asked for (IGMP, MLD). Default: true.
    pub multicast_snooping: Option<bool>,
    /// The host's own addresses on this bridge, with prefix: `192.168.10.1/24`.
    pub addresses: Option<Vec<String>>,
    /// Existing interfaces that become ports of this bridge.
    pub ports: Option<Vec<Port>>,
}

/// An existing interface as a port of the bridge.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Port {
    /// The interface's name on the host.
    pub interface: String,
    /// The VLAN of untagged frames that come in, 1 to 4094; it also leaves untagged. Only with `vlanFiltering`.
    pub pvid: Option<u64>,
    /// VLANs that leave with their tag, 1 to 4094 each. Only with `vlanFiltering`.
    pub tagged: Option<Vec<u64>>,
    /// VLANs that leave without a tag, 1 to 4094 each. Only with `vlanFiltering`.
    pub untagged: Option<Vec<u64>>,
    /// Isolated ports can't reach one another. Default: false.
    pub isolated: Option<bool>,
    /// Frames may leave by the port that they came in by. Default: false.
    pub hairpin: Option<bool>,
    /// Whether a BPDU on this port shuts it. Default: false.
    pub bpdu_guard: Option<bool>,
    /// Whether source addresses are learned here. Default: true.
    pub learning: Option<bool>,
    /// Whether frames to unknown addresses are sent here. Default: true.
    pub flood: Option<bool>,
}

impl Bridge {
    pub fn decode(self) -> Result<Inner, Vec<SpecProblem>> {
        let mut problems = Problems::default();
        let vlan_filtering = self.vlan_filtering.unwrap_or(false);
        if self.default_pvid.is_some() && !vlan_filtering {
            problems.add(
                SpecProblem::new(
                    "/defaultPvid",
                    "`defaultPvid` has no meaning without `vlanFiltering: true`",
                )
                .hint("set `vlanFiltering: true`, or remove `defaultPvid`"),
            );
        }
        let interface_name =
            self.interface_name.and_then(|text| problems.take("/interfaceName", LinkName::parse(&text)));
        let mac_address =
            self.mac_address.and_then(|text| problems.take("/macAddress", MacAddress::parse_unicast(&text)));
        let addresses = decode_addresses(&mut problems, self.addresses);
        let ports = self
            .ports
            .unwrap_or_default()
            .into_iter()
            .enumerate()
            .filter_map(|(index, port)| {
                port.decode(&format!("/ports/{index}"), vlan_filtering, &mut problems)
            })
            .collect();
        if let Some(delay) = self.forward_delay_seconds.filter(|delay| *delay < 2 && self.stp == Some(true)) {
            let message = format!("{delay} s are too short with `stp`; the kernel takes 2 at least");
            problems.add(SpecProblem::new("/forwardDelaySeconds", message));
        }
        let inner = Inner {
            interface_name,
            mtu: self.mtu.unwrap_or(1500),
            mac_address,
            settings: BridgeFacts {
                stp: self.stp.unwrap_or(false),
                forward_delay_seconds: self.forward_delay_seconds.unwrap_or(15),
                ageing_seconds: self.ageing_seconds.unwrap_or(300),
                vlan_filtering,
                default_pvid: self.default_pvid.unwrap_or(0),
                multicast_snooping: self.multicast_snooping.unwrap_or(true),
            },
            addresses,
            ports,
        };
        problems.finish(Some(inner))
    }
}

/// Shared by the kinds that have `addresses`.
pub(crate) fn decode_addresses(
    problems: &mut Problems,
    addresses: Option<Vec<String>>,
) -> std::collections::BTreeSet<IpPrefix> {
    let mut seen = std::collections::BTreeSet::new();
    for (index, text) in addresses.unwrap_or_default().iter().enumerate() {
        let pointer = format!("/addresses/{index}");
        if let Some(address) = problems.take(&pointer, text.parse::<IpPrefix>())
            && !seen.insert(address)
        {
            problems.add(SpecProblem::new(pointer, format!("`{text}` is listed twice")));
        }
    }
    seen
}

impl Port {
    fn decode(self, pointer: &str, vlan_filtering: bool, problems: &mut Problems) -> Option<InnerPort> {
        let interface = problems.take(&format!("{pointer}/interface"), LinkName::parse(&self.interface));
        let mut facts = PortFacts {
            isolated: self.isolated.unwrap_or(false),
            hairpin: self.hairpin.unwrap_or(false),
            bpdu_guard: self.bpdu_guard.unwrap_or(false),
            learning: self.learning.unwrap_or(true),
            unicast_flood: self.flood.unwrap_or(true),
            vlans: Default::default(),
        };
        let declared = [
            ("pvid", self.pvid.into_iter().collect::<Vec<_>>(), VlanFlags { pvid: true, untagged: true }),
            ("tagged", self.tagged.unwrap_or_default(), VlanFlags::default()),
            ("untagged", self.untagged.unwrap_or_default(), VlanFlags { pvid: false, untagged: true }),
        ];
        for (field, ids, flags) in declared {
            if !ids.is_empty() && !vlan_filtering {
                problems.add(
                    SpecProblem::new(
                        format!("{pointer}/{field}"),
                        format!("`{field}` has no meaning on a bridge without `vlanFiltering: true`"),
                    )
                    .hint("set `vlanFiltering: true` on the bridge, or use a Vlan object with a bridge of its own"),
                );
                continue;
            }
            for (index, id) in ids.into_iter().enumerate() {
                let at = if field == "pvid" {
                    format!("{pointer}/pvid")
                } else {
                    format!("{pointer}/{field}/{index}")
                };
                let Some(id) = problems.take(&at, VlanId::new(id)) else { continue };
                let before = facts.vlans.insert(id, flags);
                // `untagged` may repeat the pvid, which is untagged anyway.
                match before {
                    Some(before) if before.pvid && flags.untagged => {
                        facts.vlans.insert(id, before);
                    }
                    Some(_) => {
                        problems.add(SpecProblem::new(at, format!("VLAN {id} is listed twice on this port")))
                    }
                    None => {}
                }
            }
        }
        Some(InnerPort { interface: interface?, facts })
    }
}
