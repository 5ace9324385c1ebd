//! PCI as the guest meets it: a function's registers, and the bus with its configuration space, BARs and
//! hot-plug registers.

use std::collections::BTreeSet;
use std::os::fd::AsRawFd as _;
use std::sync::{Arc, Mutex};

use arbitrary::{Arbitrary, Unstructured};
use vmctl::vmm::bus::{Bus, BusDevice as _};
use vmctl::vmm::device::entropy::Entropy;
use vmctl::vmm::layout;
use vmctl::vmm::memory::GuestMemory;
use vmctl::vmm::pci::PciFunction as _;
use vmctl::vmm::pci::bars::{BarMap, Notifications, Window};
use vmctl::vmm::pci::hotplug::{Hotplug, HotplugRegisters};
use vmctl::vmm::pci::msix::{Message, MessageRoutes};
use vmctl::vmm::pci::root::{ConfigPorts, Ecam, PciRoot};
use vmctl::vmm::transport::pci::{BAR_BYTES, PciTransport, VECTORS_MAX};
use vmctl::vmm::transport::{Transport as _, VirtioDevice};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::devices::{events, no_filter};
use super::mmio::wait_until_taken;
use super::virtio::{Transport, memory};

const SLOT: u8 = 1;
const NOTIFY: u64 = 0x3000;

/// In KVM's place: wants calls that make sense.
struct Routes {
    first_gsi: u32,
    connected: Mutex<BTreeSet<u32>>,
}

impl Routes {
    fn new(first_gsi: u32) -> Arc<Self> {
        Arc::new(Self { first_gsi, connected: Mutex::default() })
    }

    fn check(&self, gsi: u32) {
        let own = self.first_gsi..self.first_gsi + u32::from(VECTORS_MAX);
        assert!(own.contains(&gsi), "GSI {gsi} is another function's");
    }
}

impl MessageRoutes for Routes {
    fn set_route(&self, gsi: u32, _message: Message) -> std::io::Result<()> {
        self.check(gsi);
        Ok(())
    }

    fn connect(&self, _event: &EventFd, gsi: u32) -> std::io::Result<()> {
        self.check(gsi);
        assert!(self.connected.lock().expect("a lock").insert(gsi), "GSI {gsi} is connected twice");
        Ok(())
    }

    fn disconnect(&self, _event: &EventFd, gsi: u32) -> std::io::Result<()> {
        assert!(self.connected.lock().expect("a lock").remove(&gsi), "GSI {gsi} was not connected");
        Ok(())
    }
}

/// One virtio function, as its driver meets it: registers are those of the BAR.
pub struct Pci {
    transport: PciTransport,
    msix_control: u16,
}

impl Pci {
    pub fn new(device: impl VirtioDevice + 'static, memory: GuestMemory) -> Self {
        let (address, gsi) = (layout::pci_bar_address(SLOT), layout::pci_first_gsi(SLOT));
        let device = Box::new(device);
        let mut transport =
            PciTransport::new(device, memory, Routes::new(gsi), address, gsi).expect("a transport");
        let msix_control = find_capability(&mut transport, 0x11) + 2;
        Self { transport, msix_control }
    }

    fn set(&mut self, offset: u64, value: u64, width: usize) {
        self.transport.write(offset, &value.to_le_bytes()[..width]);
    }

    fn get(&mut self, offset: u64, width: usize) -> u64 {
        let mut data = [0; 8];
        self.transport.read(offset, &mut data[..width]);
        u64::from_le_bytes(data)
    }
}

fn find_capability(transport: &mut PciTransport, id: u8) -> u16 {
    let mut byte = |at: u16| {
        let mut data = [0];
        transport.read_config(at, &mut data);
        data[0]
    };
    let mut at = u16::from(byte(0x34));
    for _ in 0..48 {
        if at == 0 || byte(at) == id {
            break;
        }
        at = byte(at + 1).into();
    }
    assert_ne!(at, 0, "no capability {id}");
    at
}

