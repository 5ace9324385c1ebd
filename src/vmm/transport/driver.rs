//! What a driver has told its device through the registers, whatever registers they are: status,
//! features, queues. Both transports are a register file around a [`DriverState`].
//!
//! ```text
//!   reset ─▶ ACKNOWLEDGE ─▶ DRIVER ─▶ (features) ─▶ FEATURES_OK ─▶ (queues) ─▶ DRIVER_OK ─▶ active
//!     ▲                                                                          │ fails
//!     └──────────────── write 0 to Status ◀──────────────────────── NEEDS_RESET ◀┘
//! ```
//!
//! Everything the driver writes is hostile. What comes out of order is ignored; nothing that it writes
//! can do more than break its own device.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Activation, ActiveQueue, Interrupt, VirtioDevice};
use crate::vmm::memory::GuestMemory;

/// What the transport itself offers, on top of the device's features.
pub(super) const TRANSPORT_FEATURES: u64 =
    1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;

/// The bits of Status that a driver may set.
const DRIVER_STATUS: u32 = VIRTIO_CONFIG_S_ACKNOWLEDGE
    | VIRTIO_CONFIG_S_DRIVER
    | VIRTIO_CONFIG_S_FEATURES_OK
    | VIRTIO_CONFIG_S_DRIVER_OK
    | VIRTIO_CONFIG_S_FAILED;

/// The interrupts of one transport, and what they remember for its registers.
pub(super) trait TransportInterrupt: Interrupt + 'static {
    fn needs_reset(&self) -> bool;
    fn reset(&self);
}

