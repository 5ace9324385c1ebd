//! One connection: a stream socket of the host on one side, packets on the other, and the accounts of
//! what may be in flight between them.
//!
//! ```text
//!  guest ──RW──▶ [buffer ≤ BUFFER_BYTES] ──▶ socket      what the guest may send is what has room here
//!  guest ◀──RW── (nothing is kept)       ◀── socket      what we read is what has room there
//! ```
//!
//! Sockets are edge-triggered: `readable` and `writable` hold until the socket says that it would block.

use std::collections::VecDeque;
use std::io;
use std::num::Wrapping;
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Instant;

use rustix::net::{SendFlags, Shutdown};

use super::packet::{
    HOST_CID, Header, OP_CREDIT_REQUEST, OP_CREDIT_UPDATE, OP_REQUEST, OP_RESPONSE, OP_RST, OP_SHUTDOWN,
    SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};
use crate::vmm::device::buffers::Cursor;

/// What the guest may have sent that the host's socket has not taken.
pub const BUFFER_BYTES: u32 = 128 << 10;
/// The guest hears of room when there is this much that it doesn't know of.
const ANNOUNCED_ROOM_BYTES: u32 = BUFFER_BYTES / 2;

/// Both ports: the host's, the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Key {
    pub host_port: u32,
    pub guest_port: u32,
}

impl Key {
    /// As a number for epoll.
    pub fn token(self) -> u64 {
        u64::from(self.host_port) << 32 | u64::from(self.guest_port)
    }

    pub fn of(token: u64) -> Self {
        Self { host_port: (token >> 32) as u32, guest_port: token as u32 }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// The host asked, and the guest hasn't answered.
    Requested,
    Open,
}

/// Packets without data that the guest is to get, the most urgent first.
#[derive(Default)]
struct Due {
    reset: bool,
    request: bool,
    response: bool,
    credit_update: bool,
    credit_request: bool,
}

pub struct Connection {
    key: Key,
    guest_cid: u64,
    stream: OwnedFd,
    pub state: State,
    pub readable: bool,
    pub writable: bool,
    /// Whether it stands in the line of those that have something for the guest.
    pub in_line: bool,
    /// It goes at this time unless something happens.
    pub deadline: Option<Instant>,
    due: Due,

    /// From the guest: what the socket has not taken yet.
    buffer: VecDeque<u8>,
    received: Wrapping<u32>,
    forwarded: Wrapping<u32>,
    /// `forwarded` as the guest last heard it.
    announced: Wrapping<u32>,
    /// The guest sends nothing any more; the socket has been told if `buffer` is empty.
    guest_sent_all: bool,

    /// To the guest: its room, as it last said.
    guest_buffer: u32,
    guest_forwarded: Wrapping<u32>,
    sent: Wrapping<u32>,
    credit_requested: bool,
    guest_receives: bool,
    /// The socket's end was read.
    host_sent_all: bool,
    /// The socket takes nothing any more.
    host_closed: bool,
    /// What of the host's end the guest has heard: flags of a shutdown.
    end_told: u32,
}

/// The guest broke the rules, or the socket broke: nothing but a reset is left.
#[derive(Debug)]
pub struct Broken;

/// What reading from the socket for the guest gave.
#[derive(Debug, PartialEq, Eq)]
pub enum Filled {
    Bytes(u32),
    /// Nothing for now, or no more for ever.
    Nothing,
}

impl Connection {
    fn new(key: Key, guest_cid: u64, stream: OwnedFd, state: State) -> Self {
        Self {
            key,
            guest_cid,
            stream,
            state,
            readable: false,
            writable: true,
            in_line: false,
            deadline: None,
            due: Due::default(),
            buffer: VecDeque::new(),
            received: Wrapping(0),
            forwarded: Wrapping(0),
            announced: Wrapping(0),
            guest_sent_all: false,
            guest_buffer: 0,
            guest_forwarded: Wrapping(0),
            sent: Wrapping(0),
            credit_requested: false,
            guest_receives: true,
            host_sent_all: false,
            host_closed: false,
            end_told: 0,
        }
    }

    /// The host asks the guest for a connection.
    pub fn request(key: Key, guest_cid: u64, stream: OwnedFd) -> Self {
        let mut connection = Self::new(key, guest_cid, stream, State::Requested);
        connection.due.request = true;
        connection
    }

