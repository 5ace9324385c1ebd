//! A blocking rtnetlink conversation: many requests in one system call, dumps that are whole.
//!
//! The kernel handles all messages of one `sendmsg` within that system call, whatever happens to the
//! sender meanwhile. What must happen together goes into one [`Group`]; groups are never split.
//! This room knows messages and errno values, and nothing of what a link is to us.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload, NlasIterator,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use rustix::net::sockopt;

/// Requests sent in one system call, at most: their answers must fit the receive buffer even where
/// it could not be raised (an answer takes about 1 KiB of it).
const BATCH_MESSAGES_MAX: usize = 128;
/// Bytes sent in one system call, at most, unless a single group is larger.
const BATCH_BYTES_MAX: usize = 64 * 1024;
const RECEIVE_BUFFER_BYTES: usize = 16 << 20;
/// Larger than any datagram of a dump (32 KiB).
const DATAGRAM_BYTES_MAX: usize = 128 * 1024;
/// The kernel answers within the system call; an answer that doesn't come was lost.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(20);
/// How often a dump is begun again because the links changed meanwhile.
const DUMP_ATTEMPTS_MAX: u32 = 20;

const NLMSG_NOOP: u16 = 1;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLMSG_HEADER_LEN: usize = 16;
/// In the flags of an error message: only the request's header is echoed.
const NLM_F_CAPPED: u16 = 0x100;
const NLM_F_ACK_TLVS: u16 = 0x200;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLMSGERR_ATTR_MSG: u16 = 1;

/// The kernel's refusal of one request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    pub errno: i32,
    /// The extended acknowledgement's text.
    pub text: Option<String>,
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let errno = rustix::io::Errno::from_raw_os_error(self.errno);
        let error = io::Error::from(errno).to_string();
        // "File exists (os error 17)" without its tail.
        let error = error.split(" (os error").next().unwrap_or(&error);
        match &self.text {
            Some(text) => write!(f, "{error} (the kernel says: {})", text.trim_end_matches('.')),
            None => f.write_str(error),
        }
    }
}

/// The answer to one request: acknowledged, with what came before the acknowledgement, or refused.
pub type Answer = Result<Option<Vec<u8>>, Refusal>;

/// Requests that the kernel handles within one system call, in this order. A refused one doesn't keep
/// the kernel from handling those after it.
#[derive(Debug, Default)]
pub struct Group {
    requests: Vec<(RouteNetlinkMessage, u16)>,
}

impl Group {
    pub fn push(&mut self, message: RouteNetlinkMessage, flags: u16) {
        self.requests.push((message, flags));
    }

    pub fn len(&self) -> usize {
        self.requests.len()
    }

    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }
}

impl FromIterator<(RouteNetlinkMessage, u16)> for Group {
    fn from_iter<T: IntoIterator<Item = (RouteNetlinkMessage, u16)>>(requests: T) -> Self {
        Self { requests: requests.into_iter().collect() }
    }
}

/// Why a dump gave nothing.
#[derive(Debug)]
enum DumpFailure {
    /// Something changed while the kernel walked its list, or an answer was lost.
    Interrupted,
    Io(io::Error),
}

impl From<io::Error> for DumpFailure {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOBUFS) | Some(libc::EINTR) => Self::Interrupted,
            _ => Self::Io(error),
        }
    }
}

/// A socket in the network namespace of the thread that made it.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
    datagram: Vec<u8>,
}

