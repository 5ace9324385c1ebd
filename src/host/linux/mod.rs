//! The real host: the kernel, the disks and the VM processes.
//!
//! Everything is read back from them; no state is kept here. What is half-done when we die either
//! carries our mark or is not there.

pub mod capability;
pub mod cgroup;
pub mod events;
pub mod host_policy;
mod hugepages;
mod kernel_cache;
mod link_failure;
mod link_messages;
mod link_owner;
pub mod link_steps;
pub mod links;
pub mod lock;
mod netlink;
mod network;
mod ofd;
mod parallel;
pub mod signals;
pub mod storage;
mod tap;
pub mod termination;
mod vm_control;
mod vm_live;
mod vm_place;
mod vm_process;
mod vm_seed;
mod vm_start;
pub mod vm_usage;
mod vm_user;
mod vm_vsock;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

pub use events::{Drained, LinkEvents};
pub use lock::{Holder, HostLock, LockError};
pub use ofd::has_writer;
pub use vm_user::first_choice as vm_uid;

use self::host_policy::HostFiles;
use self::network::Networks;
use self::storage::Storage;
use self::vm_control::Vms;
use self::vm_usage::Usage;
use super::error::ObserveError;
use super::snapshot::{Capability, HostFacts, Snapshot};
use super::{Host, Lane, Scope, Step, StepError};
use crate::name::ObjectName;
use crate::vmm::client::{Control, ControlError, Watch};
use crate::vmm::protocol::Condition;

/// This machine, or the part of it that is in the calling thread's network namespace.
pub struct LinuxHost {
    files: HostFiles,
    storage: Storage,
    networks: Networks,
    vms: Vms,
}

impl LinuxHost {
    /// `state_dir` outlives a reboot, `run_dir` need not; `vmm_program` is what runs one VM.
    pub fn new(
        state_dir: impl Into<PathBuf>,
        run_dir: impl Into<PathBuf>,
        vmm_program: impl Into<PathBuf>,
    ) -> Self {
        let vms = Vms { state_dir: state_dir.into(), run_dir: run_dir.into(), program: vmm_program.into() };
        Self {
            files: HostFiles::new(&vms.state_dir),
            storage: Storage::new(&vms.state_dir),
            networks: Networks::new(&vms.state_dir),
            vms,
        }
    }

    /// With another storage half, such as one that reports its progress.
    pub fn with_storage(mut self, storage: Storage) -> Self {
        self.storage = storage;
        self
    }

    /// With `/proc` and `/sys` of the host as a whole elsewhere.
    pub fn with_host_files(mut self, root: impl Into<PathBuf>) -> Self {
        self.files = HostFiles::below(root, &self.vms.state_dir);
        self
    }

    /// CPUs, memory and the policy alone: less work than a snapshot.
    pub fn facts(&self) -> Result<HostFacts, ObserveError> {
        self.files.observe()
    }

    /// Writes a volume to a file that needs nothing else; gives the file's length.
    pub fn export(&self, export: &storage::Export<'_>) -> Result<u64, StepError> {
        self.storage.export(export)
    }

    pub fn state_dir(&self) -> &Path {
        &self.vms.state_dir
    }

    /// A descriptor that becomes readable when the VM's process ends. `None`: none runs.
    pub fn vm_watch(&self, vm: &ObjectName) -> Result<Option<OwnedFd>, ObserveError> {
        Ok(self.vms.watch(vm)?.map(OwnedFd::from))
    }

    /// A descriptor that becomes readable when the network's dnsmasq ends. `None`: none runs.
    pub fn service_watch(&self, network: &crate::name::Mark) -> Option<OwnedFd> {
        self.networks.service_watch(network)
    }

    /// What the VM's process tells of itself from now on. `None`: none runs.
    pub fn vm_events(&self, vm: &ObjectName) -> Result<Option<Watch>, ObserveError> {
        self.vms.events(vm)
    }

    /// What is not as it should be with the VM, and lasts; nothing if it doesn't run.
    pub fn vm_conditions(&self, vm: &ObjectName) -> Result<Vec<Condition>, ObserveError> {
        self.vms.conditions(vm)
    }

    /// A connection to the VM's process, for its console and events. `None`: none runs.
    pub fn vm_control(&self, vm: &ObjectName) -> Result<Option<Control>, ObserveError> {
        let failed = |error: &dyn ToString| {
            ObserveError::new(format!("connect to the process of the VM {vm}"), error.to_string())
        };
        let Some(directory) = self.vms.place(vm).socket_directory().map_err(|error| failed(&error))? else {
            return Ok(None);
        };
        match Control::connect(&directory.socket()) {
            Ok(control) => Ok(Some(control)),
            Err(ControlError::Absent { .. }) => Ok(None),
            Err(error) => Err(failed(&vm_process::chain(&error))),
        }
    }

