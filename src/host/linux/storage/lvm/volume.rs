//! Logical volumes: each change is made only to what carries our mark in a report taken just before.

use std::time::{Duration, Instant};

use super::super::copy::Meter;
use super::super::qcow2::{self, Sink, Source};
use super::super::{ProgressHook, directory, directory::PoolDirectory, image};
use super::command::GROUP_LOCKS;
use super::report::{Group, LogicalVolume, Report};
use super::{Target, change, content, device, tags};
use crate::host::error::StepError;
use crate::host::step::{ImageFile, LogicalContent, NewLogicalVolume};

/// A device that somebody just closed may be held for a moment.
const IN_USE_PATIENCE: Duration = Duration::from_secs(2);
const IN_USE_RETRY: Duration = Duration::from_millis(50);

impl Target<'_> {
    /// `group/volume`, as LVM's commands take it.
    fn full_name(&self) -> String {
        format!("{}/{}", self.place.group, self.volume)
    }

    fn device(&self) -> std::path::PathBuf {
        self.place.device(self.volume.as_str())
    }

    /// The logical volume. `None`: there is none. One outside of the pool is not ours to touch.
    fn find<'g>(&self, group: &'g Group) -> Result<Option<&'g LogicalVolume>, StepError> {
        match group.volumes.get(self.volume.as_str()) {
            Some(volume) if !Group::holds(self.place, volume) => Err(StepError::failed(
                self.what,
                format!("{} is a logical volume outside of the {}", self.full_name(), self.place),
            )),
            volume => Ok(volume),
        }
    }

    fn must_be_ours(&self, volume: &LogicalVolume) -> Result<(), StepError> {
        match volume.tags.owner.as_ref() == Some(self.mark) {
            true => Ok(()),
            false => Err(directory::not_ours(self.what.to_owned(), volume.tags.owner.as_ref(), self.mark)),
        }
    }

    fn missing(&self) -> StepError {
        StepError::failed(self.what, format!("there is no logical volume {}", self.full_name()))
    }

    /// Runs `act` with our logical volume as it is now.
    fn with<T>(
        &self,
        act: impl FnOnce(&Group, &LogicalVolume) -> Result<T, StepError>,
    ) -> Result<T, StepError> {
        let report = Report::for_step(self.what)?;
        let group = report.group(self.place, self.what)?;
        let volume = self.find(group)?.ok_or_else(|| self.missing())?;
        self.must_be_ours(volume)?;
        act(group, volume)
    }

    fn retag(&self, add: &[String], remove: &[String]) -> Result<(), StepError> {
        let full = self.full_name();
        let mut arguments = vec!["lvchange"];
        add.iter().for_each(|tag| arguments.extend(["--addtag", tag]));
        remove.iter().for_each(|tag| arguments.extend(["--deltag", tag]));
        if arguments.len() == 1 {
            return Ok(());
        }
        arguments.push(&full);
        change(self.what, &arguments)
    }

    /// Removes the very volume that was looked at, and only while it carries our mark.
    fn remove(&self, volume: &LogicalVolume) -> Result<(), StepError> {
        let full = self.full_name();
        let select = format!("lv_uuid=\"{}\" && tags=\"{}\"", volume.uuid, tags::owner(self.mark));
        let deadline = Instant::now() + IN_USE_PATIENCE;
        loop {
            match change(self.what, &["lvremove", "--yes", "--select", &select, &full]) {
                Err(StepError::Failed { why, .. }) if why.contains("in use") => {
                    if Instant::now() >= deadline {
                        return Err(StepError::Failed {
                            what: self.what.to_owned(),
                            why,
                            hint: Some("stop or unmount what uses it, then apply again".to_owned()),
                        });
                    }
                    std::thread::sleep(IN_USE_RETRY);
                }
                Err(error) => return Err(error),
                Ok(()) => break,
            }
        }
        // A selection that fits nothing is no error to LVM.
        let report = Report::for_step(self.what)?;
        let left = report.groups.get(self.place.group.as_str()).and_then(|group| {
            group.volumes.get(self.volume.as_str()).filter(|left| left.uuid == volume.uuid)
        });
        match left {
            None => Ok(()),
            Some(left) => Err(directory::not_ours(self.what.to_owned(), left.tags.owner.as_ref(), self.mark)),
        }
    }
}

