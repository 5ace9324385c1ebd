//! What this host can and can't do, found out by trying, in a way that leaves no trace.
//!
//! Network abilities are tried in a network namespace of their own, which goes with the thread that
//! tries: no link of this host comes or goes.

use std::collections::BTreeMap;
use std::sync::Mutex;

use kvm_ioctls::Kvm;
use rustix::thread::UnshareFlags;

use super::{link_steps, tap};
use crate::host::error::StepError;
use crate::host::snapshot::{BridgeFacts, Capability, VlanProtocol};
use crate::host::step::{NewLink, NewLinkKind, Step};
use crate::name::{Kind, LinkName, Mark, ObjectId, ObjectName, SetName, VlanId};

/// The only KVM interface there ever was.
const KVM_API_VERSION: i32 = 12;

/// What was found and can't change while the kernel runs: an ability that is there, or one that the
/// kernel was built without.
static SETTLED: Mutex<BTreeMap<Capability, Option<String>>> = Mutex::new(BTreeMap::new());

/// How it showed that the host lacks this, or `None` if it has it.
pub fn lacks(capability: Capability) -> Option<String> {
    // A poisoned lock holds a map that was only ever inserted into.
    let settled = || SETTLED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(answer) = settled().get(&capability) {
        return answer.clone();
    }
    let answer = match capability {
        Capability::Kvm => kvm(),
        Capability::Tun => tap::probe().err().map(|error| format!("/dev/net/tun: {error}")),
        Capability::Bridge | Capability::Vlan | Capability::VlanFiltering => std::thread::Builder::new()
            .name("probe".to_owned())
            .spawn(move || network(capability))
            .map(|thread| thread.join().unwrap_or_else(|_| Some("the probe failed".to_owned())))
            .unwrap_or_else(|error| Some(format!("start a thread to try it in: {error}"))),
    };
    // Devices come and go, and modules can be loaded; links of a kind that worked stay possible.
    let lasting = match capability {
        Capability::Kvm | Capability::Tun => false,
        Capability::Bridge | Capability::Vlan => answer.is_none(),
        Capability::VlanFiltering => answer.is_none() || lacks(Capability::Bridge).is_none(),
    };
    if lasting {
        settled().insert(capability, answer.clone());
    }
    answer
}

fn kvm() -> Option<String> {
    match Kvm::new().map(|kvm| kvm.get_api_version()) {
        Ok(KVM_API_VERSION) => None,
        Ok(other) => Some(format!("/dev/kvm speaks version {other} of the interface, not {KVM_API_VERSION}")),
        Err(error) => Some(format!("open /dev/kvm: {}", std::io::Error::from_raw_os_error(error.errno()))),
    }
}

/// Runs in a thread of its own.
fn network(capability: Capability) -> Option<String> {
    // SAFETY: only this thread's network namespace changes, and the thread ends with this probe; no
    // file system state or file descriptor table is unshared.
    if let Err(error) = unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) } {
        return Some(format!("make a network namespace to try it in: {}", std::io::Error::from(error)));
    }
    let tried = links(capability).and_then(|steps| {
        steps.iter().try_for_each(|step| link_steps::run(&[step]).into_iter().collect::<Result<(), _>>())
    });
    match tried {
        Ok(()) => None,
        Err(StepError::Lacks { capability, .. }) => Some(match capability {
            Capability::VlanFiltering => "the kernel refuses `vlan_filtering 1` on a bridge".to_owned(),
            Capability::Vlan => "the kernel knows no links of the type `vlan`".to_owned(),
            _ => "the kernel knows no links of the type `bridge`".to_owned(),
        }),
        Err(error) => Some(error.to_string()),
    }
}

/// The throw-away links that show it.
fn links(capability: Capability) -> Result<Vec<Step>, StepError> {
    let invalid = |error| StepError::failed("make the names of a probe", error);
    let bridge_name = LinkName::parse("probe").map_err(invalid)?;
    let owner = ObjectId::new(Kind::Bridge, ObjectName::parse("probe").map_err(invalid)?);
    let mark = Mark::new(SetName::parse("probe").map_err(invalid)?, owner);
    let create = |name: &LinkName, kind| {
        Step::CreateLink(NewLink {
            name: name.clone(),
            mark: mark.clone(),
            kind,
            mtu: None,
            mac_address: None,
            master: None,
            port: None,
            up: false,
        })
    };
    let facts = BridgeFacts {
        stp: false,
        forward_delay_seconds: 15,
        ageing_seconds: 300,
        vlan_filtering: capability == Capability::VlanFiltering,
        default_pvid: 0,
        multicast_snooping: false,
    };
    let mut steps = vec![create(&bridge_name, NewLinkKind::Bridge(facts))];
    if capability == Capability::Vlan {
        let (id, name) = (VlanId::new(2).map_err(invalid)?, LinkName::parse("probe.2").map_err(invalid)?);
        let kind = NewLinkKind::Vlan { parent: bridge_name.clone(), id, protocol: VlanProtocol::Ieee8021Q };
        steps.push(create(&name, kind));
    }
    Ok(steps)
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
