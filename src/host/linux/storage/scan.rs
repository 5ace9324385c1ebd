//! Looking at pools and files: one pass over each directory, nothing followed, nothing changed.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::directory::{self, PRIVATE, Place};
use super::owner::{self, MarkStore, Marks};
use super::vmdk::{self, Vmdk, Window};
use super::{boot, copy, header, ova};
use crate::host::error::ObserveError;
use crate::host::linux::ofd;
use crate::host::snapshot::{
    DiskFacts, FileFacts, FileKind, Observed, Pool, PoolDirectory as DirectoryFacts, PoolFile,
};
use crate::name::Mark;

/// Below this many files another thread costs more than it brings.
const FILES_PER_THREAD_MIN: usize = 256;
const THREADS_MAX: usize = 8;

/// A pool, whether or not its directory is there.
pub fn pool(path: &Path, registered: Option<Mark>) -> Observed<Pool> {
    let directory = match directory::open_root(path) {
        Ok(root) => Some(facts(path, &root)?),
        Err(Errno::NOENT) => None,
        Err(errno) => {
            let what = format!("look at the pool {}", path.display());
            return Err(ObserveError::new(what, directory::pool_errno(errno)));
        }
    };
    Ok(Pool { path: path.to_owned(), directory, registered, lvm: None })
}

fn facts(path: &Path, root: &OwnedFd) -> Observed<DirectoryFacts> {
    let failed = |errno| ObserveError::new(format!("look at the pool {}", path.display()), errno);
    let store = MarkStore::of(root).map_err(failed)?;
    let space = rustix::fs::fstatvfs(root).map_err(failed)?;
    let images =
        directory::open_below(root, PRIVATE).and_then(|private| directory::open_below(private, "images"));
    let images = match images {
        Ok(images) => files(path, root, &images, Place::Images, store)?,
        Err(Errno::NOENT) => BTreeMap::new(),
        Err(errno) => return Err(failed(errno)),
    };
    Ok(DirectoryFacts {
        mark: directory::pool_mark(root, store).map_err(failed)?,
        capacity_bytes: space.f_blocks.saturating_mul(space.f_frsize),
        available_bytes: space.f_bavail.saturating_mul(space.f_frsize),
        files: files(path, root, root, Place::Volumes, store)?,
        images,
    })
}

/// The regular files of a place. One that can't be read fails the whole: left out, it would look
/// absent.
pub fn files(
    pool_path: &Path,
    root: &OwnedFd,
    place_directory: &OwnedFd,
    place: Place,
    store: MarkStore,
) -> Observed<BTreeMap<String, PoolFile>> {
    let failed =
        |name: &str, errno| ObserveError::new(format!("look at {}", pool_path.join(name).display()), errno);
    let mut names = directory::regular_names(place_directory).map_err(|errno| failed("", errno))?;
    names.sort_unstable();
    let sidecars = match store {
        MarkStore::Xattr => None,
        MarkStore::Sidecar => directory::sidecars_of(root, place).map_err(|errno| failed(PRIVATE, errno))?,
    };
    let look = |names: &[String]| -> Observed<Vec<(String, PoolFile)>> {
        let mut found = Vec::with_capacity(names.len());
        for name in names {
            match file(place_directory, name, store, sidecars.as_ref()) {
                Ok(Some(facts)) => found.push((name.clone(), facts)),
                Ok(None) => {}
                Err(errno) => return Err(failed(name, errno)),
            }
        }
        Ok(found)
    };

    let processors = std::thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX);
    let threads = processors.min(names.len() / FILES_PER_THREAD_MIN).max(1);
    let mut all = Vec::with_capacity(names.len());
    if threads == 1 {
        all = look(&names)?;
    } else {
        std::thread::scope(|scope| {
            let parts: Vec<_> = names
                .chunks(names.len().div_ceil(threads))
                .map(|part| scope.spawn(move || look(part)))
                .collect();
            for part in parts {
                match part.join() {
                    Ok(found) => all.extend(found?),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            Ok::<_, ObserveError>(())
        })?;
    }
    Ok(all.into_iter().collect())
}

/// One file. `None`: it went away, or it isn't a regular file (any more).
fn file(
    directory: &OwnedFd,
    name: &str,
    store: MarkStore,
    sidecars: Option<&OwnedFd>,
) -> Result<Option<PoolFile>, Errno> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    // Looking should leave no trace, but only the owner and root may ask for that.
    let opened = match rustix::fs::openat(directory, name, flags | OFlags::NOATIME, Mode::empty()) {
        Err(Errno::PERM) => rustix::fs::openat(directory, name, flags, Mode::empty()),
        opened => opened,
    };
    let file = match opened {
        Ok(file) => file,
        Err(Errno::NOENT | Errno::LOOP | Errno::NXIO) => return Ok(None),
        Err(errno) => return Err(errno),
    };
    let Some(stat) = regular(&file)? else { return Ok(None) };
    let marks = match (store, sidecars) {
        (MarkStore::Xattr, _) => owner::read_xattrs(&file)?,
        (MarkStore::Sidecar, Some(sidecars)) => owner::read_sidecar(sidecars, name, &file)?,
        (MarkStore::Sidecar, None) => Marks::default(),
    };
    let size_bytes = stat.st_size as u64;
    let header = header::of_file(&file, size_bytes)?;
    Ok(Some(PoolFile {
        boot: boot::of_image(&file, &header)?,
        mark: marks.owner,
        retained: marks.retained,
        size_bytes,
        allocated_bytes: stat.st_blocks as u64 * 512,
        header,
        reclaim_delete: marks.reclaim_delete,
        sha256: marks.sha256,
        half_made: false,
        inactive: false,
    }))
}