impl Transport for Pci {
    fn negotiate(&mut self, refused: u64) {
        const VERSION_1: u64 = 1 << 32;
        const MEMORY_AND_BUS_MASTER: u8 = 6;
        self.transport.write_config(4, &[MEMORY_AND_BUS_MASTER, 0]);
        self.transport.write_config(self.msix_control, &0x8000u16.to_le_bytes());
        for vector in 0..4 {
            let entry = 0x4000 + 16 * vector;
            for (at, value) in [(0, 0xfee0_0000), (4, 0), (8, 0x40 + vector), (12, 0)] {
                self.set(entry + at, value, 4);
            }
        }
        for status in [0, 1, 3] {
            self.set(0x14, status, 1);
        }
        for half in [0, 1] {
            self.set(0, half, 4);
            let offered = self.get(4, 4);
            self.set(8, half, 4);
            self.set(0xc, offered & !((refused & !VERSION_1) >> (32 * half)), 4);
        }
        self.set(0x14, 11, 1);
    }

    fn queue_sizes(&mut self) -> Vec<u16> {
        let queues = self.get(0x12, 2);
        let size = |queue| {
            self.set(0x16, queue, 2);
            self.get(0x18, 2) as u16
        };
        (0..queues).map(size).collect()
    }

    fn set_up_queue(&mut self, queue: u16, size: u16, descriptors: u64, available: u64, used: u64) {
        self.set(0x16, queue.into(), 2);
        self.set(0x18, size.into(), 2);
        self.set(0x1a, u64::from(queue) + 1, 2);
        for (register, address) in [(0x20, descriptors), (0x28, available), (0x30, used)] {
            self.set(register, address, 8);
        }
        self.set(0x1c, 1, 2);
    }

    fn driver_ok(&mut self) {
        self.set(0x14, 15, 1);
    }

    fn kick(&mut self, queue: u16) {
        self.set(NOTIFY + 4 * u64::from(queue), queue.into(), 2);
        let doorbells = self.transport.doorbells();
        let events: Vec<_> = doorbells.iter().map(|doorbell| doorbell.event.as_raw_fd()).collect();
        wait_until_taken(&events);
    }

    fn reset(&mut self) {
        self.transport.reset();
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.transport.read(offset % u64::from(BAR_BYTES), data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.transport.write(offset % u64::from(BAR_BYTES), data);
    }

    /// The bus hands on no access that crosses a multiple of 4.
    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        let length = data.len().min(4 - offset as usize % 4);
        self.transport.read_config(offset as u16, &mut data[..length]);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let length = data.len().min(4 - offset as usize % 4);
        self.transport.write_config(offset as u16, &data[..length]);
    }
}

/// In KVM's place: each address is connected once, and BARs stay in their window.
#[derive(Default)]
struct Doorbells(Mutex<BTreeSet<u64>>);

impl Notifications for Doorbells {
    fn connect(&self, address: u64, _event: &EventFd) {
        let window = layout::PCI_MEMORY_START..layout::PCI_MEMORY_END;
        assert!(window.contains(&address), "a BAR at {address:#x}");
        assert!(self.0.lock().expect("a lock").insert(address), "{address:#x} is connected twice");
    }

    fn disconnect(&self, address: u64, _event: &EventFd) {
        assert!(self.0.lock().expect("a lock").remove(&address), "{address:#x} was not connected");
    }
}

#[derive(Debug, Arbitrary)]
enum Operation {
    ReadConfig {
        slot: u8,
        register: u16,
        width: u8,
    },
    WriteConfig {
        slot: u8,
        register: u8,
        width: u8,
        value: u32,
    },
    ReadPort {
        port: u8,
        width: u8,
    },
    WritePort {
        port: u8,
        width: u8,
        value: u32,
    },
    /// Where BARs are at first, and beside that.
    ReadMemory {
        slot: u8,
        offset: u16,
        width: u8,
    },
    WriteMemory {
        slot: u8,
        offset: u16,
        width: u8,
        value: u64,
    },
    MoveBar {
        slot: u8,
        to: u8,
        decoding: bool,
    },
    ReadHotplug {
        register: u8,
        width: u8,
    },
    Eject {
        slots: u32,
        register: u8,
    },
    Ask(u8),
    Added(u8),
    Remove(u8),
}

struct Machine {
    ecam: Ecam,
    ports: ConfigPorts,
    mmio: Arc<Bus>,
    bars: Arc<BarMap>,
    registers: HotplugRegisters,
}

const FUNCTIONS: u8 = 3;

