//! The buses: which device answers at an address. Port I/O and MMIO each have one.
//!
//! Devices come and go while vCPUs run (a PCI device is plugged in, a BAR is moved), so a lookup takes a
//! read lock, but only for the lookup: while a device answers, none but its own lock is held.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// A device on a bus. Offsets are relative to the start of its range; `data` is 1 to 8 bytes, and
/// what the guest sends is hostile: an access that makes no sense reads as zeroes and writes nothing.
pub trait BusDevice: Send {
    fn read(&mut self, offset: u64, data: &mut [u8]);
    fn write(&mut self, offset: u64, data: &[u8]);
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("put a device at {start:#x}, {length} bytes: the range is empty, overflows or is taken")]
pub struct BusError {
    start: u64,
    length: u64,
}

struct Slot {
    length: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

#[derive(Default)]
pub struct Bus {
    /// By start. Ranges never overlap.
    slots: RwLock<BTreeMap<u64, Slot>>,
}

impl Bus {
    pub fn new() -> Self {
        Self::default()
    }

    /// The device answers at `start..start + length`.
    pub fn insert(&self, start: u64, length: u64, device: Arc<Mutex<dyn BusDevice>>) -> Result<(), BusError> {
        let refused = BusError { start, length };
        let Some(end) = start.checked_add(length).filter(|&end| end > start) else { return Err(refused) };
        // Nothing panics while it holds the lock, and a panic ends the process.
        let mut slots = self.slots.write().unwrap_or_else(PoisonError::into_inner);
        let before = slots.range(..end).next_back();
        if before.is_some_and(|(&other, slot)| other + slot.length > start) {
            return Err(refused);
        }
        slots.insert(start, Slot { length, device });
        Ok(())
    }

    /// Takes away the device whose range starts there. An access that has already found it may still
    /// reach it.
    pub fn remove(&self, start: u64) {
        self.slots.write().unwrap_or_else(PoisonError::into_inner).remove(&start);
    }

    /// Reads `data.len()` bytes. Where nothing answers, all ones are read, as from a real bus; so says
    /// the return value.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        let Some((offset, device)) = self.find(address, data.len()) else {
            data.fill(0xff);
            return false;
        };
        // A device whose lock is poisoned panicked, and a panic ends the process.
        device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
        true
    }

    /// Writes `data`; says whether a device answers there.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        let Some((offset, device)) = self.find(address, data.len()) else { return false };
        device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        true
    }

    /// The device that answers all of the access; one that straddles an end has no device.
    fn find(&self, address: u64, length: usize) -> Option<(u64, Arc<Mutex<dyn BusDevice>>)> {
        let slots = self.slots.read().unwrap_or_else(PoisonError::into_inner);
        let (&start, slot) = slots.range(..=address).next_back()?;
        let offset = address - start;
        let end = offset.checked_add(length as u64)?;
        (end <= slot.length).then(|| (offset, slot.device.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Default)]
    struct Recorder {
        writes: Vec<(u64, Vec<u8>)>,
    }

    impl BusDevice for Recorder {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }

        fn write(&mut self, offset: u64, data: &[u8]) {
            self.writes.push((offset, data.to_vec()));
        }
    }

    fn bus_with(ranges: &[(u64, u64)]) -> (Bus, Vec<Arc<Mutex<Recorder>>>) {
        let bus = Bus::new();
        let mut devices = Vec::new();
        for &(start, length) in ranges {
            let device = Arc::new(Mutex::new(Recorder::default()));
            bus.insert(start, length, device.clone()).unwrap();
            devices.push(device);
        }
        (bus, devices)
    }

    #[test]
    fn an_access_reaches_its_device_with_a_relative_offset() {
        let (bus, devices) = bus_with(&[(0x3f8, 8), (0x1000, 0x1000), (0x2000, 0x1000)]);
        let mut data = [0; 4];
        assert!(bus.read(0x1ffc, &mut data));
        assert_eq!(data, [0xfc; 4]);
        assert!(bus.write(0x3ff, &[1]));
        assert!(bus.write(0x2000, &[2, 3]));
        assert_eq!(devices[0].lock().unwrap().writes, [(7, vec![1])]);
        assert_eq!(devices[2].lock().unwrap().writes, [(0, vec![2, 3])]);
    }

    #[test]
    fn an_access_outside_or_across_an_end_has_no_device() {
        let (bus, devices) = bus_with(&[(0x3f8, 8), (u64::MAX - 8, 8)]);
        for (address, length) in [(0x3f7, 1), (0x400, 1), (0x3ff, 2), (0, 8), (u64::MAX, 8), (u64::MAX, 1)] {
            let mut data = [0; 8];
            assert!(!bus.read(address, &mut data[..length]), "{address:#x}");
            assert!(data[..length].iter().all(|&byte| byte == 0xff));
            assert!(!bus.write(address, &data[..length]));
        }
        assert!(devices.iter().all(|device| device.lock().unwrap().writes.is_empty()));
    }

    #[test]
    fn ranges_neither_overlap_nor_overflow() {
        let (bus, _) = bus_with(&[(0x100, 0x10)]);
        for (start, length) in
            [(0x100, 1), (0x10f, 1), (0xf8, 9), (0, 0x1000), (0x104, 2), (0x200, 0), (u64::MAX, 2)]
        {
            let device = Arc::new(Mutex::new(Recorder::default()));
            assert_eq!(bus.insert(start, length, device), Err(BusError { start, length }));
        }
        let device = Arc::new(Mutex::new(Recorder::default()));
        bus.insert(0x110, 0x10, device).unwrap();
        bus.remove(0x100);
        assert!(!bus.write(0x100, &[1]) && bus.write(0x110, &[1]));
        bus.insert(0x100, 0x10, Arc::new(Mutex::new(Recorder::default()))).unwrap();
    }
}