    /// The guest asked, and the host has accepted.
    pub fn accept(key: Key, guest_cid: u64, stream: OwnedFd) -> Self {
        let mut connection = Self::new(key, guest_cid, stream, State::Open);
        connection.due.response = true;
        connection
    }

    /// The guest said yes to [`Self::request`]: who asked is told.
    pub fn accepted(&mut self) -> Result<(), Broken> {
        self.state = State::Open;
        self.deadline = None;
        let answer = format!("OK {}\n", self.key.host_port);
        // The socket is fresh: it takes all of it, or it is broken.
        match rustix::net::send(&self.stream, answer.as_bytes(), SendFlags::NOSIGNAL) {
            Ok(length) if length == answer.len() => Ok(()),
            _ => Err(Broken),
        }
    }

    /// Every packet of the guest says how much room it has.
    pub fn note_room(&mut self, header: &Header) {
        self.guest_buffer = header.buf_alloc;
        self.guest_forwarded = Wrapping(header.fwd_cnt);
        // Asked once, a guest says by itself when it has room again.
        self.credit_requested &= self.room() == 0;
    }

    /// How much the guest has room for. A guest that lies gets more, or nothing: its own loss.
    fn room(&self) -> u32 {
        self.guest_buffer.saturating_sub((self.sent - self.guest_forwarded).0)
    }

