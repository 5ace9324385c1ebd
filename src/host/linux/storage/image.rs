//! The image cache of a pool: files named by their digest, verified while they are copied in.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;

use super::copy::{self, Meter};
use super::directory::{self, Entry, Place, PoolDirectory, Temporary};
use super::download::{self, Downloaded};
use super::owner::Marks;
use super::qcow2::Sink;
use super::space::Space;
use super::vmdk::{Vmdk, Window};
use super::{ProgressHook, header, ova, scan, unpack};
use crate::host::error::StepError;
use crate::host::linux::ofd::{self, Lock};
use crate::host::snapshot::ImageHeader;
use crate::host::step::{Compression, Container, ImageFile, ImageOrigin, ImageSource};
use crate::name::{Mark, Sha256};
use crate::vmm::config::DiskFormat;

/// Refuses an image that can't be served as what it is declared to be.
pub fn check_image(header: &ImageHeader, declared: DiskFormat, what: &str) -> Result<(), StepError> {
    let refuse = |why: String, hint: &str| {
        Err(StepError::Failed { what: what.to_owned(), why, hint: Some(hint.to_owned()) })
    };
    match (declared, header.format) {
        (DiskFormat::Qcow2, DiskFormat::Raw) => {
            return refuse(
                "it is declared as qcow2 and has no qcow2 header".to_owned(),
                "declare its format as raw",
            );
        }
        (DiskFormat::Raw, DiskFormat::Qcow2) => {
            return refuse(
                "it is declared as raw and begins with a qcow2 header".to_owned(),
                "declare its format as qcow2",
            );
        }
        (DiskFormat::Raw, DiskFormat::Raw) | (DiskFormat::Qcow2, DiskFormat::Qcow2) => {}
    }
    if header.encrypted {
        return refuse(
            "it is an encrypted qcow2 image".to_owned(),
            "decrypt it with `qemu-img convert`; encrypted images can't be served",
        );
    }
    if let Some(why) = &header.unusable {
        return refuse(why.clone(), "convert it with `qemu-img convert -f qcow2 -O qcow2`");
    }
    if let Some(backing) = &header.backing {
        return refuse(
            format!("it needs the backing file `{}`, which is not declared", backing.display()),
            "flatten it with `qemu-img convert -f qcow2 -O qcow2`",
        );
    }
    Ok(())
}

/// Opens a file outside of pools for reading; links are followed, nothing but a regular file opens.
pub fn open_source(path: &Path, what: &str) -> Result<(File, u64), StepError> {
    let open = || -> Result<Option<(File, u64)>, Errno> {
        if !ofd::is_regular(path)? {
            return Ok(None);
        }
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(CWD, path, flags, Mode::empty())?);
        let stat = rustix::fs::fstat(&file)?;
        let regular = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file();
        Ok(regular.then_some((file, stat.st_size as u64)))
    };
    match open() {
        Ok(Some(opened)) => Ok(opened),
        Ok(None) => Err(StepError::failed(what, format!("{} is not a regular file", path.display()))),
        Err(errno) => Err(StepError::failed(what, format!("open {}: {errno}", path.display()))),
    }
}

/// Opens a cached image that volumes are made from, locked against its removal and checked.
pub fn open_cached<'p>(
    pool: &'p PoolDirectory,
    image: &ImageFile,
    what: &str,
) -> Result<(Entry<'p>, ImageHeader), StepError> {
    let missing =
        || StepError::failed(what, format!("its image {} is not in the cache", image.path().display()));
    let entry = pool.entry(Place::Images, &image.file, false)?.ok_or_else(missing)?;
    directory::take_lock(&entry.file, Lock::Shared, &format!("{what}: read {}", entry.path().display()))?;
    let header =
        header::of_file(&entry.file, entry.bytes()?).map_err(|errno| StepError::failed(what, errno))?;
    check_image(&header, image.format, &format!("{what}: read the image {}", entry.path().display()))?;
    Ok((entry, header))
}

