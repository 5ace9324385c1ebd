//! The buses: which device answers at an address. Port I/O and MMIO each have one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

/// A device on a bus. Offsets are relative to the start of its range; `data` is 1 to 8 bytes, and
/// what the guest sends is hostile: an access that makes no sense reads as zeroes and writes nothing.
pub trait BusDevice: Send {
    fn read(&mut self, offset: u64, data: &mut [u8]);
    fn write(&mut self, offset: u64, data: &[u8]);
}
