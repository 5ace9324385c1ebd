//! Volumes: made whole under a temporary name, changed only with our mark and while unused.

use std::fs::File;
use std::path::Path;

use super::copy::{self, Meter};
use super::directory::{self, Place, PoolDirectory};
use super::owner::Marks;
use super::qcow2::{self, Sink, Source};
use super::resize::{self, ResizeError};
use super::space::{self, Space};
use super::{ProgressHook, header, image};
use crate::host::error::StepError;
use crate::host::snapshot::ImageHeader;
use crate::host::step::{ImageFile, NewVolume, NewVolumeContent};
use crate::name::Mark;
use crate::vmm::config::DiskFormat;

const SECTOR_BYTES: u64 = 512;

pub fn create(new: &NewVolume, hook: Option<&ProgressHook>) -> Result<(), StepError> {
    let what = format!("create {}", new.pool_path.join(&new.file).display());
    directory::check_file_name(&new.file)?;
    check_capacity(new.capacity_bytes, &what)?;
    let pool = PoolDirectory::open(&new.pool_path)?;
    pool.clean_leftovers().map_err(|errno| StepError::failed(&what, errno))?;
    if is_there(&pool, new, &what)? {
        return Ok(());
    }
    match &new.content {
        NewVolumeContent::Blank => create_blank(&pool, new, &what),
        NewVolumeContent::CopyOf(image) => create_copy(&pool, new, image, hook, &what),
        NewVolumeContent::OverlayOn(image) => create_overlay(&pool, new, image, &what),
    }
}

fn create_blank(pool: &PoolDirectory, new: &NewVolume, what: &str) -> Result<(), StepError> {
    let space = Space::for_writing(pool, if new.preallocate { new.capacity_bytes } else { 0 });
    space.check(what)?;
    let temporary = pool.temporary(&new.file).map_err(|errno| space.explain(what, errno))?;
    let made = match new.format {
        DiskFormat::Raw => blank_raw(&temporary.file, new),
        DiskFormat::Qcow2 => qcow2::create(&temporary.file, new.capacity_bytes, new.preallocate),
    };
    made.map_err(|error| space.explain(what, error))?;
    finish(pool, temporary, new, what, &space)
}

fn finish(
    pool: &PoolDirectory,
    temporary: directory::Temporary<'_>,
    new: &NewVolume,
    what: &str,
    space: &Space,
) -> Result<(), StepError> {
    let marks =
        Marks { owner: Some(new.mark.clone()), reclaim_delete: new.reclaim_delete, ..Marks::default() };
    match temporary.commit(Place::Volumes, &new.file, &marks) {
        Ok(true) => Ok(()),
        Ok(false) => match is_there(pool, new, what)? {
            true => Ok(()),
            false => Err(StepError::failed(what, "another file came and went under its name")),
        },
        Err(errno) => Err(space.explain(what, errno)),
    }
}

fn check_capacity(capacity_bytes: u64, what: &str) -> Result<(), StepError> {
    match capacity_bytes {
        0 => Err(StepError::failed(what, "its capacity is 0")),
        bytes if bytes % SECTOR_BYTES != 0 => Err(StepError::failed(
            what,
            format!("its capacity, {bytes} bytes, is not a multiple of {SECTOR_BYTES}"),
        )),
        bytes if bytes > i64::MAX as u64 => Err(StepError::failed(
            what,
            format!("its capacity, {bytes} bytes, is beyond what Linux can address"),
        )),
        _ => Ok(()),
    }
}

/// Whether the volume exists as it should be made: then an earlier run has done the work.
fn is_there(pool: &PoolDirectory, new: &NewVolume, what: &str) -> Result<bool, StepError> {
    let Some(entry) = pool.entry(Place::Volumes, &new.file, false)? else { return Ok(false) };
    if entry.marks.owner.as_ref() != Some(&new.mark) {
        return Err(directory::not_ours(
            format!("{what}: the file exists"),
            entry.marks.owner.as_ref(),
            &new.mark,
        ));
    }
    let (format, capacity_bytes) = declared_size(&entry.file, entry.bytes()?, new.format, what)?;
    match (format, capacity_bytes) == (new.format, new.capacity_bytes) {
        true => Ok(true),
        false => Err(StepError::failed(
            what,
            format!(
                "it exists already as {format:?} of {capacity_bytes} bytes, and {:?} of {} bytes was planned",
                new.format, new.capacity_bytes
            ),
        )),
    }
}

/// Format and size of a volume. A raw one is never judged by its content, which is its guest's.
fn declared_size(
    file: &File,
    file_bytes: u64,
    declared: DiskFormat,
    what: &str,
) -> Result<(DiskFormat, u64), StepError> {
    match declared {
        DiskFormat::Raw => Ok((DiskFormat::Raw, file_bytes)),
        DiskFormat::Qcow2 => {
            let header = header::of_file(file, file_bytes).map_err(|errno| StepError::failed(what, errno))?;
            Ok((header.format, header.virtual_size_bytes))
        }
    }
}