/// A queue as the driver sets it up.
#[derive(Clone, Copy, Default)]
pub(super) struct QueueSetup {
    pub size: u32,
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
    pub ready: bool,
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

pub(super) struct DriverState<I> {
    pub device: Box<dyn VirtioDevice>,
    memory: GuestMemory,
    pub interrupt: Arc<I>,
    /// Of each queue: what the driver's notification makes readable.
    pub kicks: Vec<Arc<EventFd>>,
    pub queue_sizes_max: Vec<u16>,
    /// What a queue's size is before the driver has said anything.
    initial_sizes: Vec<u32>,
    pub queues: Vec<QueueSetup>,
    status: u32,
    driver_features: u64,
    pub device_features_select: u32,
    pub driver_features_select: u32,
    pub queue_select: u32,
}

impl<I: TransportInterrupt> DriverState<I> {
    /// `sizes_preset`: queues have their largest size unless the driver says otherwise, as PCI has it.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        interrupt: Arc<I>,
        sizes_preset: bool,
    ) -> io::Result<Self> {
        let queue_sizes_max = device.queue_sizes().to_vec();
        let kicks = queue_sizes_max
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new))
            .collect::<io::Result<Vec<_>>>()?;
        let initial_sizes: Vec<u32> =
            queue_sizes_max.iter().map(|&size| if sizes_preset { size.into() } else { 0 }).collect();
        let mut state = Self {
            device,
            memory,
            interrupt,
            kicks,
            queue_sizes_max,
            queues: vec![QueueSetup::default(); initial_sizes.len()],
            initial_sizes,
            status: 0,
            driver_features: 0,
            device_features_select: 0,
            driver_features_select: 0,
            queue_select: 0,
        };
        state.forget();
        Ok(state)
    }

    /// Back to the state after construction. Afterwards nothing of the device touches guest memory.
    pub fn reset(&mut self) {
        self.device.reset();
        self.forget();
        self.interrupt.reset();
        for kick in &self.kicks {
            // Non-blocking: an error only says that there was no notification left.
            let _ = kick.read();
        }
    }

    fn forget(&mut self) {
        for (queue, &size) in self.queues.iter_mut().zip(&self.initial_sizes) {
            *queue = QueueSetup { size, ..QueueSetup::default() };
        }
        self.status = 0;
        self.driver_features = 0;
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.queue_select = 0;
    }

    pub fn offered_features(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    /// The selected half of what is offered.
    pub fn device_features(&self) -> u32 {
        half(self.offered_features(), self.device_features_select)
    }

    /// The selected half of what the driver has accepted.
    pub fn driver_features(&self) -> u32 {
        half(self.driver_features, self.driver_features_select)
    }

    pub fn set_driver_features(&mut self, value: u32) {
        if !self.negotiating() {
            return;
        }
        match self.driver_features_select {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            _ => {}
        }
    }

    pub fn status(&self) -> u32 {
        match self.interrupt.needs_reset() {
            true => self.status | VIRTIO_CONFIG_S_NEEDS_RESET,
            false => self.status,
        }
    }

    pub fn has(&self, bits: u32) -> bool {
        self.status & bits == bits
    }

    fn is_broken(&self) -> bool {
        self.has(VIRTIO_CONFIG_S_FAILED) || self.interrupt.needs_reset()
    }

    /// Between DRIVER and FEATURES_OK.
    fn negotiating(&self) -> bool {
        self.has(VIRTIO_CONFIG_S_DRIVER) && !self.has(VIRTIO_CONFIG_S_FEATURES_OK) && !self.is_broken()
    }

    /// Between FEATURES_OK and DRIVER_OK.
    fn setting_up_queues(&self) -> bool {
        self.has(VIRTIO_CONFIG_S_FEATURES_OK) && !self.has(VIRTIO_CONFIG_S_DRIVER_OK) && !self.is_broken()
    }

    pub fn selected_queue(&self) -> Option<&QueueSetup> {
        self.queues.get(self.queue_select as usize)
    }

    /// The selected queue, while the driver may change it: its size and addresses only while it isn't
    /// ready.
    pub fn queue_in_setup(&mut self) -> Option<&mut QueueSetup> {
        if !self.setting_up_queues() {
            return None;
        }
        self.queues.get_mut(self.queue_select as usize)
    }

    fn build_queue(&self, index: usize) -> Option<Queue> {
        let event_idx = self.driver_features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0;
        self.queues.get(index)?.build(self.queue_sizes_max[index], event_idx, &self.memory)
    }

    pub fn set_status(&mut self, value: u32) {
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
            let Some(queue) = self.build_queue(index) else { return self.interrupt.signal_needs_reset() };
            queues.push(ActiveQueue { index: index as u16, queue, kick: self.kicks[index].clone() });
        }
        let activation = Activation {
            memory: self.memory.clone(),
            queues,
            interrupt: self.interrupt.clone(),
            features: self.driver_features,
        };
        if self.device.activate(activation).is_err() {
            self.interrupt.signal_needs_reset();
        }
    }

    pub fn set_queue_ready(&mut self, ready: bool) {
        let index = self.queue_select as usize;
        if self.queue_in_setup().is_none() {
            return;
        }
        let valid = !ready || self.build_queue(index).is_some();
        self.queues[index].ready = ready && valid;
        if !valid {
            self.interrupt.signal_needs_reset();
        }
    }

    pub fn notify(&self, index: u32) {
        if !self.has(VIRTIO_CONFIG_S_DRIVER_OK) {
            return;
        }
        if let Some(kick) = self.kicks.get(index as usize) {
            // Fails only when the counter is full, and then the queue is notified already.
            let _ = kick.write(1);
        }
    }

    pub fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.device.read_config(offset, data);
    }

    pub fn write_config(&mut self, offset: u64, data: &[u8]) {
        if self.has(VIRTIO_CONFIG_S_DRIVER) && !self.is_broken() {
            self.device.write_config(offset, data);
        }
    }
}

fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

pub(super) fn set_low(target: &mut u64, value: u32) {
    *target = *target & !u64::from(u32::MAX) | u64::from(value);
}

pub(super) fn set_high(target: &mut u64, value: u32) {
    *target = *target & u64::from(u32::MAX) | u64::from(value) << 32;
}
