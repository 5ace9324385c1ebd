//! Where virtio devices are put: slots of a PCI bus, or places of virtio-mmio. The machine sees a list of
//! transports, and no device knows which it has.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use kvm_ioctls::{IoEventAddress, NoDatamatch, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::{MachineError, eventfd, io, kvm, lock};
use crate::vmm::acpi::Devices as AcpiDevices;
use crate::vmm::bus::Bus;
use crate::vmm::config::MachineKind;
use crate::vmm::event::EventSender;
use crate::vmm::irq::Routes;
use crate::vmm::layout;
use crate::vmm::memory::GuestMemory;
use crate::vmm::pci::bars::{BarMap, Notifications, Window};
use crate::vmm::pci::hotplug::{self, Hotplug, HotplugRegisters};
use crate::vmm::pci::root::{self, ConfigPorts, Ecam, PciRoot};
use crate::vmm::pci::{PciFunction as _, SLOTS};
use crate::vmm::transport::mmio::MmioTransport;
use crate::vmm::transport::pci::{BAR_BYTES, PciTransport};
use crate::vmm::transport::{Transport, VirtioDevice};

/// What a device is, as far as its place goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    Disk,
    Nic,
    /// There from the start to the end.
    Fixed,
}

/// The two buses of the vCPUs.
pub struct Buses {
    pub pio: Arc<Bus>,
    pub mmio: Arc<Bus>,
}

pub struct Backplane {
    vm: Arc<VmFd>,
    memory: GuestMemory,
    mmio: Arc<Bus>,
    kind: Kind,
    devices: BTreeMap<u8, Arc<Mutex<dyn Transport>>>,
}

enum Kind {
    Micro,
    Pci(Pci),
}

struct Pci {
    root: Arc<Mutex<PciRoot>>,
    bars: Arc<BarMap>,
    routes: Arc<Routes>,
    hotplug: Arc<Hotplug>,
}

impl Backplane {
    pub fn new(
        kind: MachineKind,
        vm: Arc<VmFd>,
        memory: GuestMemory,
        buses: &Buses,
        events: EventSender,
    ) -> Result<Self, MachineError> {
        let kind = match kind {
            MachineKind::Micro => Kind::Micro,
            MachineKind::Pci => Kind::Pci(Pci::new(&vm, buses, events)?),
        };
        Ok(Self { vm, memory, mmio: buses.mmio.clone(), kind, devices: BTreeMap::new() })
    }

    /// What the ACPI tables must name.
    pub fn acpi(&self) -> AcpiDevices {
        match self.kind {
            Kind::Micro => AcpiDevices::Mmio { slots: self.devices.len() },
            Kind::Pci(_) => AcpiDevices::Pci,
        }
    }

    /// Puts a device into a free slot; gives the slot.
    pub fn insert(&mut self, class: Class, device: Box<dyn VirtioDevice>) -> Result<u8, MachineError> {
        let slot = self.free_slot(class).ok_or(MachineError::NoFreeSlot)?;
        let transport = match &self.kind {
            Kind::Micro => self.insert_mmio(slot, device)?,
            Kind::Pci(pci) => pci.insert(slot, device, self.memory.clone())?,
        };
        self.devices.insert(slot, transport);
        Ok(slot)
    }

    fn free_slot(&self, class: Class) -> Option<u8> {
        let free = |slot: &u8| !self.devices.contains_key(slot);
        let (first, last) = match (&self.kind, class) {
            (Kind::Micro, _) => return (0..layout::VIRTIO_SLOTS as u8).find(free),
            (Kind::Pci(_), Class::Fixed) => return (layout::PCI_FIRST_FIXED_SLOT..SLOTS).find(free),
            (Kind::Pci(_), Class::Disk) => (layout::PCI_FIRST_DISK_SLOT, layout::PCI_LAST_HOTPLUG_SLOT),
            (Kind::Pci(_), Class::Nic) => (layout::PCI_FIRST_NIC_SLOT, layout::PCI_LAST_HOTPLUG_SLOT),
        };
        (first..=last).chain(layout::PCI_FIRST_DISK_SLOT..first).find(free)
    }

    fn insert_mmio(
        &self,
        slot: u8,
        device: Box<dyn VirtioDevice>,
    ) -> Result<Arc<Mutex<dyn Transport>>, MachineError> {
        let address = layout::virtio_address(slot.into());
        let transport =
            MmioTransport::new(device, self.memory.clone()).map_err(io("make a virtio device"))?;
        self.vm
            .register_irqfd(transport.irq(), layout::virtio_gsi(slot.into()))
            .map_err(kvm("bind a device's interrupt"))?;
        for notifier in transport.notifiers() {
            let at = IoEventAddress::Mmio(address + notifier.offset);
            self.vm
                .register_ioevent(notifier.event, &at, notifier.datamatch)
                .map_err(kvm("bind a device's notification"))?;
        }
        let transport = Arc::new(Mutex::new(transport));
        self.mmio.insert(address, layout::VIRTIO_MMIO_BYTES, transport.clone())?;
        Ok(transport)
    }