impl Netlink {
    pub fn open() -> io::Result<Self> {
        let socket = open_socket(0)?;
        socket.set_cap_ack(true)?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(ANSWER_TIMEOUT))?;
        // Before Linux 4.12 there are no texts: the errno has to do.
        let _ = socket.set_ext_ack(true);
        Ok(Self { socket, sequence: 0, datagram: vec![0; DATAGRAM_BYTES_MAX] })
    }

    /// Sends the groups, as many in one system call as fit, and gives each request's answer. An `Err`
    /// means that the conversation broke: what had been sent may have been done.
    pub fn exchange(&mut self, groups: Vec<Group>) -> io::Result<Vec<Vec<Answer>>> {
        let sizes: Vec<usize> = groups.iter().map(Group::len).collect();
        let mut answers = Vec::with_capacity(sizes.iter().sum());
        let mut groups = groups.into_iter().peekable();
        while groups.peek().is_some() {
            let (mut bytes, mut count) = (Vec::new(), 0);
            let first_sequence = self.sequence.wrapping_add(1);
            let fits = |count: usize, bytes: &Vec<u8>, group: &Group| {
                count == 0 || count + group.len() <= BATCH_MESSAGES_MAX && bytes.len() < BATCH_BYTES_MAX
            };
            while let Some(group) = groups.next_if(|group| fits(count, &bytes, group)) {
                for (message, flags) in group.requests {
                    self.sequence = self.sequence.wrapping_add(1);
                    append(&mut bytes, message, NLM_F_REQUEST | NLM_F_ACK | flags, self.sequence);
                    count += 1;
                }
            }
            answers.extend(self.converse(&bytes, first_sequence, count)?);
        }
        let mut answers = answers.into_iter();
        Ok(sizes.into_iter().map(|size| answers.by_ref().take(size).collect()).collect())
    }

    /// Sends one buffer and collects the answers of `count` requests, numbered from `first`.
    fn converse(&mut self, bytes: &[u8], first: u32, count: usize) -> io::Result<Vec<Answer>> {
        if count == 0 {
            return Ok(Vec::new());
        }
        self.send(bytes)?;
        let mut answers: Vec<Option<Answer>> = vec![None; count];
        let mut payloads: HashMap<usize, Vec<u8>> = HashMap::new();
        let mut missing = count;
        while missing > 0 {
            let length = self.receive()?;
            for message in messages(&self.datagram[..length]) {
                let message = message?;
                let index = message.sequence.wrapping_sub(first) as usize;
                if index >= count || answers[index].is_some() {
                    continue;
                }
                match message.kind {
                    NLMSG_NOOP => {}
                    NLMSG_ERROR => {
                        let payload = payloads.remove(&index);
                        answers[index] = Some(refusal(&message)?.map_or(Ok(payload), Err));
                        missing -= 1;
                    }
                    _ => {
                        payloads.insert(index, message.payload.to_vec());
                    }
                }
            }
        }
        // Every slot was filled, or the loop would still run.
        Ok(answers.into_iter().flatten().collect())
    }

    /// Reads a whole list: `begin` makes an empty collection, `take` adds one message's payload to it.
    /// Begins again when the list changed while it was read.
    pub fn dump<T>(
        &mut self,
        request: &RouteNetlinkMessage,
        begin: impl Fn() -> T,
        mut take: impl FnMut(&mut T, &[u8]),
    ) -> io::Result<T> {
        for attempt in 0..DUMP_ATTEMPTS_MAX {
            let mut collection = begin();
            match self.dump_once(request, |payload| take(&mut collection, payload)) {
                Ok(()) => return Ok(collection),
                Err(DumpFailure::Interrupted) => {
                    std::thread::sleep(Duration::from_millis(u64::from(attempt)));
                }
                Err(DumpFailure::Io(error)) => return Err(error),
            }
        }
        Err(io::Error::other(format!(
            "the list changed while it was read, {DUMP_ATTEMPTS_MAX} times in a row"
        )))
    }

    fn dump_once(
        &mut self,
        request: &RouteNetlinkMessage,
        mut take: impl FnMut(&[u8]),
    ) -> Result<(), DumpFailure> {
        self.sequence = self.sequence.wrapping_add(1);
        let sequence = self.sequence;
        let mut bytes = Vec::new();
        append(&mut bytes, request.clone(), NLM_F_REQUEST | NLM_F_DUMP, sequence);
        self.send(&bytes)?;
        // An interrupted dump is still read to its end: the socket has one dump at a time.
        let mut interrupted = false;
        loop {
            let length = self.receive()?;
            for message in messages(&self.datagram[..length]) {
                let message = message?;
                if message.sequence != sequence {
                    continue;
                }
                interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
                match message.kind {
                    NLMSG_NOOP => {}
                    NLMSG_ERROR => {
                        let errno = refusal(&message)?.map_or(libc::EPROTO, |refusal| refusal.errno);
                        return Err(io::Error::from_raw_os_error(errno).into());
                    }
                    NLMSG_DONE => {
                        let status =
                            message.payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code));
                        return match (status, interrupted) {
                            (0.., false) => Ok(()),
                            (0.., true) => Err(DumpFailure::Interrupted),
                            (errno, _) => Err(io::Error::from_raw_os_error(-errno).into()),
                        };
                    }
                    _ => take(message.payload),
                }
            }
        }
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let kernel = SocketAddr::new(0, 0);
        loop {
            match self.socket.send_to(bytes, &kernel, 0) {
                Ok(sent) if sent == bytes.len() => return Ok(()),
                Ok(sent) => {
                    return Err(io::Error::other(format!("netlink took {sent} of {} bytes", bytes.len())));
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn receive(&mut self) -> io::Result<usize> {
        receive(&self.socket, &mut self.datagram)
    }
}

/// A route socket bound to these multicast groups (a bit mask; 0 for none), with a large buffer.
pub fn open_socket(groups: u32) -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    // Without CAP_NET_ADMIN over the first user namespace the buffer keeps to net.core.rmem_max.
    if sockopt::set_socket_recv_buffer_size_force(&socket, RECEIVE_BUFFER_BYTES).is_err() {
        sockopt::set_socket_recv_buffer_size(&socket, RECEIVE_BUFFER_BYTES)?;
    }
    socket.bind(&SocketAddr::new(0, groups))?;
    Ok(socket)
}

/// One datagram; an error if it doesn't fit the buffer, for half a message is none.
pub fn receive(socket: &Socket, buffer: &mut [u8]) -> io::Result<usize> {
    let room = buffer.len();
    loop {
        let mut target = &mut *buffer;
        match socket.recv(&mut target, libc::MSG_TRUNC) {
            Ok(length) if length <= room => return Ok(length),
            Ok(length) => {
                return Err(io::Error::other(format!(
                    "a netlink datagram has {length} bytes, more than {room}"
                )));
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            Err(error) => return Err(error),
        }
    }
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn append(bytes: &mut Vec<u8>, message: RouteNetlinkMessage, flags: u16, sequence: u32) {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(message));
    message.finalize();
    let start = bytes.len();
    bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
    message.serialize(&mut bytes[start..]);
}

/// One message of a datagram, not yet decoded.
pub struct RawMessage<'a> {
    pub kind: u16,
    pub flags: u16,
    pub sequence: u32,
    pub payload: &'a [u8],
}

/// The messages of a datagram. Ends after the first that is malformed.
pub fn messages(datagram: &[u8]) -> impl Iterator<Item = io::Result<RawMessage<'_>>> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let split = split_message(rest);
        rest = split.as_ref().map_or(&[], |(_, rest)| rest);
        Some(split.map(|(message, _)| message).ok_or_else(|| io::Error::other("a malformed netlink message")))
    })
}

