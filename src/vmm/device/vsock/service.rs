//! The vsock's thread: packets between the queues and the [`Table`], and the sockets' events.

use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::event::epoll::EventFlags;

use super::host::{Host, HostEvent};
use super::packet::{HEADER_BYTES, Header};
use super::table::Table;
use crate::vmm::device::buffers::Buffers;
use crate::vmm::device::queue::{BrokenQueue, VirtQueue};
use crate::vmm::device::worker::{SOURCES_MAX, Service, Sources};
use crate::vmm::memory::GuestMemory;
use crate::vmm::metrics::VsockCounters;
use crate::vmm::transport::{ActivateError, Activation, Interrupt};

/// Packets moved in each direction before the other, and the mailbox, have their turn.
const PACKETS_PER_TURN: usize = 64;

/// The service takes no commands.
pub(super) enum Never {}

pub(super) struct VsockService {
    guest_cid: u64,
    counters: Arc<VsockCounters>,
    host: Host,
    active: Option<Active>,
}

struct Active {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    receive: VirtQueue,
    transmit: VirtQueue,
    buffers: Buffers,
    table: Table,
    /// The guest is to get something and has no buffer for it.
    starving: bool,
    /// There is more to do than one turn may.
    again: bool,
    counters: Arc<VsockCounters>,
}

impl VsockService {
    pub fn new(guest_cid: u64, host: Host, counters: Arc<VsockCounters>) -> Self {
        Self { guest_cid, counters, host, active: None }
    }
}

impl Service for VsockService {
    type Command = Never;

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut queues = activation.queues.into_iter();
        // The third, for events, is of use only where a guest finds itself with another id.
        let (Some(receive), Some(transmit)) = (queues.next(), queues.next()) else {
            return Err(ActivateError("the receive and the transmit queue must both be ready".into()));
        };
        if (receive.index, transmit.index) != (0, 1) {
            return Err(ActivateError("the receive and the transmit queue must both be ready".into()));
        }
        self.active = Some(Active {
            memory: activation.memory,
            interrupt: activation.interrupt,
            receive: VirtQueue::new(receive),
            transmit: VirtQueue::new(transmit),
            buffers: Buffers::new(),
            table: Table::new(self.guest_cid, self.counters.clone()),
            starving: false,
            again: true,
            counters: self.counters.clone(),
        });
        Ok(())
    }

    fn stop(&mut self) {
        // Closes all sockets: their other ends see it.
        self.active = None;
        self.host.forget_clients();
    }

    fn command(&mut self, command: Never) {
        match command {}
    }

    fn sources(&self) -> Sources<'_> {
        let mut sources = Sources::default();
        sources.fds[0] = Some((self.host.wake().as_fd(), PollFlags::IN));
        let mut deadline = self.host.deadline();
        if let Some(active) = &self.active {
            if !active.table.is_full() {
                sources.fds[1] = Some((active.transmit.kick_fd(), PollFlags::IN));
            }
            if active.starving {
                sources.fds[2] = Some((active.receive.kick_fd(), PollFlags::IN));
            }
            if active.again {
                sources.timeout = Some(Duration::ZERO);
                return sources;
            }
            deadline = deadline.into_iter().chain(active.table.deadline()).min();
        }
        sources.timeout = deadline.map(|at| at.saturating_duration_since(Instant::now()));
        sources
    }

    fn serve(&mut self, _ready: [bool; SOURCES_MAX]) {
        for event in self.host.events(self.active.is_some()) {
            let Some(active) = &mut self.active else { continue };
            match event {
                HostEvent::Request { stream, guest_port } => {
                    active.table.request(stream, guest_port, |stream, key| self.host.rename(stream, key));
                }
                HostEvent::Socket { key, flags } => {
                    let over = flags.intersects(EventFlags::HUP | EventFlags::ERR);
                    let readable = over || flags.intersects(EventFlags::IN | EventFlags::RDHUP);
                    let writable = over || flags.contains(EventFlags::OUT);
                    active.table.socket_changed(key, readable, writable, over);
                }
            }
        }
        let Some(active) = &mut self.active else { return };
        active.table.expire(Instant::now());
        if active.serve(&self.host).is_err() {
            active.interrupt.signal_needs_reset();
            self.active = None;
        }
    }
}

impl Active {
    fn serve(&mut self, host: &Host) -> Result<(), BrokenQueue> {
        let more_from_guest = self.transmit(host)?;
        let more_to_guest = self.receive()?;
        // What waited for refusals to go may go on now.
        self.again = more_to_guest || more_from_guest && !self.table.is_full();
        Ok(())
    }

    /// From the guest. True when there is, or may be, more.
    fn transmit(&mut self, host: &Host) -> Result<bool, BrokenQueue> {
        self.transmit.clear_kick();
        self.transmit.disable_notifications(&self.memory)?;
        let mut more = true;
        for _ in 0..PACKETS_PER_TURN {
            if self.table.is_full() {
                break;
            }
            let Some(chain) = self.transmit.pop(&self.memory)? else {
                more = self.transmit.enable_notifications(&self.memory)?;
                break;
            };
            let head = chain.head_index();
            let loaded = self.buffers.load(chain).is_ok();
            let mut data = self.buffers.readable(&self.memory);
            let mut raw = [0; HEADER_BYTES];
            if loaded && data.read_exact(&mut raw).is_ok() {
                let mut header = Header::parse(raw);
                // A packet that says that it is longer than it is carries nothing that can be used, and
                // nothing that a connection could go on after.
                if u64::from(header.len) > data.len() {
                    header.op = 0;
                }
                self.table.packet(&header, &mut data, |key| host.connect(key));
            } else {
                self.counters.bad_packets.increment();
            }
            self.transmit.push_used(&self.memory, head, 0)?;
        }
        self.transmit.publish_and_signal(&self.memory, self.interrupt.as_ref())?;
        Ok(more)
    }

    /// To the guest. True when there is more and room for it.
    fn receive(&mut self) -> Result<bool, BrokenQueue> {
        self.starving = false;
        self.receive.clear_kick();
        self.receive.disable_notifications(&self.memory)?;
        for _ in 0..PACKETS_PER_TURN {
            if !self.table.has_something() {
                break;
            }
            let Some(chain) = self.receive.pop(&self.memory)? else {
                self.starving = !self.receive.enable_notifications(&self.memory)?;
                if self.starving {
                    break;
                }
                continue;
            };
            let head = chain.head_index();
            let loaded = self.buffers.load(chain).is_ok();
            let room = self.buffers.writable(&self.memory);
            if !loaded || room.len() <= HEADER_BYTES as u64 {
                self.counters.bad_packets.increment();
                self.receive.push_used(&self.memory, head, 0)?;
                continue;
            }
            let mut data = room.clone();
            data.skip(HEADER_BYTES as u64);
            let Some(header) = self.table.next(&data) else {
                // Those in line had nothing after all.
                self.receive.unpop(1);
                break;
            };
            // Where the guest has no memory the packet is lost.
            let mut room = room;
            let written = room.write_all(&header.to_bytes()).map_or(0, |()| HEADER_BYTES as u32 + header.len);
            self.receive.push_used(&self.memory, head, written)?;
        }
        self.receive.publish_and_signal(&self.memory, self.interrupt.as_ref())?;
        Ok(self.table.has_something() && !self.starving)
    }
}
