//! The YAML form of a Vlan.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Vlan as Inner;
use crate::host::snapshot::VlanProtocol;
use crate::kinds::bridge::wire::decode_addresses;
use crate::kinds::{Problems, SpecProblem};
use crate::name::{LinkName, ObjectName, VlanId};

/// An 802.1Q or 802.1ad sub-device of an interface, such as `eth0.10`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Vlan {
    /// The interface below: one that the host has, or the interface of another Vlan or Bridge.
    pub parent: String,
    /// The VLAN's id, 1 to 4094 (IEEE 802.1Q reserves 0 and 4095).
    pub id: u64,
    /// The interface's name on the host, 1 to 15 bytes. Default: `<parent>.<id>`.
    pub interface_name: Option<String>,
    /// The tag's protocol. Default: 802.1Q.
    pub protocol: Option<Protocol>,
    /// The Bridge that this interface is a port of.
    pub bridge: Option<String>,
    /// Bytes, 68 to 65535, at most the parent's. Default: the parent's.
    #[schemars(range(min = 68, max = 65535))]
    pub mtu: Option<u32>,
    /// The host's own addresses in this VLAN, with prefix: `192.168.10.1/24`.
    pub addresses: Option<Vec<String>>,
}

/// The protocol of a VLAN tag.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
pub enum Protocol {
    #[serde(rename = "802.1Q")]
    Ieee8021Q,
    #[serde(rename = "802.1ad")]
    Ieee8021Ad,
}

impl Vlan {
    pub fn decode(self) -> Result<Inner, Vec<SpecProblem>> {
        let mut problems = Problems::default();
        let parent = problems.take("/parent", LinkName::parse(&self.parent));
        let id = problems.take("/id", VlanId::new(self.id));
        let interface_name = match (&self.interface_name, &parent, id) {
            (Some(text), _, _) => problems.take("/interfaceName", LinkName::parse(text)),
            (None, Some(parent), Some(id)) => match LinkName::parse(&format!("{parent}.{id}")) {
                Ok(name) => Some(name),
                Err(error) => {
                    problems.add(
                        SpecProblem::new("/parent", format!("the interface would be named {error}"))
                            .hint("choose a shorter name with `interfaceName`"),
                    );
                    None
                }
            },
            _ => None,
        };
        let bridge = match &self.bridge {
            Some(text) => problems.take("/bridge", ObjectName::parse(text)).map(Some),
            None => Some(None),
        };
        let addresses = decode_addresses(&mut problems, self.addresses);
        if bridge.as_ref().is_some_and(Option::is_some) && !addresses.is_empty() {
            problems.add(
                SpecProblem::new("/addresses", "a bridge's port can't use addresses of its own")
                    .hint("put the addresses on the Bridge"),
            );
        }
        let protocol = match self.protocol {
            Some(Protocol::Ieee8021Ad) => VlanProtocol::Ieee8021Ad,
            _ => VlanProtocol::Ieee8021Q,
        };
        let inner = (|| {
            Some(Inner {
                parent: parent?,
                id: id?,
                interface_name: interface_name?,
                protocol,
                bridge: bridge?,
                mtu: self.mtu,
                addresses,
            })
        })();
        problems.finish(inner)
    }
}
