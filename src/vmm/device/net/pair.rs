//! The thread of a queue pair: it has one queue of the tap, and moves frames between that and the
//! guest, or has the kernel do so (vhost). The first pair's thread serves the control queue, too.
//!
//! ```text
//!             ┌───────────── limits set, cable pulled, tap gone ────────────┐
//!             ▼                                                             │
//!   we move the frames ── vhost is there, nothing stands against it ──▶ the kernel does
//! ```
//!
//! It waits only for what can help: for the tap while the guest has room, for room while a frame
//! waits, for neither when the tap is gone.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_ANNOUNCE, VIRTIO_NET_F_MRG_RXBUF};

use super::control::{self, Control};
use super::kernel::Kernel;
use super::receive::Receive;
use super::shared::{LinkChange, Shared};
use super::tap::Tap;
use super::transmit::Transmit;
use crate::vmm::device::queue::{BrokenQueue, VirtQueue};
use crate::vmm::device::worker::{Mailbox, SOURCES_MAX, Service, Sources, event_fd};
use crate::vmm::memory::GuestMemory;
use crate::vmm::transport::{ActivateError, Activation, Interrupt};

/// Frames moved in each direction before the other direction, and the mailbox, have their turn.
pub(super) const FRAMES_PER_TURN: usize = 64;
/// How long a tap that fails is left alone.
const RETRY: Duration = Duration::from_millis(500);
/// A guest that sees its carrier come back needs a moment before its announcement gets through.
const ANNOUNCE_DELAY: Duration = Duration::from_millis(300);

/// While we move the frames, the driver's notifications; while the kernel does, what it has to say.
const SOURCE_RECEIVE: usize = 0;
const SOURCE_TRANSMIT: usize = 1;
const SOURCE_CALL: usize = 0;
const SOURCE_BROKEN: usize = 1;
const SOURCE_CONTROL: usize = 2;
const SOURCE_TAP: usize = 3;

pub(super) enum Command {
    ReplaceTap {
        tap: Tap,
        reply: SyncSender<io::Result<()>>,
    },
    /// The cable was plugged in or pulled.
    LinkChanged {
        change: LinkChange,
        reply: SyncSender<()>,
    },
    /// Waits for tokens were reckoned at another rate.
    LimitsChanged,
    /// The driver uses this pair, or doesn't.
    SetAttached {
        attached: bool,
        reply: SyncSender<()>,
    },
}

pub(super) struct Pair {
    index: usize,
    tap: Tap,
    shared: Arc<Shared>,
    kernel: Option<Kernel>,
    /// The threads of the other pairs; only the first one has them.
    others: Vec<Mailbox<Command>>,
    /// Whether the tap's queue is one of those that the host's frames are spread to.
    attached: bool,
    active: Option<Active>,
}

struct Active {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    features: u64,
    receive: Receive,
    transmit: Transmit,
    control: Option<Control>,
    tap_state: TapState,
    mover: Mover,
    announce_at: Option<Instant>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum TapState {
    Usable,
    /// It failed; frames from it are not asked for before then.
    Failing(Instant),
    Gone,
}

impl TapState {
    pub fn failing() -> Self {
        Self::Failing(Instant::now() + RETRY)
    }
}

/// Who moves the frames.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mover {
    Process,
    Kernel,
    /// The kernel was asked and refused: it is not asked again before the next reset.
    ProcessForGood,
}

/// What one direction waits for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Waiting {
    /// There is more to do than one turn allows.
    Nothing,
    /// A notification by the driver.
    Driver,
    /// The tap: a frame, or room for one.
    Tap,
    /// Tokens of a limit.
    Until(Instant),
}

impl Waiting {
    fn is_over(self, driver: bool, tap: bool, now: Instant) -> bool {
        match self {
            Self::Nothing => true,
            Self::Driver => driver,
            Self::Tap => tap,
            Self::Until(at) => at <= now,
        }
    }
}

impl Pair {
    pub fn new(index: usize, tap: Tap, kernel: Option<Kernel>, shared: Arc<Shared>) -> Self {
        Self { index, tap, shared, kernel, others: Vec::new(), attached: true, active: None }
    }

