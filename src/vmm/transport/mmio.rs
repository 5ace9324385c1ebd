//! virtio-mmio, version 2 (virtio 1.2, section 4.2): the register file of one device.
//!
//! ```text
//!   reset ─▶ ACKNOWLEDGE ─▶ DRIVER ─▶ (features) ─▶ FEATURES_OK ─▶ (queues) ─▶ DRIVER_OK ─▶ active
//!     ▲                                                                          │ fails
//!     └──────────────── write 0 to Status ◀──────────────────────── NEEDS_RESET ◀┘
//! ```
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

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Activation, ActiveQueue, Interrupt, VirtioDevice};
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

/// What the transport itself offers, on top of the device's features.
const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// The bits of Status that a driver may set.
const DRIVER_STATUS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FAILED;

/// What device threads and the register file share.
struct Shared {
    irq: EventFd,
    interrupt_status: AtomicU32,
    config_generation: AtomicU32,
    needs_reset: AtomicBool,
}

impl Shared {
    fn raise(&self, bit: u32) {
        self.interrupt_status.fetch_or(bit, Ordering::SeqCst);
        // Fails only when the counter is full, and then the line is signalled already.
        let _ = self.irq.write(1);
    }
}

impl Interrupt for Shared {
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

/// A queue as the driver sets it up.
#[derive(Clone, Copy, Default)]
struct QueueSetup {
    size: u32,
    descriptors: u64,
    available: u64,
    used: u64,
    ready: bool,
}

impl QueueSetup {
    /// The queue, if all of it makes sense: size, alignment, and every ring inside guest memory.
    fn build(&self, size_max: u16, event_idx: bool, memory: &GuestMemory) -> Option<Queue> {
        let size = u16::try_from(self.size).ok()?;
        let halves = |address: u64| (Some(address as u32), Some((address >> 32) as u32));
        let mut queue = Queue::new(size_max).ok()?;
        queue.try_set_size(size).ok()?;
        let (low, high) = halves(self.descriptors);
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(self.available);
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(self.used);
        queue.set_used_ring_address(low, high);
        // The setters keep their old value when an address is misaligned.
        let kept = queue.desc_table() == self.descriptors
            && queue.avail_ring() == self.available
            && queue.used_ring() == self.used
            && self.available != 0;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        (kept && queue.is_valid(memory)).then_some(queue)
    }
}

/// The register file of one device.
pub struct MmioTransport {
    device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    shared: Arc<Shared>,
    kicks: Vec<Arc<EventFd>>,
    queue_sizes_max: Vec<u16>,
    queues: Vec<QueueSetup>,
    status: u32,
    driver_features: u64,
    device_features_select: u32,
    driver_features_select: u32,
    queue_select: u32,
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
        let queue_sizes_max = device.queue_sizes().to_vec();
        let kicks = queue_sizes_max
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new))
            .collect::<io::Result<Vec<_>>>()?;
        let shared = Shared {
            irq: EventFd::new(EFD_NONBLOCK)?,
            interrupt_status: AtomicU32::new(0),
            config_generation: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
        };
        Ok(Self {
            queues: vec![QueueSetup::default(); queue_sizes_max.len()],
            device,
            memory,
            shared: Arc::new(shared),
            kicks,
            queue_sizes_max,
            status: 0,
            driver_features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
        })
    }

    /// Signalled for every interrupt of the device. Edge-triggered.
    pub fn irq(&self) -> &EventFd {
        &self.shared.irq
    }

    pub fn notifiers(&self) -> impl Iterator<Item = Notifier<'_>> {
        self.kicks.iter().enumerate().map(|(index, event)| Notifier {
            offset: NOTIFY_OFFSET,
            datamatch: index as u32,
            event,
        })
    }

    /// Back to the state after construction. Afterwards nothing of the device touches guest memory.
    pub fn reset(&mut self) {
        self.device.reset();
        self.queues.fill(QueueSetup::default());
        self.status = 0;
        self.driver_features = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
        self.shared.interrupt_status.store(0, Ordering::SeqCst);
        self.shared.needs_reset.store(false, Ordering::SeqCst);
        for kick in &self.kicks {
            // Non-blocking: an error only says that there was no notification left.
            let _ = kick.read();
        }
    }

    fn offered_features(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    fn has(&self, bits: u32) -> bool {
        self.status & bits == bits
    }

    fn is_broken(&self) -> bool {
        self.has(VIRTIO_CONFIG_S_FAILED) || self.shared.needs_reset.load(Ordering::SeqCst)
    }

    /// Between DRIVER and FEATURES_OK.
    fn negotiating(&self) -> bool {
        self.has(VIRTIO_CONFIG_S_DRIVER) && !self.has(VIRTIO_CONFIG_S_FEATURES_OK) && !self.is_broken()
    }

    /// Between FEATURES_OK and DRIVER_OK.
    fn setting_up_queues(&self) -> bool {
        self.has(VIRTIO_CONFIG_S_FEATURES_OK) && !self.has(VIRTIO_CONFIG_S_DRIVER_OK) && !self.is_broken()
    }

    /// The selected queue, while the driver may change it.
    fn queue_in_setup(&mut self) -> Option<&mut QueueSetup> {
        if !self.setting_up_queues() {
            return None;
        }
        self.queues.get_mut(self.queue_select as usize)
    }

    fn build_queue(&self, index: usize) -> Option<Queue> {
        let event_idx = self.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        self.queues.get(index)?.build(self.queue_sizes_max[index], event_idx, &self.memory)
    }

    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        // A driver may only add bits, and NEEDS_RESET, which is ours, may come along.
        let value = value & DRIVER_STATUS;
        if value & self.status != self.status {
            return;
        }
        let added = value & !self.status;
        if added & VIRTIO_CONFIG_S_ACKNOWLEDGE != 0 {
            self.status |= VIRTIO_CONFIG_S_ACKNOWLEDGE;
        }
        if added & VIRTIO_CONFIG_S_DRIVER != 0 && self.has(VIRTIO_CONFIG_S_ACKNOWLEDGE) {
            self.status |= VIRTIO_CONFIG_S_DRIVER;
        }
        if added & VIRTIO_CONFIG_S_FEATURES_OK != 0 && self.negotiating() && self.features_acceptable() {
            self.status |= VIRTIO_CONFIG_S_FEATURES_OK;
        }
        if added & VIRTIO_CONFIG_S_DRIVER_OK != 0 && self.setting_up_queues() {
            self.status |= VIRTIO_CONFIG_S_DRIVER_OK;
            self.activate();
        }
        if added & VIRTIO_CONFIG_S_FAILED != 0 {
            self.status |= VIRTIO_CONFIG_S_FAILED;
        }
    }

    fn features_acceptable(&self) -> bool {
        self.driver_features & !self.offered_features() == 0
            && self.driver_features & (1 << VIRTIO_F_VERSION_1) != 0
    }

    fn activate(&mut self) {
        let mut queues = Vec::new();
        for index in 0..self.queues.len() {
            if !self.queues[index].ready {
                continue;
            }
            let Some(queue) = self.build_queue(index) else { return self.shared.signal_needs_reset() };
            queues.push(ActiveQueue { index: index as u16, queue, kick: self.kicks[index].clone() });
        }
        let activation = Activation {
            memory: self.memory.clone(),
            queues,
            interrupt: self.shared.clone(),
            features: self.driver_features,
        };
        if self.device.activate(activation).is_err() {
            self.shared.signal_needs_reset();
        }
    }

    fn set_queue_ready(&mut self, ready: bool) {
        let index = self.queue_select as usize;
        if self.queue_in_setup().is_none() {
            return;
        }
        let valid = !ready || self.build_queue(index).is_some();
        self.queues[index].ready = ready && valid;
        if !valid {
            self.shared.signal_needs_reset();
        }
    }

    fn notify(&self, index: u32) {
        if !self.has(VIRTIO_CONFIG_S_DRIVER_OK) {
            return;
        }
        if let Some(kick) = self.kicks.get(index as usize) {
            // Fails only when the counter is full, and then the queue is notified already.
            let _ = kick.write(1);
        }
    }

    fn read_register(&self, offset: u64) -> u32 {
        let queue = self.queues.get(self.queue_select as usize);
        match offset {
            0x00 => MAGIC,
            0x04 => VERSION,
            0x08 => self.device.device_type(),
            0x0c => VENDOR,
            0x10 => match self.device_features_select {
                0 => self.offered_features() as u32,
                1 => (self.offered_features() >> 32) as u32,
                _ => 0,
            },
            0x34 => self.queue_sizes_max.get(self.queue_select as usize).map_or(0, |size| u32::from(*size)),
            0x44 => queue.map_or(0, |queue| u32::from(queue.ready)),
            0x60 => self.shared.interrupt_status.load(Ordering::SeqCst),
            0x70 => match self.shared.needs_reset.load(Ordering::SeqCst) {
                true => self.status | VIRTIO_CONFIG_S_NEEDS_RESET,
                false => self.status,
            },
            // No shared memory regions: their length and base read as all ones.
            0xb0..=0xbc => u32::MAX,
            0xfc => self.shared.config_generation.load(Ordering::SeqCst),
            _ => 0,
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            0x14 => self.device_features_select = value,
            0x20 if self.negotiating() => match self.driver_features_select {
                0 => set_low(&mut self.driver_features, value),
                1 => set_high(&mut self.driver_features, value),
                _ => {}
            },
            0x24 => self.driver_features_select = value,
            0x30 => self.queue_select = value,
            0x44 => self.set_queue_ready(value == 1),
            NOTIFY_OFFSET => self.notify(value),
            0x64 => {
                self.shared.interrupt_status.fetch_and(!value, Ordering::SeqCst);
            }
            0x70 => self.set_status(value),
            0x38 | 0x80..=0xa4 => self.write_queue_register(offset, value),
            _ => {}
        }
    }

    /// Size and addresses: they may change only while the queue isn't ready.
    fn write_queue_register(&mut self, offset: u64, value: u32) {
        let Some(queue) = self.queue_in_setup().filter(|queue| !queue.ready) else { return };
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

fn set_low(target: &mut u64, value: u32) {
    *target = *target & !u64::from(u32::MAX) | u64::from(value);
}

fn set_high(target: &mut u64, value: u32) {
    *target = *target & u64::from(u32::MAX) | u64::from(value) << 32;
}

impl BusDevice for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset >= CONFIG_OFFSET {
            self.device.read_config(offset - CONFIG_OFFSET, data);
        } else if let ([_, _, _, _], true) = (&*data, offset.is_multiple_of(4)) {
            data.copy_from_slice(&self.read_register(offset).to_le_bytes());
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if offset >= CONFIG_OFFSET {
            if self.has(VIRTIO_CONFIG_S_DRIVER) && !self.is_broken() {
                self.device.write_config(offset - CONFIG_OFFSET, data);
            }
        } else if let (&[a, b, c, d], true) = (data, offset.is_multiple_of(4)) {
            self.write_register(offset, u32::from_le_bytes([a, b, c, d]));
        }
    }
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
