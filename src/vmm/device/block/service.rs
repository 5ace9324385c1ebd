//! The thread of one queue of a disk: takes requests from the queue, has them done, answers them, and
//! carries out the control side's commands between.
//!
//! ```text
//!            pop           limits            engine            push
//!   available ──▶ parsed ─────────▶ issued ─────────▶ done ─────────▶ used
//!                    │ no token         │ ENOSPC
//!                    ▼                  ▼
//!                 waiting            held: the VM stands still, tried again each second
//! ```

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use super::disk::{Accepted, Disk};
use super::request::{Done, Failure, Operation, Request};
use super::ring::{Ended, Ring};
use crate::vmm::device::buffers::Buffers;
use crate::vmm::device::queue::{BrokenQueue, VirtQueue};
use crate::vmm::device::worker::{SOURCES_MAX, Service, Sources};
use crate::vmm::memory::GuestMemory;
use crate::vmm::metrics::DiskCounters;
use crate::vmm::transport::{ActivateError, Activation, Interrupt};

/// Requests done before the driver is interrupted: a driver that waits for the first of a long queue
/// must not wait for the last.
const REQUESTS_PER_INTERRUPT: usize = 16;
/// Requests taken before the mailbox is looked at again: bounds how long a reset waits.
const REQUESTS_PER_TURN: usize = 64;
/// How long a write that found no room waits before it is tried again.
const ROOM_RETRY: Duration = Duration::from_secs(1);
/// As long for requests that the kernel doesn't take into the ring now.
const SUBMIT_RETRY: Duration = Duration::from_millis(1);

/// Indexes into [`Sources::fds`].
const KICK: usize = 0;
const RING: usize = 1;

pub(super) enum Command {
    Grow {
        capacity_bytes: u64,
        reply: SyncSender<io::Result<()>>,
    },
    Flush {
        reply: SyncSender<io::Result<()>>,
    },
    /// For the loader of a boot from the disk; the range lies within the disk.
    Read {
        offset: u64,
        bytes: usize,
        reply: SyncSender<io::Result<Vec<u8>>>,
    },
    /// What requests wait for may have come: other limits, more room.
    LookAgain,
}

/// A request on its way, with what it asks for.
pub(super) struct Task {
    pub request: Request,
    pub operation: Operation,
    taken_at: Instant,
}

pub(super) struct QueueService {
    index: usize,
    disk: Arc<Disk>,
    counters: Arc<DiskCounters>,
    /// Here while there is no activation. Without one every request is done by this thread itself.
    ring: Option<Ring>,
    active: Option<Active>,
}

struct Active {
    index: usize,
    disk: Arc<Disk>,
    counters: Arc<DiskCounters>,
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    accepted: Accepted,
    queue: VirtQueue,
    ring: Option<Ring>,
    /// The kernel didn't take all that was pushed into the ring.
    unsubmitted: bool,
    /// More is available than one turn may take.
    again: bool,
    /// The request that the disk's limits hold back, and until when.
    limited: Option<(Task, Instant)>,
    /// Requests that found no room, the first of them first, to be tried again then.
    held: VecDeque<Task>,
    retry_at: Instant,
    /// To be used again.
    spare: Vec<Buffers>,
}

impl QueueService {
    pub fn new(index: usize, disk: Arc<Disk>, counters: Arc<DiskCounters>, ring: Option<Ring>) -> Self {
        Self { index, disk, counters, ring, active: None }
    }
}

