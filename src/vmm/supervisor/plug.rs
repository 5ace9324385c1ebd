//! Disks and NICs that come and go while the guest runs. The configuration, which is the truth about
//! this VM, changes with the machine: a device is in it from when it is plugged in to when the guest has
//! let go of it.

use std::io;
use std::os::fd::OwnedFd;

use super::{Supervisor, answer};
use crate::vmm::config::{BootConfig, DiskConfig, NicConfig};
use crate::vmm::device::block::Block;
use crate::vmm::device::net::{Net, NicFiles};
use crate::vmm::machine::MachineError;
use crate::vmm::protocol::{ConditionKind, Event, Response};

fn refused(message: impl Into<String>) -> Response {
    Response::Error { message: message.into() }
}

/// What a device's constructor said, unless its thread is gone.
fn flatten<T, E>(
    made: io::Result<Result<T, E>>,
    error: impl FnOnce(E) -> MachineError,
) -> Result<T, MachineError> {
    match made {
        Ok(result) => result.map_err(error),
        Err(source) => Err(MachineError::Io { what: "make a device", source }),
    }
}

impl Supervisor {
    /// Why no device of this name can be plugged in. A device that is there already, and the same, is
    /// no reason: then there is nothing to do.
    fn plug_refusal(&self, name: &str, fds: usize, wanted: &[usize]) -> Option<Response> {
        if !self.machine.can_hotplug() {
            return Some(refused("a machine of kind micro has the devices that it started with"));
        }
        if !wanted.contains(&fds) {
            return Some(refused(format!("the request came with {fds} descriptors, not {wanted:?}")));
        }
        let config = &self.config;
        let taken = config.disks.iter().any(|disk| disk.name == name)
            || config.nics.iter().any(|nic| nic.name == name);
        if taken {
            return Some(refused(format!("this VM has another device {name:?}: remove it first")));
        }
        let devices_max = config.machine.devices_max();
        (config.disks.len() + config.nics.len() >= devices_max)
            .then(|| refused(format!("this VM has {devices_max} disks and NICs, which is the most")))
    }

    pub(super) fn add_disk(&mut self, disk: DiskConfig, fds: Vec<OwnedFd>) -> Response {
        if self.config.disks.contains(&disk) {
            return Response::Done;
        }
        if let Some(refusal) = self.plug_refusal(&disk.name, fds.len(), &[1 + disk.backing.len()]) {
            return refusal;
        }
        let mut fds = fds.into_iter();
        // They were counted.
        let Some(image) = fds.next() else { return refused("no descriptor came with the request") };
        let (config, backing, events) = (disk.clone(), fds.collect(), self.machine.events());
        let made = self.spawner.run(move |start| Block::new(&config, image, backing, start, events));
        let plugged =
            flatten(made, MachineError::Disk).and_then(|block| self.machine.plug_disk(&disk.name, block));
        if plugged.is_ok() {
            self.clients.announce(&Event::DeviceAdded { device: disk.name.clone() });
            self.config.disks.push(disk);
        }
        answer(plugged)
    }

    pub(super) fn add_nic(&mut self, nic: NicConfig, fds: Vec<OwnedFd>) -> Response {
        if self.config.nics.contains(&nic) {
            return Response::Done;
        }
        let pairs = usize::from(nic.queue_pairs);
        if let Some(refusal) = self.plug_refusal(&nic.name, fds.len(), &[pairs, 2 * pairs]) {
            return refusal;
        }
        let mut taps = fds;
        let vhosts = taps.split_off(pairs);
        let (config, files) = (nic.clone(), NicFiles { taps, vhosts });
        let made = self.spawner.run(move |start| Net::new(&config, files, start));
        let plugged = flatten(made, MachineError::Nic).and_then(|net| self.machine.plug_nic(&nic.name, net));
        if plugged.is_ok() {
            self.clients.announce(&Event::DeviceAdded { device: nic.name.clone() });
            self.config.nics.push(nic);
        }
        answer(plugged)
    }

    pub(super) fn remove_device(&mut self, device: &str) -> Response {
        if !self.machine.can_hotplug() {
            return refused("a machine of kind micro keeps the devices that it started with");
        }
        // A reset reads the kernel from it again.
        if matches!(&self.config.boot, BootConfig::Disk(boot) if boot.disk == device) {
            return refused(format!("the VM boots from {device}: it keeps it until it boots from another"));
        }
        if !self.machine.ask_to_eject(device) {
            // Gone already, or never there: the same to who wants it gone.
            return Response::Done;
        }
        let message = format!("the guest was asked to let go of {device}");
        let event = self.conditions.raise(ConditionKind::UnplugPending, Some(device), message);
        self.announce(event);
        Response::Done
    }

    /// The guest has let go of what was in this slot.
    pub(super) fn ejected(&mut self, slot: u8) {
        if let Some(device) = self.machine.ejected(slot) {
            self.forget_device(device);
        }
    }

    /// The machine has this device no more.
    pub(super) fn forget_device(&mut self, device: String) {
        self.config.disks.retain(|disk| disk.name != device);
        self.config.nics.retain(|nic| nic.name != device);
        for kind in [ConditionKind::UnplugPending, ConditionKind::DiskFull] {
            let event = self.conditions.clear(kind, Some(&device));
            self.announce(event);
        }
        self.clients.announce(&Event::DeviceRemoved { device });
    }
}
