//! The thread of a NIC: frames from the tap to the receive queue, and from the transmit queue to the
//! tap.
//!
//! It waits only for what can help: for the tap while the guest has room, for room while a frame
//! waits, for neither when the tap is gone.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use rustix::event::PollFlags;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;

use super::tap::{FRAME_BYTES_MAX, HEADER_BYTES, Tap, Transfer};
use crate::vmm::device::buffers::Buffers;
use crate::vmm::device::queue::{BrokenQueue, VirtQueue};
use crate::vmm::device::worker::{SOURCES_MAX, Service, Sources};
use crate::vmm::memory::GuestMemory;
use crate::vmm::transport::{ActivateError, Activation, Interrupt};

/// Frames moved in each direction before the other direction, and the mailbox, have their turn.
const FRAMES_PER_TURN: usize = 64;
/// How long a tap that fails is left alone.
const RETRY: Duration = Duration::from_millis(500);
/// Where a received frame's header counts the buffers that it fills.
const BUFFER_COUNT_OFFSET: usize = 10;

const SOURCE_RECEIVE: usize = 0;
const SOURCE_TRANSMIT: usize = 1;
const SOURCE_TAP: usize = 2;

pub(super) enum Command {
    ReplaceTap { tap: OwnedFd, reply: SyncSender<io::Result<()>> },
}

pub(super) struct NetService {
    tap: Tap,
    link_up: Arc<AtomicBool>,
    active: Option<Active>,
}

struct Active {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    features: u64,
    receive: Receive,
    transmit: Transmit,
    tap_state: TapState,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum TapState {
    Usable,
    /// It failed; frames from it are not asked for until [`RETRY`] has passed.
    Failing,
    Gone,
}

/// What one direction waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Waiting {
    /// There is more to do than one turn allows.
    Nothing,
    /// A notification by the driver.
    Driver,
    /// The tap: a frame, or room for one.
    Tap,
}

struct Receive {
    queue: VirtQueue,
    waiting: Waiting,
    mergeable: bool,
    /// The frame that waits for the guest to have room, or nothing.
    frame: Box<[u8]>,
    frame_len: usize,
    buffers: Buffers,
    /// Heads and sizes of the chains that the frame fills.
    chains: Vec<(u16, u64)>,
}

struct Transmit {
    queue: VirtQueue,
    waiting: Waiting,
    buffers: Buffers,
}

impl NetService {
    pub fn new(tap: Tap, link_up: Arc<AtomicBool>) -> Self {
        Self { tap, link_up, active: None }
    }

    fn replace_tap(&mut self, tap: OwnedFd) -> io::Result<()> {
        let tap = Tap::new(tap)?;
        if let Some(active) = &mut self.active {
            tap.set_offloads(active.features)?;
            active.tap_state = TapState::Usable;
            // What the old tap gave last has no place in the new network.
            active.receive.frame_len = 0;
            active.receive.waiting = Waiting::Nothing;
            active.transmit.waiting = Waiting::Nothing;
        }
        self.tap = tap;
        self.set_link(true);
        Ok(())
    }

    fn set_link(&mut self, up: bool) {
        if self.link_up.swap(up, Ordering::AcqRel) != up
            && let Some(active) = &self.active
        {
            active.interrupt.signal_config();
        }
    }
}