    pub fn with_others(mut self, others: Vec<Mailbox<Command>>) -> Self {
        self.others = others;
        self
    }

    fn is_first(&self) -> bool {
        self.index == 0
    }

    /// The taps' queues are spread to as the driver uses them. An error says that the tap is gone, which
    /// reading it will, too.
    fn set_attached(&mut self, attached: bool) {
        if self.attached != attached && self.tap.set_attached(attached).is_ok() {
            self.attached = attached;
        }
    }

    fn tell(&self, change: LinkChange) {
        if let (LinkChange::Tell, Some(active)) = (change, &self.active) {
            active.interrupt.signal_config();
        }
    }

    /// On an error the old tap stays, for the first pair; the others follow that one, and a tap that
    /// went meanwhile shows when it is used.
    fn replace_tap(&mut self, tap: Tap) -> io::Result<()> {
        let offloads = self.shared.offloads.load(Ordering::Acquire);
        let usable = tap.set_offloads(offloads);
        if self.is_first() {
            usable?;
            if !self.shared.link.is_plugged_in() {
                tap.set_carrier(false)?;
            }
        }
        self.tap = tap;
        let attached = std::mem::replace(&mut self.attached, true);
        self.set_attached(attached);
        if let Some(active) = &mut self.active {
            active.tap_state = TapState::Usable;
            // What the old tap gave last has no place in the new network.
            active.receive.release();
            if active.mover == Mover::Kernel
                && let Some(kernel) = &self.kernel
                && kernel.use_tap(&self.tap).is_err()
            {
                self.stop_kernel(Mover::ProcessForGood);
            }
        }
        if self.is_first() {
            self.tell(self.shared.link.set_tap_gone(false));
            self.announce_after(Duration::ZERO);
        }
        self.choose_mover();
        self.look_again();
        Ok(())
    }

    fn announce_after(&mut self, delay: Duration) {
        if let Some(active) = &mut self.active
            && active.features & 1 << VIRTIO_NET_F_GUEST_ANNOUNCE != 0
        {
            active.announce_at = Some(Instant::now() + delay);
        }
    }

    /// A pulled cable carries nothing in either direction, and both ends see it.
    fn link_changed(&mut self, change: LinkChange) {
        let plugged_in = self.shared.link.is_plugged_in();
        if let Some(active) = self.active.as_mut().filter(|_| plugged_in) {
            // Frames from before are not for afterwards.
            active.receive.discard(&self.tap);
        }
        if self.is_first() {
            // It fails when the tap is gone, and is set again with the next one.
            let _ = self.tap.set_carrier(plugged_in);
        }
        self.choose_mover();
        self.look_again();
        if self.is_first() {
            self.tell(change);
            if plugged_in && change == LinkChange::Tell {
                self.announce_after(ANNOUNCE_DELAY);
            }
        }
    }

    /// What was waited for may have changed.
    fn look_again(&mut self) {
        if let Some(active) = &mut self.active {
            active.receive.waiting = Waiting::Nothing;
            active.transmit.waiting = Waiting::Nothing;
        }
    }

    /// Lets the kernel move the frames when it may, and only then.
    fn choose_mover(&mut self) {
        let Some(active) = &mut self.active else { return };
        let may = self.shared.receive_limiter.is_unlimited()
            && self.shared.transmit_limiter.is_unlimited()
            && self.shared.link.is_plugged_in()
            && active.tap_state != TapState::Gone;
        match (active.mover, &mut self.kernel) {
            (Mover::Process, Some(kernel)) if may => {
                // What was read and not delivered is lost: it is one frame.
                active.receive.release();
                let queues = [&active.receive.queue, &active.transmit.queue];
                let interrupt = active.interrupt.as_ref();
                let started = kernel.start(&active.memory, active.features, queues, interrupt, &self.tap);
                active.mover = if started.is_ok() { Mover::Kernel } else { Mover::ProcessForGood };
                if active.mover == Mover::Kernel {
                    self.shared.counters.kernel_pairs.add(1);
                }
            }
            (Mover::Kernel, _) if !may => self.stop_kernel(Mover::Process),
            _ => {}
        }
    }

