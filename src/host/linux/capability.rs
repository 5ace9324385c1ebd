//! What this host can and can't do, found out by trying, in a way that leaves no trace.
//!
//! A kind of link is tried by asking for one with an address that no link may have: a kernel that knows
//! the kind refuses the address, one that doesn't refuses the kind, and neither makes a link. What shows
//! only in a real link is tried in a network namespace of its own, which goes with the thread that tries.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use kvm_ioctls::Kvm;
use netlink_packet_route::link::{InfoData, InfoKind, LinkAttribute};
use rustix::thread::UnshareFlags;

use super::netlink::{Answer, Group, Netlink, Refusal};
use super::{link_messages, link_steps, network, tap};
use crate::host::error::StepError;
use crate::host::snapshot::{BridgeFacts, Capability, Link, LinkKind, ONLY_ROOT};
use crate::host::step::{NewLink, NewLinkKind, Step};
use crate::name::{Kind, LinkName, Mark, ObjectId, ObjectName, SetName};

/// The only KVM interface there ever was.
const KVM_API_VERSION: i32 = 12;

/// What was found the hard way and can't change while the kernel runs.
static SETTLED: Mutex<BTreeMap<Capability, Option<String>>> = Mutex::new(BTreeMap::new());

/// The abilities that these links prove by being there.
pub fn shown_by(links: &BTreeMap<LinkName, Link>) -> BTreeSet<Capability> {
    let mut shown = BTreeSet::new();
    for link in links.values() {
        match &link.kind {
            LinkKind::Bridge(facts) => {
                shown.insert(Capability::Bridge);
                if facts.vlan_filtering {
                    shown.insert(Capability::VlanFiltering);
                }
            }
            LinkKind::Vlan { .. } => {
                shown.insert(Capability::Vlan);
            }
            LinkKind::Tap { .. } => {
                shown.insert(Capability::Tun);
            }
            LinkKind::Other(_) => {}
        }
    }
    shown
}

/// How it showed that the host lacks this, or `None` if it has it.
pub fn lacks(capability: Capability) -> Option<String> {
    // A poisoned lock holds a map that was only ever inserted into.
    let settled = || SETTLED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(answer) = settled().get(&capability) {
        return answer.clone();
    }
    let answer = match capability {
        Capability::Kvm => kvm(),
        Capability::Tun => tap::probe().err().map(|error| told("open /dev/net/tun", &error)),
        Capability::Nftables => network::nft::lacks(),
        Capability::Dnsmasq => network::service::lacks(),
        Capability::Bridge => kind("bridge", InfoKind::Bridge, InfoData::Bridge(Vec::new())),
        Capability::Vlan => kind("vlan", InfoKind::Vlan, InfoData::Vlan(Vec::new())),
        Capability::VlanFiltering => std::thread::Builder::new()
            .name("probe".to_owned())
            .spawn(filtering)
            .map(|thread| thread.join().unwrap_or_else(|_| Some("the probe failed".to_owned())))
            .unwrap_or_else(|error| Some(format!("start a thread to try it in: {error}"))),
    };
    // Devices come and go, and modules can be loaded; what a bridge can do was settled when its module
    // was built.
    if capability == Capability::VlanFiltering && lacks(Capability::Bridge).is_none() {
        settled().insert(capability, answer.clone());
    }
    answer
}

/// What failed; and whether only for this user, whom another remedy helps then.
fn told(what: &str, error: &std::io::Error) -> String {
    let refused = error.kind() == std::io::ErrorKind::PermissionDenied;
    if refused { format!("{ONLY_ROOT} {what}: {error}") } else { format!("{what}: {error}") }
}

fn kvm() -> Option<String> {
    match Kvm::new().map(|kvm| kvm.get_api_version()) {
        Ok(KVM_API_VERSION) => None,
        Ok(other) => Some(format!("/dev/kvm speaks version {other} of the interface, not {KVM_API_VERSION}")),
        Err(error) => Some(told("open /dev/kvm", &std::io::Error::from_raw_os_error(error.errno()))),
    }
}