impl Service for QueueService {
    type Command = Command;

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Some(queue) = activation.queues.into_iter().next() else {
            return Err(ActivateError(format!("queue {} is not ready", self.index)));
        };
        let mut ring = self.ring.take();
        if let Some(ring) = &mut ring {
            ring.start(activation.memory.clone());
        }
        self.active = Some(Active {
            index: self.index,
            disk: self.disk.clone(),
            counters: self.counters.clone(),
            memory: activation.memory,
            interrupt: activation.interrupt,
            accepted: Accepted::of(activation.features),
            queue: VirtQueue::new(queue),
            ring,
            unsubmitted: false,
            again: true,
            limited: None,
            held: VecDeque::new(),
            retry_at: Instant::now(),
            spare: Vec::new(),
        });
        Ok(())
    }

    fn stop(&mut self) {
        let Some(active) = self.active.take() else { return };
        self.ring = active.abandon();
        if !self.disk.read_only {
            self.disk.flush_leavings();
        }
    }

    fn command(&mut self, command: Command) {
        // Callers wait for the reply; one that has gone needs none.
        match command {
            Command::Grow { capacity_bytes, reply } => {
                let _ = reply.send(self.disk.grow(capacity_bytes));
            }
            Command::Flush { reply } => {
                let _ = reply.send(self.disk.try_flush());
            }
            Command::Read { offset, bytes, reply } => {
                let mut data = vec![0; bytes];
                let _ = reply.send(self.disk.image.read_to(&mut data, offset).map(|()| data));
            }
            Command::LookAgain => {
                if let Some(active) = &mut self.active {
                    active.look_again();
                }
            }
        }
    }

    fn sources(&self) -> Sources<'_> {
        let Some(active) = &self.active else { return Sources::default() };
        let mut sources = Sources { timeout: active.timeout(), ..Sources::default() };
        sources.fds[KICK] = Some((active.queue.kick_fd(), PollFlags::IN));
        sources.fds[RING] = active.ring.as_ref().map(|ring| (ring.fd(), PollFlags::IN));
        sources
    }

    fn serve(&mut self, ready: [bool; SOURCES_MAX]) {
        let Some(active) = &mut self.active else { return };
        if ready[KICK] {
            self.counters.notifications.add(active.queue.clear_kick());
        }
        let result = active.serve();
        self.counters.interrupts.add(active.queue.take_interrupts());
        if result.is_err() {
            active.interrupt.signal_needs_reset();
            self.stop();
        }
    }
}

impl Active {
    fn serve(&mut self) -> Result<(), BrokenQueue> {
        self.reap()?;
        self.retry_held()?;
        self.take_requests()?;
        self.submit()?;
        self.queue.publish_and_signal(&self.memory, self.interrupt.as_ref())
    }

    /// How long to sleep when nobody calls.
    fn timeout(&self) -> Option<Duration> {
        if self.again {
            return Some(Duration::ZERO);
        }
        let limited = self.limited.as_ref().map(|(_, until)| *until);
        let retry = (!self.held.is_empty()).then_some(self.retry_at);
        let at = [limited, retry].into_iter().flatten().min();
        let wait = at.map(|at| at.saturating_duration_since(Instant::now()));
        wait.into_iter().chain(self.unsubmitted.then_some(SUBMIT_RETRY)).min()
    }

    fn look_again(&mut self) {
        let now = Instant::now();
        self.retry_at = now;
        if let Some((_, until)) = &mut self.limited {
            *until = now;
        }
    }

    fn take_requests(&mut self) -> Result<(), BrokenQueue> {
        self.again = false;
        if !self.held.is_empty() {
            return Ok(());
        }
        self.queue.disable_notifications(&self.memory)?;
        for taken in 1..=REQUESTS_PER_TURN {
            if self.is_full() {
                self.submit()?;
                if self.is_full() {
                    // What ends next calls.
                    return Ok(());
                }
            }
            let task = match self.limited.take() {
                Some((task, _)) => task,
                None => match self.next()? {
                    Next::Task(task) => task,
                    Next::Answered => continue,
                    Next::Nothing => {
                        self.again = self.queue.enable_notifications(&self.memory)?;
                        return Ok(());
                    }
                },
            };
            if let Err(wait) = self.disk.limiter.take(self.index, task.operation.cost()) {
                self.counters.throttled.increment();
                self.limited = Some((task, Instant::now() + wait));
                return Ok(());
            }
            self.issue(task)?;
            if !self.held.is_empty() {
                return Ok(());
            }
            if taken % REQUESTS_PER_INTERRUPT == 0 {
                self.submit()?;
                self.queue.publish_and_signal(&self.memory, self.interrupt.as_ref())?;
            } else {
                self.queue.publish(&self.memory)?;
            }
        }
        self.again = true;
        Ok(())
    }

    /// Takes the next request from the queue; one that can't be done is answered at once.
    fn next(&mut self) -> Result<Next, BrokenQueue> {
        let Some(chain) = self.queue.pop(&self.memory)? else { return Ok(Next::Nothing) };
        let head = chain.head_index();
        let mut buffers = self.spare.pop().unwrap_or_else(Buffers::new);
        let loaded = buffers.load(chain).is_ok();
        let request = Request { head, buffers };
        let parsed = match loaded {
            true => request.parse(&self.memory, &self.disk, self.accepted),
            false => None,
        };
        self.counters.in_flight.add(1);
        match parsed {
            Some(Ok(operation)) => {
                return Ok(Next::Task(Task { request, operation, taken_at: Instant::now() }));
            }
            Some(Err(failure)) => {
                let written = request.answer(Err(failure), &self.memory);
                self.give_back(request, written)?;
            }
            None => self.give_back(request, 0)?,
        }
        self.counters.errors.increment();
        Ok(Next::Answered)
    }

