//! The kinds of object.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{NameError, error};

/// The kinds of object, in the order in which people like to read them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Kind {
    HostPolicy,
    Bridge,
    Vlan,
    Network,
    StoragePool,
    Image,
    Volume,
    VirtualMachine,
}

impl Kind {
    pub const ALL: [Kind; 8] = [
        Kind::HostPolicy,
        Kind::Bridge,
        Kind::Vlan,
        Kind::Network,
        Kind::StoragePool,
        Kind::Image,
        Kind::Volume,
        Kind::VirtualMachine,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Kind::HostPolicy => "HostPolicy",
            Kind::Bridge => "Bridge",
            Kind::Vlan => "Vlan",
            Kind::Network => "Network",
            Kind::StoragePool => "StoragePool",
            Kind::Image => "Image",
            Kind::Volume => "Volume",
            Kind::VirtualMachine => "VirtualMachine",
        }
    }

    /// What people type: the kind in any case, its plural, or a short name.
    pub fn aliases(self) -> &'static [&'static str] {
        match self {
            Kind::HostPolicy => &["hostpolicy", "hostpolicies", "host", "hp"],
            Kind::Bridge => &["bridge", "bridges", "br"],
            Kind::Vlan => &["vlan", "vlans"],
            Kind::Network => &["network", "networks", "net"],
            Kind::StoragePool => &["storagepool", "storagepools", "pool", "pools", "sp"],
            Kind::Image => &["image", "images", "img"],
            Kind::Volume => &["volume", "volumes", "vol"],
            Kind::VirtualMachine => &["virtualmachine", "virtualmachines", "vm", "vms"],
        }
    }

    pub fn parse_alias(text: &str) -> Option<Kind> {
        let text = text.to_ascii_lowercase();
        Kind::ALL.into_iter().find(|kind| kind.aliases().contains(&text.as_str()))
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Kind {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        match Kind::ALL.into_iter().find(|kind| kind.as_str() == text) {
            Some(kind) => Ok(kind),
            None => error(format!("`{text}` is not a kind that vmctl knows")),
        }
    }
}
