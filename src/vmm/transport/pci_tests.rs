use std::sync::Mutex;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::vmm::bus::Bus;
use crate::vmm::device::entropy::Entropy;
use crate::vmm::device::testing::{memory, sandbox_hook};
use crate::vmm::layout;
use crate::vmm::pci::bars::{BarMap, Notifications, Window};
use crate::vmm::pci::msix::Message;
use crate::vmm::pci::root::{ConfigPorts, Ecam, PciRoot};

/// Connects nothing: interrupts stay in their descriptors, and notifications reach the registers.
struct Unconnected;

impl MessageRoutes for Unconnected {
    fn set_route(&self, _gsi: u32, _message: Message) -> io::Result<()> {
        Ok(())
    }
    fn connect(&self, _event: &EventFd, _gsi: u32) -> io::Result<()> {
        Ok(())
    }
    fn disconnect(&self, _event: &EventFd, _gsi: u32) -> io::Result<()> {
        Ok(())
    }
}

impl Notifications for Unconnected {
    fn connect(&self, _address: u64, _event: &EventFd) {}
    fn disconnect(&self, _address: u64, _event: &EventFd) {}
}

const SLOT: u8 = 3;
const BAR: u32 = 0xc001_8000;

/// A guest's view: configuration space by ECAM and by ports, memory by the bus.
struct Guest {
    bus: Arc<Bus>,
    ecam: Ecam,
    ports: ConfigPorts,
    transport: Arc<Mutex<PciTransport>>,
    memory: GuestMemory,
}

fn guest() -> Guest {
    let memory = memory();
    let (bus, unconnected) = (Arc::new(Bus::new()), Arc::new(Unconnected));
    let bars = Arc::new(BarMap::new(bus.clone(), unconnected.clone()));
    let root = Arc::new(Mutex::new(PciRoot::new(bars.clone())));
    let entropy = Entropy::new(Default::default(), &sandbox_hook()).unwrap();
    let transport = PciTransport::new(Box::new(entropy), memory.clone(), unconnected, BAR, 100).unwrap();
    let (doorbells, wanted) = (transport.doorbells(), transport.bar().unwrap());
    assert_eq!((wanted, doorbells.len()), (Bar { address: BAR, decoding: true }, 1));
    let transport = Arc::new(Mutex::new(transport));
    let window = Window { bytes: BAR_BYTES.into(), device: transport.clone(), doorbells };
    bars.insert(SLOT, window, wanted);
    root.lock().unwrap().insert(SLOT, transport.clone());
    Guest { bus, ecam: Ecam(root.clone()), ports: ConfigPorts::new(root), transport, memory }
}

impl Guest {
    fn config(&mut self, offset: u64, width: usize) -> u64 {
        let mut data = [0; 8];
        self.ecam.read((u64::from(SLOT) << 15) + offset, &mut data[..width]);
        u64::from_le_bytes(data)
    }

    fn set_config(&mut self, offset: u64, data: &[u8]) {
        self.ecam.write((u64::from(SLOT) << 15) + offset, data);
    }

    fn port_read(&mut self, address: u32, width: usize) -> u64 {
        self.ports.write(0, &address.to_le_bytes());
        let mut data = [0; 8];
        self.ports.read(4, &mut data[..width]);
        u64::from_le_bytes(data)
    }

    fn read(&self, offset: u64, width: usize) -> u64 {
        let mut data = [0; 8];
        assert!(self.bus.read(u64::from(BAR) + offset, &mut data[..width]));
        u64::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u64, width: usize) {
        assert!(self.bus.write(u64::from(BAR) + offset, &value.to_le_bytes()[..width]));
    }

    /// The offsets of the capabilities of this kind.
    fn capabilities(&mut self, id: u64) -> Vec<u64> {
        let (mut found, mut at) = (Vec::new(), self.config(0x34, 1));
        while at != 0 {
            if self.config(at, 1) == id {
                found.push(at);
            }
            at = self.config(at + 1, 1);
        }
        found
    }

