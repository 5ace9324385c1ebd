//! From the tap to the guest.
//!
//! A frame is read straight into the guest's buffers, as many of them as the last one filled. Where the
//! next one turns out to be longer its end is read to a buffer of ours, and copied when there is room.
//! Chains that were taken and not filled are given back, or kept for the next frame.

use std::time::Instant;

use super::pair::{FRAMES_PER_TURN, TapState, Waiting};
use super::shared::Shared;
use super::tap::{FRAME_BYTES_MAX, HEADER_BYTES, Tap, Transfer};
use crate::vmm::device::buffers::Buffers;
use crate::vmm::device::limiter::Cost;
use crate::vmm::device::queue::{BrokenQueue, VirtQueue};
use crate::vmm::memory::GuestMemory;

/// Where a received frame's header counts the buffers that it fills.
const BUFFER_COUNT_OFFSET: u64 = 10;

pub(super) struct Receive {
    pub queue: VirtQueue,
    pub waiting: Waiting,
    mergeable: bool,
    /// Those of `chains`.
    buffers: Buffers,
    /// Heads and lengths of the chains that were taken and not given back.
    chains: Vec<(u16, u64)>,
    /// Their lengths together.
    room: u64,
    frame: Option<Frame>,
    /// The end of the frame.
    rest: Box<[u8]>,
    /// How long the last frame was.
    expected: u64,
}

/// A frame that was read and is not the guest's yet.
#[derive(Clone, Copy)]
struct Frame {
    /// With its header.
    len: u64,
    /// How much of it is in the guest's buffers.
    placed: u64,
}

enum Taken {
    Chain,
    /// There is none for now.
    None,
    /// The next chain is not one to receive into.
    Bad,
}

enum Outcome {
    /// The next frame may be read.
    Next,
    /// The turn is over.
    Wait(Waiting),
    Tap(TapState),
}

impl Receive {
    pub fn new(queue: VirtQueue, mergeable: bool) -> Self {
        Self {
            queue,
            waiting: Waiting::Nothing,
            mergeable,
            buffers: Buffers::new(),
            chains: Vec::new(),
            room: 0,
            frame: None,
            rest: vec![0; FRAME_BYTES_MAX].into(),
            expected: 0,
        }
    }

    /// Gives all chains back; a frame that was read is lost.
    pub fn release(&mut self) {
        self.queue.unpop(self.chains.len() as u16);
        self.forget_chains();
        self.frame = None;
    }

    fn forget_chains(&mut self) {
        self.chains.clear();
        self.buffers.clear();
        self.room = 0;
    }

    /// Throws away what the tap has and the guest is not to see.
    pub fn discard(&mut self, tap: &Tap) {
        self.frame = None;
        tap.discard_stale(&mut self.rest);
    }

    pub fn serve(
        &mut self,
        tap: &Tap,
        memory: &GuestMemory,
        shared: &Shared,
        pair: usize,
    ) -> Result<TapState, BrokenQueue> {
        self.waiting = Waiting::Nothing;
        for _ in 0..FRAMES_PER_TURN {
            let outcome = match self.frame {
                Some(frame) => self.deliver(frame, memory, shared, pair)?,
                None => self.read(tap, memory, shared)?,
            };
            match outcome {
                Outcome::Next => {}
                Outcome::Wait(waiting) => {
                    self.waiting = waiting;
                    break;
                }
                Outcome::Tap(state) => return Ok(state),
            }
        }
        Ok(TapState::Usable)
    }

    fn read(&mut self, tap: &Tap, memory: &GuestMemory, shared: &Shared) -> Result<Outcome, BrokenQueue> {
        while self.chains.is_empty() || self.mergeable && self.room < self.expected {
            match self.take_chain(memory)? {
                Taken::Chain => {}
                Taken::None if self.chains.is_empty() => return self.wait_for_driver(memory),
                Taken::Bad if self.chains.is_empty() => return Ok(Outcome::Next),
                Taken::None | Taken::Bad => break,
            }
        }
        self.queue.disable_notifications(memory)?;
        let Ok(vectors) = self.buffers.writable(memory).io_vectors() else {
            // They were checked when they were taken, so this doesn't happen; if it did, it would go on.
            return Ok(Outcome::Wait(Waiting::Driver));
        };
        let room = vectors.len_bytes();
        Ok(match tap.receive(vectors, &mut self.rest) {
            Transfer::Done(len) if len > HEADER_BYTES => {
                let len = len as u64;
                self.expected = len;
                self.frame = Some(Frame { len, placed: len.min(room) });
                Outcome::Next
            }
            Transfer::Done(_) => Outcome::Next,
            Transfer::WouldBlock => Outcome::Wait(Waiting::Tap),
            Transfer::Dropped => {
                shared.counters.tap_errors.increment();
                Outcome::Tap(TapState::failing())
            }
            Transfer::Gone => Outcome::Tap(TapState::Gone),
        })
    }

