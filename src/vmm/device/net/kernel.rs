//! A queue pair's frames in the hands of the kernel: [`Vhost`] with the events between it and us.

use std::io;
use std::os::fd::OwnedFd;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::tap::Tap;
use super::vhost::{Ring, Vhost};
use crate::vmm::device::queue::VirtQueue;
use crate::vmm::device::worker::event_fd;
use crate::vmm::memory::GuestMemory;
use crate::vmm::transport::Interrupt;

pub(super) struct Kernel {
    vhost: Vhost,
    /// Signalled for interrupts that the transport has no event of its own for.
    call: EventFd,
    /// Signalled when the driver broke a ring.
    broken: EventFd,
    /// The queues whose interrupts come by `call`.
    forwarded: [Option<u16>; 2],
}

impl Kernel {
    /// Before the thread has its filter, which lets it make no events.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let event = || EventFd::new(EFD_NONBLOCK);
        Ok(Self { vhost: Vhost::new(fd), call: event()?, broken: event()?, forwarded: [None; 2] })
    }

    pub fn call(&self) -> &EventFd {
        &self.call
    }

    pub fn broken(&self) -> &EventFd {
        &self.broken
    }

    /// See [`Vhost::start`].
    pub fn start(
        &mut self,
        memory: &GuestMemory,
        features: u64,
        queues: [&VirtQueue; 2],
        interrupt: &dyn Interrupt,
        tap: &Tap,
    ) -> io::Result<()> {
        // Left from before: an error says that there is nothing.
        let _ = (self.call.read(), self.broken.read());
        let events = queues.map(|queue| interrupt.queue_event(queue.index()));
        let [receive, transmit] = [0, 1].map(|at| Ring {
            queue: queues[at],
            call: event_fd(events[at].as_deref().unwrap_or(&self.call)),
        });
        self.forwarded = [0, 1].map(|at| events[at].is_none().then(|| queues[at].index()));
        self.vhost.start(memory, features, [receive, transmit], event_fd(&self.broken), tap)
    }

    /// See [`Vhost::stop`].
    pub fn stop(&self) -> io::Result<[u16; 2]> {
        self.vhost.stop()
    }

    pub fn use_tap(&self, tap: &Tap) -> io::Result<()> {
        self.vhost.set_backend(Some(tap))
    }

    /// Passes the kernel's call on. It may have been for either queue.
    pub fn forward(&self, interrupt: &dyn Interrupt) {
        let _ = self.call.read();
        for queue in self.forwarded.into_iter().flatten() {
            interrupt.signal_queue(queue);
        }
    }
}