    /// Brings the device to work as a driver would, with vectors 1 for its queue and 0 for the rest.
    fn start(&mut self) {
        let msix = self.capabilities(0x11)[0];
        self.set_config(msix + 2, &0x8001_u16.to_le_bytes());
        for status in [0, 1, 3] {
            self.write(0x14, status, 1);
        }
        self.write(0x08, 1, 4);
        self.write(0x0c, 1, 4);
        self.write(0x14, 11, 1);
        assert_eq!(self.read(0x14, 1), 11);
        self.write(0x10, 0, 2);
        self.write(0x16, 0, 2);
        self.write(0x1a, 1, 2);
        assert_eq!((self.read(0x10, 2), self.read(0x1a, 2)), (0, 1));
        self.memory.write_slice(&[0; 0x3000], GuestAddress(0x1000)).unwrap();
        // One address in halves, one at once.
        self.write(0x20, 0x1000, 4);
        self.write(0x24, 0, 4);
        self.write(0x28, 0x2000, 8);
        self.write(0x30, 0x3000, 8);
        self.write(0x1c, 1, 2);
        assert_eq!((self.read(0x1c, 2), self.read(0x28, 8)), (1, 0x2000));
        self.write(0x14, 15, 1);
        assert_eq!(self.read(0x14, 1), 15);
    }

