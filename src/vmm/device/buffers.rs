//! The guest's buffers of one request: descriptors read once, bounded, and turned into I/O vectors
//! over guest memory.
//!
//! A descriptor may change under our hands, so nothing is read from a chain twice: [`Buffers`] copies
//! addresses and lengths, and everything after works on the copy.

use std::io;
use std::marker::PhantomData;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd};

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, Permissions};

use crate::vmm::memory::GuestMemory;

/// Most descriptors of a chain, those of an indirect table included.
pub(super) const SEGMENTS_MAX: usize = 256;
/// Most I/O vectors of one system call: a descriptor makes two only where it crosses a hole in the
/// guest's address space.
const IOVECS_MAX: usize = SEGMENTS_MAX + 8;

/// The chain makes no sense: too long, or readable buffers after writable ones.
#[derive(Debug)]
pub(super) struct Malformed;

#[derive(Clone, Copy)]
struct Segment {
    address: GuestAddress,
    len: usize,
}

/// The buffers of one chain. Reused from request to request, so that few allocate; they grow to what is
/// needed, for a device may have many of them.
pub(super) struct Buffers {
    readable: Vec<Segment>,
    writable: Vec<Segment>,
}

impl Buffers {
    pub fn new() -> Self {
        Self { readable: Vec::new(), writable: Vec::new() }
    }

    pub fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
    }

    pub fn load(&mut self, chain: DescriptorChain<&GuestMemory>) -> Result<(), Malformed> {
        self.clear();
        self.append(chain)
    }

    /// Adds another chain's buffers; used for packets that span several.
    pub fn append(&mut self, chain: DescriptorChain<&GuestMemory>) -> Result<(), Malformed> {
        let own = self.writable.len();
        for descriptor in chain {
            if self.readable.len() + self.writable.len() == SEGMENTS_MAX {
                return Err(Malformed);
            }
            let segment = Segment { address: descriptor.addr(), len: descriptor.len() as usize };
            if descriptor.is_write_only() {
                self.writable.push(segment);
            } else if self.writable.len() > own {
                return Err(Malformed);
            } else {
                self.readable.push(segment);
            }
        }
        Ok(())
    }

    /// Adds the buffers of a chain that the device only writes to, all of them in guest memory; gives
    /// their length. On an error nothing is added.
    pub fn append_writable(
        &mut self,
        chain: DescriptorChain<&GuestMemory>,
        memory: &GuestMemory,
    ) -> Result<u64, Malformed> {
        let (readable, writable) = (self.readable.len(), self.writable.len());
        let result = self.append(chain).and_then(|()| {
            let added = &self.writable[writable..];
            let backed = added.iter().all(|segment| {
                segment.len == 0 || memory.check_range(segment.address, segment.len, Permissions::ReadWrite)
            });
            if !backed || self.readable.len() > readable {
                return Err(Malformed);
            }
            Ok(added.iter().map(|segment| segment.len as u64).sum())
        });
        if result.is_err() {
            self.readable.truncate(readable);
            self.writable.truncate(writable);
        }
        result
    }

    pub fn readable<'a>(&'a self, memory: &'a GuestMemory) -> Cursor<'a> {
        Cursor::new(memory, &self.readable)
    }

    pub fn writable<'a>(&'a self, memory: &'a GuestMemory) -> Cursor<'a> {
        Cursor::new(memory, &self.writable)
    }
}

/// A place in a list of segments, with what is left of it.
#[derive(Clone)]
pub(super) struct Cursor<'a> {
    memory: &'a GuestMemory,
    segments: &'a [Segment],
    /// Into the first segment.
    offset: usize,
    left: u64,
}

impl<'a> Cursor<'a> {
    fn new(memory: &'a GuestMemory, segments: &'a [Segment]) -> Self {
        // No overflow: at most 256 lengths of 32 bits.
        let left = segments.iter().map(|segment| segment.len as u64).sum();
        Self { memory, segments, offset: 0, left }
    }

    pub fn len(&self) -> u64 {
        self.left
    }

    /// The first `len` bytes of what is left, or all of it where that is less.
    pub fn prefix(&self, len: u64) -> Self {
        Self { left: self.left.min(len), ..self.clone() }
    }

    pub fn skip(&mut self, len: u64) {
        let mut len = len.min(self.left);
        self.left -= len;
        while let Some(segment) = self.segments.first() {
            let here = (segment.len - self.offset) as u64;
            if len < here {
                self.offset += len as usize;
                return;
            }
            len -= here;
            self.segments = &self.segments[1..];
            self.offset = 0;
        }
    }

    /// The contiguous (guest-physical) piece at the cursor.
    fn piece(&self) -> Option<(GuestAddress, usize)> {
        let mut segments = self.segments.iter();
        let mut offset = self.offset;
        // Empty descriptors are legal; step over them.
        let segment = segments.find(|segment| {
            let some = segment.len > offset;
            if !some {
                offset = 0;
            }
            some
        })?;
        let len = ((segment.len - offset) as u64).min(self.left) as usize;
        let address = GuestAddress(segment.address.0.checked_add(offset as u64)?);
        (len > 0).then_some((address, len))
    }

    /// Copies from the guest. Fails when there is less, or where the guest has no memory.
    pub fn read_exact(&mut self, mut data: &mut [u8]) -> io::Result<()> {
        while !data.is_empty() {
            let (address, len) = self.piece().ok_or(io::ErrorKind::UnexpectedEof)?;
            let (now, rest) = data.split_at_mut(len.min(data.len()));
            self.memory.read_slice(now, address).map_err(bad_address)?;
            self.skip(now.len() as u64);
            data = rest;
        }
        Ok(())
    }

