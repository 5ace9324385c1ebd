//! The platform: the only room that touches the kernel, the disks and the VM processes.
//!
//! [`Host`] has two halves: look (`snapshot`) and do (`run`). `linux` is the real one, `sim` lives in
//! memory and injects faults; one conformance suite runs against both.

pub mod error;
mod facts;
pub mod limits;
pub mod linux;
pub mod lvm;
pub mod nftables;
pub mod sim;
pub mod snapshot;
pub mod step;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

pub use error::StepError;
pub use snapshot::Snapshot;
pub use step::Step;

use crate::name::ObjectName;

/// What the caller wants to know about beyond what is always read (links, definitions, VM
/// processes, registered pools).
#[derive(Clone, Debug, Default)]
pub struct Scope {
    /// Declared pools, by name: they may not be registered yet.
    pub pools: Vec<(ObjectName, snapshot::PoolPlace)>,
    /// The block devices that a pool's volume group may be made on. They are looked at while there is none.
    pub devices: BTreeMap<ObjectName, Vec<PathBuf>>,
    /// Abilities that declared objects need.
    pub capabilities: BTreeSet<snapshot::Capability>,
    /// Files outside of pools that declared objects read (kernels, initrds, image sources).
    pub files: BTreeSet<PathBuf>,
    /// Declared objects have nftables tables. (Else they are looked for where some were made before.)
    pub tables: bool,
}

/// How many steps of a kind may run at once, and whether they are worth a thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lane {
    /// Takes microseconds and gains from being sent together with others: run in one batch.
    Fast,
    /// Takes long (copies, starts, waits): runs in a thread of its own.
    Slow,
}

pub trait Host: Sync {
    /// One bulk read of everything. Never changes anything.
    fn snapshot(&self, scope: &Scope) -> Snapshot;

    /// Runs steps that don't depend on one another; the results are in their order. Every step may
    /// be repeated, and a step that finds its work done succeeds.
    fn run(&self, batch: &[&Step]) -> Vec<Result<(), StepError>>;
}
