//! The host's side of the device: one listening socket for connections to the guest, and a directory in
//! which the guest's connections find their sockets.
//!
//! ```text
//!   host program ── connect <dir>/vsock, "CONNECT 1024\n" ──▶ guest's port 1024 ── "OK <port>\n" ──▶
//!   guest ── connect to CID 2, port 1024 ──▶ <dir>/vsock_1024
//! ```
//!
//! The VM process may open nothing by path, but `connect` to a Unix socket takes nothing else. So the
//! thread of this device, and it alone, has that directory for its working directory ([`enter`]): its
//! paths are single names, its filter forbids to open or to change anything, and what is above the
//! directory is the sandbox's empty root. No broker, which would be one more process to trust.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::net::{AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType};

use super::connection::Key;
use super::packet::PORT_ANY;

/// Most programs of the host that have connected and not said to where.
const CLIENTS_MAX: usize = 32;
/// How long they may take to say it.
const CLIENT_TIMEOUT: Duration = Duration::from_secs(10);
/// `CONNECT 4294967295\n`, with room for a carriage return.
const LINE_BYTES_MAX: usize = 24;
/// Connections accepted in one turn.
const ACCEPTS_PER_TURN: usize = 16;
/// When descriptors or memory are short, accepting is tried again after this time.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);
const BACKLOG: i32 = 32;

const LISTENER: Key = Key { host_port: PORT_ANY, guest_port: PORT_ANY };

/// What wakes the thread, edge-triggered.
const CONNECTION_EVENTS: EventFlags =
    EventFlags::IN.union(EventFlags::OUT).union(EventFlags::RDHUP).union(EventFlags::ET);

