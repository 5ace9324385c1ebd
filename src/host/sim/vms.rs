//! VMs of the simulated host: their records, their processes, and guests that let go of a device or don't.

use std::collections::BTreeMap;
use std::path::Path;

use super::State;
use super::apply::{Done, failed, grow, not_ours};
use crate::host::limits::ProcessLimits;
use crate::host::snapshot::{Capability, LinkKind, SEED_DISK, UserData, Vm, VmDefinition, VmProcess};
use crate::host::{Step, StepError};
use crate::name::{LinkName, Mark, ObjectName};
use crate::vmm::config::{DiskConfig, MachineKind, NicConfig};
use crate::vmm::protocol::{Condition, ConditionKind, Phase};

impl State {
    pub(super) fn apply_to_vm(&mut self, step: &Step) -> Done {
        match step {
            Step::DefineVm { vm, definition } => {
                self.check_vm(vm, &definition.mark)?;
                self.vm(vm)?.definition = Some((**definition).clone());
                Ok(())
            }
            Step::UndefineVm { vm, mark } => {
                self.check_vm(vm, mark)?;
                if self.vms()?.get(vm).is_some_and(|have| have.process.is_some()) {
                    return failed(step, "it runs");
                }
                self.vms()?.remove(vm);
                Ok(())
            }
            Step::StartVm { vm, definition } => self.start_vm(vm, definition),
            Step::StopVm { vm, mark, .. } => {
                self.check_vm(vm, mark)?;
                self.kill_vm(vm);
                Ok(())
            }
            Step::HoldVm { vm, mark, held } => {
                self.check_defined(vm, mark)?;
                self.vm(vm)?.held = *held;
                Ok(())
            }
            Step::SetCpuShare { vm, mark, share } => {
                self.running(vm, mark)?.cpu_share = Some(*share);
                Ok(())
            }
            Step::SetProcessLimits { vm, mark, limits } => {
                self.running(vm, mark)?.limits = Some(*limits);
                Ok(())
            }
            Step::PauseVm { vm, mark, paused } => {
                self.running(vm, mark)?.phase = if *paused { Phase::Paused } else { Phase::Running };
                Ok(())
            }
            Step::AddDisk { vm, mark, disk } => self.add_disk(step, vm, mark, disk),
            Step::AddNic { vm, mark, nic } => self.add_nic(step, vm, mark, nic),
            Step::RemoveDevice { vm, mark, device } => self.remove_device(step, vm, mark, device),
            Step::SetDiskLimits { vm, mark, disk, limits } => {
                self.disk(step, vm, mark, disk)?.limits = *limits;
                Ok(())
            }
            Step::SetNicLimits { vm, mark, nic, receive, transmit } => {
                let nic = self.nic(step, vm, mark, nic)?;
                (nic.receive_limits, nic.transmit_limits) = (*receive, *transmit);
                Ok(())
            }
            Step::SetCarrier { vm, mark, nic, up } => {
                self.nic(step, vm, mark, nic)?.link_up = *up;
                Ok(())
            }
            Step::SetBalloon { vm, mark, target_bytes } => {
                match &mut self.running(vm, mark)?.config.balloon {
                    Some(balloon) => {
                        balloon.target_bytes = *target_bytes;
                        Ok(())
                    }
                    None => failed(step, "it has no balloon"),
                }
            }
            Step::ResizeDisk { vm, mark, disk, capacity_bytes } => {
                self.resize_disk(step, vm, mark, disk, *capacity_bytes)
            }
            Step::ReplaceTap { vm, mark, nic, tap } => {
                self.nic(step, vm, mark, nic)?;
                self.check_tap(tap, mark)?;
                self.nic(step, vm, mark, nic)?.tap = tap.to_string();
                Ok(())
            }
            other => failed(other, "it is not about a VM"),
        }
    }

    fn vms(&mut self) -> Result<&mut BTreeMap<ObjectName, Vm>, StepError> {
        match &mut self.world.vms {
            Ok(vms) => Ok(vms),
            Err(error) => failed("VMs", error),
        }
    }

    fn vm(&mut self, name: &ObjectName) -> Result<&mut Vm, StepError> {
        Ok(self.vms()?.entry(name.clone()).or_default())
    }

    fn check_vm(&mut self, name: &ObjectName, mark: &Mark) -> Done {
        match self.vms()?.get(name).and_then(|vm| vm.definition.as_ref()) {
            Some(definition) if definition.mark != *mark => not_ours(name, "the VM carries another mark"),
            _ => Ok(()),
        }
    }

