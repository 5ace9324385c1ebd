//! From the guest to the tap, straight out of the guest's buffers.

use std::time::Instant;

use super::pair::{FRAMES_PER_TURN, Waiting};
use super::shared::Shared;
use super::tap::{FRAME_BYTES_MAX, HEADER_BYTES, Tap, Transfer};
use crate::vmm::device::buffers::Buffers;
use crate::vmm::device::limiter::Cost;
use crate::vmm::device::queue::{BrokenQueue, VirtQueue};
use crate::vmm::memory::GuestMemory;

pub(super) struct Transmit {
    pub queue: VirtQueue,
    pub waiting: Waiting,
    buffers: Buffers,
}

impl Transmit {
    pub fn new(queue: VirtQueue) -> Self {
        Self { queue, waiting: Waiting::Nothing, buffers: Buffers::new() }
    }

    /// Sends what the driver has made available; without a tap it is dropped. Says if the tap turns out
    /// to be gone.
    pub fn serve(
        &mut self,
        mut tap: Option<&Tap>,
        memory: &GuestMemory,
        shared: &Shared,
        pair: usize,
    ) -> Result<bool, BrokenQueue> {
        self.waiting = Waiting::Nothing;
        let mut gone = false;
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
            let sane = loaded && (HEADER_BYTES as u64 + 1..=FRAME_BYTES_MAX as u64).contains(&frame.len());
            // What is dropped anyway is no load for the network.
            let Some(usable) = tap.filter(|_| sane) else {
                shared.counters.sent_dropped.increment();
                self.queue.push_used(memory, head, 0)?;
                continue;
            };
            let bytes = frame.len() - HEADER_BYTES as u64;
            if let Err(wait) = shared.transmit_limiter.take(pair, Cost::one(bytes)) {
                shared.counters.transmit_throttled.increment();
                self.queue.unpop(1);
                self.waiting = Waiting::Until(Instant::now() + wait);
                break;
            }
            match usable.send(&frame) {
                Transfer::Done(_) => {
                    shared.counters.sent_packets.increment();
                    shared.counters.sent_bytes.add(bytes);
                }
                Transfer::WouldBlock => {
                    self.queue.unpop(1);
                    self.waiting = Waiting::Tap;
                    break;
                }
                Transfer::Dropped => shared.counters.sent_dropped.increment(),
                Transfer::Gone => {
                    shared.counters.sent_dropped.increment();
                    gone = true;
                    tap = None;
                }
            }
            self.queue.push_used(memory, head, 0)?;
        }
        Ok(gone)
    }
}
