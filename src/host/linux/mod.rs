//! The real host: the kernel, the disks and the VM processes.
//!
//! Everything is read back from them; no state is kept here. What is half-done when we die either
//! carries our mark or is not there.

pub mod events;
pub mod links;
pub mod lock;
pub mod netlink;
pub mod ofd;
pub mod signals;
pub mod termination;
pub mod storage;

use std::collections::BTreeMap;
use std::path::PathBuf;

pub use events::{Drained, LinkEvents};
pub use lock::{Holder, HostLock, LockError};

use super::snapshot::Snapshot;
use super::{Host, Scope, Step, StepError};

/// This machine, or the part of it that is in the calling thread's network namespace.
pub struct LinuxHost {
    state_dir: PathBuf,
    run_dir: PathBuf,
    vmm_program: PathBuf,
}

impl LinuxHost {
    /// `state_dir` outlives a reboot, `run_dir` need not; `vmm_program` is what runs one VM.
    pub fn new(
        state_dir: impl Into<PathBuf>,
        run_dir: impl Into<PathBuf>,
        vmm_program: impl Into<PathBuf>,
    ) -> Self {
        Self { state_dir: state_dir.into(), run_dir: run_dir.into(), vmm_program: vmm_program.into() }
    }
}

impl Host for LinuxHost {
    fn snapshot(&self, _scope: &Scope) -> Snapshot {
        let _ = (&self.state_dir, &self.run_dir, &self.vmm_program);
        Snapshot {
            links: links::observe(),
            pools: BTreeMap::new(),
            vms: Ok(BTreeMap::new()),
            files: BTreeMap::new(),
            lacks: BTreeMap::new(),
        }
    }

    fn run(&self, batch: &[&Step]) -> Vec<Result<(), StepError>> {
        batch.iter().map(|_| Err(StepError::failed("run a step", "not wired up yet"))).collect()
    }
}
