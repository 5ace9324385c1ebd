//! The balloon's thread: gives back the pages that the guest names, and asks for its statistics.
//!
//! Which queue is which depends on what was negotiated. Inflate and deflate are 0 and 1, and
//! statistics 2 if they were negotiated. Reporting is 4 by the specification; Linux gives it the next
//! number that is free. So it is the first ready queue behind the others.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use vm_memory::GuestAddress;

use super::{Command, PAGE_BYTES, PAGE_POISON, PAGE_REPORTING, STATS_VQ, Shared};
use crate::vmm::device::buffers::{Buffers, SEGMENTS_MAX};
use crate::vmm::device::queue::{BrokenQueue, VirtQueue};
use crate::vmm::device::worker::{SOURCES_MAX, Service, Sources};
use crate::vmm::memory::{self, GuestMemory};
use crate::vmm::metrics::BalloonCounters;
use crate::vmm::transport::{ActivateError, Activation, ActiveQueue, Interrupt};

/// Requests served of one queue before the others, and the mailbox, have their turn.
const REQUESTS_PER_TURN: usize = 16;
/// Most pages named in one request; further ones stay where they are. Linux names 256.
const REQUEST_PAGES_MAX: usize = 64 << 10;
/// Pages looked at together, so that neighbours are given back in one call.
const BATCH_PAGES: usize = 1024;
/// A statistic is a 16-bit tag and a 64-bit value, packed.
const STATISTIC_BYTES: usize = 10;
/// More than there are tags.
const STATISTICS_MAX: usize = 32;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Inflate,
    Deflate,
    Statistics,
    Reporting,
}

const ROLES: [Role; SOURCES_MAX] = [Role::Inflate, Role::Deflate, Role::Statistics, Role::Reporting];

pub(super) struct BalloonService {
    shared: Arc<Shared>,
    created: Instant,
    /// How often the guest is asked.
    interval: Duration,
    active: Option<Active>,
}

struct Active {
    shared: Arc<Shared>,
    created: Instant,
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    /// By role.
    queues: [Option<VirtQueue>; SOURCES_MAX],
    /// More is available than one turn may serve, by role.
    again: [bool; SOURCES_MAX],
    /// The guest's poison is known to us.
    poison_negotiated: bool,
    /// The buffer in which the guest last told its statistics: to give it back is to ask again.
    told: Option<u16>,
    ask_at: Instant,
    interval: Duration,
    buffers: Buffers,
    pages: Vec<u32>,
}

impl BalloonService {
    pub fn new(shared: Arc<Shared>, interval: Duration) -> Self {
        Self { shared, created: Instant::now(), interval, active: None }
    }
}

/// Sorts the driver's queues by their roles.
fn assign(
    queues: Vec<ActiveQueue>,
    features: u64,
) -> Result<[Option<VirtQueue>; SOURCES_MAX], ActivateError> {
    let mut by_role = [const { None }; SOURCES_MAX];
    let has_statistics = features & STATS_VQ != 0;
    for queue in queues {
        let role = match queue.index {
            0 => Role::Inflate,
            1 => Role::Deflate,
            2 if has_statistics => Role::Statistics,
            _ if features & PAGE_REPORTING != 0 => Role::Reporting,
            _ => continue,
        };
        by_role[role as usize].get_or_insert_with(|| VirtQueue::new(queue));
    }
    if by_role[..2].iter().any(Option::is_none) {
        return Err(ActivateError("the inflate and the deflate queue must both be ready".into()));
    }
    Ok(by_role)
}

impl Service for BalloonService {
    type Command = Command;

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let queues = assign(activation.queues, activation.features)?;
        self.active = Some(Active {
            shared: self.shared.clone(),
            created: self.created,
            memory: activation.memory,
            interrupt: activation.interrupt,
            again: ROLES.map(|role| queues[role as usize].is_some()),
            queues,
            poison_negotiated: activation.features & PAGE_POISON != 0,
            told: None,
            ask_at: Instant::now() + self.interval,
            interval: self.interval,
            buffers: Buffers::new(),
            pages: Vec::with_capacity(BATCH_PAGES),
        });
        Ok(())
    }

    fn stop(&mut self) {
        self.active = None;
        forget_statistics(&self.shared.counters);
    }

    fn command(&mut self, command: Command) {
        let Command::SetTarget { pages, reply } = command;
        self.shared.set_target(pages);
        if let Some(active) = &self.active {
            active.interrupt.signal_config();
        }
        // Who asked may have stopped waiting.
        let _ = reply.send(());
    }

    fn sources(&self) -> Sources<'_> {
        let Some(active) = &self.active else { return Sources::default() };
        let timeout = if active.again.contains(&true) {
            Some(Duration::ZERO)
        } else {
            active.told.map(|_| active.ask_at.saturating_duration_since(Instant::now()))
        };
        let queues = active.queues.each_ref().map(Option::as_ref);
        Sources { fds: queues.map(|queue| Some((queue?.kick_fd(), PollFlags::IN))), timeout }
    }

    fn serve(&mut self, ready: [bool; SOURCES_MAX]) {
        let Some(active) = &mut self.active else { return };
        if active.serve(ready).is_err() {
            active.interrupt.signal_needs_reset();
            self.active = None;
        }
    }
}

impl Active {
    fn serve(&mut self, ready: [bool; SOURCES_MAX]) -> Result<(), BrokenQueue> {
        for (slot, role) in ROLES.into_iter().enumerate() {
            if ready[slot] || self.again[slot] {
                self.again[slot] = self.serve_queue(role)?;
            }
        }
        if self.ask_at <= Instant::now() {
            self.ask_for_statistics()?;
        }
        Ok(())
    }

