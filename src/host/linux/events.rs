//! What wakes the agent: the kernel's word that a link, an address, forwarding or a table of ours changed,
//! and the end of a VM process. An event says only "look again"; what is so is learnt by looking.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use netlink_sys::Socket;

use super::{links, netlink};
use crate::name::LinkName;

/// What happened since the last look.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Drained {
    /// Something happened to a link, an address, a port's VLANs, forwarding or a table of ours.
    pub relevant: bool,
    /// The kernel had more to say than the buffer holds: anything may have changed.
    pub overrun: bool,
    /// The links that it happened to, as far as they could be named.
    pub links: BTreeSet<LinkName>,
}

/// The kernel's events on links, addresses and bridge VLANs of this network namespace.
pub struct LinkEvents {
    socket: Socket,
    /// `None`: the kernel has no nftables.
    tables: Option<Socket>,
    datagram: Vec<u8>,
    /// Addresses come with an index only.
    names: HashMap<u32, LinkName>,
}

impl LinkEvents {
    pub fn open() -> io::Result<Self> {
        let groups = [
            libc::RTNLGRP_LINK,
            libc::RTNLGRP_IPV4_IFADDR,
            libc::RTNLGRP_IPV6_IFADDR,
            libc::RTNLGRP_IPV4_NETCONF,
            libc::RTNLGRP_IPV6_NETCONF,
        ];
        let socket = netlink::open_socket(groups.iter().map(|group| 1 << (group - 1)).sum())?;
        socket.set_non_blocking(true)?;
        Ok(Self { socket, tables: tables::open(), datagram: vec![0; 128 * 1024], names: HashMap::new() })
    }

    /// What to wait for, beside this itself.
    pub fn tables_fd(&self) -> Option<BorrowedFd<'_>> {
        self.tables.as_ref().map(AsFd::as_fd)
    }

    /// Reads all that is there, without waiting.
    pub fn drain(&mut self) -> io::Result<Drained> {
        let mut datagram = std::mem::take(&mut self.datagram);
        let drained = self.drain_into(&mut datagram);
        let tables = self.tables.as_ref().map_or(Ok(false), |socket| tables::drain(socket, &mut datagram));
        self.datagram = datagram;
        let mut drained = drained?;
        drained.relevant |= tables?;
        Ok(drained)
    }

    fn drain_into(&mut self, datagram: &mut [u8]) -> io::Result<Drained> {
        let mut drained = Drained::default();
        loop {
            let length = match netlink::receive(&self.socket, datagram) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(drained),
                // The kernel dropped events, and says so once; later ones follow.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    (drained.relevant, drained.overrun) = (true, true);
                    continue;
                }
                Err(error) => return Err(error),
            };
            for message in netlink::messages(&datagram[..length]) {
                let message = message?;
                match message.kind {
                    libc::RTM_NEWLINK | libc::RTM_DELLINK => {
                        drained.relevant = true;
                        let Some(link) = links::parse_link(message.payload) else { continue };
                        if message.kind == libc::RTM_NEWLINK {
                            self.names.insert(link.index, link.name.clone());
                        } else if message.payload.first() == Some(&(libc::AF_UNSPEC as u8)) {
                            // (A link that merely leaves its bridge is reported as AF_BRIDGE.)
                            self.names.remove(&link.index);
                        }
                        drained.links.insert(link.name);
                    }
                    libc::RTM_NEWADDR | libc::RTM_DELADDR => {
                        drained.relevant = true;
                        let index = message.payload.get(4..).and_then(|bytes| bytes.first_chunk());
                        drained.links.extend(index.and_then(|index| self.name(u32::from_ne_bytes(*index))));
                    }
                    libc::RTM_NEWNETCONF | libc::RTM_DELNETCONF => drained.relevant = true,
                    _ => {}
                }
            }
        }
    }

    fn name(&mut self, index: u32) -> Option<LinkName> {
        if let Some(name) = self.names.get(&index) {
            return Some(name.clone());
        }
        let name = rustix::net::netdevice::index_to_name(&self.socket, index).ok()?;
        let name = LinkName::parse(&name).ok()?;
        self.names.insert(index, name.clone());
        Some(name)
    }
}

impl AsFd for LinkEvents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The kernel's events on nftables tables, of which ours are told apart by their names.
mod tables {
    use super::{Socket, io, netlink};

    const PREFIX: &[u8] = b"vmctl.";
    /// Of every message about a table or what is in it: the table's name.
    const NFTA_TABLE_NAME: u16 = 1;
    /// `struct nfgenmsg`
    const HEADER_BYTES: usize = 4;

    pub fn open() -> Option<Socket> {
        let mut socket = Socket::new(libc::NETLINK_NETFILTER as isize).ok()?;
        let group = 1 << (libc::NFNLGRP_NFTABLES - 1);
        socket.bind(&netlink_sys::SocketAddr::new(0, group)).ok()?;
        socket.set_non_blocking(true).ok()?;
        Some(socket)
    }

    /// True: something happened to a table of ours, or may have.
    pub fn drain(socket: &Socket, datagram: &mut [u8]) -> io::Result<bool> {
        let mut relevant = false;
        loop {
            let length = match netlink::receive(socket, datagram) {
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(relevant),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {
                    relevant = true;
                    continue;
                }
                Err(error) => return Err(error),
            };
            for message in netlink::messages(&datagram[..length]) {
                relevant |= message.map_or(true, |message| is_ours(message.payload));
            }
        }
    }

    fn is_ours(payload: &[u8]) -> bool {
        let Some(mut rest) = payload.get(HEADER_BYTES..) else { return false };
        while let Some((&[a, b, c, d], after)) = rest.split_first_chunk() {
            let (length, kind) = (usize::from(u16::from_ne_bytes([a, b])), u16::from_ne_bytes([c, d]));
            let Some(value) = length.checked_sub(4).and_then(|length| after.get(..length)) else {
                return false;
            };
            if kind == NFTA_TABLE_NAME {
                return value.starts_with(PREFIX);
            }
            rest = after.get(value.len().next_multiple_of(4)..).unwrap_or_default();
        }
        false
    }
}
