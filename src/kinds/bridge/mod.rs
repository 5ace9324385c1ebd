//! Bridge: a Linux bridge, its own settings, and the existing interfaces that are its ports.

pub mod compare;
pub mod wire;

use std::collections::BTreeSet;

use serde::Serialize;

use crate::host::snapshot::{BridgeFacts, PortFacts};
use crate::name::{IpPrefix, LinkName, MacAddress, NameError, ObjectName};

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Bridge {
    pub interface_name: Option<LinkName>,
    pub mtu: u32,
    pub mac_address: Option<MacAddress>,
    pub settings: BridgeFacts,
    pub addresses: BTreeSet<IpPrefix>,
    pub ports: Vec<Port>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Port {
    pub interface: LinkName,
    pub facts: PortFacts,
}

impl Bridge {
    /// The link's name on the host; an object's name may be too long for one.
    pub fn link_name(&self, name: &ObjectName) -> Result<LinkName, NameError> {
        match &self.interface_name {
            Some(link) => Ok(link.clone()),
            None => LinkName::parse(name.as_str()),
        }
    }
}