pub fn create(new: &NewLogicalVolume, hook: Option<&ProgressHook>, what: &str) -> Result<(), StepError> {
    let target = Target { place: &new.place, volume: &new.volume, mark: &new.mark, what };
    let Some(bytes) = GROUP_LOCKS.with(&new.place.group, || begin(new, &target))? else { return Ok(()) };
    let image = match &new.content {
        LogicalContent::CopyOf(image) => Some(image),
        LogicalContent::Blank | LogicalContent::SnapshotOf(_) => None,
    };
    let is_linear = new.place.thin_pool.is_none();
    if is_linear || image.is_some() {
        fill(&target, bytes, is_linear, image, hook)?;
    }
    GROUP_LOCKS.with(&new.place.group, || target.retag(&[], &[tags::MAKING.to_owned()]))
}

/// The volume comes into being, marked as half made; gives its size. `None`: it is there already, and whole.
fn begin(new: &NewLogicalVolume, target: &Target<'_>) -> Result<Option<u64>, StepError> {
    let what = target.what;
    let report = Report::for_step(what)?;
    let group = report.group(target.place, what)?;
    let bytes = group.round_up(new.capacity_bytes);
    if let Some(volume) = target.find(group)? {
        target.must_be_ours(volume)?;
        if !volume.tags.making {
            return match volume.bytes == bytes {
                true => Ok(None),
                false => Err(StepError::failed(
                    what,
                    format!("it exists already with {} bytes, and {bytes} were planned", volume.bytes),
                )),
            };
        }
        target.remove(volume)?;
    }
    let (owner, extents, size) =
        (tags::owner(target.mark), (bytes / group.extent_bytes).to_string(), format!("{bytes}b"));
    let mut tagged = vec!["--addtag", owner.as_str(), "--addtag", tags::MAKING];
    if new.reclaim_delete {
        tagged.extend(["--addtag", tags::RECLAIM_DELETE]);
    }
    let name = target.volume.as_str();
    let mut arguments = vec!["lvcreate", "--yes", "--name", name];
    arguments.extend(tagged);
    let full_origin;
    match (&new.content, &target.place.thin_pool) {
        (LogicalContent::SnapshotOf(origin), Some(_)) => {
            let origin = Target { volume: origin, place: target.place, mark: target.mark, what };
            let Some(facts) = origin.find(group)? else { return Err(origin.missing()) };
            if facts.bytes > bytes {
                let why =
                    format!("its capacity, {bytes} bytes, is less than the {} of its source", facts.bytes);
                return Err(StepError::failed(what, why));
            }
            settle(&origin);
            full_origin = origin.full_name();
            // A snapshot is not activated by itself unless it is told to be.
            arguments.extend(["--snapshot", "--setactivationskip", "n", &full_origin]);
            change(what, &arguments)?;
            if facts.bytes < bytes {
                change(what, &["lvextend", "--extents", &extents, &target.full_name()])?;
            }
        }
        (LogicalContent::SnapshotOf(_), None) => {
            return Err(StepError::failed(what, "a volume outside of a thin pool has no snapshots"));
        }
        (_, Some(pool)) => {
            let full = format!("{}/{pool}", target.place.group);
            arguments.extend(["--virtualsize", &size, "--thinpool", &full]);
            change(what, &arguments)?;
        }
        (_, None) => {
            // All of it is zeroed below, signatures and all.
            arguments.extend(["--wipesignatures", "n", "--zero", "n", "--extents", &extents]);
            arguments.push(target.place.group.as_str());
            change(what, &arguments)?;
        }
    }
    Ok(Some(bytes))
}

/// What the host's page cache still has of the source goes to it first: then its snapshot is what a guest
/// would find after a power cut, and no older. A source without a device has nothing in the cache.
fn settle(origin: &Target<'_>) {
    if let Ok(file) = device::open(&origin.device(), false, false) {
        // Its own writers are told of errors.
        let _ = file.sync_all();
    }
}

/// Thin extents read as zeroes until they are written; linear ones hold what was there before.
fn fill(
    target: &Target<'_>,
    bytes: u64,
    is_linear: bool,
    image: Option<&ImageFile>,
    hook: Option<&ProgressHook>,
) -> Result<(), StepError> {
    let what = target.what;
    let failed = |error: std::io::Error| StepError::failed(what, error);
    let file = device::open(&target.device(), true, true)?;
    let mut meter = Meter::new(hook, target.device(), bytes);
    if is_linear {
        content::zero(&file, 0, bytes, &mut meter).map_err(failed)?;
    }
    if let Some(image) = image {
        let pool = PoolDirectory::open(&image.pool_path)?;
        let (source, header) = image::open_cached(&pool, image, what)?;
        if header.virtual_size_bytes > bytes {
            let why = format!(
                "its capacity, {bytes} bytes, is less than the image's {}",
                header.virtual_size_bytes
            );
            return Err(StepError::failed(what, why));
        }
        let mut meter = Meter::new(hook, target.device(), header.virtual_size_bytes);
        let source_bytes = source.bytes()?;
        let source = Source::open(&source.file, image.format, source_bytes).map_err(failed)?;
        qcow2::convert(&source, &Sink::Raw(&file), &mut meter).map_err(failed)?;
    }
    file.sync_all().map_err(failed)
}

