//! Directory pools, cached images and volumes on the host's file systems.
//!
//! Everything is reached through a descriptor of the pool's directory and never through a symbolic
//! link in it, every file of ours carries a mark, and what is half-made lives in `.vmctl/tmp/` under
//! a lock, so that what a dead process left can be told from what a living one makes.
//! This room never formats a device, never follows a path that an image names, and never removes
//! what carries no mark of ours.

mod boot;
mod copy;
pub(in crate::host::linux) mod directory;
mod download;
mod export;
pub mod header;
mod image;
mod index;
mod lvm;
mod ova;
mod owner;
mod qcow2;
mod resize;
mod scan;
mod space;
mod trash;
mod unpack;
pub mod vmdk;
mod volume;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;

pub use self::export::{Export, ExportFormat};

use self::directory::PoolDirectory;
use self::index::IndexEntry;
use self::volume::Target;
use super::ofd::Lock;
use crate::host::error::{ObserveError, StepError};
use crate::host::snapshot::{FileFacts, ImageHeader, Observed, Pool, PoolPlace};
use crate::host::{Scope, Step};
use crate::name::{Mark, ObjectName};

/// How far a long copy is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The file that is being made.
    pub path: PathBuf,
    pub done_bytes: u64,
    pub total_bytes: u64,
}

pub type ProgressHook = Arc<dyn Fn(Progress) + Send + Sync>;
pub type Pools = BTreeMap<ObjectName, Observed<Pool>>;
pub type Files = BTreeMap<PathBuf, Observed<FileFacts>>;

/// The pools of this host. Holds no state: everything is read back from the disks.
pub struct Storage {
    state_dir: PathBuf,
    progress: Option<ProgressHook>,
}

impl Storage {
    /// `state_dir` holds the index of the pools, `pools/<name>.json`.
    pub fn new(state_dir: impl Into<PathBuf>) -> Self {
        Self { state_dir: state_dir.into(), progress: None }
    }

    /// Calls `hook` now and then while an image is copied or converted.
    pub fn with_progress(mut self, hook: ProgressHook) -> Self {
        self.progress = Some(hook);
        self
    }

    /// Every pool of the scope and of the index, and the scope's files that are there.
    ///
    /// A pool that is registered is looked at where it was registered: that is where its volumes
    /// are, wherever its manifest says by now.
    pub fn observe(&self, scope: &Scope) -> (Pools, Files) {
        let mut pools = Pools::new();
        let declared: BTreeMap<&ObjectName, &PoolPlace> =
            scope.pools.iter().map(|(name, place)| (name, place)).collect();
        let registered = index::entries(&self.state_dir);
        let names: BTreeSet<&ObjectName> =
            declared.keys().copied().chain(registered.iter().flat_map(BTreeMap::keys)).collect();
        // One report for all, and none where no pool asks for it.
        let mut report = None;
        for name in names {
            let entry = match &registered {
                Ok(entries) => entries.get(name).cloned().transpose(),
                Err(error) => Err(error.clone()),
            };
            let (place, registered) = match (entry, declared.get(name)) {
                (Ok(Some(entry)), _) => (entry.place(), Some(entry.mark)),
                (Ok(None), Some(place)) => ((*place).clone(), None),
                (Ok(None), None) => continue,
                (Err(error), _) => {
                    pools.insert(name.clone(), Err(error));
                    continue;
                }
            };
            let pool = match place {
                PoolPlace::Directory(path) => scan::pool(&path, registered),
                PoolPlace::Lvm(place) => {
                    let devices = scope.devices.get(name).map(Vec::as_slice).unwrap_or_default();
                    let report = report.get_or_insert_with(lvm::Report::take);
                    report
                        .as_ref()
                        .map_err(Clone::clone)
                        .map(|report| lvm::pool(report, &place, registered, devices))
                }
            };
            pools.insert(name.clone(), pool);
        }
        let files = scope.files.iter().filter_map(|path| Some((path.clone(), scan::outside_file(path)?)));
        (pools, files.collect())
    }

    /// Runs one of the storage steps.
    pub fn run(&self, step: &Step) -> Result<(), StepError> {
        let hook = self.progress.as_ref();
        match step {
            Step::CreatePool { name, path, mark } => self.create_pool(name, path, mark),
            Step::ForgetPool { name, path, mark } => self.forget_pool(name, path, mark),
            Step::ImportImage { image, source, sha256, mark } => {
                image::import(image, source, *sha256, mark, hook)
            }
            Step::DeleteImage { image, mark } => image::delete(image, mark, &self.registered_paths()?),
            Step::RetainImage { image, mark } => image::retain(image, mark),
            Step::CreateVolume(new) => volume::create(new, hook),
            Step::GrowVolume { pool_path, file, format, capacity_bytes, mark } => {
                volume::grow(&Target { pool_path, file, mark }, *format, *capacity_bytes)
            }
            Step::SetReclaim { pool_path, file, mark, delete } => {
                volume::set_reclaim(&Target { pool_path, file, mark }, *delete)
            }
            Step::AdoptVolume { pool_path, file, mark, reclaim_delete } => {
                volume::adopt(&Target { pool_path, file, mark }, *reclaim_delete)
            }
            Step::RetainVolume { pool_path, file, mark } => volume::retain(&Target { pool_path, file, mark }),
            Step::TrashVolume { pool_path, file, mark } => trash::volume(&Target { pool_path, file, mark }),
            Step::Lvm(step) => lvm::run(step, &self.state_dir, hook),
            other => Err(StepError::failed(format!("run {other:?}"), "it is not a step of storage")),
        }
    }

