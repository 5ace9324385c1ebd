//! vhost-net: a thread of the kernel moves the frames between the rings and the tap, and we but set it
//! up and take it down. It reads and writes guest memory through this process's mappings, by the
//! addresses that we translate, and checks each descriptor against the table of memory that we give it.
//!
//! Everything here runs on the NIC's own thread. (The crate `vhost` would open `/dev/vhost-net` by its
//! path, and this process opens nothing.)

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT;
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion as _};

use super::tap::Tap;
use crate::vmm::device::queue::VirtQueue;
use crate::vmm::memory::GuestMemory;

// <linux/vhost.h>
const VHOST_GET_FEATURES: u64 = ioctl(READ, 0x00, 8);
const VHOST_SET_FEATURES: u64 = ioctl(WRITE, 0x00, 8);
const VHOST_SET_OWNER: u64 = ioctl(0, 0x01, 0);
const VHOST_SET_MEM_TABLE: u64 = ioctl(WRITE, 0x03, 8);
const VHOST_SET_VRING_NUM: u64 = ioctl(WRITE, 0x10, size_of::<RingState>());
const VHOST_SET_VRING_ADDR: u64 = ioctl(WRITE, 0x11, size_of::<RingAddresses>());
const VHOST_SET_VRING_BASE: u64 = ioctl(WRITE, 0x12, size_of::<RingState>());
const VHOST_GET_VRING_BASE: u64 = ioctl(READ | WRITE, 0x12, size_of::<RingState>());
const VHOST_SET_VRING_KICK: u64 = ioctl(WRITE, 0x20, size_of::<RingFile>());
const VHOST_SET_VRING_CALL: u64 = ioctl(WRITE, 0x21, size_of::<RingFile>());
const VHOST_SET_VRING_ERR: u64 = ioctl(WRITE, 0x22, size_of::<RingFile>());
const VHOST_NET_SET_BACKEND: u64 = ioctl(WRITE, 0x30, size_of::<RingFile>());

pub(super) const IOCTLS: [u64; 12] = [
    VHOST_GET_FEATURES,
    VHOST_SET_FEATURES,
    VHOST_SET_OWNER,
    VHOST_SET_MEM_TABLE,
    VHOST_SET_VRING_NUM,
    VHOST_SET_VRING_ADDR,
    VHOST_SET_VRING_BASE,
    VHOST_GET_VRING_BASE,
    VHOST_SET_VRING_KICK,
    VHOST_SET_VRING_CALL,
    VHOST_SET_VRING_ERR,
    VHOST_NET_SET_BACKEND,
];

const WRITE: u64 = 1;
const READ: u64 = 2;

/// `_IOC` of the kernel's headers, of vhost's type.
const fn ioctl(direction: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | 0xaf << 8 | number
}

/// Of the negotiated features, those that vhost has a part in. The rest is the tap's, or ours.
const RING_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// `struct vhost_vring_state`
#[repr(C)]
struct RingState {
    index: u32,
    number: u32,
}

/// `struct vhost_vring_addr`, with addresses in this process.
#[repr(C)]
struct RingAddresses {
    index: u32,
    flags: u32,
    descriptors: u64,
    used: u64,
    available: u64,
    log: u64,
}

/// `struct vhost_vring_file`
#[repr(C)]
struct RingFile {
    index: u32,
    fd: i32,
}

/// `struct vhost_memory_region`
#[repr(C)]
struct MemoryRegion {
    guest_address: u64,
    bytes: u64,
    address: u64,
    padding: u64,
}

/// Most regions of guest memory that vhost takes with its default settings.
const REGIONS_MAX: usize = 64;

/// `struct vhost_memory`
#[repr(C)]
struct MemoryTable {
    count: u32,
    padding: u32,
    regions: [MemoryRegion; REGIONS_MAX],
}

/// What one ring needs beside its memory.
pub(super) struct Ring<'a> {
    pub queue: &'a VirtQueue,
    /// The kernel signals it when the driver is to be interrupted.
    pub call: BorrowedFd<'a>,
}

/// `/dev/vhost-net`, opened by someone else: one queue pair.
pub(super) struct Vhost {
    fd: OwnedFd,
    /// Has a kernel thread, which works on this process's memory.
    owned: bool,
}