    /// What the VMs that run use, or these alone. One that can't be asked is there, with the reason.
    pub fn vm_usage(
        &self,
        only: &[ObjectName],
    ) -> Result<BTreeMap<ObjectName, Result<Usage, ObserveError>>, ObserveError> {
        vm_usage::observe(&self.vms.state_dir, &self.vms.run_dir, only)
    }

    /// Where the VM's console output is kept.
    pub fn console_log(&self, vm: &ObjectName) -> PathBuf {
        self.vms.place(vm).console_log_path()
    }

    fn run_one(&self, step: &Step) -> Result<(), StepError> {
        match step {
            Step::DefineVm { .. }
            | Step::UndefineVm { .. }
            | Step::StartVm { .. }
            | Step::StopVm { .. }
            | Step::ResizeDisk { .. }
            | Step::ReplaceTap { .. }
            | Step::AddDisk { .. }
            | Step::AddNic { .. }
            | Step::RemoveDevice { .. }
            | Step::SetDiskLimits { .. }
            | Step::SetNicLimits { .. }
            | Step::SetCarrier { .. }
            | Step::SetBalloon { .. }
            | Step::SetCpuShare { .. }
            | Step::SetProcessLimits { .. }
            | Step::PauseVm { .. }
            | Step::HoldVm { .. } => self.vms.run(step),
            Step::RecordHostPolicy { .. }
            | Step::SetHostSetting { .. }
            | Step::RestoreHostSetting { .. }
            | Step::ForgetHostPolicy { .. } => self.files.run(step),
            Step::CreatePool { .. }
            | Step::ForgetPool { .. }
            | Step::ImportImage { .. }
            | Step::DeleteImage { .. }
            | Step::CreateVolume(_)
            | Step::GrowVolume { .. }
            | Step::SetReclaim { .. }
            | Step::AdoptVolume { .. }
            | Step::RetainVolume { .. }
            | Step::TrashVolume { .. }
            | Step::RetainImage { .. }
            | Step::Lvm(_) => self.storage.run(step),
            Step::SetTable { .. }
            | Step::DeleteTable { .. }
            | Step::SetService { .. }
            | Step::RemoveService { .. }
            | Step::RequireForwarding { .. }
            | Step::ReleaseForwarding { .. } => self.networks.run(step),
            Step::CreateLink(_)
            | Step::DeleteLink { .. }
            | Step::MarkLink { .. }
            | Step::UnmarkLink { .. }
            | Step::SetLink { .. }
            | Step::AddAddress { .. }
            | Step::RemoveAddress { .. } => link_steps::run(&[step]).into_iter().collect(),
        }
    }
}

impl Host for LinuxHost {
    fn snapshot(&self, scope: &Scope) -> Snapshot {
        let (pools, files) = self.storage.observe(scope);
        let links = links::observe();
        // What is there needs no trial: a look at a host that is as declared makes nothing at all.
        let mut shown = links.as_ref().map(capability::shown_by).unwrap_or_default();
        let tables = self.networks.tables(scope.tables);
        if tables.as_ref().is_ok_and(|tables| !tables.is_empty()) {
            shown.insert(Capability::Nftables);
        }
        let lacks = |&capability| Some((capability, capability::lacks(capability)?));
        Snapshot {
            host: self.files.observe(),
            tables,
            forwarding: self.networks.forwarding(),
            services: self.networks.services(),
            pools,
            vms: vm_process::observe(&self.vms.state_dir, &self.vms.run_dir),
            files,
            lacks: scope.capabilities.difference(&shown).filter_map(lacks).collect(),
            links,
        }
    }

    /// The fast steps go to the kernel together, the slow ones run one after the other: whoever wants
    /// those to run at once brings the threads.
    fn run(&self, batch: &[&Step]) -> Vec<Result<(), StepError>> {
        let fast: Vec<&Step> = batch.iter().copied().filter(|step| step.lane() == Lane::Fast).collect();
        let mut fast = if fast.is_empty() { Vec::new() } else { link_steps::run(&fast) }.into_iter();
        let lost = || Err(StepError::failed("run a batch of steps", "a result is missing"));
        batch
            .iter()
            .map(|step| match step.lane() {
                Lane::Fast => fast.next().unwrap_or_else(lost),
                Lane::Slow => self.run_one(step),
            })
            .collect()
    }
}