fn regular(file: impl AsFd) -> Result<Option<Stat>, Errno> {
    let stat = rustix::fs::fstat(file)?;
    Ok((FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile).then_some(stat))
}

/// What a file is by its first bytes, and if that is a disk or an archive of disks, what those are.
fn kind(file: &File, bytes: u64) -> Result<FileKind, Errno> {
    let mut prefix = [0; 512];
    let known = bytes.min(512) as usize;
    match copy::read_exact(file, &mut prefix[..known], 0) {
        Ok(()) => {}
        // It became shorter: another look will tell.
        Err(Errno::STALE) => return Ok(FileKind::Plain),
        Err(errno) => return Err(errno),
    }
    Ok(match &prefix[..known] {
        [0x1f, 0x8b, ..] => FileKind::Gzip,
        [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => FileKind::Xz,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => FileKind::Zstd,
        prefix if vmdk::is_vmdk(prefix) => {
            let window = Window { file, start: 0, bytes };
            let disk = Vmdk::open(window).map_err(|error| error.to_string());
            FileKind::Vmdk(disk.map(|disk| DiskFacts {
                name: String::new(),
                capacity_bytes: disk.capacity_bytes(),
                unusable: None,
            }))
        }
        prefix if ova::is_tar(prefix) => {
            let disks = ova::disks(file, bytes).map_err(|error| error.to_string());
            FileKind::Ova(disks.map(|disks| disks.into_iter().map(disk_facts).collect()))
        }
        _ => FileKind::Plain,
    })
}

fn disk_facts(disk: ova::Disk<'_>) -> DiskFacts {
    let (capacity_bytes, unusable) = match Vmdk::open(disk.window) {
        Ok(found) => (found.capacity_bytes(), None),
        Err(error) => (0, Some(error.to_string())),
    };
    DiskFacts { name: disk.name, capacity_bytes, unusable }
}

/// A file outside of pools, links followed. `None`: it is not there.
pub fn outside_file(path: &Path) -> Option<Observed<FileFacts>> {
    let look = || -> Result<Result<FileFacts, &'static str>, Errno> {
        // Asked first: opening a device can wait, or do something.
        if !ofd::is_regular(path)? {
            return Ok(Err("it is not a regular file"));
        }
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(CWD, path, flags, Mode::empty())?;
        let Some(stat) = regular(&file)? else { return Ok(Err("it is not a regular file")) };
        let size_bytes = stat.st_size as u64;
        Ok(Ok(FileFacts {
            size_bytes,
            modified_unix_ns: i128::from(stat.st_mtime) * 1_000_000_000 + i128::from(stat.st_mtime_nsec),
            header: header::of_file(&file, size_bytes)?,
            kind: kind(&File::from(file), size_bytes)?,
        }))
    };
    let what = || format!("look at {}", path.display());
    match look() {
        Ok(Ok(facts)) => Some(Ok(facts)),
        Ok(Err(why)) => Some(Err(ObserveError::new(what(), why))),
        Err(Errno::NOENT) => None,
        Err(errno) => Some(Err(ObserveError::new(what(), errno))),
    }
}
