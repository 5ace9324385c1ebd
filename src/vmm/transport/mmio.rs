//! virtio-mmio, version 2 (virtio 1.2, section 4.2): the register file of one device.
//!
//! For the machine:
//! - [`MmioTransport::new`] takes the device and guest memory; put the result on the MMIO bus with a
//!   range of [`REGISTERS_BYTES`].
//! - [`MmioTransport::irq`] is the event to bind to an *edge* interrupt line (irqfd), once.
//! - [`MmioTransport::notifiers`] are the events to bind as ioeventfds, once: 4-byte writes at the
//!   range's base plus the offset, with the datamatch. They survive resets. A notification that
//!   reaches the register file all the same works, too.
//! - [`MmioTransport::reset`] is for a machine reset.
//!
//! A vCPU thread in here makes no system call but `write` and `read` on event descriptors and `futex`
//! (to wait for the device's worker), and the allocator's.
//!
//! Everything the guest writes is hostile. What comes out of order, in odd widths or at odd offsets
//! is ignored; nothing that it writes can do more than break its own device.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::driver::{DriverState, TransportInterrupt, set_high, set_low};
use super::{Interrupt, Transport, VirtioDevice};
use crate::vmm::bus::BusDevice;
use crate::vmm::memory::GuestMemory;

/// Length of a device's MMIO range, in bytes.
pub const REGISTERS_BYTES: u64 = 0x1000;
/// Where the driver notifies a queue, by writing its index.
pub const NOTIFY_OFFSET: u64 = 0x50;

const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"VMCT");
const CONFIG_OFFSET: u64 = 0x100;

const INTERRUPT_QUEUE: u32 = 1;
const INTERRUPT_CONFIG: u32 = 2;

/// What device threads and the register file share.
struct Line {
    irq: EventFd,
    status: AtomicU32,
    config_generation: AtomicU32,
    needs_reset: AtomicBool,
}

impl Line {
    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        // Fails only when the counter is full, and then the line is signalled already.
        let _ = self.irq.write(1);
    }
}

impl Interrupt for Line {
    fn signal_queue(&self, _queue_index: u16) {
        self.raise(INTERRUPT_QUEUE);
    }

    fn signal_config(&self) {
        self.config_generation.fetch_add(1, Ordering::SeqCst);
        self.raise(INTERRUPT_CONFIG);
    }

    fn signal_needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.raise(INTERRUPT_CONFIG);
    }
}

impl TransportInterrupt for Line {
    fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
    }
}

/// The register file of one device.
pub struct MmioTransport {
    driver: DriverState<Line>,
}

/// Where the driver's notification of one queue goes.
pub struct Notifier<'a> {
    /// From the start of the device's range; 4 bytes wide.
    pub offset: u64,
    pub datamatch: u32,
    pub event: &'a EventFd,
}

impl MmioTransport {
    pub fn new(device: Box<dyn VirtioDevice>, memory: GuestMemory) -> io::Result<Self> {
        let line = Line {
            irq: EventFd::new(EFD_NONBLOCK)?,
            status: AtomicU32::new(0),
            config_generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
        };
        Ok(Self { driver: DriverState::new(device, memory, Arc::new(line), false)? })
    }

    /// Signalled for every interrupt of the device. Edge-triggered.
    pub fn irq(&self) -> &EventFd {
        &self.driver.interrupt.irq
    }

    pub fn notifiers(&self) -> impl Iterator<Item = Notifier<'_>> {
        self.driver.kicks.iter().enumerate().map(|(index, event)| Notifier {
            offset: NOTIFY_OFFSET,
            datamatch: index as u32,
            event,
        })
    }

    fn read_register(&self, offset: u64) -> u32 {
        let driver = &self.driver;
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => driver.device.device_type(),
            0x0c => VENDOR,
            0x10 => driver.device_features(),
            0x34 => driver.queue_sizes_max.get(driver.queue_select as usize).map_or(0, |&size| size.into()),
            0x44 => driver.selected_queue().map_or(0, |queue| queue.ready.into()),
            0x60 => driver.interrupt.status.load(Ordering::SeqCst),
            0x70 => driver.status(),
            // No shared memory regions: their length and base read as all ones.
            0xb0..=0xbc => u32::MAX,
            0xfc => driver.interrupt.config_generation.load(Ordering::SeqCst),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        let driver = &mut self.driver;
        match offset {
            0x14 => driver.device_features_select = value,
            0x20 => driver.set_driver_features(value),
            0x24 => driver.driver_features_select = value,
            0x30 => driver.queue_select = value,
            0x44 => driver.set_queue_ready(value == 1),
            NOTIFY_OFFSET => driver.notify(value),
            0x64 => {
                driver.interrupt.status.fetch_and(!value, Ordering::SeqCst);
            }
            0x70 => driver.set_status(value),
            0x38 | 0x80..=0xa4 => self.write_queue_register(offset, value),
            _ => {}
        }
    }

    /// Size and addresses: they may change only while the queue isn't ready.
    fn write_queue_register(&mut self, offset: u64, value: u32) {
        let Some(queue) = self.driver.queue_in_setup().filter(|queue| !queue.ready) else { return };
        match offset {
            0x38 => queue.size = value,
            0x80 => set_low(&mut queue.descriptors, value),
            0x84 => set_high(&mut queue.descriptors, value),
            0x90 => set_low(&mut queue.available, value),
            0x94 => set_high(&mut queue.available, value),
            0xa0 => set_low(&mut queue.used, value),
            0xa4 => set_high(&mut queue.used, value),
            _ => {}
        }
    }
}

impl Transport for MmioTransport {
    fn reset(&mut self) {
        self.driver.reset();
    }
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= CONFIG_OFFSET {
            self.driver.read_config(offset - CONFIG_OFFSET, data);
        } else if let ([_, _, _, _], true) = (&*data, offset.is_multiple_of(4)) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= CONFIG_OFFSET {
            self.driver.write_config(offset - CONFIG_OFFSET, data);
        } else if let (&[a, b, c, d], true) = (data, offset.is_multiple_of(4)) {
            self.write_register(offset, u32::from_le_bytes([a, b, c, d]));
        }
    }
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