    /// True when there is more to do than one turn may.
    fn serve_queue(&mut self, role: Role) -> Result<bool, BrokenQueue> {
        let Self { memory, queues, interrupt, .. } = self;
        let Some(queue) = &mut queues[role as usize] else { return Ok(false) };
        queue.clear_kick();
        let mut more = true;
        for _ in 0..REQUESTS_PER_TURN {
            let Some(chain) = queue.pop(memory)? else {
                more = queue.enable_notifications(memory)?;
                break;
            };
            let mut used = Some(chain.head_index());
            match role {
                Role::Deflate => {}
                Role::Reporting => {
                    let poison = self.shared.poison.load(Ordering::Acquire);
                    // A page that comes back must hold the guest's poison, and ours come back empty.
                    if !self.poison_negotiated || poison == 0 {
                        for range in chain.writable().take(SEGMENTS_MAX) {
                            report(memory, range.addr(), range.len().into(), &self.shared.counters);
                        }
                    }
                }
                Role::Inflate => match self.buffers.load(chain) {
                    Ok(()) => inflate(memory, &self.buffers, &mut self.pages, &self.shared.counters),
                    Err(_) => self.shared.counters.errors.increment(),
                },
                Role::Statistics => {
                    if self.buffers.load(chain).is_ok() {
                        read_statistics(memory, &self.buffers, &self.shared.counters);
                        let told_at_ms = self.created.elapsed().as_millis() as u64;
                        // 0 would mean never.
                        self.shared.counters.told_at_ms.set(told_at_ms.max(1));
                    }
                    // One buffer is kept, by the specification the only one.
                    used = std::mem::replace(&mut self.told, used);
                    self.ask_at = Instant::now() + self.interval;
                }
            }
            if let Some(head) = used {
                queue.push_used(memory, head, 0)?;
            }
        }
        queue.publish_and_signal(memory, interrupt.as_ref())?;
        Ok(more)
    }

    fn ask_for_statistics(&mut self) -> Result<(), BrokenQueue> {
        let (Some(queue), Some(head)) = (&mut self.queues[Role::Statistics as usize], self.told.take())
        else {
            return Ok(());
        };
        queue.push_used(&self.memory, head, 0)?;
        queue.publish_and_signal(&self.memory, self.interrupt.as_ref())
    }
}

/// Gives back the pages whose numbers stand in the buffers, at most [`REQUEST_PAGES_MAX`].
fn inflate(memory: &GuestMemory, buffers: &Buffers, pages: &mut Vec<u32>, counters: &BalloonCounters) {
    let mut numbers = buffers.readable(memory);
    let mut left = (numbers.len() / 4).min(REQUEST_PAGES_MAX as u64) as usize;
    while left > 0 {
        let mut raw = [0; 4 * BATCH_PAGES];
        let count = left.min(BATCH_PAGES);
        left -= count;
        let raw = &mut raw[..4 * count];
        if numbers.read_exact(raw).is_err() {
            return counters.errors.increment();
        }
        pages.clear();
        pages
            .extend(raw.chunks_exact(4).map(|page| u32::from_le_bytes([page[0], page[1], page[2], page[3]])));
        pages.sort_unstable();
        for run in pages.chunk_by(|page, next| next - page <= 1) {
            // Sorted, with equal numbers perhaps, and never empty.
            let (first, last) = (u64::from(run[0]), u64::from(run[run.len() - 1]));
            let bytes = (last - first + 1) * PAGE_BYTES;
            match memory::discard(memory, GuestAddress(first * PAGE_BYTES), bytes) {
                Ok(given_back) if given_back == bytes => {}
                _ => counters.errors.increment(),
            }
        }
    }
}

/// Gives back a range that the guest reports as free.
fn report(memory: &GuestMemory, start: GuestAddress, bytes: u64, counters: &BalloonCounters) {
    match memory::discard(memory, start, bytes) {
        Ok(given_back) if given_back > 0 => counters.reported_bytes.add(given_back),
        _ => counters.errors.increment(),
    }
}

fn read_statistics(memory: &GuestMemory, buffers: &Buffers, counters: &BalloonCounters) {
    let mut told = buffers.readable(memory);
    for _ in 0..STATISTICS_MAX {
        let mut statistic = [0; STATISTIC_BYTES];
        if told.read_exact(&mut statistic).is_err() {
            return;
        }
        let [tag, tag_high, value @ ..] = statistic;
        let gauge = match u16::from_le_bytes([tag, tag_high]) {
            0 => &counters.swapped_in_bytes,
            1 => &counters.swapped_out_bytes,
            2 => &counters.major_faults,
            3 => &counters.minor_faults,
            4 => &counters.free_bytes,
            5 => &counters.total_bytes,
            6 => &counters.available_bytes,
            7 => &counters.disk_caches_bytes,
            // Huge pages of the guest, and what came after we were written.
            _ => continue,
        };
        gauge.set(u64::from_le_bytes(value));
    }
}

/// They were those of a driver that is no more.
fn forget_statistics(counters: &BalloonCounters) {
    for gauge in [
        &counters.swapped_in_bytes,
        &counters.swapped_out_bytes,
        &counters.major_faults,
        &counters.minor_faults,
        &counters.free_bytes,
        &counters.total_bytes,
        &counters.available_bytes,
        &counters.disk_caches_bytes,
        &counters.told_at_ms,
    ] {
        gauge.set(0);
    }
}
