//! What a kind may look at, with the look-ups that would otherwise be a scan per object.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use super::network::Place;
use super::{Declared, Spec};
use crate::host::snapshot::{Link, Snapshot};
use crate::name::{IpPrefix, LinkName, Mark, ObjectId, ObjectName};

/// A declaration beside a snapshot.
pub struct Context<'a> {
    pub declared: &'a Declared,
    pub snapshot: &'a Snapshot,
    index: Index<'a>,
}

#[derive(Default)]
struct Index<'a> {
    /// The declared Bridge or Vlan of each link name.
    declared_links: HashMap<LinkName, &'a ObjectId>,
    /// Addresses that networks put on declared bridges, by link.
    lent_addresses: HashMap<LinkName, BTreeSet<IpPrefix>>,
    /// The links that carry our set's mark, by owner.
    links: HashMap<ObjectId, Vec<(&'a LinkName, &'a Link, Mark)>>,
    /// What sits on a link: its ports and its sub-devices.
    uppers: HashMap<&'a LinkName, Vec<(&'a LinkName, &'a Link)>>,
    /// The pools in which an object of our set has a volume file.
    volume_pools: HashMap<&'a ObjectId, Vec<&'a ObjectName>>,
    /// Which disk of which running VM a file is.
    running_disks: HashMap<&'a str, (&'a ObjectName, Mark, &'a str)>,
    /// Files that something is an overlay of.
    backing_files: BTreeSet<&'a PathBuf>,
}

impl<'a> Context<'a> {
    pub fn new(declared: &'a Declared, snapshot: &'a Snapshot) -> Self {
        let mut index = Index::default();
        for (id, spec) in &declared.objects {
            if let Some(link) = link_of(id, spec, &declared.objects) {
                index.declared_links.insert(link, id);
            }
            if let Spec::Network(network) = spec
                && let Ok(place @ Place::Declared(..)) = network.place(&id.name, declared)
                && let Ok(link) = place.link(&id.name)
            {
                index.lent_addresses.entry(link).or_default().extend(network.addresses());
            }
        }
        for (name, link) in snapshot.links.iter().flatten() {
            if let Some(mark) = link.mark().filter(|mark| mark.set == declared.set) {
                index.links.entry(mark.owner.clone()).or_default().push((name, link, mark));
            }
            for lower in link.master.iter().chain(&link.parent) {
                index.uppers.entry(lower).or_default().push((name, link));
            }
        }
        for (name, pool) in &snapshot.pools {
            let Some(directory) = pool.as_ref().ok().and_then(|pool| pool.directory.as_ref()) else {
                continue;
            };
            for file in directory.files.values() {
                if let Some(mark) = file.mark.as_ref().filter(|mark| mark.set == declared.set) {
                    index.volume_pools.entry(&mark.owner).or_default().push(name);
                }
                index.backing_files.extend(&file.header.backing);
            }
        }
        for (name, vm) in snapshot.vms.iter().flatten() {
            let Some(Ok(process)) = &vm.process else { continue };
            let Ok(mark) = process.config.mark.parse::<Mark>() else { continue };
            for disk in &process.config.disks {
                index.running_disks.insert(&disk.path, (name, mark.clone(), &disk.name));
            }
        }
        Self { declared, snapshot, index }
    }

    /// Whether a policy lets the agent move balloons: then their targets are its matter.
    pub fn balloons_follow_memory(&self) -> bool {
        let declared = self.declared.host_policy().map(|policy| &policy.rules);
        let recorded = || Some(&self.snapshot.host.as_ref().ok()?.policy.as_ref()?.rules);
        declared.or_else(recorded).is_some_and(|rules| rules.balloon.is_some())
    }

    /// The declared object, if any, whose link this is.
    pub fn declared_owner(&self, link: &LinkName) -> Option<&'a ObjectId> {
        self.index.declared_links.get(link).copied()
    }

    /// What networks put on a declared bridge.
    pub fn addresses_lent_to(&self, bridge: &LinkName) -> BTreeSet<IpPrefix> {
        self.index.lent_addresses.get(bridge).cloned().unwrap_or_default()
    }

    /// The links that carry the mark of this object of our set.
    pub fn links_of(&self, owner: &ObjectId) -> &[(&'a LinkName, &'a Link, Mark)] {
        self.index.links.get(owner).map(Vec::as_slice).unwrap_or_default()
    }

    /// The ports and sub-devices of a link.
    pub fn uppers(&self, link: &LinkName) -> &[(&'a LinkName, &'a Link)] {
        self.index.uppers.get(link).map(Vec::as_slice).unwrap_or_default()
    }

    /// A pool other than this one in which our set has this volume's data.
    pub fn other_pool_of(&self, volume: &ObjectId, pool: &ObjectName) -> Option<&'a ObjectName> {
        self.index.volume_pools.get(volume)?.iter().copied().find(|other| *other != pool)
    }

    /// The VM, its mark, and its disk, that runs on this file.
    pub fn running_disk(&self, path: &Path) -> Option<(ObjectName, Mark, String)> {
        let (vm, mark, disk) = self.index.running_disks.get(path.to_str()?)?;
        Some(((*vm).clone(), mark.clone(), (*disk).to_owned()))
    }

    /// The size that the VM which runs on this file sees.
    pub fn running_capacity_bytes(&self, path: &Path) -> Option<u64> {
        let (vm, _, disk) = self.index.running_disks.get(path.to_str()?)?;
        let process = self.snapshot.vms.as_ref().ok()?.get(*vm)?.process.as_ref()?.as_ref().ok()?;
        let place = process.config.disks.iter().position(|running| running.name == *disk)?;
        process.disk_capacity_bytes.get(place).copied()
    }

    /// Whether some volume is an overlay of this file.
    pub fn is_backing_file(&self, path: &PathBuf) -> bool {
        self.index.backing_files.contains(path)
    }
}

/// The link that an object is on the host.
pub fn link_of(id: &ObjectId, spec: &Spec, objects: &BTreeMap<ObjectId, Spec>) -> Option<LinkName> {
    match spec {
        Spec::Network(network) if network.declared_bridge(objects).is_some() => None,
        Spec::Network(network) => network.own_link(&id.name).ok(),
        Spec::Bridge(bridge) => bridge.link_name(&id.name).ok(),
        Spec::Vlan(vlan) => Some(vlan.interface_name.clone()),
        _ => None,
    }
}