    /// Copies to the guest. Fails when there is less room, or where the guest has no memory.
    pub fn write_all(&mut self, mut data: &[u8]) -> io::Result<()> {
        while !data.is_empty() {
            let (address, len) = self.piece().ok_or(io::ErrorKind::UnexpectedEof)?;
            let (now, rest) = data.split_at(len.min(data.len()));
            self.memory.write_slice(now, address).map_err(bad_address)?;
            self.skip(now.len() as u64);
            data = rest;
        }
        Ok(())
    }

    /// Writes zeroes to all that is left.
    pub fn fill_zero(&mut self) -> io::Result<()> {
        const ZEROES: [u8; 4096] = [0; 4096];
        while self.left > 0 {
            let len = self.left.min(ZEROES.len() as u64);
            self.write_all(&ZEROES[..len as usize])?;
        }
        Ok(())
    }

    /// As many I/O vectors over what is left as fit into one system call. Fails where the guest has
    /// no memory.
    pub fn io_vectors(&self) -> io::Result<IoVectors<'a>> {
        let mut vectors = IoVectors::default();
        let mut cursor = self.clone();
        'segments: while let Some((address, len)) = cursor.piece() {
            let slices = self.memory.get_slices(address, len, Permissions::ReadWrite).map_err(bad_address)?;
            for slice in slices {
                let slice = slice.map_err(bad_address)?;
                if vectors.count == IOVECS_MAX {
                    break 'segments;
                }
                vectors.push(slice.ptr_guard_mut().as_ptr(), slice.len());
            }
            cursor.skip(len as u64);
        }
        Ok(vectors)
    }
}

fn bad_address(error: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error.to_string())
}

/// I/O vectors over guest memory, for the kernel alone to read and write: the guest may change the
/// bytes at any time, so Rust must never see a reference to them.
pub(super) struct IoVectors<'m> {
    /// The first `count` are set. The rest isn't even zeroed: this is made for each frame of a NIC.
    vectors: [MaybeUninit<libc::iovec>; IOVECS_MAX + 1],
    count: usize,
    len_bytes: u64,
    memory: PhantomData<&'m GuestMemory>,
}

impl Default for IoVectors<'_> {
    fn default() -> Self {
        let vectors = [const { MaybeUninit::uninit() }; IOVECS_MAX + 1];
        Self { vectors, count: 0, len_bytes: 0, memory: PhantomData }
    }
}

impl IoVectors<'_> {
    pub fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn push(&mut self, base: *mut u8, len: usize) {
        self.vectors[self.count].write(libc::iovec { iov_base: base.cast(), iov_len: len });
        self.count += 1;
        self.len_bytes += len as u64;
    }

    fn as_ptr(&self) -> *const libc::iovec {
        self.vectors.as_ptr().cast()
    }

    /// For who hands them to the kernel by other means, and sees to it that guest memory outlives that.
    pub fn as_slice(&self) -> &[libc::iovec] {
        // SAFETY: `push` has set the first `count`, and nothing unsets them.
        unsafe { std::slice::from_raw_parts(self.as_ptr(), self.count) }
    }

    /// Whether each lies and ends at a multiple of `align`.
    pub fn are_aligned(&self, align: usize) -> bool {
        self.as_slice().iter().all(|vector| (vector.iov_base as usize | vector.iov_len).is_multiple_of(align))
    }

    fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
        loop {
            if let Ok(len) = usize::try_from(call()) {
                return Ok(len);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    pub fn preadv(&self, fd: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let (vectors, count, offset) = (self.as_ptr(), self.count as i32, to_offset(offset)?);
        // SAFETY: the first `count` vectors lie in guest memory, which is mapped for `'m` and which
        // only volatile accesses and the kernel touch.
        Self::retry(|| unsafe { libc::preadv(fd.as_raw_fd(), vectors, count, offset) })
    }

    pub fn pwritev(&self, fd: BorrowedFd<'_>, offset: u64) -> io::Result<usize> {
        let (vectors, count, offset) = (self.as_ptr(), self.count as i32, to_offset(offset)?);
        // SAFETY: as for `preadv`.
        Self::retry(|| unsafe { libc::pwritev(fd.as_raw_fd(), vectors, count, offset) })
    }

    pub fn readv(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: as for `preadv`.
        Self::retry(|| unsafe { libc::readv(fd.as_raw_fd(), self.as_ptr(), self.count as i32) })
    }

    pub fn writev(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: as for `preadv`.
        Self::retry(|| unsafe { libc::writev(fd.as_raw_fd(), self.as_ptr(), self.count as i32) })
    }

    /// Reads into the vectors, and what doesn't fit into them to `rest`.
    pub fn readv_and_rest(mut self, fd: BorrowedFd<'_>, rest: &mut [u8]) -> io::Result<usize> {
        // There is a place for it beyond those of the guest's buffers.
        self.push(rest.as_mut_ptr(), rest.len());
        // SAFETY: as for `preadv`; the last vector is `rest`, which is borrowed until the call returns.
        Self::retry(|| unsafe { libc::readv(fd.as_raw_fd(), self.as_ptr(), self.count as i32) })
    }
}

fn to_offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))
}
