//! All connections of a guest: what its packets do to them, and what it is to get next.

use std::collections::{BTreeMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::connection::{Broken, Connection, Filled, Key, State};
use super::packet::{
    HOST_CID, Header, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST, OP_RW,
    OP_SHUTDOWN, PORT_ANY, TYPE_STREAM,
};
use crate::vmm::device::buffers::Cursor;
use crate::vmm::metrics::VsockCounters;

/// Most connections at once. Each holds a descriptor, and up to a buffer's length of memory.
pub const CONNECTIONS_MAX: usize = 256;
/// Most refusals that wait for the guest to have room. Then its packets wait, too.
pub const REFUSALS_MAX: usize = 64;
/// How long the guest may take to answer a request, and to say goodbye.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// The host's ports of its own connections. The guest's own choice is below, by custom.
const FIRST_OWN_PORT: u32 = 1 << 30;

pub struct Table {
    guest_cid: u64,
    counters: Arc<VsockCounters>,
    connections: BTreeMap<Key, Connection>,
    /// Those that have something for the guest, each once. Some may be gone.
    line: VecDeque<Key>,
    refusals: VecDeque<Header>,
    next_own_port: u32,
}

impl Table {
    pub fn new(guest_cid: u64, counters: Arc<VsockCounters>) -> Self {
        Self {
            guest_cid,
            counters,
            connections: BTreeMap::new(),
            line: VecDeque::new(),
            refusals: VecDeque::new(),
            next_own_port: FIRST_OWN_PORT,
        }
    }

    /// The guest's packets must wait until it has taken some of ours.
    pub fn is_full(&self) -> bool {
        self.refusals.len() >= REFUSALS_MAX
    }

    pub fn has_something(&self) -> bool {
        !self.refusals.is_empty() || !self.line.is_empty()
    }

    fn refuse(&mut self, header: &Header) {
        self.counters.bad_packets.increment();
        if header.op != OP_RST {
            self.refusals.push_back(header.refusal());
        }
    }

    fn insert(&mut self, key: Key, connection: Connection) {
        self.connections.insert(key, connection);
        self.counters.opened.increment();
        self.counters.connections.set(self.connections.len() as u64);
        self.line_up(key);
    }

    fn remove(&mut self, key: Key) {
        self.connections.remove(&key);
        self.counters.connections.set(self.connections.len() as u64);
    }

    fn line_up(&mut self, key: Key) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        if connection.waits_for_goodbye() && connection.deadline.is_none() {
            connection.deadline = Some(Instant::now() + ANSWER_TIMEOUT);
        }
        if !connection.in_line && connection.has_something() {
            connection.in_line = true;
            self.line.push_back(key);
        }
    }

    /// The host asks for a connection to this port of the guest. `register` makes the connection's
    /// socket wake us under its key.
    pub fn request(
        &mut self,
        stream: OwnedFd,
        guest_port: u32,
        register: impl FnOnce(&OwnedFd, Key) -> bool,
    ) {
        if guest_port == PORT_ANY || self.connections.len() >= CONNECTIONS_MAX {
            self.counters.refused.increment();
            return;
        }
        let mut key = Key { host_port: self.next_own_port, guest_port };
        // Ends: there are more ports than connections.
        while self.connections.contains_key(&key) {
            key.host_port = own_port_after(key.host_port);
        }
        self.next_own_port = own_port_after(key.host_port);
        if register(&stream, key) {
            let mut connection = Connection::request(key, self.guest_cid, stream);
            connection.deadline = Some(Instant::now() + ANSWER_TIMEOUT);
            self.insert(key, connection);
        }
    }

    /// A packet of the guest, whose data (at least as many as it says) are behind `data`. `connect`
    /// finds who listens on a port of the host.
    pub fn packet(
        &mut self,
        header: &Header,
        data: &mut Cursor<'_>,
        connect: impl FnOnce(Key) -> Option<OwnedFd>,
    ) {
        let addressed = header.dst_cid == HOST_CID && header.kind == TYPE_STREAM;
        if header.src_cid != self.guest_cid {
            // Nobody could be told.
            return self.counters.bad_packets.increment();
        }
        if !addressed || header.src_port == PORT_ANY || header.dst_port == PORT_ANY {
            return self.refuse(header);
        }
        let key = Key { host_port: header.dst_port, guest_port: header.src_port };
        match (self.connections.get_mut(&key), header.op) {
            (None, OP_REQUEST) => self.connect(key, header, connect),
            (None, _) => self.refuse(header),
            (Some(_), OP_RST) => self.remove(key),
            (Some(connection), op) => {
                connection.note_room(header);
                let fits = match (connection.state, op) {
                    (State::Requested, OP_RESPONSE) => connection.accepted(),
                    (State::Open, OP_RW) => connection.take(data, header.len),
                    (State::Open, OP_SHUTDOWN) => {
                        connection.shut(header.flags);
                        Ok(())
                    }
                    (State::Open, OP_CREDIT_UPDATE) => Ok(()),
                    (State::Open, OP_CREDIT_REQUEST) => {
                        connection.update_credit();
                        Ok(())
                    }
                    // A request for what is there, an answer to nothing, or no such thing.
                    _ => Err(Broken),
                };
                match fits {
                    Ok(()) if op == OP_RW => self.counters.sent_bytes.add(header.len.into()),
                    Ok(()) => {}
                    Err(Broken) => {
                        self.counters.bad_packets.increment();
                        return self.end(key);
                    }
                }
                self.line_up(key);
            }
        }
    }

    /// Ends a connection for both sides at once.
    fn end(&mut self, key: Key) {
        if let Some(mut connection) = self.connections.remove(&key) {
            self.refusals.push_back(connection.header(OP_RST, 0, 0));
            self.counters.connections.set(self.connections.len() as u64);
        }
    }

    fn connect(&mut self, key: Key, header: &Header, connect: impl FnOnce(Key) -> Option<OwnedFd>) {
        let stream = match self.connections.len() {
            CONNECTIONS_MAX.. => None,
            _ => connect(key),
        };
        match stream {
            Some(stream) => {
                let mut connection = Connection::accept(key, self.guest_cid, stream);
                connection.note_room(header);
                self.insert(key, connection);
            }
            None => {
                self.counters.refused.increment();
                self.refusals.push_back(header.refusal());
            }
        }
    }

    /// A socket changed. What was the case stays so until the socket says otherwise.
    pub fn socket_changed(&mut self, key: Key, readable: bool, writable: bool, closed: bool) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        connection.readable |= readable;
        connection.writable |= writable;
        if closed {
            connection.host_takes_nothing();
        }
        connection.flush();
        self.line_up(key);
    }

    /// The next packet for the guest; its data, if any, were put into `data`, which has room for some.
    pub fn next(&mut self, data: &Cursor<'_>) -> Option<Header> {
        if let Some(refusal) = self.refusals.pop_front() {
            return Some(refusal);
        }
        while let Some(key) = self.line.pop_front() {
            let Some(connection) = self.connections.get_mut(&key) else { continue };
            connection.in_line = false;
            let packet = next_of(connection, data);
            if packet.is_some_and(|header| header.op == OP_RST) {
                self.remove(key);
            } else {
                // At the end, so that all have their turn.
                self.line_up(key);
            }
            if let Some(header) = packet {
                self.counters.received_bytes.add(header.len.into());
                return packet;
            }
        }
        None
    }

    /// When the first deadline is.
    pub fn deadline(&self) -> Option<Instant> {
        self.connections.values().filter_map(|connection| connection.deadline).min()
    }

    /// Ends what had its time.
    pub fn expire(&mut self, now: Instant) {
        let over = |(key, connection): (&Key, &Connection)| {
            connection.deadline.is_some_and(|deadline| deadline <= now).then_some(*key)
        };
        let expired: Vec<Key> = self.connections.iter().filter_map(over).collect();
        for key in expired {
            self.end(key);
        }
    }
}

impl Drop for Table {
    fn drop(&mut self) {
        self.counters.connections.set(0);
    }
}

fn own_port_after(port: u32) -> u32 {
    if port + 1 == PORT_ANY { FIRST_OWN_PORT } else { port + 1 }
}

fn next_of(connection: &mut Connection, data: &Cursor<'_>) -> Option<Header> {
    if let Some(header) = connection.next_control() {
        return Some(header);
    }
    if !connection.may_read() {
        return None;
    }
    match connection.fill(data) {
        Ok(Filled::Bytes(len)) => Some(connection.header(OP_RW, 0, len)),
        Ok(Filled::Nothing) => connection.next_control(),
        Err(Broken) => {
            connection.abort();
            connection.next_control()
        }
    }
}