    fn check_defined(&mut self, name: &ObjectName, mark: &Mark) -> Done {
        self.check_vm(name, mark)?;
        match self.vms()?.get(name).and_then(|vm| vm.definition.as_ref()) {
            Some(_) => Ok(()),
            None => not_ours(name, "it is not defined here"),
        }
    }

    /// Its process ends, as if it were killed.
    pub(super) fn kill_vm(&mut self, name: &ObjectName) {
        let ended = self.world.vms.as_mut().ok().and_then(|vms| vms.get_mut(name)).and_then(|vm| {
            vm.exit = None;
            vm.process.take()
        });
        if let Some(Ok(process)) = ended {
            self.give_pages(&process.config);
        }
    }

    fn running(&mut self, name: &ObjectName, mark: &Mark) -> Result<&mut VmProcess, StepError> {
        self.check_defined(name, mark)?;
        match &mut self.vm(name)?.process {
            Some(Ok(process)) => Ok(process),
            Some(Err(error)) => failed(name, error),
            None => failed(name, "it does not run"),
        }
    }

    fn disk(
        &mut self,
        step: &Step,
        vm: &ObjectName,
        mark: &Mark,
        disk: &str,
    ) -> Result<&mut DiskConfig, StepError> {
        let disks = &mut self.running(vm, mark)?.config.disks;
        match disks.iter_mut().find(|have| have.name == disk) {
            Some(disk) => Ok(disk),
            None => failed(step, "it has no such disk"),
        }
    }

    fn nic(
        &mut self,
        step: &Step,
        vm: &ObjectName,
        mark: &Mark,
        nic: &str,
    ) -> Result<&mut NicConfig, StepError> {
        match self.running(vm, mark)?.config.nics.iter_mut().find(|have| have.name == nic) {
            Some(nic) => Ok(nic),
            None => failed(step, "it has no such NIC"),
        }
    }

    /// A tap that carries a mark of this VM.
    fn check_tap(&mut self, tap: &LinkName, mark: &Mark) -> Done {
        let link = self.link(tap)?;
        match link.mark() {
            Some(found) if found.set == mark.set && found.owner == mark.owner => match link.kind {
                LinkKind::Tap { .. } => Ok(()),
                _ => failed(tap, "it is no tap"),
            },
            _ => not_ours(tap, "the tap carries another mark"),
        }
    }

    /// Opens and locks a disk for this VM; gives its capacity.
    fn open_disk(&mut self, vm: &ObjectName, disk: &DiskConfig) -> Result<u64, StepError> {
        let in_use = self.vms()?.iter().any(|(other, vm_there)| {
            let process = vm_there.process.as_ref().and_then(|process| process.as_ref().ok());
            process.is_some_and(|process| {
                process.config.disks.iter().any(|used| {
                    let same = other == vm && used.name == disk.name;
                    !same && used.path == disk.path && !(used.read_only && disk.read_only)
                })
            })
        });
        if in_use {
            return failed(&disk.path, "locked by another process");
        }
        Ok(self.disk_file(Path::new(&disk.path))?.header.virtual_size_bytes)
    }

    fn start_vm(&mut self, name: &ObjectName, definition: &VmDefinition) -> Done {
        self.check_vm(name, &definition.mark)?;
        if self.lacks.contains(&Capability::Kvm) {
            return Err(StepError::Lacks { what: format!("start VM {name}"), capability: Capability::Kvm });
        }
        let mut disk_capacity_bytes = Vec::new();
        for disk in &definition.config.disks {
            if let Some(seed) = definition.seed.as_ref().filter(|_| disk.name == SEED_DISK) {
                match &seed.user_data {
                    UserData::File(path) if !self.files.contains_key(path) => {
                        return failed(path.display(), "no such file");
                    }
                    _ => disk_capacity_bytes.push(512 << 10),
                }
                continue;
            }
            disk_capacity_bytes.push(self.open_disk(name, disk)?);
        }
        for nic in &definition.config.nics {
            match LinkName::parse(&nic.tap) {
                Ok(tap) => self.link(&tap)?,
                Err(error) => return failed(&nic.tap, error),
            };
        }
        self.next_pid += 1;
        let pid = self.next_pid;
        match &self.vm(name)?.process {
            Some(Ok(process)) if process.config == definition.config => return Ok(()),
            Some(_) => {
                return failed(format!("start VM {name}"), "it runs already, with another configuration");
            }
            None => {}
        }
        self.take_pages(&definition.config)?;
        let vm = self.vm(name)?;
        vm.process = Some(Ok(VmProcess {
            pid,
            phase: Phase::Running,
            uptime_ms: 0,
            reboots: 0,
            config: definition.config.clone(),
            disk_capacity_bytes,
            conditions: Vec::new(),
            cpu_share: Some(definition.cpu_share),
            limits: Some(ProcessLimits::of(&definition.config, false)),
            files_in_memory: false,
        }));
        vm.exit = None;
        Ok(())
    }

