//! The control socket's connections: who is connected, in which mode, and what waits to be sent.
//!
//! Nothing here ever blocks. A client that doesn't read its answers or events is dropped; a console
//! client that doesn't read loses the oldest output (see [`crate::vmm::console`]).

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::net::{SendFlags, SocketFlags};
use serde::{Deserialize, Serialize};

use super::console::Output;
use super::packet::{self, PacketError};
use super::protocol::{CONSOLE_PACKET_BYTES_MAX, Event, Request, Response, VERSION, Verb};

/// Most clients at once; further ones are turned away.
const CLIENTS_MAX: usize = 64;
const BACKLOG: i32 = 16;
/// Console packets sent to one client before others get their turn.
const CONSOLE_BURST: usize = 64;

enum Mode {
    Requests,
    /// Has read the output up to here. `blocked`: its socket is full.
    Console {
        position: u64,
        blocked: bool,
    },
    Watch,
}

struct Client {
    socket: OwnedFd,
    mode: Mode,
}

/// What came from a client.
pub enum Received {
    Nothing,
    Request {
        client: u64,
        verb: Verb,
        fds: Vec<OwnedFd>,
    },
    /// Typed at an attached console.
    Input(Vec<u8>),
}

pub struct Clients {
    epoll: Arc<OwnedFd>,
    listener: OwnedFd,
    clients: BTreeMap<u64, Client>,
    next: u64,
    /// No input is read from consoles: the guest must first read what there is.
    input_held: bool,
    buffer: Vec<u8>,
}

impl Clients {
    /// Starts to listen. Clients are registered with `epoll` under numbers from `first` on, the
    /// listener under `listener_token`.
    pub fn new(epoll: Arc<OwnedFd>, listener: OwnedFd, listener_token: u64, first: u64) -> io::Result<Self> {
        rustix::net::listen(&listener, BACKLOG)?;
        // A client may be gone again before it is accepted; accept must not wait for the next one.
        rustix::io::ioctl_fionbio(&listener, true)?;
        epoll::add(&*epoll, &listener, EventData::new_u64(listener_token), EventFlags::IN)?;
        let buffer = packet::buffer();
        Ok(Self { epoll, listener, clients: BTreeMap::new(), next: first, input_held: false, buffer })
    }

    /// The listener is readable.
    pub fn accept(&mut self) {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        // Errors are the peer's (it has gone), or a lack of memory that the next event retries.
        let Ok(socket) = rustix::net::accept_with(&self.listener, flags) else { return };
        if self.clients.len() >= CLIENTS_MAX {
            return;
        }
        let id = self.next;
        if epoll::add(&*self.epoll, &socket, EventData::new_u64(id), EventFlags::IN).is_ok() {
            self.next += 1;
            self.clients.insert(id, Client { socket, mode: Mode::Requests });
        }
    }

    /// A client's socket is ready.
    pub fn serve(&mut self, id: u64, flags: EventFlags, output: &Output) -> Received {
        if flags.contains(EventFlags::OUT)
            && let Some(Client { mode: Mode::Console { blocked, .. }, .. }) = self.clients.get_mut(&id)
        {
            *blocked = false;
            self.flush_one(id, output);
        }
        let ended = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        if !flags.contains(EventFlags::IN) {
            if ended {
                self.remove(id);
            }
            return Received::Nothing;
        }
        let Some(client) = self.clients.get(&id) else { return Received::Nothing };
        match (&client.mode, packet::receive_bytes(&client.socket, &mut self.buffer)) {
            (_, Err(PacketError::Closed | PacketError::Io(_))) => {
                self.remove(id);
                Received::Nothing
            }
            (_, Err(PacketError::WouldBlock)) => Received::Nothing,
            (Mode::Requests, Err(error)) => {
                self.respond(id, &Response::Error { message: error.to_string() });
                Received::Nothing
            }
            (Mode::Requests, Ok((length, fds))) => self.request(id, length, fds),
            (Mode::Console { .. }, Ok((length, _))) => Received::Input(self.buffer[..length].to_vec()),
            // Watchers have nothing to say.
            (Mode::Console { .. } | Mode::Watch, _) => Received::Nothing,
        }
    }

    fn request(&mut self, client: u64, length: usize, fds: Vec<OwnedFd>) -> Received {
        match parse(&self.buffer[..length]) {
            Ok(verb) => Received::Request { client, verb, fds },
            Err(message) => {
                self.respond(client, &Response::Error { message });
                Received::Nothing
            }
        }
    }

