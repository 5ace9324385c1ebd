//! A tap, opened and attached by someone else, as a source and a sink of frames. Each frame is
//! preceded by a [`HEADER_BYTES`] long `struct virtio_net_hdr_v1`, which the kernel understands.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
};

use crate::vmm::device::buffers::Cursor;

/// `struct virtio_net_hdr_v1`: with the number of buffers at its end.
pub(super) const HEADER_BYTES: usize = 12;
/// The longest frame that the kernel makes (64 KiB of IP, an Ethernet header with a VLAN tag), with
/// its header.
pub(super) const FRAME_BYTES_MAX: usize = HEADER_BYTES + 65535 + 18;

// <linux/if_tun.h>
pub(super) const TUNSETOFFLOAD: u64 = 0x4004_54d0;
pub(super) const TUNGETIFF: u64 = 0x8004_54d2;
pub(super) const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;
const TUN_F_CSUM: u32 = 1;
const TUN_F_TSO4: u32 = 2;
const TUN_F_TSO6: u32 = 4;
const TUN_F_TSO_ECN: u32 = 8;
const IFF_TAP: u16 = 0x0002;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// What became of a frame.
pub(super) enum Transfer {
    Done(usize),
    /// Nothing to read, or no room to write, for now.
    WouldBlock,
    /// The frame is lost, but the tap may recover (it is down, say).
    Dropped,
    /// The tap was deleted. This descriptor will never work again.
    Gone,
}

pub(super) struct Tap {
    fd: OwnedFd,
}

impl Tap {
    /// Checks that it is what we need, and makes it non-blocking.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        // struct ifreq: the name, then a union that starts with the flags.
        let mut request = [0u8; 40];
        // SAFETY: the kernel writes a `struct ifreq`, which is 40 bytes long, to `request`.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETIFF as _, request.as_mut_ptr()) })?;
        let flags = u16::from_ne_bytes([request[16], request[17]]);
        let wanted = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        if flags & wanted != wanted {
            return Err(io::Error::other(format!(
                "the tap lacks IFF_TAP, IFF_NO_PI or IFF_VNET_HDR (flags {flags:#x})"
            )));
        }
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        Ok(Self { fd })
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Lets the kernel hand over what the driver accepted of checksum and segmentation offloads.
    pub fn set_offloads(&self, features: u64) -> io::Result<()> {
        let accepted = |feature: u32| features & 1 << feature != 0;
        let mut offloads = 0;
        // Segmentation builds on checksums: the kernel refuses one without the other.
        if accepted(VIRTIO_NET_F_GUEST_CSUM) {
            offloads |= TUN_F_CSUM;
            offloads |= if accepted(VIRTIO_NET_F_GUEST_TSO4) { TUN_F_TSO4 } else { 0 };
            offloads |= if accepted(VIRTIO_NET_F_GUEST_TSO6) { TUN_F_TSO6 } else { 0 };
            let segments = offloads & (TUN_F_TSO4 | TUN_F_TSO6) != 0;
            offloads |= if segments && accepted(VIRTIO_NET_F_GUEST_ECN) { TUN_F_TSO_ECN } else { 0 };
        }
        let header_bytes = HEADER_BYTES as libc::c_int;
        // SAFETY: the kernel reads an `int` from the pointer.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETVNETHDRSZ as _, &raw const header_bytes) })?;
        // SAFETY: this call takes a number, not a pointer.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETOFFLOAD as _, libc::c_ulong::from(offloads)) })
    }

    /// Reads a frame with its header.
    pub fn receive(&self, buffer: &mut [u8]) -> Transfer {
        loop {
            return match rustix::io::read(&self.fd, &mut *buffer) {
                Ok(len) => Transfer::Done(len),
                Err(Errno::INTR) => continue,
                Err(error) => error.into(),
            };
        }
    }

    /// Sends a frame with its header, directly from guest memory.
    pub fn send(&self, frame: &Cursor<'_>) -> Transfer {
        // One frame is one call: what the guest has cut into absurdly many pieces is dropped.
        let Ok(vectors) = frame.io_vectors() else { return Transfer::Dropped };
        if vectors.len_bytes() != frame.len() {
            return Transfer::Dropped;
        }
        match vectors.writev(self.as_fd()) {
            Ok(len) => Transfer::Done(len),
            Err(error) => Errno::from_io_error(&error).unwrap_or(Errno::IO).into(),
        }
    }
}

impl From<Errno> for Transfer {
    fn from(error: Errno) -> Self {
        match error {
            Errno::AGAIN => Self::WouldBlock,
            Errno::BADFD => Self::Gone,
            _ => Self::Dropped,
        }
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
