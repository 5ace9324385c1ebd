//! Volume groups of the simulated host, with the refusals that LVM and the real host have.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::State;
use super::apply::{Done, failed, not_ours};
use crate::host::StepError;
use crate::host::snapshot::{
    BootFacts, DeviceFacts, GroupFacts, ImageHeader, LvmPlace, LvmPool, Pool, PoolDirectory, PoolFile,
    ThinFacts,
};
use crate::host::step::{LogicalContent, LvmStep, NewLogicalVolume, NewLvmPool};
use crate::name::{LvmName, Mark, ObjectName};
use crate::vmm::config::DiskFormat;

pub const EXTENT_BYTES: u64 = 4 << 20;
/// What LVM keeps of a device, and of a thin pool, for itself.
const METADATA_BYTES: u64 = EXTENT_BYTES;

/// A volume group.
#[derive(Clone, Debug, Default)]
pub struct SimGroup {
    pub mark: Option<Mark>,
    pub bytes: u64,
    pub thin_pools: BTreeMap<LvmName, SimThinPool>,
    pub volumes: BTreeMap<String, SimVolume>,
}

#[derive(Clone, Debug)]
pub struct SimThinPool {
    pub mark: Option<Mark>,
    pub bytes: u64,
    pub facts: ThinFacts,
}

#[derive(Clone, Debug)]
pub struct SimVolume {
    pub thin_pool: Option<LvmName>,
    pub file: PoolFile,
}

#[derive(Default)]
pub(super) struct Lvm {
    pub groups: BTreeMap<LvmName, SimGroup>,
    pub devices: BTreeMap<PathBuf, DeviceFacts>,
}

fn round_up(bytes: u64) -> u64 {
    bytes.next_multiple_of(EXTENT_BYTES)
}

impl SimGroup {
    fn free_bytes(&self) -> u64 {
        let linear = self.volumes.values().filter(|volume| volume.thin_pool.is_none());
        let used: u64 = linear.map(|volume| volume.file.size_bytes).sum();
        let thin: u64 = self.thin_pools.values().map(|pool| pool.bytes + METADATA_BYTES).sum();
        self.bytes.saturating_sub(used + thin)
    }
}

/// A logical volume of zeroes.
pub fn logical_file(bytes: u64) -> PoolFile {
    PoolFile {
        mark: None,
        retained: None,
        size_bytes: bytes,
        allocated_bytes: bytes,
        header: ImageHeader {
            format: DiskFormat::Raw,
            virtual_size_bytes: bytes,
            backing: None,
            encrypted: false,
            unusable: None,
        },
        reclaim_delete: false,
        sha256: None,
        boot: Some(BootFacts::BLANK),
        half_made: false,
        inactive: false,
    }
}

fn set_size(file: &mut PoolFile, bytes: u64) {
    file.size_bytes = bytes;
    file.header.virtual_size_bytes = bytes;
}

impl Lvm {
    /// The pool as a look at the host shows it.
    pub fn pool(&self, place: &LvmPlace, registered: Option<Mark>, devices: &[PathBuf]) -> Pool {
        let group = self.groups.get(&place.group);
        let unmade = devices.iter().filter(|_| group.is_none());
        let devices = unmade.filter_map(|path| Some((path.clone(), Ok(self.devices.get(path)?.clone()))));
        let lvm = LvmPool {
            place: place.clone(),
            group: group.map(|group| facts(group, place)),
            devices: devices.collect(),
        };
        let directory = group.and_then(|group| contents(group, place));
        Pool { path: place.directory(), directory, registered, lvm: Some(Box::new(lvm)) }
    }

    pub fn file(&mut self, path: &Path) -> Option<&mut PoolFile> {
        let group = path.strip_prefix("/dev").ok()?.parent()?.to_str()?;
        let volume = self.groups.get_mut(group)?.volumes.get_mut(path.file_name()?.to_str()?)?;
        Some(&mut volume.file)
    }
}

fn facts(group: &SimGroup, place: &LvmPlace) -> GroupFacts {
    let others = group.volumes.iter().filter(|(_, volume)| volume.thin_pool != place.thin_pool);
    let pools = group.thin_pools.keys().filter(|pool| Some(*pool) != place.thin_pool.as_ref());
    let other_names: BTreeSet<String> =
        others.map(|(name, _)| name.clone()).chain(pools.map(ToString::to_string)).collect();
    GroupFacts {
        extent_bytes: EXTENT_BYTES,
        free_bytes: group.free_bytes(),
        other_names,
        unusable: None,
        thin: place.thin_pool.as_ref().and_then(|pool| Some(group.thin_pools.get(pool)?.facts.clone())),
    }
}

