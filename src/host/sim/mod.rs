//! A host in memory, with faults on demand. It keeps to the same rules as the real one (the conformance
//! suite holds it to them) and can fail, crash or be edited by others at any step.

mod apply;
mod lvm;
mod networks;
mod policy;
mod vms;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use super::error::ObserveError;
use super::snapshot::{Capability, DeviceFacts, FileFacts, Forwarding, IpFamily, Pool, PoolPlace, Snapshot};
use super::{Host, Scope, Step, StepError};
use crate::name::{LvmName, ObjectName};
pub use lvm::{SimGroup, SimThinPool, SimVolume, logical_file};

/// What goes wrong, and when. Steps are counted from 1 over the host's life.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// This step fails without an effect.
    pub fail_at: Option<usize>,
    /// Before this step the process dies: it and all later ones fail without an effect.
    pub crash_before: Option<usize>,
    /// After this step took effect the process dies: its success is never heard of.
    pub crash_after: Option<usize>,
    /// At this step the process of the VM that it is about dies, and the step fails.
    pub vm_dies_at: Option<usize>,
    /// No guest lets go of a device.
    pub guests_refuse: bool,
    /// Looking at links fails.
    pub links_unseen: bool,
    /// Looking at nftables tables fails.
    pub tables_unseen: bool,
    /// Looking at the host as a whole fails.
    pub host_unseen: bool,
    /// Looking at VMs fails.
    pub vms_unseen: bool,
    /// Looking at these pools fails.
    pub pools_unseen: BTreeSet<ObjectName>,
}

pub struct SimHost {
    state: Mutex<State>,
}

struct State {
    /// All there is, whether in a scope or not.
    world: Snapshot,
    lacks: BTreeSet<Capability>,
    /// Files outside of pools.
    files: std::collections::BTreeMap<PathBuf, FileFacts>,
    lvm: lvm::Lvm,
    faults: Faults,
    /// Forwarding that was on before any of our networks needed it.
    forwards_anyway: BTreeSet<IpFamily>,
    steps: usize,
    log: Vec<Step>,
    next_pid: i32,
}

impl Default for SimHost {
    fn default() -> Self {
        Self::new()
    }
}

impl SimHost {
    /// A host with nothing but its loopback device.
    pub fn new() -> Self {
        let world = Snapshot {
            host: Ok(policy::facts()),
            links: Ok(Default::default()),
            tables: Ok(Default::default()),
            services: Ok(Default::default()),
            forwarding: Ok(IpFamily::ALL.map(|family| (family, Forwarding::default())).into()),
            pools: Default::default(),
            vms: Ok(Default::default()),
            files: Default::default(),
            lacks: Default::default(),
        };
        let state = State {
            world,
            lacks: BTreeSet::new(),
            files: Default::default(),
            lvm: Default::default(),
            faults: Faults::default(),
            forwards_anyway: BTreeSet::new(),
            steps: 0,
            log: Vec::new(),
            next_pid: 1000,
        };
        Self { state: Mutex::new(state) }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        // A test that panics while it holds the state has failed already.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub fn set_faults(&self, faults: Faults) {
        self.lock().faults = faults;
    }

    pub fn lack(&self, capability: Capability) {
        self.lock().lacks.insert(capability);
    }

    pub fn add_file(&self, path: impl Into<PathBuf>, facts: FileFacts) {
        self.lock().files.insert(path.into(), facts);
    }

    pub fn add_device(&self, path: impl Into<PathBuf>, facts: DeviceFacts) {
        self.lock().lvm.devices.insert(path.into(), facts);
    }

    /// Others at work in the volume groups.
    pub fn edit_groups<T>(&self, edit: impl FnOnce(&mut BTreeMap<LvmName, SimGroup>) -> T) -> T {
        edit(&mut self.lock().lvm.groups)
    }

    /// Others at work: edits the world directly, past every rule.
    pub fn edit<T>(&self, edit: impl FnOnce(&mut Snapshot) -> T) -> T {
        edit(&mut self.lock().world)
    }

    /// Every step that took effect, in order.
    pub fn log(&self) -> Vec<Step> {
        self.lock().log.clone()
    }