    /// Takes the frames back from the kernel.
    fn stop_kernel(&mut self, next: Mover) {
        let Some(active) = &mut self.active else { return };
        if active.mover != Mover::Kernel {
            return;
        }
        active.mover = next;
        self.shared.counters.kernel_pairs.subtract(1);
        let came_to = self.kernel.as_ref().map(|kernel| kernel.stop());
        let Some(Ok(came_to)) = came_to else {
            // That leaves no way to know what it still does but to close it, and nothing to go on from.
            self.kernel = None;
            return self.give_up();
        };
        match active.take_over(came_to) {
            Ok(()) => {}
            Err(_) => self.give_up(),
        }
    }

    /// The driver broke a ring.
    fn give_up(&mut self) {
        self.stop_kernel(Mover::Process);
        if let Some(active) = self.active.take() {
            active.interrupt.signal_needs_reset();
        }
    }

    fn tap_is_gone(&mut self) {
        if let Some(active) = &mut self.active {
            active.tap_state = TapState::Gone;
        }
        self.choose_mover();
        self.tell(self.shared.link.set_tap_gone(true));
    }

    fn serve_control(&mut self) -> Result<(), BrokenQueue> {
        let Some(active) = &mut self.active else { return Ok(()) };
        let Some(control) = &mut active.control else { return Ok(()) };
        let (tap, shared, others) = (&self.tap, &self.shared, &self.others);
        control.serve(&active.memory, |command| match command {
            control::Command::SetPairs(pairs) => {
                // All at the same time, and then the driver may rely on it. They never wait for this thread.
                let replies: Vec<_> = (1..)
                    .zip(others)
                    .map(|(index, other)| {
                        let (reply, answer) = sync_channel(1);
                        let attached = index < pairs;
                        other.tell(Command::SetAttached { attached, reply }).map(|()| answer)
                    })
                    .collect();
                replies.into_iter().all(|answer| answer.is_ok_and(|answer| answer.recv().is_ok()))
            }
            control::Command::Announced => {
                shared.link.announced();
                true
            }
            control::Command::SetOffloads(offloads) => {
                shared.offloads.store(offloads, Ordering::Release);
                tap.set_offloads(offloads).is_ok()
            }
        })?;
        let signalled = control.queue_mut().publish_and_count(&active.memory, active.interrupt.as_ref())?;
        shared.counters.interrupts.add(signalled);
        Ok(())
    }

    fn serve_frames(&mut self, ready: [bool; SOURCES_MAX]) -> Result<(), BrokenQueue> {
        let Some(active) = &mut self.active else { return Ok(()) };
        if active.mover == Mover::Kernel {
            let Some(kernel) = self.kernel.as_ref() else { return Ok(()) };
            if ready[SOURCE_CALL] {
                kernel.forward(active.interrupt.as_ref());
            }
            if ready[SOURCE_BROKEN] {
                self.give_up();
            } else if ready[SOURCE_TAP] {
                // Nothing but an error was asked for.
                self.tap_is_gone();
            }
            return Ok(());
        }
        let plugged_in = self.shared.link.is_plugged_in();
        let gone = active.serve(&self.tap, plugged_in, &self.shared, self.index, ready)?;
        // A queue that is not in use has nothing to say about the tap.
        if gone && self.attached {
            self.tap_is_gone();
        }
        Ok(())
    }
}

impl Service for Pair {
    type Command = Command;

