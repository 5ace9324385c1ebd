//! How a virtio device meets the guest. A device knows [`VirtioDevice`] and [`Interrupt`]; whether
//! it sits behind MMIO or PCI it can't tell.

mod driver;
pub mod mmio;
pub mod pci;

use std::sync::Arc;

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use super::memory::GuestMemory;

/// How a device tells its driver something.
pub trait Interrupt: Send + Sync {
    /// Used buffers were added to this queue.
    fn signal_queue(&self, queue_index: u16);
    /// An event to which a write does what [`Self::signal_queue`] does, for the kernel to raise this
    /// queue's interrupt with no thread of ours between (vhost's call). It stays good until the
    /// device's next reset: while the interrupt is masked a write leaves it pending, and if the driver
    /// gives the queue another vector it is for the transport to lead the event there.
    ///
    /// `None`: an interrupt takes more than an event (MMIO's status bit). Then the device has to watch
    /// an event of its own and to signal the queue.
    fn queue_event(&self, _queue_index: u16) -> Option<Arc<EventFd>> {
        None
    }
    /// The device's configuration space changed.
    fn signal_config(&self);
    /// The device can't go on (its driver broke a ring): sets DEVICE_NEEDS_RESET and tells the driver.
    fn signal_needs_reset(&self);
}

/// A queue as handed to a device when the driver has set DRIVER_OK.
pub struct ActiveQueue {
    pub index: u16,
    /// Configured and validated, with event index as negotiated.
    pub queue: Queue,
    /// Becomes readable when the driver notifies this queue. Non-blocking. It belongs to the
    /// transport and outlives resets, so that activation needs no system call.
    pub kick: Arc<EventFd>,
}

pub struct Activation {
    pub memory: GuestMemory,
    /// The queues that the driver made ready, in the order of their indexes.
    pub queues: Vec<ActiveQueue>,
    pub interrupt: Arc<dyn Interrupt>,
    /// What the driver accepted of [`VirtioDevice::features`].
    pub features: u64,
}

/// A device's place in a machine: its registers, whatever they are. The machine holds it, and buses lead
/// to it.
pub trait Transport: Send {
    /// The state after construction, for a reset of the machine. When it returns nothing of the device
    /// touches guest memory.
    fn reset(&mut self);
}

#[derive(Debug, thiserror::Error)]
#[error("activate the device: {0}")]
pub struct ActivateError(pub String);

pub trait VirtioDevice: Send {
    /// The virtio device id (virtio 1.2, section 5).
    fn device_type(&self) -> u32;
    /// The largest size of each queue.
    fn queue_sizes(&self) -> &[u16];
    /// Offered features, without those of the transport.
    fn features(&self) -> u64;
    fn read_config(&self, offset: u64, data: &mut [u8]);
    fn write_config(&mut self, offset: u64, data: &[u8]);
    /// The driver set DRIVER_OK. An error sets DEVICE_NEEDS_RESET and nothing worse.
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError>;
    /// Back to the state after construction. When it returns no thread of the device touches guest
    /// memory, and every backend descriptor (tap, disk) is still held, ready for the next activation.
    fn reset(&mut self);
}