fn blank_raw(file: &File, new: &NewVolume) -> std::io::Result<()> {
    file.set_len(new.capacity_bytes)?;
    if new.preallocate {
        copy::allocate(file, 0, new.capacity_bytes)?;
    }
    Ok(())
}

fn check_fits(header: &ImageHeader, new: &NewVolume, what: &str) -> Result<(), StepError> {
    match header.virtual_size_bytes > new.capacity_bytes {
        false => Ok(()),
        true => Err(StepError::Failed {
            what: what.to_owned(),
            why: format!(
                "its capacity, {} bytes, is less than the image's {} bytes",
                new.capacity_bytes, header.virtual_size_bytes
            ),
            hint: Some(format!("declare a capacity of at least {}", space::human(header.virtual_size_bytes))),
        }),
    }
}

fn create_copy(
    pool: &PoolDirectory,
    new: &NewVolume,
    image: &ImageFile,
    hook: Option<&ProgressHook>,
    what: &str,
) -> Result<(), StepError> {
    let image_pool = PoolDirectory::open(&image.pool_path)?;
    let (source, source_header) = image::open_cached(&image_pool, image, what)?;
    check_fits(&source_header, new, what)?;
    let source_bytes = source.bytes()?;
    let stat = rustix::fs::fstat(&source.file).map_err(|errno| StepError::failed(what, errno))?;
    let needed =
        if new.preallocate { new.capacity_bytes } else { source_bytes.min(stat.st_blocks as u64 * 512) };
    let space = Space::for_writing(pool, needed);
    if new.preallocate {
        space.check(what)?;
    }
    let temporary = pool.temporary(&new.file).map_err(|errno| space.explain(what, errno))?;
    let to = &temporary.file;
    let mut meter =
        Meter::new(hook, pool.file_path(Place::Volumes, &new.file), source_header.virtual_size_bytes);
    // A qcow2 file's clusters can't be reserved afterwards: then its content is copied instead.
    let whole_file = image.format == new.format && !(new.preallocate && new.format == DiskFormat::Qcow2);
    let made = if whole_file {
        copy_file(&source.file, source_bytes, to, new, &mut meter)
    } else {
        Source::open(&source.file, image.format, source_bytes).and_then(|source| {
            let sink = Sink::create(to, new.format, new.capacity_bytes, new.preallocate)?;
            qcow2::convert(&source, &sink, &mut meter)
        })
    };
    made.map_err(|error| space.explain(what, error))?;
    finish(pool, temporary, new, what, &space)
}

fn copy_file(
    from: &File,
    bytes: u64,
    to: &File,
    new: &NewVolume,
    meter: &mut Meter<'_>,
) -> std::io::Result<()> {
    copy::copy(from, to, bytes, meter)?;
    match new.format {
        DiskFormat::Raw => {
            to.set_len(new.capacity_bytes)?;
            if new.preallocate {
                copy::allocate(to, bytes, new.capacity_bytes)?;
            }
            Ok(())
        }
        DiskFormat::Qcow2 => qcow2::grow_unseen(to, new.capacity_bytes),
    }
}

fn create_overlay(
    pool: &PoolDirectory,
    new: &NewVolume,
    image: &ImageFile,
    what: &str,
) -> Result<(), StepError> {
    if new.format != DiskFormat::Qcow2 {
        return Err(StepError::failed(what, "an overlay must be a qcow2 volume"));
    }
    if new.preallocate {
        return Err(StepError::failed(what, "an overlay can't be preallocated"));
    }
    let image_pool = PoolDirectory::open(&image.pool_path)?;
    // Kept open until the overlay is in place: its lock keeps the image from being removed.
    let (_source, source_header) = image::open_cached(&image_pool, image, what)?;
    check_fits(&source_header, new, what)?;
    let path = image.path();
    let backing = path.to_str().filter(|path| path.len() <= 1023 && !path.chars().any(char::is_control));
    let Some(backing) = backing else {
        let why = "its image's path can't be written into a qcow2 header (at most 1023 bytes of UTF-8)";
        return Err(StepError::failed(what, why));
    };
    let space = Space::for_writing(pool, 0);
    let temporary = pool.temporary(&new.file).map_err(|errno| space.explain(what, errno))?;
    qcow2::create_overlay(&temporary.file, new.capacity_bytes, backing, image.format)
        .map_err(|error| space.explain(what, error))?;
    finish(pool, temporary, new, what, &space)
}

/// Which volume a step speaks of.
pub struct Target<'a> {
    pub pool_path: &'a Path,
    pub file: &'a str,
    pub mark: &'a Mark,
}

impl Target<'_> {
    pub fn pool(&self, what: &str) -> Result<PoolDirectory, StepError> {
        directory::check_file_name(self.file)?;
        let pool = PoolDirectory::open(self.pool_path)?;
        pool.clean_leftovers().map_err(|errno| StepError::failed(what, errno))?;
        Ok(pool)
    }

    fn missing(&self, doing: &str) -> StepError {
        StepError::failed(
            format!("{doing} {}", self.pool_path.join(self.file).display()),
            "there is no such file",
        )
    }
}