fn split_message(bytes: &[u8]) -> Option<(RawMessage<'_>, &[u8])> {
    let u16_at = |at: usize| Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
    let u32_at = |at: usize| Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
    let length = u32_at(0)? as usize;
    let message = RawMessage {
        kind: u16_at(4)?,
        flags: u16_at(6)?,
        sequence: u32_at(8)?,
        payload: bytes.get(NLMSG_HEADER_LEN..length)?,
    };
    Some((message, bytes.get(length.next_multiple_of(4)..).unwrap_or(&[])))
}

/// What an error message says: `None` is an acknowledgement.
fn refusal(message: &RawMessage<'_>) -> io::Result<Option<Refusal>> {
    let malformed = || io::Error::other("a malformed netlink error message");
    let code = i32::from_ne_bytes(*message.payload.first_chunk().ok_or_else(malformed)?);
    if code == 0 {
        return Ok(None);
    }
    let mut text = None;
    if message.flags & NLM_F_ACK_TLVS != 0 {
        let echoed = match message.flags & NLM_F_CAPPED {
            0 => {
                message.payload.get(4..).and_then(|bytes| bytes.first_chunk()).map(|b| u32::from_ne_bytes(*b))
            }
            _ => Some(NLMSG_HEADER_LEN as u32),
        };
        let start = 4 + (echoed.ok_or_else(malformed)? as usize).next_multiple_of(4);
        for attribute in NlasIterator::new(message.payload.get(start..).unwrap_or(&[])).flatten() {
            if attribute.kind() == NLMSGERR_ATTR_MSG {
                let bytes = attribute.value().split(|&byte| byte == 0).next().unwrap_or_default();
                text = Some(String::from_utf8_lossy(bytes).into_owned());
            }
        }
    }
    Ok(Some(Refusal { errno: -code, text }))
}