    /// Answers a request.
    pub fn respond(&mut self, id: u64, response: &Response) {
        self.send(id, response);
    }

    /// Tells all watchers.
    pub fn announce(&mut self, event: &Event) {
        let watchers: Vec<u64> = self
            .clients
            .iter()
            .filter_map(|(&id, client)| matches!(client.mode, Mode::Watch).then_some(id))
            .collect();
        for id in watchers {
            self.send(id, event);
        }
    }

    fn send<T: Serialize>(&mut self, id: u64, message: &T) {
        let Some(client) = self.clients.get(&id) else { return };
        if packet::send(&client.socket, message, &[]).is_err() {
            self.remove(id);
        }
    }

    pub fn watch(&mut self, id: u64) {
        self.respond(id, &Response::Done);
        if let Some(client) = self.clients.get_mut(&id) {
            client.mode = Mode::Watch;
        }
    }

    pub fn attach_console(&mut self, id: u64, replay_bytes: usize, output: &Output) {
        self.respond(id, &Response::Done);
        if let Some(client) = self.clients.get_mut(&id) {
            let position = output.end().saturating_sub(replay_bytes as u64);
            client.mode = Mode::Console { position, blocked: false };
            self.flush_one(id, output);
        }
    }

    /// Sends new output to all attached consoles.
    pub fn flush_consoles(&mut self, output: &Output) {
        let consoles: Vec<u64> = self
            .clients
            .iter()
            .filter_map(|(&id, client)| {
                matches!(client.mode, Mode::Console { blocked: false, .. }).then_some(id)
            })
            .collect();
        for id in consoles {
            self.flush_one(id, output);
        }
    }

    fn flush_one(&mut self, id: u64, output: &Output) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let Mode::Console { position, blocked } = &mut client.mode else { return };
        let mut chunk = [0; CONSOLE_PACKET_BYTES_MAX];
        for _ in 0..CONSOLE_BURST {
            let (next, length) = output.copy(*position, &mut chunk);
            if length == 0 {
                break;
            }
            match rustix::net::send(&client.socket, &chunk[..length], SendFlags::NOSIGNAL) {
                Ok(_) => *position = next,
                Err(rustix::io::Errno::AGAIN) => {
                    *blocked = true;
                    break;
                }
                Err(_) => return self.remove(id),
            }
        }
        // After a full burst the rest waits for the socket's next readiness, as when it is full.
        *blocked |= output.end() > *position;
        self.set_interest(id);
    }

    /// Whether input is read from attached consoles.
    pub fn hold_input(&mut self, held: bool) {
        if self.input_held == held {
            return;
        }
        self.input_held = held;
        let ids: Vec<u64> = self.clients.keys().copied().collect();
        for id in ids {
            self.set_interest(id);
        }
    }

    fn set_interest(&mut self, id: u64) {
        let Some(client) = self.clients.get(&id) else { return };
        let flags = match client.mode {
            Mode::Requests | Mode::Watch => EventFlags::IN,
            Mode::Console { blocked, .. } => {
                let mut flags = EventFlags::empty();
                flags.set(EventFlags::IN, !self.input_held);
                flags.set(EventFlags::OUT, blocked);
                flags
            }
        };
        if epoll::modify(&*self.epoll, &client.socket, EventData::new_u64(id), flags).is_err() {
            self.remove(id);
        }
    }

    /// Closing the socket takes it out of the epoll set.
    fn remove(&mut self, id: u64) {
        self.clients.remove(&id);
    }

    pub fn listener(&self) -> impl AsFd + '_ {
        &self.listener
    }
}

/// What a packet asks for, or why that can't be told. The version is looked at first: a newer client may
/// say what this process doesn't know.
pub fn parse(packet: &[u8]) -> Result<Verb, String> {
    #[derive(Deserialize)]
    struct VersionOnly {
        version: u32,
    }

    let malformed = |error: serde_json::Error| format!("the request is malformed: {error}");
    let VersionOnly { version } = serde_json::from_slice(packet).map_err(malformed)?;
    if version != VERSION {
        return Err(format!("the request is of version {version}, this VM process speaks version {VERSION}"));
    }
    Ok(serde_json::from_slice::<Request>(packet).map_err(malformed)?.verb)
}