    /// Asks for random bytes; gives how many came.
    fn ask(&self, available: u16) -> u32 {
        let descriptor = [0x5000_u64, 64 | 2 << 32];
        self.memory.write_obj(descriptor, GuestAddress(0x1000)).unwrap();
        self.memory.write_obj(available, GuestAddress(0x2002)).unwrap();
        self.write(0x3000, 0, 2);
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while self.memory.read_obj::<u16>(GuestAddress(0x3002)).unwrap() != available {
            assert!(std::time::Instant::now() < deadline, "the device used no buffer in time");
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        let slot = u64::from(available - 1) % self.read(0x18, 2);
        self.memory.read_obj(GuestAddress(0x3004 + slot * 8 + 4)).unwrap()
    }

    /// Takes the interrupts of a vector.
    fn interrupts(&self, vector: u16) -> u64 {
        let transport = self.transport.lock().unwrap();
        let event = transport.driver.interrupt.msix.event(vector).unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_millis(200);
        loop {
            match event.read() {
                Ok(count) => return count,
                Err(_) if std::time::Instant::now() > deadline => return 0,
                Err(_) => std::thread::sleep(std::time::Duration::from_millis(1)),
            }
        }
    }
}

#[test]
fn both_ways_to_configuration_space_show_the_same_device() {
    let mut guest = guest();
    assert_eq!(guest.config(0, 4), 0x1044_1af4);
    assert_eq!(guest.port_read(0x8000_0000 | u32::from(SLOT) << 11, 4), 0x1044_1af4);
    // The host bridge, an empty slot, another function, another bus, and not enabled.
    assert_eq!(guest.port_read(0x8000_0000, 4), 0x0008_1b36);
    for address in [0x8000_0800, 0x8000_0000 | u32::from(SLOT) << 11 | 0x100, 0x8001_0000, 0x0000_0000] {
        assert_eq!(guest.port_read(address, 4), 0xffff_ffff, "{address:#x}");
    }
    assert_eq!(guest.capabilities(0x11).len(), 1);
    let kinds: Vec<u64> = guest.capabilities(0x09).iter().map(|at| guest.config(at + 3, 1)).collect();
    assert_eq!(kinds, [1, 3, 4, 2, 5]);
}

#[test]
fn a_driver_that_does_it_right_gets_bytes_and_its_queues_interrupt() {
    let mut guest = guest();
    for round in 0..2 {
        guest.start();
        guest.interrupts(0);
        assert_eq!(guest.ask(1), 64, "round {round}");
        assert_eq!((guest.interrupts(1), guest.interrupts(0)), (1, 0));
        // Vectors are the driver's until it resets the device.
        guest.write(0x1a, 0, 2);
        assert_eq!(guest.read(0x1a, 2), 1);
        guest.write(0x14, 0, 1);
        assert_eq!((guest.read(0x1a, 2), guest.read(0x1c, 2), guest.read(0x14, 1)), (0xffff, 0, 0));
    }
}

#[test]
fn without_msix_the_status_register_tells() {
    let mut guest = guest();
    guest.start();
    let msix = guest.capabilities(0x11)[0];
    guest.set_config(msix + 2, &[1, 0]);
    assert_eq!(guest.read(0x1000, 1), 0);
    assert_eq!(guest.ask(1), 64);
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
    while guest.read(0x1000, 1) != 1 {
        assert!(std::time::Instant::now() < deadline);
    }
    assert_eq!(guest.read(0x1000, 1), 0, "a read takes it");
}

#[test]
fn the_window_in_configuration_space_leads_to_the_bar() {
    let mut guest = guest();
    let window = guest.capabilities(0x09)[4];
    let aim = |guest: &mut Guest, offset: u32, length: u32| {
        guest.set_config(window + 8, &offset.to_le_bytes());
        guest.set_config(window + 12, &length.to_le_bytes());
    };
    aim(&mut guest, 0x14, 1);
    guest.set_config(window + 16, &[1]);
    assert_eq!((guest.config(window + 16, 1), guest.read(0x14, 1)), (1, 1));
    for (offset, length) in [(0x8000, 1), (0xffff_ffff, 1), (0x13, 2), (0x14, 8), (0x14, 0)] {
        aim(&mut guest, offset, length);
        assert_eq!(guest.config(window + 16, 1), 0, "{offset:#x} {length}");
    }
    aim(&mut guest, 0x12, 2);
    assert_eq!(guest.config(window + 16, 2), 1, "one queue");
    guest.set_config(window + 4, &[1]);
    assert_eq!(guest.config(window + 16, 2), 0, "there is no BAR 1");
}

#[test]
fn a_reset_of_the_machine_brings_everything_back() {
    let mut guest = guest();
    guest.start();
    guest.set_config(4, &[0, 0]);
    guest.set_config(0x10, &0xc900_0000_u32.to_le_bytes());
    guest.transport.lock().unwrap().reset();
    assert_eq!((guest.config(0x10, 4), guest.config(4, 2)), (BAR.into(), 2));
    let msix = guest.capabilities(0x11)[0];
    assert_eq!(guest.config(msix + 2, 2), 1);
    guest.start();
    assert_eq!(guest.ask(1), 64);
}

#[derive(Clone, Debug)]
enum Access {
    Config(u64, Vec<u8>),
    ReadConfig(u64, usize),
    Bar(u64, Vec<u8>),
    ReadBar(u64, usize),
    Port(u64, Vec<u8>),
}

fn access() -> impl Strategy<Value = Access> {
    let data = || {
        prop::sample::select(vec![1_usize, 2, 4, 8]).prop_flat_map(|width| {
            prop_oneof![
                prop::collection::vec(any::<u8>(), width),
                prop::collection::vec(Just(0), width),
                (0u8..16).prop_map(move |low| {
                    let mut data = vec![0; width];
                    data[0] = low;
                    data
                }),
            ]
        })
    };
    let bar = prop_oneof![
        0u64..0x38,
        0x1000u64..0x1008,
        0x2000u64..0x2010,
        0x3000u64..0x3010,
        0x4000u64..0x4040,
        0u64..0x8000
    ];
    let width = prop::sample::select(vec![1_usize, 2, 4, 8]);
    prop_oneof![
        3 => (prop_oneof![0u64..256, 0u64..4096], data()).prop_map(|(at, data)| Access::Config(at, data)),
        1 => (0u64..4096, width.clone()).prop_map(|(at, width)| Access::ReadConfig(at, width)),
        6 => (bar.clone(), data()).prop_map(|(at, data)| Access::Bar(at, data)),
        2 => (bar, width).prop_map(|(at, width)| Access::ReadBar(at, width)),
        1 => (0u64..8, data()).prop_map(|(at, data)| Access::Port(at, data)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever a guest does to the registers, of whatever width and in whatever order: nothing breaks,
    /// and after a reset of the machine the device works.
    #[test]
    fn random_accesses_break_nothing(accesses in prop::collection::vec(access(), 1..200)) {
        let mut guest = guest();
        for access in accesses {
            match access {
                Access::Config(at, data) => guest.set_config(at, &data),
                Access::ReadConfig(at, width) => {
                    guest.config(at, width);
                }
                Access::Bar(at, data) => {
                    guest.bus.write(u64::from(BAR) + at, &data);
                }
                Access::ReadBar(at, width) => {
                    guest.bus.read(u64::from(BAR) + at, &mut vec![0; width]);
                }
                Access::Port(at, data) => guest.ports.write(at, &data),
            }
        }
        guest.transport.lock().unwrap().reset();
        // The machine's reset puts the BAR back, too; here a write does.
        guest.set_config(0x10, &BAR.to_le_bytes());
        guest.start();
        prop_assert_eq!(guest.ask(1), 64);
    }
}

#[test]
fn bars_of_all_slots_lie_apart() {
    for slot in 1..crate::vmm::pci::SLOTS {
        assert!(layout::pci_bar_address(slot) - layout::pci_bar_address(slot - 1) >= BAR_BYTES);
        assert!(layout::pci_bar_address(slot).is_multiple_of(BAR_BYTES));
    }
}