    fn check_slot(process: &VmProcess, step: &Step) -> Done {
        let config = &process.config;
        if config.machine == MachineKind::Micro {
            return failed(step, "this machine can't do that");
        }
        if config.disks.len() + config.nics.len() >= config.machine.devices_max() {
            return failed(step, "it has no slot left");
        }
        Ok(())
    }

    fn add_disk(&mut self, step: &Step, vm: &ObjectName, mark: &Mark, disk: &DiskConfig) -> Done {
        let process = self.running(vm, mark)?;
        match process.config.disks.iter().find(|have| have.name == disk.name) {
            Some(have) if (&have.path, have.read_only) == (&disk.path, disk.read_only) => return Ok(()),
            Some(_) => return failed(step, "it has another disk of this name"),
            None => Self::check_slot(process, step)?,
        }
        let capacity_bytes = self.open_disk(vm, disk)?;
        let process = self.running(vm, mark)?;
        process.config.disks.push(disk.clone());
        process.disk_capacity_bytes.push(capacity_bytes);
        Ok(())
    }

    fn add_nic(&mut self, step: &Step, vm: &ObjectName, mark: &Mark, nic: &NicConfig) -> Done {
        let process = self.running(vm, mark)?;
        match process.config.nics.iter().find(|have| have.name == nic.name) {
            Some(have) if have.mac_address == nic.mac_address => return Ok(()),
            Some(_) => return failed(step, "it has another NIC of this name"),
            None => Self::check_slot(process, step)?,
        }
        match LinkName::parse(&nic.tap) {
            Ok(tap) => self.check_tap(&tap, mark)?,
            Err(error) => return failed(step, error),
        }
        self.running(vm, mark)?.config.nics.push(nic.clone());
        Ok(())
    }

    fn remove_device(&mut self, step: &Step, vm: &ObjectName, mark: &Mark, device: &str) -> Done {
        let refuses = self.faults.guests_refuse;
        let process = self.running(vm, mark)?;
        let disk = process.config.disks.iter().position(|disk| disk.name == device);
        let nic = process.config.nics.iter().position(|nic| nic.name == device);
        if disk.is_none() && nic.is_none() {
            return Ok(());
        }
        if process.config.machine == MachineKind::Micro {
            return failed(step, "this machine can't do that");
        }
        let is_about = |condition: &Condition| {
            condition.kind == ConditionKind::UnplugPending && condition.device.as_deref() == Some(device)
        };
        if refuses || process.phase == Phase::Paused {
            if !process.conditions.iter().any(is_about) {
                process.conditions.push(Condition {
                    kind: ConditionKind::UnplugPending,
                    device: Some(device.to_owned()),
                    message: format!("the guest was asked to let go of {device}"),
                    age_ms: 0,
                });
            }
            return failed(step, "the guest has not let go of it");
        }
        if let Some(disk) = disk {
            process.config.disks.remove(disk);
            process.disk_capacity_bytes.remove(disk);
        }
        if let Some(nic) = nic {
            process.config.nics.remove(nic);
        }
        process.conditions.retain(|condition| !is_about(condition));
        Ok(())
    }

    fn resize_disk(
        &mut self,
        step: &Step,
        vm: &ObjectName,
        mark: &Mark,
        disk: &str,
        capacity_bytes: u64,
    ) -> Done {
        let path = self.disk(step, vm, mark, disk)?.path.clone();
        let path = Path::new(&path);
        let have = self.disk_file(path)?;
        match path.starts_with("/dev") {
            false => grow(have, capacity_bytes)?,
            true if have.size_bytes < capacity_bytes => {
                return failed(step, "the block device is smaller: grow it first");
            }
            true => {}
        }
        let process = self.running(vm, mark)?;
        if let Some(place) = process.config.disks.iter().position(|have| have.name == disk) {
            process.disk_capacity_bytes[place] = capacity_bytes;
        }
        Ok(())
    }
}
