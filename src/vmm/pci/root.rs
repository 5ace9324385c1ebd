//! The bus itself: which function is in which slot, and the two ways to its configuration space.

use std::sync::{Arc, Mutex, PoisonError};

use super::bars::BarMap;
use super::config::{ConfigSpace, Identity};
use super::{PciFunction, SLOTS};
use crate::vmm::bus::BusDevice;

/// The ports of configuration mechanism 1 (PCI 3.0, section 3.2.2.3.2): address, then data.
pub const PORTS_START: u16 = 0xcf8;
pub const PORTS: u16 = 8;
const DATA_PORT: u64 = 4;
const ADDRESS_ENABLE: u32 = 1 << 31;

/// Bytes of configuration space that ECAM gives a function, and those of bus 0.
const FUNCTION_BYTES: u64 = 4096;
pub const ECAM_BYTES: u64 = FUNCTION_BYTES * 8 * SLOTS as u64;

/// "Generic PCIe host bridge" of Red Hat's range, which no driver takes for something else.
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: [0x06, 0x00, 0x00],
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
};

struct Occupant {
    function: Arc<Mutex<dyn PciFunction>>,
    /// Ejected: still there for its owner, but not for the guest.
    hidden: bool,
}

pub struct PciRoot {
    slots: [Option<Occupant>; SLOTS as usize],
    bars: Arc<BarMap>,
}

impl PciRoot {
    pub fn new(bars: Arc<BarMap>) -> Self {
        let mut slots = [const { None }; SLOTS as usize];
        let bridge: Arc<Mutex<dyn PciFunction>> =
            Arc::new(Mutex::new(HostBridge(ConfigSpace::new(HOST_BRIDGE))));
        slots[0] = Some(Occupant { function: bridge, hidden: false });
        Self { slots, bars }
    }

    /// Puts a function into an empty slot.
    pub fn insert(&mut self, slot: u8, function: Arc<Mutex<dyn PciFunction>>) {
        if let Some(place) = self.slots.get_mut(usize::from(slot)) {
            *place = Some(Occupant { function, hidden: false });
        }
    }

    pub fn remove(&mut self, slot: u8) {
        if let Some(place) = self.slots.get_mut(usize::from(slot)) {
            *place = None;
        }
    }

    /// The guest sees the slot as empty from now on.
    pub fn hide(&mut self, slot: u8) {
        if let Some(Some(occupant)) = self.slots.get_mut(usize::from(slot)) {
            occupant.hidden = true;
        }
    }

    fn function(&self, slot: u8) -> Option<&Arc<Mutex<dyn PciFunction>>> {
        let occupant = self.slots.get(usize::from(slot))?.as_ref()?;
        (!occupant.hidden).then_some(&occupant.function)
    }

    /// `at` as in ECAM: bus, device, function, register. An access that crosses a multiple of 4 is
    /// refused, as is one to what isn't there: all ones.
    fn read(&mut self, at: u64, data: &mut [u8]) {
        match self.find(at, data.len()) {
            Some((slot, offset)) => match self.function(slot) {
                Some(function) => lock(function).read_config(offset, data),
                None => data.fill(0xff),
            },
            None => data.fill(0xff),
        }
    }

    fn write(&mut self, at: u64, data: &[u8]) {
        let Some((slot, offset)) = self.find(at, data.len()) else { return };
        let Some(function) = self.function(slot) else { return };
        let bar = {
            let mut function = lock(function);
            function.write_config(offset, data);
            function.bar()
        };
        if let Some(bar) = bar {
            self.bars.want(slot, bar);
        }
    }

    /// Slot and register of function 0 on bus 0; there are no others.
    fn find(&self, at: u64, length: usize) -> Option<(u8, u16)> {
        let register = at % FUNCTION_BYTES;
        let function = at / FUNCTION_BYTES;
        let whole = matches!(length, 1..=4) && (register % 4) + length as u64 <= 4;
        (whole && function.is_multiple_of(8) && function / 8 < SLOTS.into())
            .then_some(((function / 8) as u8, register as u16))
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    // A device whose lock is poisoned panicked, and a panic ends the process.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

struct HostBridge(ConfigSpace);

impl PciFunction for HostBridge {
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        self.0.write(offset, data);
    }

    fn bar(&self) -> Option<super::Bar> {
        None
    }
}

/// Configuration space in memory (PCI Express 4.0, section 7.2.2).
pub struct Ecam(pub Arc<Mutex<PciRoot>>);

impl BusDevice for Ecam {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        lock(&self.0).read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        lock(&self.0).write(offset, data);
    }
}

/// Configuration space through two ports.
pub struct ConfigPorts {
    root: Arc<Mutex<PciRoot>>,
    address: u32,
}

impl ConfigPorts {
    pub fn new(root: Arc<Mutex<PciRoot>>) -> Self {
        Self { root, address: 0 }
    }

    /// As in ECAM. `None`: not enabled, or another bus.
    fn target(&self, offset: u64) -> Option<u64> {
        let bus = self.address >> 16 & 0xff;
        let function = u64::from(self.address >> 8 & 0xff);
        let register = u64::from(self.address & 0xfc) + (offset - DATA_PORT);
        (self.address & ADDRESS_ENABLE != 0 && bus == 0).then_some(function * FUNCTION_BYTES + register)
    }
}

impl BusDevice for ConfigPorts {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (0, [_, _, _, _]) = (offset, &*data) {
            data.copy_from_slice(&self.address.to_le_bytes());
        } else if offset >= DATA_PORT
            && let Some(at) = self.target(offset)
        {
            lock(&self.root).read(at, data);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (0, &[a, b, c, d]) = (offset, data) {
            self.address = u32::from_le_bytes([a, b, c, d]);
        } else if offset >= DATA_PORT
            && let Some(at) = self.target(offset)
        {
            lock(&self.root).write(at, data);
        }
    }
}