impl Service for NetService {
    type Command = Command;

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Ok([receive, transmit]) = <[_; 2]>::try_from(activation.queues) else {
            return Err(ActivateError("the receive and the transmit queue must both be ready".into()));
        };
        // A tap that refuses is gone or broken. That is no reason to fail the driver: its link is down.
        let usable = self.tap.set_offloads(activation.features).is_ok();
        self.active = Some(Active {
            memory: activation.memory,
            interrupt: activation.interrupt,
            features: activation.features,
            receive: Receive::new(
                VirtQueue::new(receive),
                activation.features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0,
            ),
            transmit: Transmit {
                queue: VirtQueue::new(transmit),
                waiting: Waiting::Nothing,
                buffers: Buffers::new(),
            },
            tap_state: if usable { TapState::Usable } else { TapState::Gone },
        });
        self.set_link(usable);
        Ok(())
    }

    fn stop(&mut self) {
        self.active = None;
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::ReplaceTap { tap, reply } => {
                // The caller waits for the reply; one that has gone needs none.
                let _ = reply.send(self.replace_tap(tap));
            }
        }
    }

    fn sources(&self) -> Sources<'_> {
        let Some(active) = &self.active else { return Sources::default() };
        let mut sources = Sources::default();
        sources.fds[SOURCE_RECEIVE] = Some((active.receive.queue.kick_fd(), PollFlags::IN));
        sources.fds[SOURCE_TRANSMIT] = Some((active.transmit.queue.kick_fd(), PollFlags::IN));
        let mut flags = PollFlags::empty();
        if active.receive.waiting == Waiting::Tap {
            flags |= PollFlags::IN;
        }
        if active.transmit.waiting == Waiting::Tap {
            flags |= PollFlags::OUT;
            // A tap that goes down never has room again, but then it says so when asked.
            sources.timeout = Some(RETRY);
        }
        match active.tap_state {
            TapState::Usable if !flags.is_empty() => {
                sources.fds[SOURCE_TAP] = Some((self.tap.as_fd(), flags))
            }
            TapState::Failing => sources.timeout = Some(RETRY),
            // Even an empty set of events reports errors, without end when the tap is gone.
            TapState::Usable | TapState::Gone => {}
        }
        let receive_now = active.receive.waiting == Waiting::Nothing && active.tap_state == TapState::Usable;
        if receive_now || active.transmit.waiting == Waiting::Nothing {
            sources.timeout = Some(Duration::ZERO);
        }
        sources
    }

    fn serve(&mut self, ready: [bool; SOURCES_MAX]) {
        let Some(active) = &mut self.active else { return };
        let was_gone = active.tap_state == TapState::Gone;
        match active.serve(&self.tap, ready) {
            Ok(()) if active.tap_state == TapState::Gone && !was_gone => self.set_link(false),
            Ok(()) => {}
            Err(_) => {
                active.interrupt.signal_needs_reset();
                self.active = None;
            }
        }
    }
}

impl Active {
    fn serve(&mut self, tap: &Tap, ready: [bool; SOURCES_MAX]) -> Result<(), BrokenQueue> {
        if ready[SOURCE_RECEIVE] {
            self.receive.queue.clear_kick();
        }
        if ready[SOURCE_TRANSMIT] {
            self.transmit.queue.clear_kick();
        }
        let timed_out = ready == [false; SOURCES_MAX];
        if self.tap_state == TapState::Failing && timed_out {
            self.tap_state = TapState::Usable;
        }
        let receive = match self.receive.waiting {
            Waiting::Nothing => true,
            Waiting::Driver => ready[SOURCE_RECEIVE],
            Waiting::Tap => ready[SOURCE_TAP] || timed_out,
        };
        if receive && self.tap_state == TapState::Usable {
            self.tap_state = self.receive.serve(tap, &self.memory)?;
            self.receive.queue.publish_and_signal(&self.memory, self.interrupt.as_ref())?;
        }
        let transmit = match self.transmit.waiting {
            Waiting::Nothing => true,
            Waiting::Driver => ready[SOURCE_TRANSMIT],
            Waiting::Tap => ready[SOURCE_TAP] || timed_out,
        };
        if transmit {
            let state = self.transmit.serve(tap, self.tap_state, &self.memory)?;
            self.tap_state = state;
            self.transmit.queue.publish_and_signal(&self.memory, self.interrupt.as_ref())?;
        }
        Ok(())
    }
}

impl Receive {
    fn new(queue: VirtQueue, mergeable: bool) -> Self {
        Self {
            queue,
            waiting: Waiting::Nothing,
            mergeable,
            frame: vec![0; FRAME_BYTES_MAX].into(),
            frame_len: 0,
            buffers: Buffers::new(),
            chains: Vec::new(),
        }
    }