    /// The queues are those of the pair, and the control queue if it is this one's.
    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut queues = activation.queues.into_iter().map(VirtQueue::new);
        let (Some(receive), Some(transmit)) = (queues.next(), queues.next()) else {
            return Err(ActivateError("the receive and the transmit queue must both be ready".into()));
        };
        let features = activation.features;
        let pairs = self.shared.pairs_ready.load(Ordering::Acquire);
        let mut receive = Receive::new(receive, features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0);
        // A tap that refuses is gone or broken. That is no reason to fail the driver: its link is down.
        let usable = self.tap.set_offloads(features).is_ok();
        // What came before this driver was there may be cut into segments as its predecessor wished.
        receive.discard(&self.tap);
        self.active = Some(Active {
            memory: activation.memory,
            interrupt: activation.interrupt,
            features,
            receive,
            transmit: Transmit::new(transmit),
            control: queues.next().map(|queue| Control::new(queue, features, pairs)),
            tap_state: if usable { TapState::Usable } else { TapState::Gone },
            mover: Mover::Process,
            announce_at: None,
        });
        if self.is_first() {
            self.tell(self.shared.link.set_tap_gone(!usable));
        }
        self.choose_mover();
        Ok(())
    }

    fn stop(&mut self) {
        let active = self.active.take();
        if active.is_some_and(|active| active.mover == Mover::Kernel) {
            self.shared.counters.kernel_pairs.subtract(1);
            // How far it came is of no use any more. If it can't be told to stop, closing it does.
            self.kernel = self.kernel.take().filter(|kernel| kernel.stop().is_ok());
        }
        self.shared.receive_limiter.give_up(self.index);
        self.shared.transmit_limiter.give_up(self.index);
        if !self.is_first() {
            self.set_attached(false);
        }
    }

    fn command(&mut self, command: Command) {
        // Callers wait for their replies; one that has gone needs none.
        match command {
            Command::ReplaceTap { tap, reply } => {
                let _ = reply.send(self.replace_tap(tap));
            }
            Command::LinkChanged { change, reply } => {
                self.link_changed(change);
                let _ = reply.send(());
            }
            Command::LimitsChanged => {
                self.choose_mover();
                self.look_again();
            }
            Command::SetAttached { attached, reply } => {
                // Until the driver is there none but the first is used.
                self.set_attached(attached && self.active.is_some());
                let _ = reply.send(());
            }
        }
    }

    fn sources(&self) -> Sources<'_> {
        let Some(active) = &self.active else { return Sources::default() };
        let mut sources = Sources::default();
        let mut timer = Timer { now: Instant::now(), timeout: None };
        timer.at(active.announce_at);
        if let Some(control) = &active.control {
            sources.fds[SOURCE_CONTROL] = Some((control.queue().kick_fd(), PollFlags::IN));
            timer.at(control.is_unfinished().then_some(timer.now));
        }
        match (active.mover, &self.kernel) {
            (Mover::Kernel, Some(kernel)) => {
                sources.fds[SOURCE_CALL] = Some((event_fd(kernel.call()), PollFlags::IN));
                sources.fds[SOURCE_BROKEN] = Some((event_fd(kernel.broken()), PollFlags::IN));
                sources.fds[SOURCE_TAP] = Some((self.tap.as_fd(), PollFlags::empty()));
            }
            _ => {
                let receiving = self.shared.link.is_plugged_in();
                active.frame_sources(self.tap.as_fd(), receiving, &mut sources, &mut timer);
            }
        }
        sources.timeout = timer.timeout;
        sources
    }

    fn serve(&mut self, ready: [bool; SOURCES_MAX]) {
        let Some(active) = &mut self.active else { return };
        if active.announce_at.is_some_and(|at| at <= Instant::now()) {
            active.announce_at = None;
            self.tell(self.shared.link.announce());
        }
        if let Some(active) = &self.active
            && let Some(control) = &active.control
            && (ready[SOURCE_CONTROL] || control.is_unfinished())
        {
            control.queue().clear_kick();
            self.shared.counters.notifications.add(ready[SOURCE_CONTROL].into());
            if self.serve_control().is_err() {
                return self.give_up();
            }
        }
        if self.serve_frames(ready).is_err() {
            self.give_up();
        }
    }
}

/// The earliest of several instants, as a time-out.
struct Timer {
    now: Instant,
    timeout: Option<Duration>,
}

impl Timer {
    fn at(&mut self, at: Option<Instant>) {
        if let Some(at) = at {
            let timeout = at.saturating_duration_since(self.now);
            self.timeout = Some(self.timeout.map_or(timeout, |other| other.min(timeout)));
        }
    }
}