fn contents(group: &SimGroup, place: &LvmPlace) -> Option<PoolDirectory> {
    let (mark, capacity_bytes, available_bytes) = match &place.thin_pool {
        None => (group.mark.clone(), group.bytes, group.free_bytes()),
        Some(name) => {
            let pool = group.thin_pools.get(name)?;
            (pool.mark.clone(), pool.bytes, pool.bytes / 10_000 * u64::from(10_000 - pool.facts.data_used))
        }
    };
    let here = group.volumes.iter().filter(|(_, volume)| volume.thin_pool == place.thin_pool);
    let files = here.map(|(name, volume)| (name.clone(), volume.file.clone())).collect();
    Some(PoolDirectory { mark, capacity_bytes, available_bytes, files, images: BTreeMap::new() })
}

impl State {
    pub(super) fn apply_to_lvm(&mut self, step: &LvmStep) -> Done {
        match step {
            LvmStep::CreatePool(new) => self.create_lvm_pool(new),
            LvmStep::ForgetPool { name, place, mark } => self.forget_lvm_pool(name, place, mark),
            LvmStep::Create(new) => self.create_logical(new),
            LvmStep::Grow { place, volume, capacity_bytes, mark } => {
                let free_bytes = self.group(place)?.free_bytes();
                let have = self.marked_logical(place, volume, mark)?;
                let bytes = round_up(*capacity_bytes);
                if bytes < have.size_bytes {
                    return failed(step, "a volume never shrinks");
                }
                if place.thin_pool.is_none() && bytes - have.size_bytes > free_bytes {
                    return failed(step, "the volume group has no room");
                }
                set_size(have, bytes);
                Ok(())
            }
            LvmStep::Activate { place, volume, mark } => {
                self.marked_logical(place, volume, mark)?.inactive = false;
                Ok(())
            }
            LvmStep::SetReclaim { place, volume, mark, delete } => {
                self.marked_logical(place, volume, mark)?.reclaim_delete = *delete;
                Ok(())
            }
            LvmStep::Adopt { place, volume, mark, reclaim_delete } => {
                let Some(have) = self.logical(place, volume)? else {
                    return failed(step, "no such logical volume");
                };
                if have.mark.as_ref().is_some_and(|found| found != mark) {
                    return not_ours(step, "it carries another mark");
                }
                have.mark = Some(mark.clone());
                have.retained = None;
                have.reclaim_delete = *reclaim_delete;
                Ok(())
            }
            LvmStep::Retain { place, volume, mark } => {
                match self.logical(place, volume)? {
                    None => return Ok(()),
                    Some(have) if have.mark.is_none() && have.retained.as_ref() == Some(mark) => {
                        return Ok(());
                    }
                    Some(_) => {}
                }
                let have = self.marked_logical(place, volume, mark)?;
                have.retained = have.mark.take();
                Ok(())
            }
            LvmStep::Remove { place, volume, mark, half_made } => {
                if self.logical(place, volume)?.is_none() {
                    return Ok(());
                }
                if *half_made && !self.marked_logical(place, volume, mark)?.half_made {
                    return failed(step, "it is whole by now");
                }
                self.marked_logical(place, volume, mark)?;
                if self.is_running_on(&place.device(volume.as_str())) {
                    return failed(step, "it is in use");
                }
                self.group(place)?.volumes.remove(volume.as_str());
                Ok(())
            }
        }
    }

    fn is_running_on(&self, path: &Path) -> bool {
        let processes =
            self.world.vms.iter().flatten().filter_map(|(_, vm)| vm.process.as_ref()?.as_ref().ok());
        processes.flat_map(|process| &process.config.disks).any(|disk| Path::new(&disk.path) == path)
    }

    fn group(&mut self, place: &LvmPlace) -> Result<&mut SimGroup, StepError> {
        match self.lvm.groups.get_mut(&place.group) {
            Some(group) => Ok(group),
            None => failed(&place.group, "no such volume group"),
        }
    }

    fn logical(&mut self, place: &LvmPlace, volume: &ObjectName) -> Result<Option<&mut PoolFile>, StepError> {
        match self.group(place)?.volumes.get_mut(volume.as_str()) {
            Some(have) if have.thin_pool != place.thin_pool => failed(volume, "it is outside of the pool"),
            have => Ok(have.map(|volume| &mut volume.file)),
        }
    }

    fn marked_logical(
        &mut self,
        place: &LvmPlace,
        volume: &ObjectName,
        mark: &Mark,
    ) -> Result<&mut PoolFile, StepError> {
        match self.logical(place, volume)? {
            None => failed(volume, "no such logical volume"),
            Some(have) if have.mark.as_ref() != Some(mark) => {
                not_ours(volume, "it carries another mark, or none")
            }
            Some(have) => Ok(have),
        }
    }