    /// Writes a volume to a file that needs nothing else; gives the file's length.
    pub fn export(&self, export: &Export<'_>) -> Result<u64, StepError> {
        export::export(export, self.progress.as_ref())
    }

    /// Removes what has been in the pool's trash for at least `ttl`; returns what was removed.
    pub fn expire_trash(&self, pool_path: &Path, ttl: Duration) -> Result<Vec<String>, StepError> {
        trash::expire(pool_path, ttl)
    }

    /// An existing directory is marked and registered as it is: nothing in it changes hands. A pool
    /// of the same set may take it over under another name.
    fn create_pool(&self, name: &ObjectName, path: &Path, mark: &Mark) -> Result<(), StepError> {
        let what = || format!("create the pool {name} in {}", path.display());
        directory::check_pool_path(path)?;
        // Asked before anything is made in it.
        match directory::open_root(path) {
            Ok(root) => {
                let store = owner::MarkStore::of(&root);
                let found = store.and_then(|store| directory::pool_mark(&root, store));
                let found = found.map_err(|errno| StepError::failed(what(), errno))?;
                if found.as_ref().is_some_and(|found| found.set != mark.set) {
                    return Err(directory::not_ours(what(), found.as_ref(), mark));
                }
            }
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(StepError::failed(what(), directory::pool_errno(errno))),
        }
        // Registered first: what a crash leaves half-made is then known of.
        let place = PoolPlace::Directory(path.to_owned());
        index::register(&self.state_dir, name, &IndexEntry::new(&place, mark))?;
        let pool = PoolDirectory::prepare(path)?;
        let failed = |errno: Errno| StepError::failed(what(), errno);
        pool.clean_leftovers().map_err(failed)?;
        match pool.mark().map_err(failed)? {
            Some(found) if found == *mark => Ok(()),
            _ => pool.set_mark(Some(mark)).map_err(failed),
        }
    }

    fn forget_pool(&self, name: &ObjectName, path: &Path, mark: &Mark) -> Result<(), StepError> {
        let what = || format!("forget the pool {name} in {}", path.display());
        let failed = |errno: Errno| StepError::failed(what(), errno);
        directory::check_pool_path(path)?;
        match directory::open_root(path) {
            Ok(root) => {
                let store = owner::MarkStore::of(&root).map_err(failed)?;
                match directory::pool_mark(&root, store).map_err(failed)? {
                    Some(found) if found == *mark => {
                        directory::unmark(path, &root, store)?;
                    }
                    None => {}
                    Some(found) => return Err(directory::not_ours(what(), Some(&found), mark)),
                }
            }
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(StepError::failed(what(), directory::pool_errno(errno))),
        }
        index::forget(&self.state_dir, name, mark)
    }

    fn registered_paths(&self) -> Result<Vec<PathBuf>, StepError> {
        let failed = |error: ObserveError| StepError::failed("look for pools that may need the image", error);
        let entries = index::entries(&self.state_dir).map_err(failed)?;
        let mut paths = Vec::new();
        for entry in entries.into_values() {
            if let PoolPlace::Directory(path) = entry.map_err(failed)?.place() {
                paths.push(path);
            }
        }
        Ok(paths)
    }
}

/// Opens a disk for a VM and takes its lock (shared for a reader, exclusive for a writer). The lock
/// belongs to the open file description: it holds until the last copy of the descriptor is closed,
/// in whatever process that is.
pub fn open_disk(path: &Path, read_only: bool) -> Result<OwnedFd, StepError> {
    if path.starts_with("/dev") {
        return lvm::open_disk(path, read_only);
    }
    let what = format!("open the disk {}", path.display());
    let (access, kind) =
        if read_only { (OFlags::RDONLY, Lock::Shared) } else { (OFlags::RDWR, Lock::Exclusive) };
    // Without waiting: what has this name could be a FIFO.
    let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(CWD, path, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(Errno::LOOP) => return Err(StepError::failed(what, "it is a symbolic link")),
        Err(errno) => return Err(StepError::failed(what, errno)),
    };
    let prepare = || -> Result<bool, Errno> {
        rustix::fs::fcntl_setfl(&file, access)?;
        Ok(FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode) == FileType::RegularFile)
    };
    match prepare() {
        Ok(true) => {}
        Ok(false) => return Err(StepError::failed(what, "it is not a regular file")),
        Err(errno) => return Err(StepError::failed(what, errno)),
    }
    directory::take_lock(&file, kind, &what)?;
    Ok(file.into())
}

/// What a file's first bytes say. Links are followed.
pub fn read_header(path: &Path) -> Result<ImageHeader, StepError> {
    let what = format!("read the header of {}", path.display());
    let (file, bytes) = image::open_source(path, &what)?;
    header::of_file(&file, bytes).map_err(|errno| StepError::failed(what, errno))
}