impl Vhost {
    pub fn new(fd: OwnedFd) -> Self {
        Self { fd, owned: false }
    }

    /// Lets the kernel move the frames of this pair from now on. On an error it moves none.
    ///
    /// `error` is signalled when the driver broke a ring.
    pub fn start(
        &mut self,
        memory: &GuestMemory,
        features: u64,
        rings: [Ring<'_>; 2],
        error: BorrowedFd<'_>,
        tap: &Tap,
    ) -> io::Result<()> {
        self.set_up(memory, features)?;
        for (index, ring) in rings.iter().enumerate() {
            self.set_ring(index as u32, ring, error, memory)?;
        }
        self.set_backend(Some(tap)).inspect_err(|_| {
            // Where the first ring has it already.
            let _ = self.set_backend(None);
        })?;
        // What the driver announced before the kernel listened is looked for now.
        for ring in rings {
            ring.queue.kick();
        }
        Ok(())
    }

    /// When it returns the kernel touches neither rings nor buffers. Gives how far it came in the
    /// available rings.
    pub fn stop(&self) -> io::Result<[u16; 2]> {
        self.set_backend(None)?;
        let base = |index| {
            // Else the kernel's thread would go on to wake with each notification.
            self.set_file(VHOST_SET_VRING_KICK, index, -1)?;
            let mut state = RingState { index, number: 0 };
            // SAFETY: the kernel reads and writes a `struct vhost_vring_state`.
            unsafe { self.ioctl(VHOST_GET_VRING_BASE, (&raw mut state).cast()) }?;
            // The upper half is of packed rings.
            Ok::<_, io::Error>(state.number as u16)
        };
        Ok([base(0)?, base(1)?])
    }

    /// The rings stay; frames go through this tap from now on, or through none. On an error the
    /// second ring may be with another tap than the first.
    pub fn set_backend(&self, tap: Option<&Tap>) -> io::Result<()> {
        use std::os::fd::AsFd as _;
        let fd = tap.map_or(-1, |tap| tap.as_fd().as_raw_fd());
        (0..2).try_for_each(|index| self.set_file(VHOST_NET_SET_BACKEND, index, fd))
    }

    fn set_up(&mut self, memory: &GuestMemory, features: u64) -> io::Result<()> {
        if !self.owned {
            // SAFETY: takes no argument.
            unsafe { self.ioctl(VHOST_SET_OWNER, std::ptr::null_mut()) }?;
            self.owned = true;
        }
        let wanted = features & RING_FEATURES;
        let mut known = 0u64;
        // SAFETY: the kernel writes a `u64`.
        unsafe { self.ioctl(VHOST_GET_FEATURES, (&raw mut known).cast()) }?;
        if wanted & !known != 0 {
            let missing = wanted & !known;
            return Err(io::Error::other(format!("this kernel's vhost lacks the features {missing:#x}")));
        }
        // SAFETY: the kernel reads a `u64`.
        unsafe { self.ioctl(VHOST_SET_FEATURES, (&raw const wanted).cast_mut().cast()) }?;
        let table = memory_table(memory)?;
        // SAFETY: the kernel reads a `struct vhost_memory` and as many regions as that counts. What it
        // does with the memory that they name is what a guest's devices may do: the mappings are guest
        // memory, stay for the process's life, and Rust has no references to them.
        unsafe { self.ioctl(VHOST_SET_MEM_TABLE, (&raw const *table).cast_mut().cast()) }
    }

    fn set_ring(
        &self,
        index: u32,
        ring: &Ring<'_>,
        error: BorrowedFd<'_>,
        memory: &GuestMemory,
    ) -> io::Result<()> {
        let queue = ring.queue.rings();
        let size = u64::from(queue.size());
        // Headers and event indexes included (virtio 1.2, section 2.7).
        let host_address = |address, bytes: u64| host_address(memory, address, bytes);
        let addresses = RingAddresses {
            index,
            flags: 0,
            descriptors: host_address(queue.desc_table(), 16 * size)?,
            used: host_address(queue.used_ring(), 6 + 8 * size)?,
            available: host_address(queue.avail_ring(), 6 + 2 * size)?,
            log: 0,
        };
        let number = RingState { index, number: queue.size().into() };
        let base = RingState { index, number: queue.next_avail().into() };
        // SAFETY: the kernel reads the structures that these requests take.
        unsafe {
            self.ioctl(VHOST_SET_VRING_NUM, (&raw const number).cast_mut().cast())?;
            self.ioctl(VHOST_SET_VRING_BASE, (&raw const base).cast_mut().cast())?;
            self.ioctl(VHOST_SET_VRING_ADDR, (&raw const addresses).cast_mut().cast())?;
        }
        self.set_file(VHOST_SET_VRING_CALL, index, ring.call.as_raw_fd())?;
        self.set_file(VHOST_SET_VRING_ERR, index, error.as_raw_fd())?;
        self.set_file(VHOST_SET_VRING_KICK, index, ring.queue.kick_fd().as_raw_fd())
    }

    fn set_file(&self, request: u64, index: u32, fd: i32) -> io::Result<()> {
        let file = RingFile { index, fd };
        // SAFETY: the kernel reads a `struct vhost_vring_file`, and takes its own hold of the file.
        unsafe { self.ioctl(request, (&raw const file).cast_mut().cast()) }
    }

    /// # Safety
    /// `argument` must be what `request` takes.
    unsafe fn ioctl(&self, request: u64, argument: *mut libc::c_void) -> io::Result<()> {
        // SAFETY: the descriptor is open; the rest is the caller's promise.
        match unsafe { libc::ioctl(self.fd.as_raw_fd(), request as _, argument) } {
            0.. => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

fn memory_table(memory: &GuestMemory) -> io::Result<Box<MemoryTable>> {
    let regions =
        [const { MemoryRegion { guest_address: 0, bytes: 0, address: 0, padding: 0 } }; REGIONS_MAX];
    let mut table = Box::new(MemoryTable { count: 0, padding: 0, regions });
    for region in memory.iter() {
        let slot = table.regions.get_mut(table.count as usize);
        let slot = slot.ok_or_else(|| io::Error::other("more regions of memory than vhost takes"))?;
        slot.guest_address = region.start_addr().0;
        slot.bytes = region.len();
        slot.address = region.as_ptr() as u64;
        table.count += 1;
    }
    Ok(table)
}

/// Where a part of a ring lies in this process. It must lie in one region: neighbours in the guest's
/// address space need not be neighbours in ours.
fn host_address(memory: &GuestMemory, address: u64, bytes: u64) -> io::Result<u64> {
    let slice = memory.get_slice(GuestAddress(address), bytes as usize);
    let slice = slice.map_err(|error| io::Error::other(format!("a ring at {address:#x}: {error}")))?;
    Ok(slice.ptr_guard().as_ptr() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_the_kernels() {
        assert_eq!(VHOST_GET_FEATURES, 0x8008_af00);
        assert_eq!(VHOST_SET_FEATURES, 0x4008_af00);
        assert_eq!(VHOST_SET_OWNER, 0xaf01);
        assert_eq!(VHOST_SET_MEM_TABLE, 0x4008_af03);
        assert_eq!(VHOST_SET_VRING_NUM, 0x4008_af10);
        assert_eq!(VHOST_SET_VRING_ADDR, 0x4028_af11);
        assert_eq!(VHOST_SET_VRING_BASE, 0x4008_af12);
        assert_eq!(VHOST_GET_VRING_BASE, 0xc008_af12);
        assert_eq!(VHOST_SET_VRING_KICK, 0x4008_af20);
        assert_eq!(VHOST_SET_VRING_CALL, 0x4008_af21);
        assert_eq!(VHOST_SET_VRING_ERR, 0x4008_af22);
        assert_eq!(VHOST_NET_SET_BACKEND, 0x4008_af30);
    }

    #[test]
    fn rings_across_a_hole_are_refused() {
        let memory = crate::vmm::device::testing::memory();
        use crate::vmm::device::testing::LOW_BYTES;
        assert!(host_address(&memory, 0x1000, 4096).is_ok());
        assert!(host_address(&memory, LOW_BYTES - 4096, 4096).is_ok());
        assert!(host_address(&memory, LOW_BYTES - 4096, 4097).is_err());
        assert!(host_address(&memory, u64::MAX, 2).is_err());
        let table = memory_table(&memory).unwrap();
        assert_eq!(table.count, 2);
        assert_eq!(table.regions[0].bytes, LOW_BYTES);
    }
}