    /// Data of the guest: into the socket, and what that doesn't take into the buffer.
    pub fn take(&mut self, data: &mut Cursor<'_>, len: u32) -> Result<(), Broken> {
        let held = (self.received - self.forwarded).0;
        if self.guest_sent_all || len > BUFFER_BYTES - held {
            return Err(Broken);
        }
        self.received += len;
        let mut left = len;
        while left > 0 && self.writable && self.buffer.is_empty() && !self.host_closed {
            let vectors = data.prefix(left.into()).io_vectors().map_err(|_| Broken)?;
            match vectors.writev(self.stream.as_fd()) {
                // Only what is no memory takes nothing.
                Ok(0) => return Err(Broken),
                Ok(written) => {
                    // No more than was asked for.
                    let written = written as u32;
                    data.skip(written.into());
                    left -= written;
                    self.forward(written);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                Err(_) => self.host_takes_nothing(),
            }
        }
        if self.host_closed {
            self.forward(left);
        } else if left > 0 {
            self.keep(data, left as usize)?;
        }
        Ok(())
    }

    fn keep(&mut self, data: &mut Cursor<'_>, len: usize) -> Result<(), Broken> {
        let start = self.buffer.len();
        self.buffer.resize(start + len, 0);
        let (front, back) = self.buffer.as_mut_slices();
        let in_front = front.len().saturating_sub(start);
        let into_back = back.len() - (len - in_front);
        let front_start = front.len() - in_front;
        let pieces = [&mut front[front_start..], &mut back[into_back..]];
        pieces.into_iter().try_for_each(|piece| data.read_exact(piece)).map_err(|_| Broken)
    }

    /// The socket may take more: gives it what waits.
    pub fn flush(&mut self) {
        while self.writable && !self.buffer.is_empty() {
            let (front, _) = self.buffer.as_slices();
            match rustix::net::send(&self.stream, front, SendFlags::NOSIGNAL) {
                Ok(written) => {
                    self.buffer.drain(..written);
                    self.forward(written as u32);
                }
                Err(rustix::io::Errno::AGAIN) => self.writable = false,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => self.host_takes_nothing(),
            }
        }
        if self.buffer.is_empty() {
            // A connection that was busy once doesn't hold its memory for ever.
            self.buffer.shrink_to(0);
            self.end_if_over();
        }
    }

    /// The host's end is closed. What it sent before is still to be read; what the guest sends is lost,
    /// as with any connection.
    pub fn host_takes_nothing(&mut self) {
        if std::mem::replace(&mut self.host_closed, true) {
            return;
        }
        self.forward(self.buffer.len() as u32);
        self.buffer.clear();
    }

    fn forward(&mut self, bytes: u32) {
        self.forwarded += bytes;
        if (self.forwarded - self.announced).0 >= ANNOUNCED_ROOM_BYTES {
            self.due.credit_update = true;
        }
    }

    pub fn update_credit(&mut self) {
        self.due.credit_update = true;
    }

    /// The guest said what it will not do any more.
    pub fn shut(&mut self, flags: u32) {
        self.guest_sent_all |= flags & SHUTDOWN_SEND != 0;
        if flags & SHUTDOWN_RECEIVE != 0 && self.guest_receives {
            self.guest_receives = false;
            // Errors say that it is closed already.
            let _ = rustix::net::shutdown(&self.stream, Shutdown::Read);
        }
        if self.buffer.is_empty() {
            self.end_if_over();
        }
    }

    /// All of the guest's data is delivered.
    fn end_if_over(&mut self) {
        if self.guest_sent_all {
            // Errors say that it is closed already.
            let _ = rustix::net::shutdown(&self.stream, Shutdown::Write);
            // The answer to a clean end.
            self.due.reset |= !self.guest_receives;
        }
    }

    /// What the host will not do any more, as flags of a shutdown.
    fn end(&self) -> u32 {
        match (self.host_sent_all, self.host_closed || self.guest_sent_all) {
            (false, _) => 0,
            (true, false) => SHUTDOWN_SEND,
            (true, true) => SHUTDOWN_BOTH,
        }
    }

    /// The end without a goodbye.
    pub fn abort(&mut self) {
        self.due.reset = true;
    }

    /// Whether the guest is to get something.
    pub fn has_something(&self) -> bool {
        let Due { reset, request, response, credit_update, credit_request } = self.due;
        let control = reset || request || response || credit_update || credit_request;
        control || self.end() != self.end_told || self.may_read()
    }

    pub fn may_read(&self) -> bool {
        self.state == State::Open
            && self.readable
            && self.guest_receives
            && !self.host_sent_all
            && (self.room() > 0 || !self.credit_requested)
    }

    /// The next packet without data, if there is one. After a reset the connection is no more.
    pub fn next_control(&mut self) -> Option<Header> {
        // The end was read behind all data, and so comes last.
        let end = self.end();
        let due = &mut self.due;
        let (op, flags) = if std::mem::take(&mut due.reset) {
            (OP_RST, 0)
        } else if std::mem::take(&mut due.request) {
            (OP_REQUEST, 0)
        } else if std::mem::take(&mut due.response) {
            (OP_RESPONSE, 0)
        } else if std::mem::take(&mut due.credit_update) {
            (OP_CREDIT_UPDATE, 0)
        } else if std::mem::take(&mut due.credit_request) {
            (OP_CREDIT_REQUEST, 0)
        } else if end != self.end_told {
            self.end_told = end;
            (OP_SHUTDOWN, end)
        } else {
            return None;
        };
        Some(self.header(op, flags, 0))
    }

    pub fn header(&mut self, op: u16, flags: u32, len: u32) -> Header {
        self.announced = self.forwarded;
        self.due.credit_update = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            len,
            kind: TYPE_STREAM,
            op,
            flags,
            buf_alloc: BUFFER_BYTES,
            fwd_cnt: self.forwarded.0,
        }
    }

    /// Reads from the socket into the guest's buffer, as much as the guest has room for.
    pub fn fill(&mut self, data: &Cursor<'_>) -> Result<Filled, Broken> {
        let room = self.room();
        if room == 0 {
            self.credit_requested = true;
            self.due.credit_request = true;
            return Ok(Filled::Nothing);
        }
        let vectors = data.prefix(room.into()).io_vectors().map_err(|_| Broken)?;
        if vectors.len_bytes() == 0 {
            // Or nothing would look like the socket's end.
            return Err(Broken);
        }
        match vectors.readv(self.stream.as_fd()) {
            Ok(0) => {
                self.host_sent_all = true;
                Ok(Filled::Nothing)
            }
            Ok(length) => {
                // No more than the room, which has 32 bits.
                self.sent += length as u32;
                Ok(Filled::Bytes(length as u32))
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                Ok(Filled::Nothing)
            }
            Err(_) => Err(Broken),
        }
    }

    /// Nothing can move any more, and the guest knows: only its goodbye is missing.
    pub fn waits_for_goodbye(&self) -> bool {
        self.end_told == SHUTDOWN_BOTH && self.buffer.is_empty()
    }
}
