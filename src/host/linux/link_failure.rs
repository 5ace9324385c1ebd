//! What was being done to a link, in words, and what a person can do about the kernel's refusal.

use super::netlink::Refusal;
use crate::host::error::StepError;
use crate::host::snapshot::Capability;
use crate::host::step::{LinkChange, NewLink, NewLinkKind, Step};
use crate::name::{IpPrefix, LinkName, MacAddress};

/// One request to the kernel about one link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Doing {
    Create,
    Configure,
    Persist,
    Delete,
    Mark,
    Unmark,
    Mtu(u32),
    Up(bool),
    Master(Option<LinkName>),
    MacAddress(MacAddress),
    /// A bridge's own setting, in words.
    Bridge(String),
    VlanFiltering(bool),
    PortFlags,
    Vlans,
    OtherVlans,
    AddAddress(IpPrefix),
    RemoveAddress(IpPrefix),
}

impl Doing {
    pub fn of(change: &LinkChange) -> Self {
        match change {
            LinkChange::Mtu(mtu) => Self::Mtu(*mtu),
            LinkChange::Up(up) => Self::Up(*up),
            LinkChange::Master(master) => Self::Master(master.clone()),
            LinkChange::MacAddress(mac) => Self::MacAddress(*mac),
            LinkChange::Stp(on) => Self::Bridge(format!("STP to {on}")),
            LinkChange::ForwardDelaySeconds(seconds) => Self::Bridge(format!("forward delay to {seconds} s")),
            LinkChange::AgeingSeconds(seconds) => Self::Bridge(format!("ageing time to {seconds} s")),
            LinkChange::VlanFiltering(on) => Self::VlanFiltering(*on),
            LinkChange::DefaultPvid(pvid) => Self::Bridge(format!("default PVID to {pvid}")),
            LinkChange::MulticastSnooping(on) => Self::Bridge(format!("multicast snooping to {on}")),
            LinkChange::PortFlags(_) => Self::PortFlags,
            LinkChange::PortVlans(_) => Self::Vlans,
        }
    }

    /// `set the MTU of br0 to 9000`
    pub fn phrase(&self, link: &LinkName) -> String {
        match self {
            Self::Create => format!("create the link {link}"),
            Self::Configure => format!("configure {link}"),
            Self::Persist => format!("make the tap {link} persistent"),
            Self::Delete => format!("delete the link {link}"),
            Self::Mark => format!("mark the link {link}"),
            Self::Unmark => format!("remove the mark of {link}"),
            Self::Mtu(mtu) => format!("set the MTU of {link} to {mtu}"),
            Self::Up(true) => format!("bring {link} up"),
            Self::Up(false) => format!("take {link} down"),
            Self::Master(Some(master)) => format!("put {link} into {master}"),
            Self::Master(None) => format!("take {link} out of its master"),
            Self::MacAddress(mac) => format!("set the MAC address of {link} to {mac}"),
            Self::Bridge(setting) => format!("set {link}'s {setting}"),
            Self::VlanFiltering(on) => format!("set {link}'s VLAN filtering to {on}"),
            Self::PortFlags => format!("set the port flags of {link}"),
            Self::Vlans | Self::OtherVlans => format!("set the VLANs of the port {link}"),
            Self::AddAddress(address) => format!("add {address} to {link}"),
            Self::RemoveAddress(address) => format!("remove {address} from {link}"),
        }
    }
}

impl Refusal {
    /// A VLAN device of the same id is on the parent, under another name.
    pub fn is_vlan_twin(&self) -> bool {
        self.text.as_ref().is_some_and(|text| text.contains("VLAN device already exists"))
    }
}

/// The error of a step whose request was refused.
pub fn failure(step: &Step, link: &LinkName, doing: &Doing, refusal: &Refusal) -> StepError {
    let mut what = doing.phrase(link);
    if let (Step::CreateLink(_), true) = (step, *doing != Doing::Create) {
        what = format!("create the link {link}: {what}");
    }
    match lacking(step, doing, refusal) {
        Some(capability) => StepError::Lacks { what, capability },
        None => StepError::Failed { what, why: refusal.to_string(), hint: hint(step, doing, refusal) },
    }
}

fn lacking(step: &Step, doing: &Doing, refusal: &Refusal) -> Option<Capability> {
    if refusal.errno != libc::EOPNOTSUPP {
        return None;
    }
    let unknown_kind = refusal.text.as_ref().is_some_and(|text| text.contains("Unknown device type"));
    match (doing, step) {
        (Doing::Create | Doing::Configure, Step::CreateLink(NewLink { kind, .. })) => match kind {
            NewLinkKind::Bridge(facts) if facts.vlan_filtering && !unknown_kind => {
                Some(Capability::VlanFiltering)
            }
            NewLinkKind::Bridge(_) => Some(Capability::Bridge),
            NewLinkKind::Vlan { .. } => Some(Capability::Vlan),
            NewLinkKind::Tap { .. } => Some(Capability::Tun),
        },
        (Doing::VlanFiltering(_) | Doing::Vlans | Doing::OtherVlans, _) => Some(Capability::VlanFiltering),
        _ => None,
    }
}

fn hint(step: &Step, doing: &Doing, refusal: &Refusal) -> Option<String> {
    let is_vlan = matches!(step, Step::CreateLink(NewLink { kind: NewLinkKind::Vlan { .. }, .. }));
    let hint = match (doing, refusal.errno) {
        (Doing::AddAddress(_), libc::EACCES | libc::EOPNOTSUPP) => {
            "IPv6 may be off for this link: net.ipv6.conf.*.disable_ipv6"
        }
        (_, libc::EPERM | libc::EACCES) => "network links are root's to change (CAP_NET_ADMIN)",
        (Doing::Mtu(_), libc::ERANGE) => {
            "the MTU of a VLAN may not exceed its parent's: raise the parent's first"
        }
        (Doing::Mtu(_), libc::EINVAL) => {
            "`ip -d link` shows the device's least and greatest MTU (minmtu, maxmtu); a VLAN's may not exceed its parent's"
        }
        (Doing::Up(true), libc::ENETDOWN) => {
            "its parent is down, and a VLAN device is up no longer than its parent: bring that up first"
        }
        (Doing::Create, libc::EEXIST) if is_vlan => {
            "the parent carries this VLAN already, under another name: `ip -d link show type vlan`"
        }
        (Doing::Create, libc::EINVAL | libc::ENODEV) if is_vlan => "the parent must be an Ethernet device",
        (Doing::Create | Doing::Configure | Doing::Bridge(_), libc::ERANGE) => {
            "with STP the forward delay is 2 to 30 seconds"
        }
        (Doing::Master(_), libc::EBUSY) => "it is a port of something else, or is in use: `ip -d link show`",
        (Doing::Master(_), libc::EINVAL) => {
            "a bridge takes Ethernet devices, but no other bridge and no loopback"
        }
        (Doing::Master(_), libc::ELOOP) => "this would put a bridge into itself",
        (Doing::Master(_), libc::EXFULL) => "a bridge has at most 1023 ports",
        (Doing::MacAddress(_), libc::EBUSY) => "this device must be down to get another MAC address",
        (Doing::AddAddress(_), libc::EEXIST) => {
            "the address is there with another prefix length: remove that first"
        }
        (Doing::Create, libc::EBUSY) if matches!(step, Step::CreateLink(_)) => {
            "another process holds its name"
        }
        (_, libc::ENODEV) => "it went away meanwhile: apply again",
        _ => return None,
    };
    Some(hint.to_owned())
}