impl Machine {
    fn new() -> Self {
        let mmio = Arc::new(Bus::new());
        let bars = Arc::new(BarMap::new(mmio.clone(), Arc::new(Doorbells::default())));
        let mut root = PciRoot::new(bars.clone());
        let memory = memory();
        for slot in 1..=FUNCTIONS {
            let (address, gsi) = (layout::pci_bar_address(slot), layout::pci_first_gsi(slot));
            let device = Box::new(Entropy::new(Default::default(), &no_filter()).expect("a device"));
            let transport = PciTransport::new(device, memory.clone(), Routes::new(gsi), address, gsi);
            let transport = transport.expect("a transport");
            let (doorbells, wanted) = (transport.doorbells(), transport.bar().expect("a BAR"));
            let transport = Arc::new(Mutex::new(transport));
            let window = Window { bytes: BAR_BYTES.into(), device: transport.clone(), doorbells };
            bars.insert(slot, window, wanted);
            root.insert(slot, transport);
        }
        let root = Arc::new(Mutex::new(root));
        let hotplug = Arc::new(Hotplug::new(EventFd::new(EFD_NONBLOCK).expect("an event")));
        Self {
            ecam: Ecam(root.clone()),
            ports: ConfigPorts::new(root.clone()),
            mmio,
            bars,
            registers: HotplugRegisters { hotplug, root, events: events() },
        }
    }

    fn write_config(&mut self, slot: u8, register: u64, data: &[u8]) {
        self.ecam.write(u64::from(slot % 5) * 0x8000 + register, data);
    }

    fn run(&mut self, operation: &Operation) {
        let mut data = [0; 8];
        let address =
            |slot: u8, offset: u16| u64::from(layout::pci_bar_address(slot % 5)) + u64::from(offset);
        match *operation {
            Operation::ReadConfig { slot, register, width } => {
                let at = u64::from(slot) * 0x8000 + u64::from(register);
                self.ecam.read(at, &mut data[..1 << (width % 4)]);
            }
            Operation::WriteConfig { slot, register, width, value } => {
                self.write_config(slot, register.into(), &value.to_le_bytes()[..1 << (width % 3)]);
            }
            Operation::ReadPort { port, width } => {
                self.ports.read(u64::from(port % 8), &mut data[..1 << (width % 3)]);
            }
            Operation::WritePort { port, width, value } => {
                self.ports.write(u64::from(port % 8), &value.to_le_bytes()[..1 << (width % 3)]);
            }
            Operation::ReadMemory { slot, offset, width } => {
                self.mmio.read(address(slot, offset), &mut data[..1 << (width % 4)]);
            }
            Operation::WriteMemory { slot, offset, width, value } => {
                let value = value.to_le_bytes();
                self.mmio.write(address(slot, offset), &value[..1 << (width % 4)]);
            }
            Operation::MoveBar { slot, to, decoding } => {
                let command = if decoding { 6u16 } else { 0 };
                self.write_config(slot, 4, &0u16.to_le_bytes());
                // Some are in the window of BARs and some in RAM or on other devices.
                let at = (layout::PCI_MEMORY_START as u32).wrapping_add(u32::from(to) * (BAR_BYTES / 2));
                self.write_config(slot, 0x10, &at.to_le_bytes());
                self.write_config(slot, 4, &command.to_le_bytes());
            }
            Operation::ReadHotplug { register, width } => {
                self.registers.read(register.into(), &mut data[..1 << (width % 4)]);
            }
            Operation::Eject { slots, register } => {
                self.registers.write(u64::from(register & !3), &slots.to_le_bytes());
            }
            Operation::Ask(slot) => self.registers.hotplug.ask(slot % 40),
            Operation::Added(slot) => self.registers.hotplug.added(slot % 40),
            Operation::Remove(slot) => {
                self.bars.remove(slot % 5);
                self.registers.root.lock().expect("a lock").remove(slot % 5);
                self.registers.hotplug.removed(slot % 5);
            }
        }
    }
}

/// Three functions on the bus, and everything that a guest can do to them.
pub fn bus(data: &[u8]) {
    let operations: Vec<Operation> = Vec::arbitrary_take_rest(Unstructured::new(data)).unwrap_or_default();
    let mut machine = Machine::new();
    for operation in operations.iter().take(200) {
        machine.run(operation);
    }
}
