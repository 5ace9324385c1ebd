//! Volume groups as pools and logical volumes as volumes, by LVM's own commands.
//!
//! What is seen comes from one report; what is done is checked against a fresh one first, under the group's
//! lock, so that nothing without our tag is ever changed. A logical volume is tagged in the same commit of
//! the metadata in which it comes into being, as ours and as half made, and loses the second tag when its
//! content is whole: whatever kills us, the next look tells what there is.

mod command;
mod content;
mod device;
mod report;
mod tags;
mod volume;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use self::command::{CommandError, GROUP_LOCKS};
pub use self::device::{open_disk, open_still};
pub use self::report::Report;
use self::report::{Group, LogicalVolume, Shape};
use super::index::{self, IndexEntry};
use super::{ProgressHook, boot, directory};
use crate::host::error::StepError;
use crate::host::snapshot::{
    DeviceFacts, ImageHeader, LvmPlace, LvmPool, Observed, Pool, PoolDirectory, PoolFile, PoolPlace,
};
use crate::host::step::{LvmStep, NewLvmPool};
use crate::name::{Mark, ObjectName};
use crate::vmm::config::DiskFormat;

/// The signature of a physical volume.
const PHYSICAL_VOLUME: &str = "LVM2_member";

/// A pool as the report shows it. The devices are looked at only while the group is missing.
pub fn pool(report: &Report, place: &LvmPlace, registered: Option<Mark>, devices: &[PathBuf]) -> Pool {
    let group = report.groups.get(place.group.as_str());
    let unmade = devices.iter().filter(|_| group.is_none());
    let devices = unmade.filter_map(|path| {
        let facts = look(report, path, registered.is_some())?;
        Some((path.clone(), facts))
    });
    let lvm = LvmPool {
        place: place.clone(),
        devices: devices.collect(),
        group: group.map(|group| group.facts(place)),
    };
    let directory = group.and_then(|group| contents(group, place));
    Pool { path: place.directory(), directory, registered, lvm: Some(Box::new(lvm)) }
}

/// What is on a device. A physical volume in no group, while we were making this very group (the pool is
/// registered before), is what a killed `vgcreate` of ours left: it holds nothing.
fn look(report: &Report, path: &Path, registered: bool) -> Option<Observed<DeviceFacts>> {
    let mut facts = device::look(path)?;
    let is_orphan = || {
        let real = std::fs::canonicalize(path).ok();
        report.orphans.iter().any(|orphan| real.is_some() && std::fs::canonicalize(orphan).ok() == real)
    };
    if let Ok(facts) = &mut facts
        && registered
        && facts.signatures == [PHYSICAL_VOLUME]
        && is_orphan()
    {
        facts.signatures.clear();
    }
    Some(facts)
}

fn contents(group: &Group, place: &LvmPlace) -> Option<PoolDirectory> {
    let (mark, capacity_bytes, available_bytes) = match &place.thin_pool {
        None => (group.tags.owner.clone(), group.bytes, group.free_bytes),
        Some(_) => {
            let pool = group.thin_pool(place)?;
            let free = pool.bytes / 10_000 * u64::from(10_000 - pool.data_used);
            // One that is not set up yet is taken up again, as one to be adopted.
            (pool.tags.owner.clone().filter(|_| !pool.tags.making), pool.bytes, free)
        }
    };
    let here = group.volumes.iter().filter(|(_, volume)| Group::holds(place, volume));
    let files = here.map(|(name, volume)| (name.clone(), file(volume, &place.device(name)))).collect();
    Some(PoolDirectory { mark, capacity_bytes, available_bytes, files, images: BTreeMap::new() })
}

fn file(volume: &LogicalVolume, device: &Path) -> PoolFile {
    // What was added and isn't zeroed yet is not there yet.
    let size_bytes = volume.tags.growing_from_bytes.unwrap_or(volume.bytes).min(volume.bytes);
    let allocated_bytes = match volume.shape {
        Shape::Thin { .. } => volume.bytes / 10_000 * u64::from(volume.data_used),
        _ => volume.bytes,
    };
    // Ours alone: what others keep is not looked into.
    let looked_into = volume.active && volume.tags.owner.is_some() && volume.failing.is_none();
    let opened = looked_into.then(|| device::open(device, false, false).ok()).flatten();
    PoolFile {
        boot: opened.and_then(|file| boot::of_raw(&file).ok()),
        mark: volume.tags.owner.clone(),
        retained: volume.tags.retained.clone(),
        size_bytes,
        allocated_bytes,
        header: ImageHeader {
            format: DiskFormat::Raw,
            virtual_size_bytes: size_bytes,
            backing: None,
            encrypted: false,
            unusable: volume.failing.clone().map(|why| format!("it is {why}")),
        },
        reclaim_delete: volume.tags.reclaim_delete,
        sha256: None,
        half_made: volume.tags.making,
        inactive: !volume.active,
    }
}