/// Grows in place, with the exclusive lock held. A crash leaves the old or the new size.
pub fn grow(target: &Target<'_>, format: DiskFormat, capacity_bytes: u64) -> Result<(), StepError> {
    let what = format!("grow {}", target.pool_path.join(target.file).display());
    check_capacity(capacity_bytes, &what)?;
    let pool = target.pool(&what)?;
    let entry = pool.entry(Place::Volumes, target.file, true)?.ok_or_else(|| target.missing("grow"))?;
    entry.must_be(target.mark, "grow")?;
    entry.must_be_unused("grow")?;
    let file_bytes = entry.bytes()?;
    let (found, old_bytes) = declared_size(&entry.file, file_bytes, format, &what)?;
    if found != format {
        return Err(StepError::failed(&what, "it is declared as qcow2 and has no qcow2 header"));
    }
    if capacity_bytes < old_bytes {
        let why = format!("it has {old_bytes} bytes, and is never shrunk (to {capacity_bytes})");
        return Err(StepError::failed(&what, why));
    }
    if capacity_bytes == old_bytes {
        return Ok(());
    }
    let space = Space::for_writing(&pool, 0);
    match format {
        DiskFormat::Raw => entry.file.set_len(capacity_bytes).and_then(|()| entry.file.sync_all()),
        DiskFormat::Qcow2 => {
            let header =
                header::of_file(&entry.file, file_bytes).map_err(|errno| StepError::failed(&what, errno))?;
            check_uncovers_nothing(&header, &entry.path(), &what)?;
            image::check_image(&ImageHeader { backing: None, ..header }, format, &what)?;
            match resize::grow_in_place(&entry.file, capacity_bytes) {
                Err(ResizeError::Io(error)) => Err(error),
                Err(error) => return Err(needs_qemu_img(&what, error.to_string())),
                Ok(()) => Ok(()),
            }
        }
    }
    .map_err(|error| space.explain(&what, error))
}

fn needs_qemu_img(what: &str, why: String) -> StepError {
    StepError::Failed {
        what: what.to_owned(),
        why,
        hint: Some("stop what uses it and grow it with `qemu-img resize -f qcow2`".to_owned()),
    }
}

/// An overlay that is smaller than its backing file would show that file's data in what is new.
/// Ours never are; an adopted one may be.
fn check_uncovers_nothing(header: &ImageHeader, overlay: &Path, what: &str) -> Result<(), StepError> {
    let Some(backing) = &header.backing else { return Ok(()) };
    let path = overlay.parent().unwrap_or(overlay).join(backing);
    let (file, bytes) = image::open_source(&path, what)?;
    let backing = header::of_file(&file, bytes).map_err(|errno| StepError::failed(what, errno))?;
    // Its format isn't known here, so the larger of what both would mean.
    match backing.virtual_size_bytes.max(bytes) > header.virtual_size_bytes {
        true => Err(needs_qemu_img(what, format!("its backing file {} is larger than it", path.display()))),
        false => Ok(()),
    }
}

pub fn set_reclaim(target: &Target<'_>, delete: bool) -> Result<(), StepError> {
    let pool = target.pool("record the reclaim policy")?;
    let entry = pool.entry(Place::Volumes, target.file, false)?;
    let mut entry = entry.ok_or_else(|| target.missing("record the reclaim policy of"))?;
    entry.must_be(target.mark, "record the reclaim policy of")?;
    if entry.marks.reclaim_delete == delete {
        return Ok(());
    }
    entry.write_marks(Marks { reclaim_delete: delete, ..entry.marks.clone() })
}

pub fn adopt(target: &Target<'_>, reclaim_delete: bool) -> Result<(), StepError> {
    let pool = target.pool("adopt")?;
    let entry = pool.entry(Place::Volumes, target.file, false)?;
    let mut entry = entry.ok_or_else(|| target.missing("adopt"))?;
    if entry.marks.owner.is_some() {
        entry.must_be(target.mark, "adopt")?;
    }
    let marks = Marks {
        owner: Some(target.mark.clone()),
        retained: None,
        reclaim_delete,
        trashed_unix_seconds: None,
        sha256: entry.marks.sha256.clone(),
    };
    match entry.marks == marks {
        true => Ok(()),
        false => entry.write_marks(marks),
    }
}

pub fn retain(target: &Target<'_>) -> Result<(), StepError> {
    let pool = target.pool("retain")?;
    let Some(mut entry) = pool.entry(Place::Volumes, target.file, false)? else { return Ok(()) };
    if entry.marks.owner.is_none() && entry.marks.retained.as_ref() == Some(target.mark) {
        return Ok(());
    }
    entry.must_be(target.mark, "retain")?;
    let marks = Marks { owner: None, retained: Some(target.mark.clone()), ..entry.marks.clone() };
    entry.write_marks(marks)
}
