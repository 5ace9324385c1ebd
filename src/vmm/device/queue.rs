//! A virtqueue in use: `virtio_queue` reads the available side, we write the used side.
//!
//! The used side is ours for two reasons: a packet that spans several receive buffers must appear to
//! the driver all at once, and `VIRTQ_AVAIL_F_NO_INTERRUPT` must be respected where the event index
//! was not negotiated.

use std::num::Wrapping;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::worker::event_fd;
use crate::vmm::memory::GuestMemory;
use crate::vmm::transport::{ActiveQueue, Interrupt};

/// Offsets and sizes of the split ring (virtio 1.2, section 2.7).
const RING_HEADER_BYTES: u64 = 4;
const USED_ELEMENT_BYTES: u64 = 8;
const AVAIL_ELEMENT_BYTES: u64 = 2;
const AVAIL_FLAG_NO_INTERRUPT: u16 = 1;

/// The driver broke the ring itself. Nothing but a reset helps.
#[derive(Debug, thiserror::Error)]
#[error("virtqueue {index}: {reason}")]
pub(super) struct BrokenQueue {
    index: u16,
    reason: String,
}

pub(super) struct VirtQueue {
    index: u16,
    queue: Queue,
    kick: Arc<EventFd>,
    /// Where the next used element goes; may run ahead of what is published.
    next_used: Wrapping<u16>,
    published: Wrapping<u16>,
    /// What was published when the driver was last considered for an interrupt.
    signalled: Wrapping<u16>,
    /// Interrupts since somebody asked.
    interrupts: u64,
}

impl VirtQueue {
    pub fn new(active: ActiveQueue) -> Self {
        let next_used = Wrapping(active.queue.next_used());
        Self {
            index: active.index,
            queue: active.queue,
            kick: active.kick,
            next_used,
            published: next_used,
            signalled: next_used,
            interrupts: 0,
        }
    }

    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    pub fn index(&self) -> u16 {
        self.index
    }

    /// The rings as the driver set them up, for somebody else to serve them (vhost).
    pub fn rings(&self) -> &Queue {
        &self.queue
    }

    /// Goes on where somebody else has stopped who served the queue meanwhile. What that one used last
    /// may not have been announced.
    pub fn resume(&mut self, memory: &GuestMemory, next_available: u16) -> Result<(), BrokenQueue> {
        self.queue.set_next_avail(next_available);
        let address = GuestAddress(self.queue.used_ring() + 2);
        let used = memory.load(address, Ordering::Acquire).map(u16::from_le);
        self.next_used = Wrapping(used.map_err(|error| self.broken(error))?);
        self.published = self.next_used;
        self.signalled = self.next_used;
        Ok(())
    }

    /// As if the driver had notified this queue, for whoever watches for that.
    pub fn kick(&self) {
        // Fails only when the counter is full, and then the queue is notified already.
        let _ = self.kick.write(1);
    }

    pub fn kick_fd(&self) -> BorrowedFd<'_> {
        event_fd(&self.kick)
    }

    /// Gives how often the driver has kicked.
    pub fn clear_kick(&self) -> u64 {
        // Non-blocking: an error only says that there was no kick.
        self.kick.read().unwrap_or(0)
    }

    /// How many interrupts were raised since the last call.
    pub fn take_interrupts(&mut self) -> u64 {
        std::mem::take(&mut self.interrupts)
    }

    fn broken(&self, reason: impl ToString) -> BrokenQueue {
        BrokenQueue { index: self.index, reason: reason.to_string() }
    }

    /// The next available chain. Its head is within the queue.
    pub fn pop<'m>(
        &mut self,
        memory: &'m GuestMemory,
    ) -> Result<Option<DescriptorChain<&'m GuestMemory>>, BrokenQueue> {
        let chain = self.queue.iter(memory).map(|mut chains| chains.next());
        match chain.map_err(|error| self.broken(error))? {
            Some(chain) if chain.head_index() >= self.queue.size() => {
                Err(self.broken("an available head beyond the queue"))
            }
            chain => Ok(chain),
        }
    }

    /// Gives back the `count` chains popped last, none of which was pushed as used.
    pub fn unpop(&mut self, count: u16) {
        let next = Wrapping(self.queue.next_avail()) - Wrapping(count);
        self.queue.set_next_avail(next.0);
    }

    /// Writes a used element; the driver sees it with the next [`Self::publish`].
    pub fn push_used(&mut self, memory: &GuestMemory, head: u16, len: u32) -> Result<(), BrokenQueue> {
        let slot = u64::from(self.next_used.0 % self.queue.size());
        let element = [u32::from(head).to_le(), len.to_le()];
        // No overflow: the transport checked that the whole ring lies in guest memory.
        let address = GuestAddress(self.queue.used_ring() + RING_HEADER_BYTES + slot * USED_ELEMENT_BYTES);
        memory.write_obj(element, address).map_err(|error| self.broken(error))?;
        self.next_used += 1;
        Ok(())
    }

    pub fn publish(&mut self, memory: &GuestMemory) -> Result<(), BrokenQueue> {
        if self.published == self.next_used {
            return Ok(());
        }
        let address = GuestAddress(self.queue.used_ring() + 2);
        memory
            .store(self.next_used.0.to_le(), address, Ordering::Release)
            .map_err(|error| self.broken(error))?;
        self.published = self.next_used;
        Ok(())
    }

    /// Publishes, and interrupts the driver if it asked to be told of anything since the last time.
    pub fn publish_and_signal(
        &mut self,
        memory: &GuestMemory,
        interrupt: &dyn Interrupt,
    ) -> Result<(), BrokenQueue> {
        self.publish_and_count(memory, interrupt).map(drop)
    }

    /// As [`Self::publish_and_signal`]; gives how many interrupts that took.
    pub fn publish_and_count(
        &mut self,
        memory: &GuestMemory,
        interrupt: &dyn Interrupt,
    ) -> Result<u64, BrokenQueue> {
        self.publish(memory)?;
        if self.signalled == self.published {
            return Ok(0);
        }
        // The driver stores its wish and then reads the used index; we do the reverse.
        fence(Ordering::SeqCst);
        let since = self.signalled;
        self.signalled = self.published;
        let wanted = if self.queue.event_idx_enabled() {
            let offset = RING_HEADER_BYTES + u64::from(self.queue.size()) * AVAIL_ELEMENT_BYTES;
            let used_event = Wrapping(self.load_avail(memory, offset)?);
            self.published - used_event - Wrapping(1) < self.published - since
        } else {
            self.load_avail(memory, 0)? & AVAIL_FLAG_NO_INTERRUPT == 0
        };
        if wanted {
            interrupt.signal_queue(self.index);
            self.interrupts += 1;
        }
        Ok(wanted.into())
    }

    fn load_avail(&self, memory: &GuestMemory, offset: u64) -> Result<u16, BrokenQueue> {
        let address = GuestAddress(self.queue.avail_ring() + offset);
        memory.load(address, Ordering::Relaxed).map(u16::from_le).map_err(|error| self.broken(error))
    }

    /// Asks the driver not to notify while we look anyway.
    pub fn disable_notifications(&mut self, memory: &GuestMemory) -> Result<(), BrokenQueue> {
        self.queue.disable_notification(memory).map_err(|error| self.broken(error))
    }

    /// Asks for notifications again; true when more came meanwhile, which nobody will announce.
    pub fn enable_notifications(&mut self, memory: &GuestMemory) -> Result<bool, BrokenQueue> {
        self.queue.enable_notification(memory).map_err(|error| self.broken(error))
    }
}