pub fn run(step: &LvmStep, state_dir: &Path, hook: Option<&ProgressHook>) -> Result<(), StepError> {
    let what = step.to_string();
    match step {
        LvmStep::CreatePool(new) => {
            // Registered first: what a crash leaves half-made is then known of.
            let place = PoolPlace::Lvm(new.place.clone());
            check_mark(new, &what)?;
            index::register(state_dir, &new.name, &IndexEntry::new(&place, &new.mark))?;
            GROUP_LOCKS.with(&new.place.group, || create_pool(new, &what))
        }
        LvmStep::ForgetPool { name, place, mark } => {
            GROUP_LOCKS.with(&place.group, || forget_pool(place, mark, &what))?;
            index::forget(state_dir, name, mark)
        }
        LvmStep::Create(new) => volume::create(new, hook, &what),
        LvmStep::Grow { place, volume, capacity_bytes, mark } => {
            let target = Target { place, volume, mark, what: &what };
            GROUP_LOCKS.with(&place.group, || volume::grow(&target, *capacity_bytes, hook))
        }
        LvmStep::Activate { place, volume, mark } => {
            let target = Target { place, volume, mark, what: &what };
            GROUP_LOCKS.with(&place.group, || volume::activate(&target))
        }
        LvmStep::SetReclaim { place, volume, mark, delete } => {
            let target = Target { place, volume, mark, what: &what };
            GROUP_LOCKS.with(&place.group, || volume::set_reclaim(&target, *delete))
        }
        LvmStep::Adopt { place, volume, mark, reclaim_delete } => {
            let target = Target { place, volume, mark, what: &what };
            GROUP_LOCKS.with(&place.group, || volume::adopt(&target, *reclaim_delete))
        }
        LvmStep::Retain { place, volume, mark } => {
            let target = Target { place, volume, mark, what: &what };
            GROUP_LOCKS.with(&place.group, || volume::retain(&target))
        }
        LvmStep::Remove { place, volume, mark, half_made } => {
            let target = Target { place, volume, mark, what: &what };
            GROUP_LOCKS.with(&place.group, || volume::remove(&target, *half_made))
        }
    }
}

/// Which logical volume a step speaks of.
struct Target<'a> {
    place: &'a LvmPlace,
    volume: &'a ObjectName,
    mark: &'a Mark,
    what: &'a str,
}

/// Runs a command that changes something.
fn change(what: &str, arguments: &[&str]) -> Result<(), StepError> {
    let failed = |error: CommandError| StepError::Failed {
        what: what.to_owned(),
        why: error.why("lvm"),
        hint: error.hint(),
    };
    command::lvm(arguments).map(drop).map_err(failed)
}

/// Before anything is registered: another set's pool is not ours to have.
fn check_mark(new: &NewLvmPool, what: &str) -> Result<(), StepError> {
    let report = Report::for_step(what)?;
    let Some(group) = report.groups.get(new.place.group.as_str()) else { return Ok(()) };
    match pool_mark(group, &new.place).filter(|found| found.set != new.mark.set) {
        Some(found) => Err(directory::not_ours(what.to_owned(), Some(found), &new.mark)),
        None => Ok(()),
    }
}

fn pool_mark<'a>(group: &'a Group, place: &LvmPlace) -> Option<&'a Mark> {
    match &place.thin_pool {
        None => group.tags.owner.as_ref(),
        Some(_) => group.thin_pool(place)?.tags.owner.as_ref(),
    }
}