    /// Gives the frame to the guest, once there is room for it and it may pass. One that fits nowhere is
    /// dropped.
    fn deliver(
        &mut self,
        frame: Frame,
        memory: &GuestMemory,
        shared: &Shared,
        pair: usize,
    ) -> Result<Outcome, BrokenQueue> {
        while self.room < frame.len {
            let taken = if self.mergeable { self.take_chain(memory)? } else { Taken::Bad };
            match taken {
                Taken::Chain => {}
                Taken::None if self.chains.len() < usize::from(self.queue.size()) => {
                    return self.wait_for_driver(memory);
                }
                Taken::None | Taken::Bad => {
                    shared.counters.received_dropped.increment();
                    self.frame = None;
                    return Ok(Outcome::Next);
                }
            }
        }
        let bytes = frame.len - HEADER_BYTES as u64;
        if let Err(wait) = shared.receive_limiter.take(pair, Cost::one(bytes)) {
            shared.counters.receive_throttled.increment();
            return Ok(Outcome::Wait(Waiting::Until(Instant::now() + wait)));
        }
        self.hand_over(frame, memory)?;
        self.frame = None;
        shared.counters.received_packets.increment();
        shared.counters.received_bytes.add(bytes);
        Ok(Outcome::Next)
    }

    /// Completes the frame in the guest's buffers and makes it the guest's.
    fn hand_over(&mut self, frame: Frame, memory: &GuestMemory) -> Result<(), BrokenQueue> {
        let mut before = 0;
        let filled = self.chains.iter().take_while(|(_, len)| {
            let needed = before < frame.len;
            before += len;
            needed
        });
        let filled = filled.count();
        let mut end = self.buffers.writable(memory);
        end.skip(frame.placed);
        let mut count = self.buffers.writable(memory);
        count.skip(BUFFER_COUNT_OFFSET);
        let rest = &self.rest[..(frame.len - frame.placed) as usize];
        let complete =
            end.write_all(rest).and_then(|()| count.write_all(&(filled as u16).to_le_bytes())).is_ok();
        let mut left = if complete { frame.len } else { 0 };
        for (head, len) in &self.chains[..filled] {
            let used = left.min(*len);
            left -= used;
            self.queue.push_used(memory, *head, used as u32)?;
        }
        // All buffers of a frame appear at once.
        self.queue.publish(memory)?;
        self.queue.unpop((self.chains.len() - filled) as u16);
        self.forget_chains();
        Ok(())
    }

    /// Takes one more chain. A bad one is given back to the guest, unless it comes after good ones that
    /// are still to be filled.
    fn take_chain(&mut self, memory: &GuestMemory) -> Result<Taken, BrokenQueue> {
        let Some(chain) = self.queue.pop(memory)? else { return Ok(Taken::None) };
        let head = chain.head_index();
        match self.buffers.append_writable(chain, memory) {
            Ok(len) => {
                self.chains.push((head, len));
                self.room += len;
                Ok(Taken::Chain)
            }
            Err(_) => {
                if self.chains.is_empty() {
                    self.queue.push_used(memory, head, 0)?;
                    self.queue.publish(memory)?;
                } else {
                    self.queue.unpop(1);
                }
                Ok(Taken::Bad)
            }
        }
    }

    fn wait_for_driver(&mut self, memory: &GuestMemory) -> Result<Outcome, BrokenQueue> {
        // What came while we looked is for the next turn.
        let more = self.queue.enable_notifications(memory)?;
        Ok(Outcome::Wait(if more { Waiting::Nothing } else { Waiting::Driver }))
    }
}
