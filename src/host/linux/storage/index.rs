//! The index of pools in the state directory: `pools/<name>.json`, with the path and the mark.
//!
//! It only remembers pools that are no longer declared; losing it loses nothing else.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::directory::{self, FILE_MODE};
use crate::host::error::{ObserveError, StepError};
use crate::host::linux::ofd::{self, Lock};
use crate::host::snapshot::{LvmPlace, Observed, PoolPlace};
use crate::name::{Mark, ObjectName};

const ENTRY_BYTES_MAX: usize = 16 << 10;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexEntry {
    pub path: PathBuf,
    pub mark: Mark,
    /// Of a pool in a volume group; its path is `/dev/<group>` then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lvm: Option<LvmPlace>,
}

impl IndexEntry {
    pub fn new(place: &PoolPlace, mark: &Mark) -> Self {
        Self { path: place.path(), mark: mark.clone(), lvm: place.lvm().cloned() }
    }

    pub fn place(&self) -> PoolPlace {
        match &self.lvm {
            Some(place) => PoolPlace::Lvm(place.clone()),
            None => PoolPlace::Directory(self.path.clone()),
        }
    }
}

fn file_name(pool: &ObjectName) -> String {
    format!("{pool}.json")
}

fn open(state_dir: &Path) -> Result<Option<OwnedFd>, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match rustix::fs::openat(CWD, state_dir.join("pools"), flags, Mode::empty()) {
        Ok(directory) => Ok(Some(directory)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn read(directory: &OwnedFd, name: &str) -> Result<Option<IndexEntry>, String> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(directory, name, flags, Mode::empty()) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(errno.to_string()),
    };
    let text = directory::read_bounded(file, ENTRY_BYTES_MAX).map_err(|errno| errno.to_string())?;
    serde_json::from_slice(&text).map(Some).map_err(|error| error.to_string())
}

/// Every registered pool. An error of the whole is one of the index's directory.
pub fn entries(state_dir: &Path) -> Observed<BTreeMap<ObjectName, Observed<IndexEntry>>> {
    let what = || format!("read the index of pools {}", state_dir.join("pools").display());
    let failed = |errno| ObserveError::new(what(), errno);
    let mut found = BTreeMap::new();
    let Some(directory) = open(state_dir).map_err(failed)? else { return Ok(found) };
    for name in directory::regular_names(&directory).map_err(failed)? {
        let Some(pool) = name.strip_suffix(".json").and_then(|name| ObjectName::parse(name).ok()) else {
            continue;
        };
        match read(&directory, &name) {
            Ok(Some(entry)) => drop(found.insert(pool, Ok(entry))),
            Ok(None) => {}
            Err(why) => drop(found.insert(pool, Err(ObserveError::new(format!("{}: {name}", what()), why)))),
        }
    }
    Ok(found)
}

/// Writes the entry; refuses to replace another set's. Other names of the set for the same directory
/// are forgotten: the pool was renamed.
pub fn register(state_dir: &Path, pool: &ObjectName, entry: &IndexEntry) -> Result<(), StepError> {
    let what = || format!("register the pool {pool} in {}", state_dir.join("pools").display());
    let failed = |errno: Errno| StepError::failed(what(), errno);
    std::fs::create_dir_all(state_dir.join("pools")).map_err(|error| StepError::failed(what(), error))?;
    let directory = open(state_dir).map_err(failed)?.ok_or_else(|| failed(Errno::NOENT))?;
    let _lock = take_lock(&directory).map_err(failed)?;
    match read(&directory, &file_name(pool)) {
        Ok(Some(old)) if old.mark.set != entry.mark.set => {
            return Err(directory::not_ours(what(), Some(&old.mark), &entry.mark));
        }
        Ok(Some(old)) if old == *entry => {}
        // Missing, moved, or not to be understood: the new one says more.
        _ => {
            let text = serde_json::to_vec(entry).map_err(|error| StepError::failed(what(), error))?;
            directory::replace_file(&directory, ".entry", &directory, &file_name(pool), &text)
                .map_err(failed)?;
        }
    }
    for name in directory::regular_names(&directory).map_err(failed)? {
        let old = name.ends_with(".json") && name != file_name(pool);
        let Some(Ok(Some(old))) = old.then(|| read(&directory, &name)) else { continue };
        if old.place() == entry.place() && old.mark.set == entry.mark.set {
            remove(&directory, &name).map_err(failed)?;
        }
    }
    Ok(())
}

fn remove(directory: &OwnedFd, name: &str) -> Result<(), Errno> {
    match rustix::fs::unlinkat(directory, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => rustix::fs::fsync(directory),
        Err(errno) => Err(errno),
    }
}

/// Removes the entry, if it is this owner's.
pub fn forget(state_dir: &Path, pool: &ObjectName, mark: &Mark) -> Result<(), StepError> {
    let what = || format!("forget the pool {pool} in {}", state_dir.join("pools").display());
    let failed = |errno: Errno| StepError::failed(what(), errno);
    let Some(directory) = open(state_dir).map_err(failed)? else { return Ok(()) };
    let _lock = take_lock(&directory).map_err(failed)?;
    match read(&directory, &file_name(pool)) {
        Ok(None) => return Ok(()),
        Ok(Some(entry)) if entry.mark != *mark => {
            return Err(directory::not_ours(what(), Some(&entry.mark), mark));
        }
        // One that can't be understood remembers nothing.
        Ok(Some(_)) | Err(_) => {}
    }
    remove(&directory, &file_name(pool)).map_err(failed)
}

fn take_lock(directory: &OwnedFd) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, ".lock", flags, FILE_MODE)?;
    ofd::lock(&file, Lock::Exclusive)?;
    Ok(file)
}
