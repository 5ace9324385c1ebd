//! Vlan: a tagged sub-device of an interface, alone or as a bridge's port.

pub mod compare;
pub mod wire;

use std::collections::BTreeSet;

use serde::Serialize;

use super::Reference;
use crate::host::snapshot::VlanProtocol;
use crate::name::{IpPrefix, Kind, LinkName, ObjectId, ObjectName, VlanId};

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Vlan {
    pub parent: LinkName,
    pub id: VlanId,
    pub interface_name: LinkName,
    pub protocol: VlanProtocol,
    pub bridge: Option<ObjectName>,
    /// `None`: the parent's.
    pub mtu: Option<u32>,
    pub addresses: BTreeSet<IpPrefix>,
}

impl Vlan {
    pub fn references(&self) -> Vec<Reference> {
        let to_bridge = |name: &ObjectName| Reference {
            to: ObjectId::new(Kind::Bridge, name.clone()),
            pointer: "/bridge".to_owned(),
        };
        self.bridge.iter().map(to_bridge).collect()
    }
}