/// Makes the directory the calling thread's own working directory.
pub fn enter(directory: &OwnedFd) -> io::Result<()> {
    // SAFETY: gives this thread a file system context of its own; no memory is concerned.
    if unsafe { libc::unshare(libc::CLONE_FS) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(rustix::process::fchdir(directory)?)
}

/// A program that has connected and not said to where.
struct Client {
    stream: OwnedFd,
    deadline: Instant,
}

pub struct Host {
    epoll: OwnedFd,
    listener: OwnedFd,
    clients: BTreeMap<u32, Client>,
    next_client: u32,
    accept_at: Option<Instant>,
}

/// What a socket has to say.
pub enum HostEvent {
    /// Somebody wants to reach this port of the guest.
    Request {
        stream: OwnedFd,
        guest_port: u32,
    },
    Socket {
        key: Key,
        flags: EventFlags,
    },
}

impl Host {
    /// `listener` is bound, and not listening yet.
    pub fn new(listener: OwnedFd) -> io::Result<Self> {
        rustix::net::listen(&listener, BACKLOG)?;
        rustix::io::ioctl_fionbio(&listener, true)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let events = EventFlags::IN | EventFlags::ET;
        epoll::add(&epoll, &listener, EventData::new_u64(LISTENER.token()), events)?;
        Ok(Self { epoll, listener, clients: BTreeMap::new(), next_client: 0, accept_at: None })
    }

    /// Becomes readable when there are events.
    pub fn wake(&self) -> &OwnedFd {
        &self.epoll
    }

    pub fn deadline(&self) -> Option<Instant> {
        let clients = self.clients.values().map(|client| client.deadline);
        clients.chain(self.accept_at).min()
    }

    /// All that happened. Who connects while nobody `serves` the guest's side is turned away.
    pub fn events(&mut self, serves: bool) -> Vec<HostEvent> {
        let mut events = Vec::with_capacity(64);
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        // Fails only when interrupted, and then the descriptor stays readable.
        let _ = epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), Some(&now));
        let mut found = Vec::with_capacity(events.len());
        for event in events {
            // The structure is packed: copy its fields.
            let (token, flags) = (event.data.u64(), event.flags);
            match Key::of(token) {
                LISTENER => self.accept_at = Some(Instant::now()),
                Key { guest_port: PORT_ANY, host_port: client } => found.extend(self.hear(client)),
                key => found.push(HostEvent::Socket { key, flags }),
            }
        }
        let now = Instant::now();
        self.clients.retain(|_, client| client.deadline > now);
        if self.accept_at.is_some_and(|at| at <= now) {
            self.accept(serves);
        }
        found
    }

    fn accept(&mut self, serves: bool) {
        self.accept_at = None;
        for _ in 0..ACCEPTS_PER_TURN {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            match rustix::net::accept_with(&self.listener, flags) {
                Ok(stream) if serves && self.clients.len() < CLIENTS_MAX => self.welcome(stream),
                Ok(_) | Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => {}
                Err(rustix::io::Errno::AGAIN) => return,
                Err(_) => return self.accept_at = Some(Instant::now() + ACCEPT_RETRY),
            }
        }
        self.accept_at = Some(Instant::now());
    }

    fn welcome(&mut self, stream: OwnedFd) {
        let client = self.next_client;
        let token = Key { host_port: client, guest_port: PORT_ANY }.token();
        let events = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
        if epoll::add(&self.epoll, &stream, EventData::new_u64(token), events).is_ok() {
            // The last number is the listener's.
            self.next_client = (client + 1) % PORT_ANY;
            self.clients.insert(client, Client { stream, deadline: Instant::now() + CLIENT_TIMEOUT });
        }
    }

    /// Reads a client's line, and nothing of what follows it.
    fn hear(&mut self, id: u32) -> Option<HostEvent> {
        let stream = &self.clients.get(&id)?.stream;
        let mut line = [0; LINE_BYTES_MAX];
        let length = match rustix::net::recv(stream, &mut line[..], RecvFlags::PEEK) {
            Ok((length, _)) if length > 0 => length,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return None,
            Ok(_) | Err(_) => return self.turn_away(id),
        };
        let Some(end) = line[..length].iter().position(|&byte| byte == b'\n') else {
            return if length < LINE_BYTES_MAX { None } else { self.turn_away(id) };
        };
        let port = parse_line(&line[..end]);
        let taken = rustix::net::recv(stream, &mut line[..=end], RecvFlags::empty());
        match (port, taken) {
            (Some(guest_port), Ok((length, _))) if length == end + 1 => {
                let Client { stream, .. } = self.clients.remove(&id)?;
                Some(HostEvent::Request { stream, guest_port })
            }
            _ => self.turn_away(id),
        }
    }

    fn turn_away(&mut self, id: u32) -> Option<HostEvent> {
        self.clients.remove(&id);
        None
    }

    /// From now on a former client's socket tells of its connection.
    pub fn rename(&self, stream: &OwnedFd, key: Key) -> bool {
        epoll::modify(&self.epoll, stream, EventData::new_u64(key.token()), CONNECTION_EVENTS).is_ok()
    }

    /// Connects to who listens for the guest on this port.
    pub fn connect(&self, key: Key) -> Option<OwnedFd> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let stream = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).ok()?;
        // A name in the thread's working directory. The socket doesn't wait: if the listener's backlog
        // is full, that is a refusal.
        let address = SocketAddrUnix::new(format!("vsock_{}", key.host_port)).ok()?;
        rustix::net::connect(&stream, &address).ok()?;
        epoll::add(&self.epoll, &stream, EventData::new_u64(key.token()), CONNECTION_EVENTS).ok()?;
        Some(stream)
    }

    /// The guest's side is gone.
    pub fn forget_clients(&mut self) {
        self.clients.clear();
    }
}

fn parse_line(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?;
    let port = line.strip_prefix("CONNECT ")?.trim();
    // No sign: `parse` takes one.
    if !port.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    port.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_a_port_or_nothing() {
        assert_eq!(parse_line(b"CONNECT 1024"), Some(1024));
        assert_eq!(parse_line(b"CONNECT 4294967295\r"), Some(u32::MAX));
        for bad in [
            &b"CONNECT"[..],
            b"CONNECT ",
            b"CONNECT 4294967296",
            b"CONNECT -1",
            b"CONNECT +1",
            b"connect 1",
            b"CONNECT 1 2",
            b"\xff\xfe",
            b"",
            b"GET / HTTP/1.1",
        ] {
            assert_eq!(parse_line(bad), None, "{bad:?}");
        }
    }
}