impl Active {
    /// Goes on where the kernel stopped.
    fn take_over(&mut self, came_to: [u16; 2]) -> Result<(), BrokenQueue> {
        for (queue, next) in [&mut self.receive.queue, &mut self.transmit.queue].into_iter().zip(came_to) {
            queue.resume(&self.memory, next)?;
            // In case that the last of it was not announced: one interrupt too many does no harm.
            self.interrupt.signal_queue(queue.index());
        }
        self.receive.waiting = Waiting::Nothing;
        self.transmit.waiting = Waiting::Nothing;
        Ok(())
    }

    fn frame_sources<'a>(
        &'a self,
        tap: BorrowedFd<'a>,
        receiving: bool,
        sources: &mut Sources<'a>,
        timer: &mut Timer,
    ) {
        sources.fds[SOURCE_RECEIVE] = Some((self.receive.queue.kick_fd(), PollFlags::IN));
        sources.fds[SOURCE_TRANSMIT] = Some((self.transmit.queue.kick_fd(), PollFlags::IN));
        let now = timer.now;
        let mut flags = PollFlags::empty();
        if receiving {
            match (self.tap_state, self.receive.waiting) {
                (TapState::Usable, Waiting::Nothing) => timer.at(Some(now)),
                (TapState::Usable, Waiting::Tap) => flags |= PollFlags::IN,
                (TapState::Usable, Waiting::Until(at)) | (TapState::Failing(at), _) => timer.at(Some(at)),
                (TapState::Usable, Waiting::Driver) | (TapState::Gone, _) => {}
            }
        }
        match self.transmit.waiting {
            Waiting::Nothing => timer.at(Some(now)),
            Waiting::Driver => {}
            Waiting::Tap => {
                flags |= PollFlags::OUT;
                // A tap that goes down never has room again, but then it says so when asked.
                timer.at(Some(now + RETRY));
            }
            Waiting::Until(at) => timer.at(Some(at)),
        }
        // Even an empty set of events reports errors, without end when the tap is gone.
        if self.tap_state == TapState::Usable && !flags.is_empty() {
            sources.fds[SOURCE_TAP] = Some((tap, flags));
        }
    }

    /// Moves frames in both directions. True when the tap turns out to be gone.
    fn serve(
        &mut self,
        tap: &Tap,
        plugged_in: bool,
        shared: &Shared,
        pair: usize,
        ready: [bool; SOURCES_MAX],
    ) -> Result<bool, BrokenQueue> {
        if ready[SOURCE_RECEIVE] {
            self.receive.queue.clear_kick();
        }
        if ready[SOURCE_TRANSMIT] {
            self.transmit.queue.clear_kick();
        }
        let notifications = u64::from(ready[SOURCE_RECEIVE]) + u64::from(ready[SOURCE_TRANSMIT]);
        shared.counters.notifications.add(notifications);
        let now = Instant::now();
        let tap_ready = ready[SOURCE_TAP] || ready == [false; SOURCES_MAX];
        if matches!(self.tap_state, TapState::Failing(until) if until <= now) {
            self.tap_state = TapState::Usable;
            self.receive.waiting = Waiting::Nothing;
        }
        let mut gone = false;
        let receive = plugged_in && self.receive.waiting.is_over(ready[SOURCE_RECEIVE], tap_ready, now);
        if receive && self.tap_state == TapState::Usable {
            self.tap_state = self.receive.serve(tap, &self.memory, shared, pair)?;
            gone |= self.tap_state == TapState::Gone;
            let signalled = self.receive.queue.publish_and_count(&self.memory, self.interrupt.as_ref())?;
            shared.counters.interrupts.add(signalled);
        }
        if self.transmit.waiting.is_over(ready[SOURCE_TRANSMIT], tap_ready, now) {
            let usable = plugged_in && self.tap_state != TapState::Gone;
            gone |= self.transmit.serve(usable.then_some(tap), &self.memory, shared, pair)?;
            let signalled = self.transmit.queue.publish_and_count(&self.memory, self.interrupt.as_ref())?;
            shared.counters.interrupts.add(signalled);
        }
        Ok(gone)
    }
}