    fn create_lvm_pool(&mut self, new: &NewLvmPool) -> Done {
        let place = &new.place;
        if !self.lvm.groups.contains_key(&place.group) {
            if new.devices.is_empty() {
                return failed(&place.group, "no such volume group");
            }
            let mut bytes = 0;
            for path in &new.devices {
                match self.lvm.devices.get_mut(path) {
                    Some(facts) if facts.in_use.is_none() && facts.signatures.is_empty() => {
                        facts.signatures.push("LVM2_member".to_owned());
                        bytes += facts.size_bytes - METADATA_BYTES;
                    }
                    Some(_) => return failed(path.display(), "it is not blank"),
                    None => return failed(path.display(), "no such device"),
                }
            }
            self.lvm.groups.insert(place.group.clone(), SimGroup { bytes, ..SimGroup::default() });
        }
        let group = self.group(place)?;
        let free_bytes = group.free_bytes();
        let mark = match &place.thin_pool {
            None => &mut group.mark,
            Some(name) => {
                if !group.thin_pools.contains_key(name) {
                    let Some(bytes) = new.thin_pool_bytes.map(round_up) else {
                        return failed(name, "no such thin pool");
                    };
                    if group.volumes.contains_key(name.as_str()) || bytes + METADATA_BYTES > free_bytes {
                        return failed(name, "the name is taken, or there is no room");
                    }
                    let facts = ThinFacts { data_used: 0, metadata_used: 0, zeroes: true, failing: None };
                    group.thin_pools.insert(name.clone(), SimThinPool { mark: None, bytes, facts });
                }
                match group.thin_pools.get_mut(name) {
                    Some(pool) => &mut pool.mark,
                    None => return failed(name, "no such thin pool"),
                }
            }
        };
        if mark.as_ref().is_some_and(|found| found.set != new.mark.set) {
            return not_ours(place, "it carries another set's mark");
        }
        *mark = Some(new.mark.clone());
        let here = place.clone();
        self.world.pools.retain(|_, pool| !matches!(pool, Ok(pool) if pool.place().lvm() == Some(&here)));
        let pool = self.lvm.pool(place, Some(new.mark.clone()), &[]);
        self.world.pools.insert(new.name.clone(), Ok(pool));
        Ok(())
    }

    fn forget_lvm_pool(&mut self, name: &ObjectName, place: &LvmPlace, mark: &Mark) -> Done {
        if let Some(Ok(pool)) = self.world.pools.get_mut(name)
            && pool.registered.as_ref() == Some(mark)
        {
            pool.registered = None;
            if let Some(group) = self.lvm.groups.get_mut(&place.group) {
                match &place.thin_pool {
                    None => group.mark = None,
                    Some(thin) => {
                        if let Some(thin) = group.thin_pools.get_mut(thin) {
                            thin.mark = None;
                        }
                    }
                }
            }
        }
        Ok(())
    }

    fn create_logical(&mut self, new: &NewLogicalVolume) -> Done {
        let (place, bytes) = (&new.place, round_up(new.capacity_bytes));
        if let LogicalContent::CopyOf(image) = &new.content
            && !self.directory(&image.pool_path)?.images.contains_key(&image.file)
        {
            return failed(image.path().display(), "no such file");
        }
        if let LogicalContent::SnapshotOf(origin) = &new.content {
            let there = self.logical(place, origin)?.map(|origin| origin.size_bytes);
            if place.thin_pool.is_none() || there.is_none_or(|origin| origin > bytes) {
                return failed(origin, "there is nothing to make a snapshot of, or it is larger");
            }
        }
        match self.logical(place, &new.volume)? {
            Some(have) if have.mark.as_ref() != Some(&new.mark) => {
                return not_ours(&new.volume, "a logical volume of this name exists and is not ours");
            }
            Some(have) if have.half_made => {
                self.group(place)?.volumes.remove(new.volume.as_str());
            }
            Some(have) if have.size_bytes == bytes => return Ok(()),
            Some(_) => return failed(&new.volume, "it exists already, of another size"),
            None => {}
        }
        let group = self.group(place)?;
        match &place.thin_pool {
            None if bytes > group.free_bytes() => return failed(&new.volume, "the volume group has no room"),
            Some(pool) if !group.thin_pools.contains_key(pool) => return failed(pool, "no such thin pool"),
            _ => {}
        }
        let file = PoolFile {
            mark: Some(new.mark.clone()),
            reclaim_delete: new.reclaim_delete,
            boot: (new.content == LogicalContent::Blank).then_some(BootFacts::BLANK),
            ..logical_file(bytes)
        };
        let volume = SimVolume { thin_pool: place.thin_pool.clone(), file };
        group.volumes.insert(new.volume.to_string(), volume);
        Ok(())
    }
}