fn create_pool(new: &NewLvmPool, what: &str) -> Result<(), StepError> {
    let place = &new.place;
    let mut report = Report::for_step(what)?;
    if !report.groups.contains_key(place.group.as_str()) {
        create_group(new, &report, what)?;
        report = Report::for_step(what)?;
    }
    let mut group = report.group(place, what)?;
    if let Some(name) = &place.thin_pool
        && group.thin_pool(place).is_none()
    {
        if group.volumes.contains_key(name.as_str()) {
            let why = format!("{}/{name} is a logical volume, not a thin pool", place.group);
            return Err(StepError::failed(what, why));
        }
        create_thin_pool(new, group, name.as_str(), what)?;
        report = Report::for_step(what)?;
        group = report.group(place, what)?;
    }
    let Some(name) = &place.thin_pool else {
        return mark_pool(&["vgchange"], place.group.as_str(), &group.tags, &new.mark, what);
    };
    let full = format!("{}/{name}", place.group);
    match group.thin_pool(place) {
        None => Err(StepError::failed(what, format!("there is no thin pool {full}"))),
        Some(pool) => {
            // Asked for what is so already, LVM fails.
            if pool.tags.making && !pool.errors_when_full {
                // A pool of ours: what finds no room is told so at once and can wait for it.
                change(what, &["lvchange", "--errorwhenfull", "y", &full])?;
            }
            mark_pool(&["lvchange"], &full, &pool.tags, &new.mark, what)
        }
    }
}

/// In one commit: the mark comes, what was in its place goes.
fn mark_pool(
    command: &[&str],
    name: &str,
    found: &tags::Tags,
    mark: &Mark,
    what: &str,
) -> Result<(), StepError> {
    match &found.owner {
        Some(owner) if owner == mark && !found.making => return Ok(()),
        Some(owner) if owner.set != mark.set => {
            return Err(directory::not_ours(what.to_owned(), Some(owner), mark));
        }
        _ => {}
    }
    let new = tags::owner(mark);
    let old = found.owner.as_ref().filter(|owner| *owner != mark).map(tags::owner);
    let mut arguments = command.to_vec();
    arguments.extend(["--addtag", &new]);
    if let Some(old) = &old {
        arguments.extend(["--deltag", old]);
    }
    if found.making {
        arguments.extend(["--deltag", tags::MAKING]);
    }
    arguments.push(name);
    change(what, &arguments)
}

/// On devices that are looked at again here. LVM asks before it wipes a signature and takes silence for a no,
/// so that even one which comes up in between is safe.
fn create_group(new: &NewLvmPool, report: &Report, what: &str) -> Result<(), StepError> {
    if new.devices.is_empty() {
        return Err(StepError::failed(what, format!("there is no volume group {}", new.place.group)));
    }
    let mut arguments = vec!["vgcreate", new.place.group.as_str()];
    for path in &new.devices {
        let refuse = |why: String| {
            Err(StepError::Failed {
                what: what.to_owned(),
                why: format!("{}: {why}", path.display()),
                hint: Some("declare another device, or empty this one yourself".to_owned()),
            })
        };
        match look(report, path, true) {
            None => return refuse("there is no such device".to_owned()),
            Some(Err(error)) => return refuse(error.to_string()),
            Some(Ok(DeviceFacts { in_use: Some(user), .. })) => {
                return refuse(format!("it is in use: {user}"));
            }
            Some(Ok(facts)) if !facts.signatures.is_empty() => {
                return refuse(format!("it carries the signature of {}", facts.signatures.join(", ")));
            }
            Some(Ok(_)) => {}
        }
        match path.to_str() {
            Some(path) => arguments.push(path),
            None => return refuse("its path is not UTF-8".to_owned()),
        }
    }
    change(what, &arguments)
}

fn create_thin_pool(new: &NewLvmPool, group: &Group, name: &str, what: &str) -> Result<(), StepError> {
    let Some(bytes) = new.thin_pool_bytes else {
        return Err(StepError::failed(what, format!("there is no thin pool {}/{name}", new.place.group)));
    };
    let extents = (group.round_up(bytes) / group.extent_bytes).to_string();
    change(
        what,
        &[
            "lvcreate",
            "--yes",
            "--type",
            "thin-pool",
            "--name",
            name,
            "--extents",
            &extents,
            "--zero",
            "y",
            "--addtag",
            tags::MAKING,
            new.place.group.as_str(),
        ],
    )
}

fn forget_pool(place: &LvmPlace, mark: &Mark, what: &str) -> Result<(), StepError> {
    let report = Report::for_step(what)?;
    let Some(group) = report.groups.get(place.group.as_str()) else { return Ok(()) };
    let tag = tags::owner(mark);
    match (pool_mark(group, place), &place.thin_pool) {
        (None, _) => Ok(()),
        (Some(found), _) if found != mark => Err(directory::not_ours(what.to_owned(), Some(found), mark)),
        (Some(_), None) => change(what, &["vgchange", "--deltag", &tag, place.group.as_str()]),
        (Some(_), Some(name)) => {
            change(what, &["lvchange", "--deltag", &tag, &format!("{}/{name}", place.group)])
        }
    }
}
