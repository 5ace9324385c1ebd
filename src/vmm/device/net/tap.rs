//! A tap, opened and attached by someone else, as a source and a sink of frames. Each frame is
//! preceded by a [`HEADER_BYTES`] long `struct virtio_net_hdr_v1`, which the kernel understands.
//!
//! A tap with several queues has a descriptor for each. Offloads, header and carrier are of the
//! interface, whichever descriptor they are set through.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::Errno;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
};

use crate::vmm::device::buffers::{Cursor, IoVectors};

/// `struct virtio_net_hdr_v1`: with the number of buffers at its end.
pub(super) const HEADER_BYTES: usize = 12;
/// The longest frame that the kernel makes (64 KiB of IP, an Ethernet header with a VLAN tag), with
/// its header.
pub(super) const FRAME_BYTES_MAX: usize = HEADER_BYTES + 65535 + 18;

// <linux/if_tun.h>
pub(super) const TUNSETOFFLOAD: u64 = 0x4004_54d0;
pub(super) const TUNGETIFF: u64 = 0x8004_54d2;
pub(super) const TUNSETVNETHDRSZ: u64 = 0x4004_54d8;
pub(super) const TUNSETQUEUE: u64 = 0x4004_54d9;
pub(super) const TUNSETCARRIER: u64 = 0x4004_54e2;
const TUN_F_CSUM: u32 = 1;
const TUN_F_TSO4: u32 = 2;
const TUN_F_TSO6: u32 = 4;
const TUN_F_TSO_ECN: u32 = 8;
const IFF_TAP: u16 = 0x0002;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_ATTACH_QUEUE: u16 = 0x0200;
const IFF_DETACH_QUEUE: u16 = 0x0400;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// Most frames that lie in a tap unread: its queue's length, which somebody may have raised.
const STALE_FRAMES_MAX: usize = 4096;

/// `struct ifreq`: the name, then a union that starts with the flags.
type InterfaceRequest = [u8; 40];
const FLAGS_AT: std::ops::Range<usize> = 16..18;

/// What became of a frame.
#[derive(Debug)]
pub(super) enum Transfer {
    Done(usize),
    /// Nothing to read, or no room to write, for now.
    WouldBlock,
    /// The frame is lost, but the tap may recover (it is down, say).
    Dropped,
    /// The tap was deleted. This descriptor will never work again.
    Gone,
}

/// One queue of a tap.
pub(super) struct Tap {
    fd: OwnedFd,
}

impl Tap {
    /// Checks that it is what we need, and makes it non-blocking.
    pub fn new(fd: OwnedFd, multi_queue: bool) -> io::Result<Self> {
        let mut request: InterfaceRequest = [0; 40];
        // SAFETY: the kernel writes a `struct ifreq`, which is 40 bytes long, to `request`.
        check(unsafe { libc::ioctl(fd.as_raw_fd(), TUNGETIFF as _, request.as_mut_ptr()) })?;
        let flags = u16::from_ne_bytes([request[FLAGS_AT.start], request[FLAGS_AT.start + 1]]);
        let wanted = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        if flags & wanted != wanted {
            return Err(io::Error::other(format!(
                "the tap lacks IFF_TAP, IFF_NO_PI or IFF_VNET_HDR (flags {flags:#x})"
            )));
        }
        if multi_queue && flags & IFF_MULTI_QUEUE == 0 {
            return Err(io::Error::other(format!("the tap has but one queue (flags {flags:#x})")));
        }
        fcntl_setfl(&fd, fcntl_getfl(&fd)? | OFlags::NONBLOCK)?;
        Ok(Self { fd })
    }

    /// Lets the kernel hand over what the driver accepted of checksum and segmentation offloads.
    pub fn set_offloads(&self, features: u64) -> io::Result<()> {
        let header_bytes = HEADER_BYTES as libc::c_int;
        // SAFETY: the kernel reads an `int` from the pointer.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETVNETHDRSZ as _, &raw const header_bytes) })?;
        let offloads = libc::c_ulong::from(offloads(features));
        // SAFETY: this call takes a number, not a pointer.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETOFFLOAD as _, offloads) })
    }

    /// Whether the kernel spreads frames to this queue of several.
    pub fn set_attached(&self, attached: bool) -> io::Result<()> {
        let mut request: InterfaceRequest = [0; 40];
        let flags = if attached { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
        request[FLAGS_AT].copy_from_slice(&flags.to_ne_bytes());
        // SAFETY: the kernel reads a `struct ifreq`, which is 40 bytes long.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETQUEUE as _, request.as_ptr()) })
    }

    /// Whether the host sees a carrier on the interface: without one it sends nothing there.
    pub fn set_carrier(&self, carrier: bool) -> io::Result<()> {
        let carrier = libc::c_int::from(carrier);
        // SAFETY: the kernel reads an `int` from the pointer.
        check(unsafe { libc::ioctl(self.fd.as_raw_fd(), TUNSETCARRIER as _, &raw const carrier) })
    }

    /// Throws away what lies unread, into `scratch`.
    pub fn discard_stale(&self, scratch: &mut [u8]) {
        for _ in 0..STALE_FRAMES_MAX {
            match rustix::io::read(&self.fd, &mut *scratch) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }

    /// Reads a frame with its header: as much as fits into guest memory, and what doesn't to `rest`.
    pub fn receive(&self, vectors: IoVectors<'_>, rest: &mut [u8]) -> Transfer {
        match vectors.readv_and_rest(self.fd.as_fd(), rest) {
            Ok(len) => Transfer::Done(len),
            Err(error) => Errno::from_io_error(&error).unwrap_or(Errno::IO).into(),
        }
    }

    /// Sends a frame with its header, directly from guest memory.
    pub fn send(&self, frame: &Cursor<'_>) -> Transfer {
        // One frame is one call: what the guest has cut into absurdly many pieces is dropped.
        let Ok(vectors) = frame.io_vectors() else { return Transfer::Dropped };
        if vectors.len_bytes() != frame.len() {
            return Transfer::Dropped;
        }
        match vectors.writev(self.fd.as_fd()) {
            Ok(len) => Transfer::Done(len),
            Err(error) => Errno::from_io_error(&error).unwrap_or(Errno::IO).into(),
        }
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn offloads(features: u64) -> u32 {
    let accepted = |feature: u32| features & 1 << feature != 0;
    // Segmentation builds on checksums: the kernel refuses one without the other.
    if !accepted(VIRTIO_NET_F_GUEST_CSUM) {
        return 0;
    }
    let mut offloads = TUN_F_CSUM;
    offloads |= if accepted(VIRTIO_NET_F_GUEST_TSO4) { TUN_F_TSO4 } else { 0 };
    offloads |= if accepted(VIRTIO_NET_F_GUEST_TSO6) { TUN_F_TSO6 } else { 0 };
    let segments = offloads & (TUN_F_TSO4 | TUN_F_TSO6) != 0;
    offloads | if segments && accepted(VIRTIO_NET_F_GUEST_ECN) { TUN_F_TSO_ECN } else { 0 }
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