pub fn import(
    image: &ImageFile,
    source: &ImageSource,
    sha256: Sha256,
    mark: &Mark,
    hook: Option<&ProgressHook>,
) -> Result<(), StepError> {
    let what = format!("import {source} into the pool {}", image.pool_path.display());
    let pool = PoolDirectory::open(&image.pool_path)?;
    pool.clean_leftovers().map_err(|errno| StepError::failed(&what, errno))?;
    directory::check_file_name(&image.file)?;
    let marks = Marks { owner: Some(mark.clone()), sha256: Some(sha256.to_string()), ..Marks::default() };
    if adopt_cached(&pool, image, source, &marks, &what)? {
        return Ok(());
    }
    let work = Import { pool: &pool, image, source, sha256, hook, what };
    let (staged, downloaded) = work.stage()?;
    let made = work.extract(staged)?;
    let (what, explain) = (&work.what, |errno: Errno| work.explain(errno.into()));
    match made.commit(Place::Images, &image.file, &marks).map_err(explain)? {
        true => {}
        // Somebody was faster: theirs counts, if it is what ours would have been.
        false => match adopt_cached(&pool, image, source, &marks, what)? {
            true => {}
            false => return Err(StepError::failed(what, "another file came and went under its name")),
        },
    }
    downloaded.into_iter().for_each(Downloaded::remove);
    Ok(())
}

struct Import<'a> {
    pool: &'a PoolDirectory,
    image: &'a ImageFile,
    source: &'a ImageSource,
    sha256: Sha256,
    hook: Option<&'a ProgressHook>,
    what: String,
}

