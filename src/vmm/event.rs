//! What happens inside a machine that its event loop must know of: a closed list, one queue.

use std::sync::{Arc, mpsc};

use vmm_sys_util::eventfd::EventFd;

/// What vCPUs and devices tell the event loop.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineEvent {
    /// The guest asked for a reset. The vCPU has parked itself, as with the next four.
    Reset,
    PowerOff,
    /// The guest's processor gave up (KVM_EXIT_SHUTDOWN). A PC resets itself then, and so do we.
    TripleFault,
    /// The guest did what KVM can't go on from.
    GuestFault(String),
    /// KVM, or we, failed.
    Failed(String),
    /// The guest's kernel wrote its last words to pvpanic.
    GuestPanicked {
        /// It goes on for a while, to write its dump.
        dumps: bool,
    },
    /// The guest lets go of the device in this PCI slot (`_EJ0`).
    Ejected {
        slot: u8,
    },
    /// The storage below this disk is full: a write waits for room.
    DiskFull {
        disk: String,
    },
    /// The write that waited went through.
    DiskHasRoom {
        disk: String,
    },
}

/// Where events are put.
#[derive(Clone)]
pub struct EventSender {
    pub queue: mpsc::Sender<MachineEvent>,
    pub wake: Arc<EventFd>,
}

impl EventSender {
    pub fn send(&self, event: MachineEvent) {
        // If the event loop is gone the process is about to end.
        let _ = self.queue.send(event);
        let _ = self.wake.write(1);
    }
}
