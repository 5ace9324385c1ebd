//! Packets of the two conversations: JSON, bounded, with open files beside it. Both ends use these, so
//! that they agree on the bounds. Nothing here knows a verb.

use std::io;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::protocol::PACKET_BYTES_MAX;

/// Most descriptors in one packet (the kernel's own bound is SCM_MAX_FD, 253).
pub const PACKET_FDS_MAX: usize = 253;

#[derive(Debug, thiserror::Error)]
pub enum PacketError {
    /// The other side closed the connection.
    #[error("the connection is closed")]
    Closed,
    /// Nothing to read, or no room to write, within the time that the socket allows.
    #[error("timed out")]
    WouldBlock,
    /// The connection goes on: the rest of the packet is dropped by the kernel.
    #[error("the packet is longer than {PACKET_BYTES_MAX} bytes")]
    TooLong,
    #[error("the packet carries more than {PACKET_FDS_MAX} descriptors")]
    TooManyFds,
    #[error("the packet is no valid message: {0}")]
    Malformed(#[from] serde_json::Error),
    #[error("{0}")]
    Io(#[source] io::Error),
}

impl From<rustix::io::Errno> for PacketError {
    fn from(errno: rustix::io::Errno) -> Self {
        match errno {
            rustix::io::Errno::AGAIN => Self::WouldBlock,
            rustix::io::Errno::PIPE | rustix::io::Errno::CONNRESET => Self::Closed,
            other => Self::Io(other.into()),
        }
    }
}

/// A buffer for one packet of any length allowed, and one byte to see that it is longer.
pub fn buffer() -> Vec<u8> {
    // Zeroed memory comes from the kernel untouched: only what is received becomes resident.
    vec![0; PACKET_BYTES_MAX + 1]
}

/// Sends one message with its descriptors, as one packet. Never raises SIGPIPE.
pub fn send<T: Serialize>(socket: impl AsFd, message: &T, fds: &[BorrowedFd<'_>]) -> Result<(), PacketError> {
    let bytes = serde_json::to_vec(message)?;
    send_bytes(socket, &bytes, fds)
}

pub fn send_bytes(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), PacketError> {
    if bytes.len() > PACKET_BYTES_MAX {
        return Err(PacketError::TooLong);
    }
    let mut space = vec![MaybeUninit::uninit(); SendAncillaryMessage::ScmRights(fds).size()];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && (fds.len() > PACKET_FDS_MAX || !control.push(SendAncillaryMessage::ScmRights(fds)))
    {
        return Err(PacketError::TooManyFds);
    }
    rustix::io::retry_on_intr(|| {
        rustix::net::sendmsg(&socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)
    })?;
    Ok(())
}

/// Receives one packet into `buffer` (see [`buffer`]); gives its length and the descriptors in it,
/// close-on-exec. Of an over-long packet the descriptors are closed.
pub fn receive_bytes(socket: impl AsFd, buffer: &mut [u8]) -> Result<(usize, Vec<OwnedFd>), PacketError> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PACKET_FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::io::retry_on_intr(|| {
        rustix::net::recvmsg(&socket, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.flags.contains(ReturnFlags::TRUNC) || received.bytes > PACKET_BYTES_MAX {
        return Err(PacketError::TooLong);
    }
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return Err(PacketError::TooManyFds);
    }
    // An empty packet can't be told from the end of the connection, and no message is empty.
    if received.bytes == 0 {
        return Err(PacketError::Closed);
    }
    Ok((received.bytes, fds))
}

/// Receives one message with its descriptors.
pub fn receive<T: DeserializeOwned>(socket: impl AsFd) -> Result<(T, Vec<OwnedFd>), PacketError> {
    let mut buffer = buffer();
    let (length, fds) = receive_bytes(socket, &mut buffer)?;
    Ok((serde_json::from_slice(&buffer[..length])?, fds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .unwrap()
    }

    #[test]
    fn a_message_arrives_with_its_descriptors() {
        let (near, far) = pair();
        let (one, two) = pair();
        send(&near, &"hello", &[one.as_fd(), two.as_fd()]).unwrap();
        let (message, fds) = receive::<String>(&far).unwrap();
        assert_eq!((message.as_str(), fds.len()), ("hello", 2));
        assert!(matches!(receive::<String>(&far), Err(PacketError::WouldBlock)));
        drop(near);
        assert!(matches!(receive::<String>(&far), Err(PacketError::Closed)));
    }

    #[test]
    fn the_longest_packet_passes_and_a_longer_one_does_not() {
        let (near, far) = pair();
        let longest = "x".repeat(PACKET_BYTES_MAX - 2);
        send(&near, &longest, &[]).unwrap();
        assert_eq!(receive::<String>(&far).unwrap().0, longest);
        assert!(matches!(send(&near, &(longest + "x"), &[]), Err(PacketError::TooLong)));
        rustix::net::send(&near, &vec![b'x'; PACKET_BYTES_MAX + 5000], SendFlags::empty()).unwrap();
        assert!(matches!(receive::<String>(&far), Err(PacketError::TooLong)));
        send(&near, &"still there", &[]).unwrap();
        assert_eq!(receive::<String>(&far).unwrap().0, "still there");
    }

    #[test]
    fn nonsense_is_malformed() {
        let (near, far) = pair();
        send_bytes(&near, b"{\"version\":", &[]).unwrap();
        assert!(matches!(receive::<String>(&far), Err(PacketError::Malformed(_))));
    }
}
