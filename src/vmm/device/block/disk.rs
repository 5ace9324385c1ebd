//! What the queues of one disk share.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES};

use super::SERIAL_BYTES;
use super::image::{Image, SECTOR_BYTES};
use super::request::Failure;
use crate::vmm::config::{CacheMode, DiskConfig};
use crate::vmm::device::limiter::SharedLimiter;
use crate::vmm::event::{EventSender, MachineEvent};
use crate::vmm::transport::Interrupt;

/// What the driver accepted of what a request may need.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Accepted {
    /// It flushes for itself.
    pub flush: bool,
    pub discard: bool,
    pub write_zeroes: bool,
}

impl Accepted {
    pub fn of(features: u64) -> Self {
        let accepted = |feature: u32| features & 1 << feature != 0;
        Self {
            flush: accepted(VIRTIO_BLK_F_FLUSH),
            discard: accepted(VIRTIO_BLK_F_DISCARD),
            write_zeroes: accepted(VIRTIO_BLK_F_WRITE_ZEROES),
        }
    }
}

pub(super) struct Disk {
    pub image: Box<dyn Image>,
    pub read_only: bool,
    pub serial: [u8; SERIAL_BYTES],
    pub cache: CacheMode,
    pub limiter: SharedLimiter,
    pub room: Room,
    /// Something was written since the last flush.
    dirty: AtomicBool,
    /// Of the present activation, for changes of the configuration space.
    interrupt: Mutex<Option<Arc<dyn Interrupt>>>,
}

impl Disk {
    pub fn new(image: Box<dyn Image>, config: &DiskConfig, events: EventSender) -> Self {
        let mut serial = [0; SERIAL_BYTES];
        serial.iter_mut().zip(config.name.bytes()).for_each(|(to, from)| *to = from);
        Self {
            image,
            read_only: config.read_only,
            serial,
            cache: config.cache,
            limiter: SharedLimiter::new(config.limits),
            room: Room { disk: config.name.clone(), events, waiting: Mutex::default() },
            dirty: AtomicBool::new(false),
            interrupt: Mutex::default(),
        }
    }

    /// The byte offset of a range of whole sectors within the disk.
    pub fn range(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Failure::Io)?;
        let end = offset.checked_add(len).ok_or(Failure::Io)?;
        let fits = len.is_multiple_of(SECTOR_BYTES) && end <= self.image.capacity_bytes();
        if fits { Ok(offset) } else { Err(Failure::Io) }
    }

    /// To be called before a write begins: a flush that begins later covers it, or leaves the mark.
    pub fn note_write(&self) {
        self.dirty.store(true, Ordering::Release);
    }

    /// Whether a write must be on stable storage before the guest hears of it.
    pub fn is_durable(&self, accepted: Accepted) -> bool {
        match self.cache {
            CacheMode::Writethrough => true,
            CacheMode::Writeback | CacheMode::Direct => !accepted.flush,
            CacheMode::Unsafe => false,
        }
    }

    /// After a write: makes it durable where it must be.
    pub fn settle_write(&self, accepted: Accepted) -> Result<(), Failure> {
        if self.is_durable(accepted) { self.flush() } else { Ok(()) }
    }

    /// The image's own tables go to the file, and all of it to stable storage if the cache mode wants it.
    pub fn flush(&self) -> Result<(), Failure> {
        self.image.write_back().map_err(Failure::of_write)?;
        if self.cache != CacheMode::Unsafe {
            // Not to be tried again for want of room: the kernel tells of what it lost only once.
            self.image.sync()?;
        }
        Ok(())
    }

    /// As [`Self::flush`], for who can say what failed.
    pub fn try_flush(&self) -> io::Result<()> {
        self.image.write_back()?;
        if self.cache == CacheMode::Unsafe { Ok(()) } else { self.image.sync() }
    }

    /// After the last request of a driver that has gone.
    pub fn flush_leavings(&self) {
        if self.dirty.swap(false, Ordering::AcqRel) && self.flush().is_err() {
            // Nobody is left to be told; the driver was told of the errors of its own flushes.
            self.note_write();
        }
    }

    pub fn grow(&self, capacity_bytes: u64) -> io::Result<()> {
        let before = self.image.capacity_bytes();
        if self.read_only && capacity_bytes > before {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "the disk is read-only"));
        }
        self.image.grow(capacity_bytes)?;
        if self.image.capacity_bytes() != before
            && let Some(interrupt) = &*self.interrupt()
        {
            interrupt.signal_config();
        }
        Ok(())
    }

    fn interrupt(&self) -> MutexGuard<'_, Option<Arc<dyn Interrupt>>> {
        self.interrupt.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn set_interrupt(&self, interrupt: Option<Arc<dyn Interrupt>>) {
        *self.interrupt() = interrupt;
    }
}

/// Whether writes wait for room on the storage: the machine's event loop is told when the first does
/// and when none does any more.
pub(super) struct Room {
    disk: String,
    events: EventSender,
    /// One bit for each queue.
    waiting: Mutex<u64>,
}

impl Room {
    /// The lock is held while the event is sent: the event loop sees them in the order in which they
    /// became true.
    fn set(&self, queue: usize, waits: bool) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *waiting;
        match waits {
            true => *waiting |= 1 << queue,
            false => *waiting &= !(1 << queue),
        }
        let disk = || self.disk.clone();
        match (before == 0, *waiting == 0) {
            (true, false) => self.events.send(MachineEvent::DiskFull { disk: disk() }),
            (false, true) => self.events.send(MachineEvent::DiskHasRoom { disk: disk() }),
            _ => {}
        }
    }

    pub fn wait(&self, queue: usize) {
        self.set(queue, true);
    }

    /// Nothing of this queue waits any more.
    pub fn is_found(&self, queue: usize) {
        self.set(queue, false);
    }
}
