//! Directory pools, cached images and volumes on the host's file systems.
//!
//! Everything is reached through a descriptor of the pool's directory and never through a symbolic
//! link in it, every file of ours carries a mark, and what is half-made lives in `.vmctl/tmp/` under
//! a lock, so that what a dead process left can be told from what a living one makes.
//! This room never formats a device, never follows a path that an image names, and never removes
//! what carries no mark of ours.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crate::host::error::StepError;
use crate::host::snapshot::{FileFacts, ImageHeader, Observed, Pool};
use crate::host::{Scope, Step};
use crate::name::ObjectName;

/// How far a long copy is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The file that is being made.
    pub path: PathBuf,
    pub done_bytes: u64,
    pub total_bytes: u64,
}

pub type ProgressHook = Arc<dyn Fn(Progress) + Send + Sync>;

/// The pools of this host. Holds no state: everything is read back from the disks.
pub struct Storage {
    state_dir: PathBuf,
    progress: Option<ProgressHook>,
}

impl Storage {
    /// `state_dir` holds the index of the pools, `pools/<name>`.
    pub fn new(state_dir: impl Into<PathBuf>) -> Self {
        Self { state_dir: state_dir.into(), progress: None }
    }

    /// Calls `hook` now and then while an image is copied or converted.
    pub fn with_progress(mut self, hook: ProgressHook) -> Self {
        self.progress = Some(hook);
        self
    }

    /// Every pool of the scope and of the index, and the scope's files that are there.
    #[allow(clippy::type_complexity)]
    pub fn observe(
        &self,
        scope: &Scope,
    ) -> (BTreeMap<ObjectName, Observed<Pool>>, BTreeMap<PathBuf, Observed<FileFacts>>) {
        let _ = (scope, &self.state_dir, &self.progress);
        todo!()
    }

    /// Runs one of the storage steps.
    pub fn run(&self, step: &Step) -> Result<(), StepError> {
        let _ = step;
        todo!()
    }

    /// Removes what has been in the pool's trash for at least `ttl`; returns what was removed.
    pub fn expire_trash(&self, pool_path: &Path, ttl: Duration) -> Result<Vec<String>, StepError> {
        let _ = (pool_path, ttl);
        todo!()
    }
}

/// Opens a disk for a VM and takes its lock (shared for a reader, exclusive for a writer). The lock
/// belongs to the open file description: it holds until the last copy of the descriptor is closed,
/// in whatever process that is.
pub fn open_disk(path: &Path, read_only: bool) -> Result<OwnedFd, StepError> {
    let _ = (path, read_only);
    todo!()
}

/// What a file's first bytes say.
pub fn read_header(path: &Path) -> Result<ImageHeader, StepError> {
    let _ = path;
    todo!()
}