    /// Has a request done: now, or by the kernel while others follow.
    fn issue(&mut self, task: Task) -> Result<(), BrokenQueue> {
        let task = match &mut self.ring {
            Some(ring) => match ring.push(task, &self.disk, self.accepted) {
                Ok(()) => return Ok(()),
                Err(task) => task,
            },
            None => task,
        };
        self.perform(task)
    }

    fn is_full(&self) -> bool {
        self.ring.as_ref().is_some_and(Ring::is_full)
    }

    /// Begins what was issued, and answers what has ended: most reads from the host's page cache have.
    fn submit(&mut self) -> Result<(), BrokenQueue> {
        if let Some(ring) = &mut self.ring {
            self.unsubmitted = !ring.submit();
        }
        self.reap()
    }

    fn reap(&mut self) -> Result<(), BrokenQueue> {
        while let Some((task, ended)) = self.ring.as_mut().and_then(Ring::reap) {
            match ended {
                Ended::As(result) => self.finish(task, result)?,
                Ended::Half => self.perform(task)?,
            }
        }
        Ok(())
    }

    fn perform(&mut self, task: Task) -> Result<(), BrokenQueue> {
        let result = task.request.perform(task.operation, &self.memory, &self.disk, self.accepted);
        self.finish(task, result)
    }

    /// Answers a request, or holds it if it found no room.
    fn finish(&mut self, task: Task, result: Result<Done, Failure>) -> Result<(), BrokenQueue> {
        if result == Err(Failure::NoRoom) {
            if self.held.is_empty() {
                self.disk.room.wait(self.index);
            }
            self.retry_at = Instant::now() + ROOM_RETRY;
            self.held.push_back(task);
            return Ok(());
        }
        self.count(&task, result);
        let written = task.request.answer(result, &self.memory);
        self.give_back(task.request, written)
    }

    fn give_back(&mut self, request: Request, written: u32) -> Result<(), BrokenQueue> {
        self.counters.in_flight.subtract(1);
        self.queue.push_used(&self.memory, request.head, written)?;
        self.spare.push(request.buffers);
        Ok(())
    }

    fn count(&self, task: &Task, result: Result<Done, Failure>) {
        let (counters, took) = (&self.counters, task.taken_at.elapsed());
        let Ok(done) = result else { return counters.errors.increment() };
        match task.operation {
            Operation::Read { len, .. } => {
                counters.reads.increment();
                counters.read_bytes.add(len);
                counters.read_latency.record(took);
            }
            Operation::Write { len, .. } => {
                counters.writes.increment();
                counters.written_bytes.add(len);
                counters.write_latency.record(took);
            }
            Operation::Flush => {
                counters.flushes.increment();
                counters.flush_latency.record(took);
            }
            Operation::Discard | Operation::WriteZeroes => {
                counters.discards.increment();
                counters.discarded_bytes.add(done.zeroed);
            }
            Operation::GetId => {}
        }
    }

    /// Tries what found no room once more, until something still finds none.
    fn retry_held(&mut self) -> Result<(), BrokenQueue> {
        if self.held.is_empty() || Instant::now() < self.retry_at {
            return Ok(());
        }
        while let Some(task) = self.held.pop_front() {
            match task.request.perform(task.operation, &self.memory, &self.disk, self.accepted) {
                Err(Failure::NoRoom) => {
                    self.held.push_front(task);
                    self.retry_at = Instant::now() + ROOM_RETRY;
                    return Ok(());
                }
                result => self.finish(task, result)?,
            }
        }
        self.disk.room.is_found(self.index);
        self.again = true;
        Ok(())
    }

    /// The driver has gone, and nobody waits for an answer. When it returns the kernel doesn't touch
    /// guest memory for us either.
    fn abandon(mut self) -> Option<Ring> {
        let mut waiting = self.held.len() + usize::from(self.limited.is_some());
        match self.ring.as_mut().map(Ring::stop) {
            Some(Ok(in_flight)) => waiting += in_flight,
            Some(Err(in_flight)) => {
                waiting += in_flight;
                self.ring = None;
            }
            None => {}
        }
        self.counters.in_flight.subtract(waiting as u64);
        self.disk.limiter.give_up(self.index);
        self.disk.room.is_found(self.index);
        self.ring
    }
}

enum Next {
    Task(Task),
    Answered,
    Nothing,
}