    /// Tells a running guest of a new device.
    pub fn announce(&self, slot: u8) {
        if let Kind::Pci(pci) = &self.kind {
            pci.hotplug.added(slot);
        }
    }

    /// Whether devices may come and go.
    pub fn can_hotplug(&self) -> bool {
        matches!(self.kind, Kind::Pci(_))
    }

    /// Asks the guest to let go of a device.
    pub fn ask_to_eject(&self, slot: u8) {
        if let Kind::Pci(pci) = &self.kind {
            pci.hotplug.ask(slot);
        }
    }

    /// Whether the guest was asked to let go of this device, and hasn't.
    pub fn is_leaving(&self, slot: u8) -> bool {
        matches!(&self.kind, Kind::Pci(pci) if pci.hotplug.is_leaving(slot))
    }

    /// Takes a device out; when it returns nothing of the device touches guest memory.
    pub fn remove(&mut self, slot: u8) {
        let Some(transport) = self.devices.remove(&slot) else { return };
        if let Kind::Pci(pci) = &self.kind {
            lock(&pci.root).remove(slot);
            pci.bars.remove(slot);
            pci.hotplug.removed(slot);
        }
        // Whoever found it on a bus a moment ago may still have it, and drops it then.
        lock(&transport).reset();
    }

    /// For a reset of the machine: all devices as at the start.
    pub fn reset(&self) {
        for (&slot, transport) in &self.devices {
            lock(transport).reset();
            if let Kind::Pci(pci) = &self.kind {
                pci.bars.want(
                    slot,
                    crate::vmm::pci::Bar { address: layout::pci_bar_address(slot), decoding: true },
                );
            }
        }
        if let Kind::Pci(pci) = &self.kind {
            pci.hotplug.reset();
        }
    }
}

impl Pci {
    fn new(vm: &Arc<VmFd>, buses: &Buses, events: EventSender) -> Result<Self, MachineError> {
        let bars = Arc::new(BarMap::new(buses.mmio.clone(), Arc::new(KvmNotifications(vm.clone()))));
        let root = Arc::new(Mutex::new(PciRoot::new(bars.clone())));
        let interrupt = eventfd()?;
        vm.register_irqfd(&interrupt, layout::PCI_HOTPLUG_GSI).map_err(kvm("bind the hot-plug interrupt"))?;
        let hotplug = Arc::new(Hotplug::new(interrupt));
        let ecam = Arc::new(Mutex::new(Ecam(root.clone())));
        buses.mmio.insert(layout::PCI_ECAM_START, root::ECAM_BYTES, ecam)?;
        let ports = Arc::new(Mutex::new(ConfigPorts::new(root.clone())));
        buses.pio.insert(root::PORTS_START.into(), root::PORTS.into(), ports)?;
        let registers = HotplugRegisters { hotplug: hotplug.clone(), root: root.clone(), events };
        buses.pio.insert(
            hotplug::PORTS_START.into(),
            hotplug::PORTS.into(),
            Arc::new(Mutex::new(registers)),
        )?;
        Ok(Self { root, bars, routes: Arc::new(Routes::new(vm.clone())), hotplug })
    }

    fn insert(
        &self,
        slot: u8,
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
    ) -> Result<Arc<Mutex<dyn Transport>>, MachineError> {
        let (bar, gsi) = (layout::pci_bar_address(slot), layout::pci_first_gsi(slot));
        let transport = PciTransport::new(device, memory, self.routes.clone(), bar, gsi)
            .map_err(io("make a virtio device"))?;
        let (doorbells, wanted) = (transport.doorbells(), transport.bar());
        let transport = Arc::new(Mutex::new(transport));
        if let Some(wanted) = wanted {
            let window = Window { bytes: BAR_BYTES.into(), device: transport.clone(), doorbells };
            self.bars.insert(slot, window, wanted);
        }
        lock(&self.root).insert(slot, transport.clone());
        Ok(transport)
    }
}

/// Notifications become events in the kernel, without an exit of the vCPU.
struct KvmNotifications(Arc<VmFd>);

impl Notifications for KvmNotifications {
    fn connect(&self, address: u64, event: &EventFd) {
        // Without it the write exits, and the bus brings it to the device.
        let _ = self.0.register_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch);
    }

    fn disconnect(&self, address: u64, event: &EventFd) {
        // What wasn't connected needs no disconnecting.
        let _ = self.0.unregister_ioevent(event, &IoEventAddress::Mmio(address), NoDatamatch);
    }
}
