//! Tap devices, which rtnetlink can't make: `/dev/net/tun` and its ioctls.
//!
//! A tap of ours has `IFF_VNET_HDR` and root as its owner: a persistent tap without an owner could be
//! opened by anyone who may open `/dev/net/tun`, which is everybody on most hosts. It has one queue, and so
//! one holder, unless its NIC has several pairs.

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};

use crate::name::LinkName;

const HELD_PATIENCE: Duration = Duration::from_secs(2);
const HELD_RETRY: Duration = Duration::from_millis(5);
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
/// What `TUNGETIFF` adds for a tap that outlives its holders (linux/if_tun.h).
const IFF_PERSIST: libc::c_int = 0x0800;

fn flags(multi_queue: bool) -> libc::c_int {
    if multi_queue { FLAGS | libc::IFF_MULTI_QUEUE } else { FLAGS }
}

/// A tap that is not persistent yet: it goes when this value does.
#[derive(Debug)]
pub struct NewTap {
    fd: OwnedFd,
}

impl NewTap {
    /// Makes a tap under a name and an index that must both be free; else the error is `EBUSY`.
    pub fn create(name: &LinkName, index: u32, multi_queue: bool) -> io::Result<Self> {
        let fd = open_tun()?;
        let wanted = libc::c_int::try_from(index).map_err(io::Error::other)?;
        // SAFETY: TUNSETIFINDEX reads one int, which lives through the call.
        unsafe { ioctl(&fd, libc::TUNSETIFINDEX as _, (&raw const wanted).cast_mut().cast()) }?;
        set_interface(&fd, name, flags(multi_queue) | libc::IFF_TUN_EXCL)?;
        Ok(Self { fd })
    }

    /// From here on it outlives us. The mark must be on it.
    pub fn persist(self) -> io::Result<()> {
        // SAFETY: TUNSETOWNER takes a user id (0, root) by value.
        unsafe { ioctl(&self.fd, libc::TUNSETOWNER as _, std::ptr::null_mut()) }?;
        // SAFETY: TUNSETPERSIST takes a truth value by value.
        unsafe { ioctl(&self.fd, libc::TUNSETPERSIST as _, std::ptr::without_provenance_mut(1)) }
    }
}

/// Why a tap could not be taken hold of.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    #[error("there is no persistent tap of this name")]
    NotThere,
    #[error("another process holds it")]
    InUse,
    #[error("it was made for another number of queues")]
    Queues,
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Takes hold of an existing persistent tap, once for each queue pair. Never leaves a new one behind.
///
/// Waits for a moment if it is held: a process that ends gives it up last, and while another thread of
/// ours starts a VM, the child holds a copy of every descriptor (the one that made this tap, too)
/// between its fork and its exec.
pub fn attach(name: &LinkName, queue_pairs: u16) -> Result<Vec<OwnedFd>, AttachError> {
    let deadline = Instant::now() + HELD_PATIENCE;
    let attach_one = |_| loop {
        match try_attach(name, queue_pairs > 1) {
            Err(AttachError::InUse) if Instant::now() < deadline => std::thread::sleep(HELD_RETRY),
            result => return result,
        }
    };
    (0..queue_pairs.max(1)).map(attach_one).collect()
}

fn try_attach(name: &LinkName, multi_queue: bool) -> Result<OwnedFd, AttachError> {
    let fd = open_tun()?;
    set_interface(&fd, name, flags(multi_queue)).map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY) => AttachError::InUse,
        Some(libc::EINVAL) => AttachError::Queues,
        _ => AttachError::Io(error),
    })?;
    let mut request = interface_request(name);
    // SAFETY: TUNGETIFF writes an `ifreq`, which lives through the call.
    unsafe { ioctl(&fd, libc::TUNGETIFF as _, (&raw mut request).cast()) }?;
    // SAFETY: TUNGETIFF filled in the flags, and any bytes make a `c_short`.
    let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
    if flags & IFF_PERSIST == 0 {
        // There was none, so the kernel made one: it goes with its only descriptor.
        return Err(AttachError::NotThere);
    }
    Ok(fd)
}

/// Whether taps as we need them can be made.
pub fn probe() -> io::Result<()> {
    let fd = open_tun()?;
    let mut features: libc::c_uint = 0;
    // SAFETY: TUNGETFEATURES writes one unsigned int, which lives through the call.
    unsafe { ioctl(&fd, libc::TUNGETFEATURES as _, (&raw mut features).cast()) }?;
    if features & libc::IFF_VNET_HDR as libc::c_uint == 0 {
        return Err(io::Error::other("the kernel's taps know no virtio header (IFF_VNET_HDR)"));
    }
    Ok(())
}

fn open_tun() -> io::Result<OwnedFd> {
    Ok(rustix::fs::open("/dev/net/tun", OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK, Mode::empty())?)
}

fn interface_request(name: &LinkName) -> libc::ifreq {
    // SAFETY: all-zero bytes are a valid `ifreq`: integers, arrays of integers and a null pointer.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // A LinkName has at most 15 bytes, so the NUL after them stays.
    for (to, &from) in request.ifr_name.iter_mut().zip(name.as_str().as_bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn set_interface(fd: &OwnedFd, name: &LinkName, flags: libc::c_int) -> io::Result<()> {
    let mut request = interface_request(name);
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes an `ifreq`, which lives through the call.
    unsafe { ioctl(fd, libc::TUNSETIFF as _, (&raw mut request).cast()) }
}

/// # Safety
/// `argument` must be what `request` takes: a value, or a pointer to what it reads or writes.
unsafe fn ioctl(fd: &OwnedFd, request: libc::Ioctl, argument: *mut c_void) -> io::Result<()> {
    // SAFETY: the descriptor is open for the length of the borrow; the rest is the caller's promise.
    match unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), request, argument) } {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