/// The version of Landlock that the kernel speaks, if it does.
pub fn landlock_version() -> Option<i64> {
    const LANDLOCK_CREATE_RULESET_VERSION: u32 = 1;
    let no_rules = std::ptr::null::<libc::c_void>();
    // SAFETY: with this flag and no attributes the call makes nothing and tells its version.
    let version = unsafe {
        libc::syscall(libc::SYS_landlock_create_ruleset, no_rules, 0, LANDLOCK_CREATE_RULESET_VERSION)
    };
    (version > 0).then_some(version)
}

/// Asks for a link that can't be.
fn kind(name: &str, kind: InfoKind, data: InfoData) -> Option<String> {
    const MULTICAST: [u8; 6] = [1, 0, 0, 0, 0, 1];
    let ask = || -> std::io::Result<Option<Answer>> {
        let link = LinkName::parse("vmctl-probe").map_err(std::io::Error::other)?;
        // The index only keeps the kernel from taking the name for that of an existing link.
        let mut message = link_messages::create(&link, link_steps::random_index()?, kind, data);
        message.attributes.push(LinkAttribute::Address(MULTICAST.to_vec()));
        let group = Group::from_iter([link_messages::creation(message)]);
        Ok(Netlink::open()?.exchange(vec![group])?.into_iter().flatten().next())
    };
    match ask() {
        Ok(Some(Err(Refusal { errno: libc::EADDRNOTAVAIL | libc::EINVAL, .. }))) => None,
        Ok(Some(Err(Refusal { errno: libc::EOPNOTSUPP, .. }))) => {
            Some(format!("the kernel knows no links of the kind `{name}`"))
        }
        Ok(Some(Err(refusal @ Refusal { errno: libc::EPERM | libc::EACCES, .. }))) => {
            Some(format!("{ONLY_ROOT} make links of the kind `{name}`: {refusal}"))
        }
        Ok(Some(Err(refusal))) => Some(format!("the kernel doesn't let us try: {refusal}")),
        Ok(Some(Ok(_)) | None) => Some("the kernel's answer makes no sense".to_owned()),
        Err(error) => Some(format!("ask the kernel: {error}")),
    }
}

/// Makes a throw-away bridge. Runs in a thread of its own.
fn filtering() -> Option<String> {
    // SAFETY: only this thread's network namespace changes, and the thread ends with this probe; no
    // file system state or file descriptor table is unshared.
    if let Err(error) = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) } {
        return Some(told("make a network namespace to try it in", &error.into()));
    }
    let tried =
        filtering_bridge().and_then(|step| link_steps::run(&[&step]).into_iter().collect::<Result<(), _>>());
    match tried {
        Ok(()) => None,
        Err(StepError::Lacks { capability: Capability::VlanFiltering, .. }) => {
            Some("the kernel refuses `vlan_filtering 1` on a bridge".to_owned())
        }
        Err(StepError::Lacks { capability, .. }) => Some(format!("it lacks {}", capability.name())),
        Err(error) => Some(error.to_string()),
    }
}

fn filtering_bridge() -> Result<Step, StepError> {
    let invalid = |error| StepError::failed("make the names of a probe", error);
    let owner = ObjectId::new(Kind::Bridge, ObjectName::parse("probe").map_err(invalid)?);
    Ok(Step::CreateLink(NewLink {
        name: LinkName::parse("vmctl-probe").map_err(invalid)?,
        mark: Mark::new(SetName::parse("probe").map_err(invalid)?, owner),
        kind: NewLinkKind::Bridge(BridgeFacts {
            stp: false,
            forward_delay_seconds: 15,
            ageing_seconds: 300,
            vlan_filtering: true,
            default_pvid: 0,
            multicast_snooping: false,
        }),
        mtu: None,
        mac_address: None,
        master: None,
        port: None,
        up: false,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_probe_answers_the_same_twice() {
        for capability in Capability::ALL {
            assert_eq!(lacks(capability), lacks(capability), "{capability:?}");
        }
    }
}