    pub fn steps_run(&self) -> usize {
        self.lock().steps
    }
}

impl Host for SimHost {
    fn snapshot(&self, scope: &Scope) -> Snapshot {
        let state = self.lock();
        let mut seen = state.world.clone();
        // The groups are where logical volumes are; the world only knows who registered which.
        for (name, pool) in &mut seen.pools {
            if let Ok(pool) = pool
                && let PoolPlace::Lvm(place) = pool.place()
            {
                let devices = scope.devices.get(name).map(Vec::as_slice).unwrap_or_default();
                *pool = state.lvm.pool(&place, pool.registered.clone(), devices);
            }
        }
        for (name, place) in &scope.pools {
            let registered = matches!(seen.pools.get(name), Some(Ok(pool)) if pool.registered.is_some());
            if registered {
                continue;
            }
            let pool = match place {
                PoolPlace::Directory(path) => {
                    let directory = state.directory_at(path);
                    Pool { path: path.clone(), directory, registered: None, lvm: None }
                }
                PoolPlace::Lvm(place) => {
                    let devices = scope.devices.get(name).map(Vec::as_slice).unwrap_or_default();
                    state.lvm.pool(place, None, devices)
                }
            };
            seen.pools.insert(name.clone(), Ok(pool));
        }
        let declared: BTreeSet<&ObjectName> = scope.pools.iter().map(|(name, _)| name).collect();
        seen.pools.retain(|name, pool| {
            declared.contains(name) || matches!(pool, Ok(pool) if pool.registered.is_some())
        });
        let faults = &state.faults;
        for name in &faults.pools_unseen {
            if let Some(pool) = seen.pools.get_mut(name) {
                *pool = Err(ObserveError::new(format!("read pool {name}"), "input/output error (simulated)"));
            }
        }
        if faults.links_unseen {
            seen.links = Err(ObserveError::new("list links", "no buffer space (simulated)"));
        }
        if faults.tables_unseen {
            seen.tables = Err(ObserveError::new("list our nftables tables", "no answer (simulated)"));
        }
        if faults.host_unseen {
            seen.host = Err(ObserveError::new("read /proc/meminfo", "permission denied (simulated)"));
        }
        if faults.vms_unseen {
            seen.vms = Err(ObserveError::new("read the VMs' definitions", "permission denied (simulated)"));
        }
        for path in &scope.files {
            if let Some(facts) = state.files.get(path) {
                seen.files.insert(path.clone(), Ok(facts.clone()));
            }
        }
        let lacks = scope.capabilities.intersection(&state.lacks);
        seen.lacks = lacks.map(|capability| (*capability, "simulated".to_owned())).collect();
        seen
    }

    fn run(&self, batch: &[&Step]) -> Vec<Result<(), StepError>> {
        batch.iter().map(|step| self.lock().run(step)).collect()
    }
}

impl State {
    fn run(&mut self, step: &Step) -> Result<(), StepError> {
        self.steps += 1;
        let number = self.steps;
        let dead = |at: Option<usize>| at.is_some_and(|at| number >= at);
        if self.faults.fail_at == Some(number) {
            return Err(StepError::failed(step.to_string(), "simulated failure"));
        }
        if dead(self.faults.crash_before) || self.faults.crash_after.is_some_and(|at| number > at) {
            return Err(StepError::failed(step.to_string(), "simulated crash"));
        }
        if self.faults.vm_dies_at == Some(number)
            && let Some(vm) = step.vm()
        {
            self.kill_vm(vm);
            return Err(StepError::failed(step.to_string(), "its process died (simulated)"));
        }
        self.apply(step)?;
        self.log.push(step.clone());
        if self.faults.crash_after == Some(number) {
            return Err(StepError::failed(step.to_string(), "simulated crash"));
        }
        Ok(())
    }

    fn directory_at(&self, path: &Path) -> Option<super::snapshot::PoolDirectory> {
        self.world
            .pools
            .values()
            .flatten()
            .find(|pool| pool.path == path && pool.lvm.is_none())
            .and_then(|pool| pool.directory.clone())
    }
}
