//! What a plan was made from, as a hash: a saved plan refuses to run on a host that has changed since.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use sha2::Digest;

use crate::host::snapshot::{LinkKind, Snapshot};
use crate::host::step::NewLinkKind;
use crate::host::{Step, snapshot::Link};
use crate::kinds::action::Action;
use crate::name::LinkName;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fingerprint {
    pub sha256: String,
    /// Links without a mark of ours that the plan has to do with.
    pub links: BTreeSet<LinkName>,
}

/// Of everything that bears our marks or that these actions name; not of what changes by itself
/// (uptimes, free space).
pub fn fingerprint(snapshot: &Snapshot, actions: &[Action]) -> Fingerprint {
    let links = actions.iter().flat_map(|action| &action.steps).flat_map(links_of).collect();
    Fingerprint { sha256: digest(snapshot, &links), links }
}

impl Fingerprint {
    pub fn matches(&self, snapshot: &Snapshot) -> bool {
        digest(snapshot, &self.links) == self.sha256
    }
}

fn links_of(step: &Step) -> Vec<LinkName> {
    match step {
        Step::CreateLink(new) => {
            let parent = match &new.kind {
                NewLinkKind::Vlan { parent, .. } => Some(parent.clone()),
                _ => None,
            };
            std::iter::once(new.name.clone()).chain(new.master.clone()).chain(parent).collect()
        }
        Step::DeleteLink { link, .. }
        | Step::MarkLink { link, .. }
        | Step::UnmarkLink { link, .. }
        | Step::SetLink { link, .. }
        | Step::AddAddress { link, .. }
        | Step::RemoveAddress { link, .. } => vec![link.clone()],
        _ => Vec::new(),
    }
}

fn digest(snapshot: &Snapshot, interesting: &BTreeSet<LinkName>) -> String {
    let mut seen = snapshot.clone();
    if let Ok(host) = &mut seen.host {
        (host.available_bytes, host.pressure) = (0, None);
        host.hugepages.values_mut().for_each(|pages| pages.free = 0);
        host.ksm.iter_mut().for_each(|ksm| ksm.saved_bytes = 0);
    }
    if let Ok(links) = &mut seen.links {
        links.retain(|name, link| link.mark().is_some() || interesting.contains(name));
        links.values_mut().for_each(settle_link);
    }
    for pool in seen.pools.values_mut().flatten() {
        if let Some(group) = pool.lvm.as_mut().and_then(|lvm| lvm.group.as_mut()) {
            group.free_bytes = 0;
            group.other_names.clear();
            if let Some(thin) = &mut group.thin {
                (thin.data_used, thin.metadata_used, thin.failing) = (0, 0, None);
            }
        }
        if let Some(directory) = &mut pool.directory {
            directory.available_bytes = 0;
            directory.capacity_bytes = 0;
            for file in directory.files.values_mut().chain(directory.images.values_mut()) {
                file.allocated_bytes = 0;
                // A guest's doing.
                file.boot = None;
                if file.mark.is_none() && file.retained.is_none() {
                    file.size_bytes = 0;
                }
            }
        }
    }
    for service in seen.services.iter_mut().flat_map(|services| services.values_mut()) {
        service.leases.clear();
    }
    for vm in seen.vms.iter_mut().flat_map(|vms| vms.values_mut()) {
        if let Some(Ok(process)) = &mut vm.process {
            process.uptime_ms = 0;
            process.reboots = 0;
            process.conditions.iter_mut().for_each(|condition| condition.age_ms = 0);
        }
    }
    // Plain data with text keys: it serialises.
    let bytes = serde_json::to_vec(&seen).unwrap_or_default();
    sha2::Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A bridge's address may follow its ports by itself.
fn settle_link(link: &mut Link) {
    if matches!(link.kind, LinkKind::Bridge(_)) {
        link.mac_address = None;
    }
}