impl<'a> Import<'a> {
    fn temporary(&self) -> Result<Temporary<'a>, StepError> {
        self.pool.temporary(&self.image.file).map_err(|errno| self.explain(errno.into()))
    }

    fn explain(&self, error: io::Error) -> StepError {
        match error.raw_os_error().map(Errno::from_raw_os_error) {
            Some(Errno::STALE) => {
                StepError::failed(&self.what, "the source became shorter while it was copied")
            }
            _ => Space::for_writing(self.pool, 0).explain(&self.what, error),
        }
    }

    /// The source's bytes, decompressed, in a file that nobody else can change; their digest was right.
    fn stage(&self) -> Result<(Temporary<'a>, Option<Downloaded>), StepError> {
        match &self.source.origin {
            ImageOrigin::Path(path) => Ok((self.stage_file(path)?, None)),
            ImageOrigin::Url(url) => {
                let fetched = download::fetch(self.pool, url, self.sha256, &self.what, self.hook)?;
                let temporary = self.temporary()?;
                let mut meter = Meter::new(self.hook, self.image.path(), fetched.bytes);
                match self.source.compression {
                    Some(method) => self.unpack(&fetched.file, method, &temporary.file, &mut meter)?,
                    None => copy::copy(&fetched.file, &temporary.file, fetched.bytes, &mut meter)
                        .map_err(|errno| self.explain(errno.into()))?,
                }
                Ok((temporary, Some(fetched)))
            }
        }
    }

    fn stage_file(&self, path: &Path) -> Result<Temporary<'a>, StepError> {
        let explain = |errno: Errno| self.explain(errno.into());
        let (file, length) = open_source(path, &self.what)?;
        let mut meter = Meter::new(self.hook, self.image.path(), length);
        if let Some(method) = self.source.compression {
            let temporary = self.temporary()?;
            self.unpack(&file, method, &temporary.file, &mut meter)?;
            return Ok(temporary);
        }
        // Before anything is copied: what is no good is refused at once.
        self.check(&file, length)?;
        let stat = rustix::fs::fstat(&file).map_err(explain)?;
        let space = Space::for_writing(self.pool, length.min(stat.st_blocks as u64 * 512));
        let temporary = self.temporary()?;
        let found = match copy::reflink(&file, &temporary.file).map_err(explain)? {
            // What was cloned can't change any more, unlike the source.
            true => {
                let cloned = rustix::fs::fstat(&temporary.file).map_err(explain)?.st_size as u64;
                copy::hash(&temporary.file, cloned, &mut meter).map_err(explain)?
            }
            false => {
                space.check(&self.what)?;
                copy::copy_and_hash(&file, &temporary.file, length, &mut meter).map_err(explain)?
            }
        };
        self.check_digest(found)?;
        Ok(temporary)
    }

    fn unpack(
        &self,
        from: &File,
        method: Compression,
        to: &File,
        meter: &mut Meter<'_>,
    ) -> Result<(), StepError> {
        let unpacked =
            unpack::unpack(from, method, to, meter).map_err(|error| match error.raw_os_error() {
                Some(_) => self.explain(error),
                None => StepError::Failed {
                    what: self.what.clone(),
                    why: format!("it can't be decompressed by {method:?}: {error}"),
                    hint: Some("is it what `compression` says, and whole?".to_owned()),
                },
            })?;
        self.check_digest(unpacked.0)
    }

    fn check_digest(&self, found: Sha256) -> Result<(), StepError> {
        match found == self.sha256 {
            true => Ok(()),
            false => Err(StepError::Failed {
                what: self.what.clone(),
                why: format!("its SHA-256 digest is {found}, and {} is declared", self.sha256),
                hint: Some(
                    "was the source replaced or cut off? Fetch it again, or declare the new digest"
                        .to_owned(),
                ),
            }),
        }
    }

    /// Whether the bytes of an (uncompressed) source are what they are declared to be.
    fn check(&self, file: &File, bytes: u64) -> Result<(), StepError> {
        let refuse = |error: io::Error| StepError::failed(&self.what, error);
        match &self.source.container {
            Container::Plain => {
                let header = header::of_file(file, bytes).map_err(|errno| refuse(errno.into()))?;
                check_image(&header, self.image.format, &self.what)
            }
            Container::Vmdk => Vmdk::open(Window { file, start: 0, bytes }).map(drop).map_err(refuse),
            Container::Ova { disk } => {
                let found = ova::disk(file, bytes, disk.as_deref()).map_err(refuse)?;
                Vmdk::open(found.window).map(drop).map_err(refuse)
            }
        }
    }

    /// The image out of the staged source.
    fn extract(&self, staged: Temporary<'a>) -> Result<Temporary<'a>, StepError> {
        let bytes = staged.file.metadata().map_err(|error| self.explain(error))?.len();
        // The source may have changed between the first look and the copy.
        self.check(&staged.file, bytes)?;
        let made = match &self.source.container {
            Container::Plain => return Ok(staged),
            Container::Vmdk => self.flatten(Window { file: &staged.file, start: 0, bytes }),
            Container::Ova { disk } => ova::disk(&staged.file, bytes, disk.as_deref())
                .map_err(|error| self.explain(error))
                .and_then(|disk| self.flatten(disk.window)),
        }?;
        Ok(made)
    }

    fn flatten(&self, window: Window<'_>) -> Result<Temporary<'a>, StepError> {
        let temporary = self.temporary()?;
        let write = || {
            let disk = Vmdk::open(window)?;
            let capacity_bytes = disk.capacity_bytes();
            let mut meter = Meter::new(self.hook, self.image.path(), capacity_bytes);
            let sink = Sink::create(&temporary.file, DiskFormat::Qcow2, capacity_bytes, false)?;
            disk.each_grain(|bytes, at| {
                copy::each_non_zero(bytes, at, |run, at| sink.write(run, at))?;
                meter.at(at);
                Ok(())
            })?;
            meter.at(capacity_bytes);
            sink.finish()
        };
        write().map_err(|error| self.explain(error))?;
        Ok(temporary)
    }
}

/// Whether the image is in the cache already. One that is nobody's, or of the same set under another
/// name, becomes this owner's once it was read and has the declared digest.
fn adopt_cached(
    pool: &PoolDirectory,
    image: &ImageFile,
    source: &ImageSource,
    marks: &Marks,
    what: &str,
) -> Result<bool, StepError> {
    let Some(mut entry) = pool.entry(Place::Images, &image.file, false)? else { return Ok(false) };
    if let (Some(owner), Some(wanted)) = (&entry.marks.owner, &marks.owner)
        && owner.set != wanted.set
    {
        return Err(directory::not_ours(what.to_owned(), Some(owner), wanted));
    }
    let recorded = entry.marks.sha256 == marks.sha256;
    if !source.is_plain() && !recorded {
        return Err(StepError::NotOurs {
            what: what.to_owned(),
            why: format!(
                "{} is there already, and nothing says what it was made from",
                entry.path().display()
            ),
        });
    }
    // Of an image that was made from its source only the record can tell which source that was.
    if source.is_plain() && (!recorded || entry.marks.owner != marks.owner) {
        let failed = |errno: Errno| StepError::failed(what, errno);
        let length = entry.bytes()?;
        let mut meter = Meter::new(None, entry.path(), length);
        let found = copy::hash(&entry.file, length, &mut meter).map_err(failed)?;
        if Some(found.to_string()) != marks.sha256 {
            return Err(StepError::NotOurs {
                what: what.to_owned(),
                why: format!("{} is there already, with the digest {found}", entry.path().display()),
            });
        }
        let header = header::of_file(&entry.file, length).map_err(failed)?;
        check_image(&header, image.format, what)?;
    }
    if entry.marks != *marks {
        entry.write_marks(marks.clone())?;
    }
    Ok(true)
}

/// The image becomes nobody's; what it was stays recorded.
pub fn retain(image: &ImageFile, mark: &Mark) -> Result<(), StepError> {
    let pool = PoolDirectory::open(&image.pool_path)?;
    let Some(mut entry) = pool.entry(Place::Images, &image.file, false)? else { return Ok(()) };
    if entry.marks.owner.is_none() {
        return Ok(());
    }
    entry.must_be(mark, "retain")?;
    let marks = Marks { owner: None, retained: Some(mark.clone()), ..entry.marks.clone() };
    entry.write_marks(marks)
}

/// Removes a cached image, unless a volume is an overlay on it. If only the trash needs it, it is
/// kept as nobody's until the trash is emptied: what was deleted by mistake must be restorable.
pub fn delete(image: &ImageFile, mark: &Mark, other_pools: &[std::path::PathBuf]) -> Result<(), StepError> {
    let pool = PoolDirectory::open(&image.pool_path)?;
    let path = image.path();
    let what = format!("delete the image {}", path.display());
    pool.clean_leftovers().map_err(|errno| StepError::failed(&what, errno))?;
    let Some(mut entry) = pool.entry(Place::Images, &image.file, true)? else { return Ok(()) };
    if entry.marks.owner.is_some() || entry.marks.retained.as_ref() != Some(mark) {
        entry.must_be(mark, "delete the image")?;
    }
    // The lock also keeps new overlays from being made meanwhile.
    entry.must_be_unused("delete the image")?;
    let mut overlays = overlays_on(&pool, Place::Volumes, &image.file, &entry)?;
    for other in other_pools.iter().filter(|other| **other != image.pool_path) {
        match PoolDirectory::open(other) {
            Ok(other) => overlays.extend(overlays_on(&other, Place::Volumes, &image.file, &entry)?),
            // Gone with all that was in it; any other failure hides what may need the image.
            Err(_) if matches!(directory::open_root(other), Err(Errno::NOENT)) => {}
            Err(error) => {
                return Err(StepError::failed(&what, format!("see whether an overlay needs it: {error}")));
            }
        }
    }
    if let Some(overlay) = overlays.first() {
        return Err(StepError::Failed {
            what,
            why: format!("it is the backing file of {}", overlay.display()),
            hint: Some("delete that volume first".to_owned()),
        });
    }
    if overlays_on(&pool, Place::Trash, &image.file, &entry)?.is_empty() {
        return entry.remove();
    }
    let marks =
        Marks { owner: None, retained: Some(mark.clone()), reclaim_delete: true, ..entry.marks.clone() };
    entry.write_marks(marks)
}

/// The files of a place that name this image as their backing file.
pub fn overlays_on(
    pool: &PoolDirectory,
    place: Place,
    image_file: &str,
    image: &Entry<'_>,
) -> Result<Vec<std::path::PathBuf>, StepError> {
    let what = || format!("look for overlays in {}", pool.path.display());
    let failed = |errno: Errno| StepError::failed(what(), errno);
    let directory = pool.place(place).map_err(failed)?;
    let files = scan::files(&pool.path, &pool.root, &directory, place, pool.store)
        .map_err(|error| StepError::failed(what(), error))?;
    let wanted = rustix::fs::fstat(&image.file).map_err(failed)?;
    let is_it = |backing: &Path, overlay: &Path| {
        // The last component is compared first: only a path that may be ours is looked up.
        backing.file_name().is_some_and(|name| name == image_file)
            && match rustix::fs::stat(overlay.parent().unwrap_or(overlay).join(backing)) {
                Ok(stat) => (stat.st_dev, stat.st_ino) == (wanted.st_dev, wanted.st_ino),
                // It can't be told apart: rather keep the image.
                Err(errno) => errno != Errno::NOENT,
            }
    };
    let overlays = files.into_iter().filter_map(|(name, file)| {
        let path = pool.file_path(place, &name);
        is_it(file.header.backing.as_deref()?, &path).then_some(path)
    });
    Ok(overlays.collect())
}
