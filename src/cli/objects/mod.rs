//! The objects that a host has, found by their marks, with what is true of them now.

mod host;
mod network;
mod vm;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::host::error::ObserveError;
use crate::host::snapshot::BootSignature;
use crate::host::snapshot::{GroupFacts, Link, LinkKind, Pool, PoolFile, Snapshot, ThinFacts, VlanProtocol};
use crate::kinds::virtual_machine::compare::owner;
use crate::name::{Kind, LinkName, Mark, ObjectId, ObjectName, SetName};
use crate::vmm::config::DiskFormat;
pub use host::{HostStatus, status as host_status};
pub use network::{Lease, NetworkStatus};
pub use vm::VmStatus;

/// One object on the host.
#[derive(Clone, Debug)]
pub struct Object {
    pub id: ObjectId,
    pub set: SetName,
    pub status: Status,
}

#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Status {
    HostPolicy(Box<HostStatus>),
    Bridge(BridgeStatus),
    Vlan(VlanStatus),
    Network(NetworkStatus),
    StoragePool(PoolStatus),
    Image(ImageStatus),
    Volume(VolumeStatus),
    VirtualMachine(Box<VmStatus>),
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LinkStatus {
    pub interface: LinkName,
    pub up: bool,
    pub mtu: u32,
    pub mac_address: Option<String>,
    /// The bridge that it is a port of.
    pub master: Option<LinkName>,
    pub addresses: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct BridgeStatus {
    #[serde(flatten)]
    pub link: LinkStatus,
    pub ports: Vec<LinkName>,
    pub stp: bool,
    pub vlan_filtering: bool,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VlanStatus {
    #[serde(flatten)]
    pub link: LinkStatus,
    pub vlan_id: Option<u16>,
    pub protocol: Option<VlanProtocol>,
    pub parent: Option<LinkName>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolStatus {
    pub path: PathBuf,
    /// Only of a pool in a volume group.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub volume_group: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thin_pool: Option<String>,
    /// The directory, volume group or thin pool is there.
    pub present: bool,
    pub capacity_bytes: u64,
    pub available_bytes: u64,
    /// Blocks in use by volumes and images of vmctl.
    pub used_bytes: u64,
    pub volumes: usize,
    pub images: usize,
    /// What is not as it should be and lasts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<PoolCondition>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolCondition {
    /// `PoolNearlyFull`, `PoolFailing`, `PoolUnusable`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    pub message: String,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ImageStatus {
    pub pool: ObjectName,
    pub path: PathBuf,
    pub format: DiskFormat,
    pub virtual_size_bytes: u64,
    pub allocated_bytes: u64,
    pub sha256: Option<String>,
    /// Volumes that are overlays of it.
    pub used_by: Vec<ObjectId>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct VolumeStatus {
    pub pool: ObjectName,
    pub path: PathBuf,
    pub format: DiskFormat,
    pub capacity_bytes: u64,
    pub allocated_bytes: u64,
    pub backing: Option<PathBuf>,
    /// VMs that are defined with it; `running` says which use it now.
    pub used_by: Vec<ObjectId>,
    pub running: bool,
    pub reclaim_policy: &'static str,
    /// What is there to boot from. Not there where it can't be told by a glance.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_signature: Option<BootSignature>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unusable: Option<String>,
}

/// Everything that carries a mark of these sets (`None`: of any), by kind and name, and what could not be
/// looked at.
pub fn objects(snapshot: &Snapshot, set: Option<&SetName>) -> (Vec<Object>, Vec<ObserveError>) {
    let mut finder = Finder { snapshot, objects: Vec::new(), unseen: Vec::new() };
    finder.host();
    finder.links();
    finder.networks();
    finder.pools();
    finder.vms();
    let Finder { mut objects, unseen, .. } = finder;
    objects.retain(|object| set.is_none_or(|set| object.set == *set));
    objects.sort_by(|a, b| (&a.id, &a.set).cmp(&(&b.id, &b.set)));
    (objects, unseen)
}

struct Finder<'a> {
    snapshot: &'a Snapshot,
    objects: Vec<Object>,
    unseen: Vec<ObserveError>,
}

impl<'a> Finder<'a> {
    fn found(&mut self, mark: Mark, status: Status) {
        self.objects.push(Object { id: mark.owner, set: mark.set, status });
    }

    fn host(&mut self) {
        match &self.snapshot.host {
            Ok(host) => {
                if let Some(policy) = &host.policy {
                    let status = host::status(host, self.snapshot);
                    self.found(policy.mark.clone(), Status::HostPolicy(Box::new(status)));
                }
            }
            Err(error) => self.unseen.push(error.clone()),
        }
    }

    fn links(&mut self) {
        let links = match &self.snapshot.links {
            Ok(links) => links,
            Err(error) => return self.unseen.push(error.clone()),
        };
        let mut ports: BTreeMap<&LinkName, Vec<LinkName>> = BTreeMap::new();
        for (name, link) in links {
            if let Some(master) = &link.master {
                ports.entry(master).or_default().push(name.clone());
            }
        }
        for (name, link) in links {
            let Some(mark) = link.mark().filter(|mark| mark.part.is_none()) else { continue };
            let status = match (&link.kind, mark.owner.kind) {
                (LinkKind::Bridge(facts), Kind::Bridge) => Status::Bridge(BridgeStatus {
                    link: link_status(name, link),
                    ports: ports.remove(name).unwrap_or_default(),
                    stp: facts.stp,
                    vlan_filtering: facts.vlan_filtering,
                }),
                (LinkKind::Vlan { id, protocol }, Kind::Vlan) => Status::Vlan(VlanStatus {
                    link: link_status(name, link),
                    vlan_id: Some(id.get()),
                    protocol: Some(*protocol),
                    parent: link.parent.clone(),
                }),
                _ => continue,
            };
            self.found(mark, status);
        }
    }

    fn pools(&mut self) {
        let users = self.disk_users();
        let overlays = self.overlays();
        for (name, pool) in &self.snapshot.pools {
            let pool = match pool {
                Ok(pool) => pool,
                Err(error) => {
                    self.unseen.push(error.clone());
                    continue;
                }
            };
            if let Some(mark) = pool.registered.clone() {
                self.found(mark, Status::StoragePool(pool_status(pool)));
            }
            let Some(directory) = &pool.directory else { continue };
            for (file, facts) in &directory.files {
                let Some(mark) = facts.mark.clone().filter(|mark| mark.owner.kind == Kind::Volume) else {
                    continue;
                };
                let path = pool.path.join(file);
                let used = users.get(&path).cloned().unwrap_or_default();
                self.found(mark, Status::Volume(volume_status(name, path, facts, used)));
            }
            for (file, facts) in &directory.images {
                let Some(mark) = facts.mark.clone().filter(|mark| mark.owner.kind == Kind::Image) else {
                    continue;
                };
                let path = Pool::image_directory(&pool.path).join(file);
                let status = ImageStatus {
                    pool: name.clone(),
                    format: facts.header.format,
                    virtual_size_bytes: facts.header.virtual_size_bytes,
                    allocated_bytes: facts.allocated_bytes,
                    sha256: facts.sha256.clone(),
                    used_by: overlays.get(path.as_path()).cloned().unwrap_or_default(),
                    path,
                };
                self.found(mark, Status::Image(status));
            }
        }
    }

    /// For each disk's file: the VMs that have it, and whether one of them runs.
    fn disk_users(&self) -> BTreeMap<PathBuf, (Vec<ObjectId>, bool)> {
        let mut users: BTreeMap<PathBuf, (Vec<ObjectId>, bool)> = BTreeMap::new();
        for (name, vm) in self.snapshot.vms.iter().flatten() {
            let running =
                vm.process.as_ref().and_then(|process| process.as_ref().ok()).map(|process| &process.config);
            let defined = vm.definition.as_ref().map(|definition| &definition.config);
            let disks = running.into_iter().map(|config| (config, true));
            for (config, runs) in disks.chain(defined.map(|config| (config, false))) {
                for disk in &config.disks {
                    let user = users.entry(PathBuf::from(&disk.path)).or_default();
                    let id = ObjectId::new(Kind::VirtualMachine, name.clone());
                    if !user.0.contains(&id) {
                        user.0.push(id);
                    }
                    user.1 |= runs;
                }
            }
        }
        users
    }

    fn overlays(&self) -> BTreeMap<&'a Path, Vec<ObjectId>> {
        let mut overlays: BTreeMap<&'a Path, Vec<ObjectId>> = BTreeMap::new();
        let directories = self.snapshot.pools.values().flatten().filter_map(|pool| pool.directory.as_ref());
        for file in directories.flat_map(|directory| directory.files.values()) {
            if let (Some(backing), Some(mark)) = (&file.header.backing, &file.mark) {
                overlays.entry(backing).or_default().push(mark.owner.clone());
            }
        }
        overlays
    }

    fn vms(&mut self) {
        let vms = match &self.snapshot.vms {
            Ok(vms) => vms,
            Err(error) => return self.unseen.push(error.clone()),
        };
        for (name, vm) in vms {
            // A process that doesn't answer and has no definition belongs to nobody that we know.
            let Some(mark) = owner(vm) else {
                if let Some(Err(error)) = &vm.process {
                    self.unseen.push(ObserveError::new(format!("VM {name}"), error));
                }
                continue;
            };
            let status = vm::status(vm, self.snapshot);
            self.found(mark, Status::VirtualMachine(Box::new(status)));
        }
    }
}

fn link_status(name: &LinkName, link: &Link) -> LinkStatus {
    LinkStatus {
        interface: name.clone(),
        up: link.up,
        mtu: link.mtu,
        mac_address: link.mac_address.map(|mac| mac.to_string()),
        master: link.master.clone(),
        addresses: link.addresses.iter().map(ToString::to_string).collect(),
    }
}

fn pool_status(pool: &Pool) -> PoolStatus {
    let directory = pool.directory.as_ref();
    let files = || directory.into_iter().flat_map(|directory| directory.files.values());
    let images = || directory.into_iter().flat_map(|directory| directory.images.values());
    let ours = |file: &&PoolFile| file.mark.is_some() || file.retained.is_some();
    let lvm = pool.lvm.as_ref();
    PoolStatus {
        path: pool.path.clone(),
        volume_group: lvm.map(|lvm| lvm.place.group.to_string()),
        thin_pool: lvm.and_then(|lvm| Some(lvm.place.thin_pool.as_ref()?.to_string())),
        conditions: lvm.and_then(|lvm| lvm.group.as_ref()).map(pool_conditions).unwrap_or_default(),
        present: directory.is_some(),
        capacity_bytes: directory.map_or(0, |directory| directory.capacity_bytes),
        available_bytes: directory.map_or(0, |directory| directory.available_bytes),
        used_bytes: files().chain(images()).filter(ours).map(|file| file.allocated_bytes).sum(),
        volumes: files().filter(|file| file.mark.is_some()).count(),
        images: images().filter(|file| file.mark.is_some()).count(),
    }
}

fn pool_conditions(group: &GroupFacts) -> Vec<PoolCondition> {
    let thin = group.thin.as_ref();
    let found = [
        ("PoolNearlyFull", thin.and_then(ThinFacts::nearly_full)),
        ("PoolFailing", thin.and_then(|thin| thin.failing.clone())),
        ("PoolUnusable", group.unusable.clone()),
    ];
    let condition = |(kind, message): (_, Option<_>)| Some(PoolCondition { kind, message: message? });
    found.into_iter().filter_map(condition).collect()
}

fn volume_status(
    pool: &ObjectName,
    path: PathBuf,
    facts: &PoolFile,
    (used_by, running): (Vec<ObjectId>, bool),
) -> VolumeStatus {
    VolumeStatus {
        pool: pool.clone(),
        path,
        format: facts.header.format,
        capacity_bytes: facts.header.virtual_size_bytes,
        allocated_bytes: facts.allocated_bytes,
        backing: facts.header.backing.clone(),
        used_by,
        running,
        boot_signature: facts.boot.map(|boot| boot.signature),
        reclaim_policy: if facts.reclaim_delete { "Delete" } else { "Retain" },
        unusable: if facts.half_made {
            Some("its making was cut short; apply again".to_owned())
        } else if facts.header.encrypted {
            Some("encrypted".to_owned())
        } else {
            facts.header.unusable.clone()
        },
    }
}
