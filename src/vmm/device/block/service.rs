//! The thread of a disk: takes requests from the queue and the control side's commands, one after
//! the other.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use rustix::event::PollFlags;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_WRITE_ZEROES};

use super::SERIAL_BYTES;
use super::image::Image;
use super::request::Disk;
use crate::vmm::device::buffers::Buffers;
use crate::vmm::device::queue::{BrokenQueue, VirtQueue};
use crate::vmm::device::worker::{SOURCES_MAX, Service, Sources};
use crate::vmm::memory::GuestMemory;
use crate::vmm::transport::{ActivateError, Activation, Interrupt};

/// Requests served before the driver is interrupted: a driver that waits for the first of a long
/// queue must not wait for the last.
const REQUESTS_PER_INTERRUPT: usize = 16;
/// Requests served before the mailbox is looked at again: bounds how long a reset waits.
const REQUESTS_PER_TURN: usize = 64;

pub(super) enum Command {
    Grow { capacity_bytes: u64, reply: SyncSender<io::Result<()>> },
    Flush { reply: SyncSender<io::Result<()>> },
}

pub(super) struct BlockService {
    disk: Disk,
    capacity_bytes: Arc<AtomicU64>,
    buffers: Buffers,
    active: Option<Active>,
}

struct Active {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    queue: VirtQueue,
    /// More is available than one turn may serve.
    again: bool,
}

impl BlockService {
    pub fn new(
        image: Box<dyn Image>,
        read_only: bool,
        serial: [u8; SERIAL_BYTES],
        capacity_bytes: Arc<AtomicU64>,
    ) -> Self {
        let disk = Disk {
            image,
            read_only,
            serial,
            driver_flushes: false,
            driver_discards: false,
            driver_writes_zeroes: false,
        };
        Self { disk, capacity_bytes, buffers: Buffers::new(), active: None }
    }

    fn grow(&mut self, capacity_bytes: u64) -> io::Result<()> {
        if self.disk.read_only && capacity_bytes > self.disk.image.capacity_bytes() {
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, "the disk is read-only"));
        }
        self.disk.image.grow(capacity_bytes)?;
        let present = self.disk.image.capacity_bytes();
        if self.capacity_bytes.swap(present, Ordering::AcqRel) != present
            && let Some(active) = &self.active
        {
            active.interrupt.signal_config();
        }
        Ok(())
    }
}

impl Service for BlockService {
    type Command = Command;

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Some(queue) = activation.queues.into_iter().find(|queue| queue.index == 0) else {
            return Err(ActivateError("the request queue is not ready".into()));
        };
        let accepted = |feature: u32| activation.features & 1 << feature != 0;
        self.disk.driver_flushes = accepted(VIRTIO_BLK_F_FLUSH);
        self.disk.driver_discards = accepted(VIRTIO_BLK_F_DISCARD);
        self.disk.driver_writes_zeroes = accepted(VIRTIO_BLK_F_WRITE_ZEROES);
        self.active = Some(Active {
            memory: activation.memory,
            interrupt: activation.interrupt,
            queue: VirtQueue::new(queue),
            again: true,
        });
        Ok(())
    }

    fn stop(&mut self) {
        if self.active.take().is_some() && !self.disk.read_only {
            // Nobody is left to be told of an error; the driver was told of those of its own flushes.
            let _ = self.disk.image.flush();
        }
    }

    fn command(&mut self, command: Command) {
        // Callers wait for the reply; one that has gone needs none.
        match command {
            Command::Grow { capacity_bytes, reply } => {
                let _ = reply.send(self.grow(capacity_bytes));
            }
            Command::Flush { reply } => {
                let _ = reply.send(self.disk.image.flush());
            }
        }
    }

    fn sources(&self) -> Sources<'_> {
        let Some(active) = &self.active else { return Sources::default() };
        Sources {
            fds: [Some((active.queue.kick_fd(), PollFlags::IN)), None, None, None],
            timeout: active.again.then_some(Duration::ZERO),
        }
    }

    fn serve(&mut self, ready: [bool; SOURCES_MAX]) {
        let Some(active) = &mut self.active else { return };
        if ready[0] {
            active.queue.clear_kick();
        }
        if active.serve(&mut self.disk, &mut self.buffers).is_err() {
            active.interrupt.signal_needs_reset();
            self.stop();
        }
    }
}

impl Active {
    fn serve(&mut self, disk: &mut Disk, buffers: &mut Buffers) -> Result<(), BrokenQueue> {
        let memory = &self.memory;
        self.again = true;
        self.queue.disable_notifications(memory)?;
        for served in 1..=REQUESTS_PER_TURN {
            let Some(chain) = self.queue.pop(memory)? else {
                self.again = self.queue.enable_notifications(memory)?;
                break;
            };
            let head = chain.head_index();
            let written = match buffers.load(chain) {
                Ok(()) => disk.serve(buffers, memory),
                Err(_) => 0,
            };
            self.queue.push_used(memory, head, written)?;
            if served % REQUESTS_PER_INTERRUPT == 0 {
                self.queue.publish_and_signal(memory, self.interrupt.as_ref())?;
            } else {
                self.queue.publish(memory)?;
            }
        }
        self.queue.publish_and_signal(memory, self.interrupt.as_ref())
    }
}