/// First a note of the old size, then the extents, then their zeroes: until the note is gone the volume counts
/// as the old size, and the step is done again.
pub fn grow(target: &Target<'_>, capacity_bytes: u64, hook: Option<&ProgressHook>) -> Result<(), StepError> {
    target.with(|group, volume| {
        let bytes = group.round_up(capacity_bytes);
        if bytes < volume.bytes {
            let why = format!("it has {} bytes, and is never shrunk (to {bytes})", volume.bytes);
            return Err(StepError::failed(target.what, why));
        }
        let is_linear = target.place.thin_pool.is_none();
        let mut from_bytes = volume.tags.growing_from_bytes;
        if bytes > volume.bytes {
            if is_linear && from_bytes.is_none() {
                target.retag(&[tags::growing(volume.bytes)], &[])?;
                from_bytes = Some(volume.bytes);
            }
            let extents = (bytes / group.extent_bytes).to_string();
            change(target.what, &["lvextend", "--extents", &extents, &target.full_name()])?;
        }
        let Some(from_bytes) = from_bytes else { return Ok(()) };
        // A guest may have the volume open: what is zeroed is beyond what it has been told of.
        let failed = |error: std::io::Error| StepError::failed(target.what, error);
        let file = device::open(&target.device(), true, false)?;
        let mut meter = Meter::new(hook, target.device(), bytes);
        content::zero(&file, from_bytes, bytes, &mut meter).map_err(failed)?;
        file.sync_all().map_err(failed)?;
        target.retag(&[], &[tags::growing(from_bytes)])
    })
}

pub fn activate(target: &Target<'_>) -> Result<(), StepError> {
    target.with(|_, volume| match volume.active {
        true => Ok(()),
        false => change(
            target.what,
            &["lvchange", "--activate", "y", "--ignoreactivationskip", &target.full_name()],
        ),
    })
}

pub fn set_reclaim(target: &Target<'_>, delete: bool) -> Result<(), StepError> {
    let tag = [tags::RECLAIM_DELETE.to_owned()];
    target.with(|_, volume| match (volume.tags.reclaim_delete, delete) {
        (false, true) => target.retag(&tag, &[]),
        (true, false) => target.retag(&[], &tag),
        _ => Ok(()),
    })
}

pub fn adopt(target: &Target<'_>, reclaim_delete: bool) -> Result<(), StepError> {
    let report = Report::for_step(target.what)?;
    let volume = target.find(report.group(target.place, target.what)?)?.ok_or_else(|| target.missing())?;
    let (mut add, mut remove) = (Vec::new(), Vec::new());
    match &volume.tags.owner {
        Some(owner) if owner != target.mark => {
            return Err(directory::not_ours(target.what.to_owned(), Some(owner), target.mark));
        }
        Some(_) => {}
        None => add.push(tags::owner(target.mark)),
    }
    remove.extend(volume.tags.retained.as_ref().map(tags::retained));
    match (volume.tags.reclaim_delete, reclaim_delete) {
        (false, true) => add.push(tags::RECLAIM_DELETE.to_owned()),
        (true, false) => remove.push(tags::RECLAIM_DELETE.to_owned()),
        _ => {}
    }
    target.retag(&add, &remove)
}

/// It stays, and is nobody's; whose it was stays known.
pub fn retain(target: &Target<'_>) -> Result<(), StepError> {
    let report = Report::for_step(target.what)?;
    let Some(volume) = target.find(report.group(target.place, target.what)?)? else { return Ok(()) };
    if volume.tags.owner.is_none() && volume.tags.retained.as_ref() == Some(target.mark) {
        return Ok(());
    }
    target.must_be_ours(volume)?;
    target.retag(&[tags::retained(target.mark)], &[tags::owner(target.mark)])
}

pub fn remove(target: &Target<'_>, half_made: bool) -> Result<(), StepError> {
    let report = Report::for_step(target.what)?;
    let Some(volume) = target.find(report.group(target.place, target.what)?)? else { return Ok(()) };
    target.must_be_ours(volume)?;
    if half_made && !volume.tags.making {
        return Err(StepError::failed(target.what, "it is whole by now"));
    }
    target.remove(volume)
}