    fn serve(&mut self, tap: &Tap, memory: &GuestMemory) -> Result<TapState, BrokenQueue> {
        self.waiting = Waiting::Nothing;
        for _ in 0..FRAMES_PER_TURN {
            if self.frame_len == 0 {
                match tap.receive(&mut self.frame) {
                    Transfer::Done(len) => self.frame_len = len,
                    Transfer::WouldBlock => {
                        self.waiting = Waiting::Tap;
                        return Ok(TapState::Usable);
                    }
                    Transfer::Dropped => return Ok(TapState::Failing),
                    Transfer::Gone => return Ok(TapState::Gone),
                }
            }
            if self.frame_len > HEADER_BYTES && !self.deliver(memory)? {
                self.waiting = Waiting::Driver;
                return Ok(TapState::Usable);
            }
            self.frame_len = 0;
        }
        Ok(TapState::Usable)
    }

    /// Gives the frame to the guest, or drops it when it fits nowhere. False when the guest has no
    /// room for now, and will notify us when it has.
    fn deliver(&mut self, memory: &GuestMemory) -> Result<bool, BrokenQueue> {
        loop {
            match self.collect(memory)? {
                Room::Enough => break,
                Room::Never => return Ok(true),
                Room::Now => {}
                Room::Later => return Ok(false),
            }
        }
        self.queue.disable_notifications(memory)?;
        let count = self.chains.len() as u16;
        self.frame[BUFFER_COUNT_OFFSET..HEADER_BYTES].copy_from_slice(&count.to_le_bytes());
        let frame = &self.frame[..self.frame_len];
        // Buffers outside of guest memory lose the frame, but are given back all the same.
        let delivered = self.buffers.writable(memory).write_all(frame).is_ok();
        let mut left = if delivered { frame.len() as u64 } else { 0 };
        for (head, len) in self.chains.drain(..) {
            let used = len.min(left);
            left -= used;
            self.queue.push_used(memory, head, used as u32)?;
        }
        // All buffers of a frame appear at once.
        self.queue.publish(memory)?;
        Ok(true)
    }

    /// Takes chains until the frame fits. Unless it fits, none is kept.
    fn collect(&mut self, memory: &GuestMemory) -> Result<Room, BrokenQueue> {
        self.buffers.clear();
        self.chains.clear();
        let wanted = self.frame_len as u64;
        let mut room = 0;
        let mut taken = 0;
        let outcome = loop {
            let Some(chain) = self.queue.pop(memory)? else {
                // Before giving the chains back: what counts is what comes after them.
                break if taken == self.queue.size() {
                    Room::Never
                } else if self.queue.enable_notifications(memory)? {
                    Room::Now
                } else {
                    Room::Later
                };
            };
            taken += 1;
            let head = chain.head_index();
            if self.buffers.append(chain).is_err() {
                break Room::Never;
            }
            let len = self.buffers.writable(memory).len() - room;
            room += len;
            self.chains.push((head, len));
            if room >= wanted {
                return Ok(Room::Enough);
            }
            if !self.mergeable {
                break Room::Never;
            }
        };
        self.queue.unpop(taken);
        Ok(outcome)
    }
}

enum Room {
    Enough,
    /// More came while we looked: look again.
    Now,
    Later,
    /// The guest's buffers are of a kind that this frame can't fit into.
    Never,
}

impl Transmit {
    fn serve(
        &mut self,
        tap: &Tap,
        mut tap_state: TapState,
        memory: &GuestMemory,
    ) -> Result<TapState, BrokenQueue> {
        self.waiting = Waiting::Nothing;
        self.queue.disable_notifications(memory)?;
        for _ in 0..FRAMES_PER_TURN {
            let Some(chain) = self.queue.pop(memory)? else {
                if !self.queue.enable_notifications(memory)? {
                    self.waiting = Waiting::Driver;
                }
                break;
            };
            let head = chain.head_index();
            let loaded = self.buffers.load(chain).is_ok();
            let frame = self.buffers.readable(memory);
            let sane = loaded && (HEADER_BYTES as u64..=FRAME_BYTES_MAX as u64).contains(&frame.len());
            if sane && tap_state != TapState::Gone {
                match tap.send(&frame) {
                    Transfer::Done(_) | Transfer::Dropped => {}
                    Transfer::WouldBlock => {
                        self.queue.unpop(1);
                        self.waiting = Waiting::Tap;
                        break;
                    }
                    Transfer::Gone => tap_state = TapState::Gone,
                }
            }
            self.queue.push_used(memory, head, 0)?;
        }
        Ok(tap_state)
    }
}
