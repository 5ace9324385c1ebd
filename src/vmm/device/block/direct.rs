//! I/O past the host's page cache (O_DIRECT): what the file system demands of offsets, lengths and
//! buffers, and how to serve what doesn't fit.
//!
//! A guest's buffer that lies badly is copied through one that lies well. A guest's sectors that are
//! smaller than what the file system writes at once are put into the block around them: read, changed
//! and written back while nobody else writes to the file.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use rustix::fs::{AtFlags, OFlags, StatxFlags, fcntl_getfl, fcntl_setfl, statx};
use rustix::io::Errno;

use super::image::SECTOR_BYTES;

/// Where the kernel doesn't say (before Linux 6.1): what no file system exceeds in practice.
const ALIGN_UNKNOWN: usize = 4096;
/// Most bytes that are copied at once.
const BOUNCE_BYTES: usize = 256 * 1024;

#[derive(Debug)]
pub(super) struct Direct {
    /// Of buffers' addresses.
    pub memory_align: usize,
    /// Of offsets and lengths. A power of two, at least [`SECTOR_BYTES`].
    pub offset_align: usize,
    /// Taken exclusively to change a part of a block.
    gate: RwLock<()>,
}

/// Whether something must be kept out while it lasts.
#[derive(Debug)]
pub(super) enum Entered<'a> {
    Free,
    Shared(#[expect(dead_code, reason = "held for its drop")] RwLockReadGuard<'a, ()>),
    Alone(#[expect(dead_code, reason = "held for its drop")] RwLockWriteGuard<'a, ()>),
}

impl Direct {
    /// Turns the page cache off for this open file.
    pub fn enable(fd: BorrowedFd<'_>) -> io::Result<Self> {
        fcntl_setfl(fd, fcntl_getfl(fd)? | OFlags::DIRECT).map_err(|errno| match errno {
            Errno::INVAL => io::Error::new(
                io::ErrorKind::Unsupported,
                "its file system has no direct I/O (O_DIRECT): choose another cache mode",
            ),
            errno => errno.into(),
        })?;
        let (memory_align, offset_align) = match statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN) {
            Ok(stat) if stat.stx_dio_offset_align > 0 => {
                (stat.stx_dio_mem_align as usize, stat.stx_dio_offset_align as usize)
            }
            _ => (ALIGN_UNKNOWN, ALIGN_UNKNOWN),
        };
        // Sectors are what a guest can address anyway.
        let offset_align = offset_align.max(SECTOR_BYTES as usize);
        Ok(Self { memory_align: memory_align.max(1), offset_align, gate: RwLock::new(()) })
    }

    /// Whether every request of whole sectors is one of whole blocks.
    pub fn writes_sectors(&self) -> bool {
        self.offset_align as u64 <= SECTOR_BYTES
    }

    pub fn is_aligned(&self, offset: u64, len: u64) -> bool {
        (offset | len).is_multiple_of(self.offset_align as u64)
    }

    /// To be held while this range is written.
    pub fn enter(&self, offset: u64, len: u64) -> Entered<'_> {
        if self.writes_sectors() {
            Entered::Free
        } else if self.is_aligned(offset, len) {
            Entered::Shared(self.gate.read().unwrap_or_else(PoisonError::into_inner))
        } else {
            Entered::Alone(self.gate.write().unwrap_or_else(PoisonError::into_inner))
        }
    }

    /// The blocks around the start of a range, as many as are copied at once: their offset, their
    /// length, where the range begins in them and how much of it they hold.
    fn blocks(&self, offset: u64, len: u64) -> (u64, usize, usize, usize) {
        let before = offset % self.offset_align as u64;
        let wanted = (before + len).min(BOUNCE_BYTES as u64) as usize;
        let before = before as usize;
        (offset - before as u64, wanted.next_multiple_of(self.offset_align), before, wanted - before)
    }

    /// Reads from the start of a range, and gives what was read to `take`; how much that was, which is
    /// nothing at the end of the file.
    pub fn read(
        &self,
        fd: BorrowedFd<'_>,
        offset: u64,
        len: u64,
        take: impl FnOnce(&[u8]) -> io::Result<()>,
    ) -> io::Result<u64> {
        let (start, block_len, before, wanted) = self.blocks(offset, len);
        let mut buffer = AlignedBuffer::new(block_len, self.memory_align);
        let got = read_up_to(fd, buffer.bytes(), start)?;
        let got = got.saturating_sub(before).min(wanted);
        take(&buffer.bytes()[before..before + got])?;
        Ok(got as u64)
    }

    /// Writes the start of a range with what `give` puts into the buffer; how much that was. The caller
    /// has entered.
    pub fn write(
        &self,
        fd: BorrowedFd<'_>,
        offset: u64,
        len: u64,
        give: impl FnOnce(&mut [u8]) -> io::Result<()>,
    ) -> io::Result<u64> {
        let (start, block_len, before, wanted) = self.blocks(offset, len);
        let mut buffer = AlignedBuffer::new(block_len, self.memory_align);
        if before != 0 || wanted + before != block_len {
            // What lies beyond the end of the file is zero, as the buffer is.
            read_up_to(fd, buffer.bytes(), start)?;
        }
        give(&mut buffer.bytes()[before..before + wanted])?;
        let mut written = 0;
        while written < block_len {
            match rustix::io::pwrite(fd, &buffer.bytes()[written..], start + written as u64) {
                Err(Errno::INTR) => {}
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                result => written += result?,
            }
        }
        Ok(wanted as u64)
    }
}

/// Reads to the end of the buffer or the file.
fn read_up_to(fd: BorrowedFd<'_>, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    loop {
        match rustix::io::pread(fd.as_fd(), &mut *buffer, offset) {
            Err(Errno::INTR) => {}
            // Direct I/O on files is short at the end of the file alone.
            result => return Ok(result?),
        }
    }
}

/// Zeroed bytes at a multiple of some power of two.
struct AlignedBuffer {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl AlignedBuffer {
    fn new(len: usize, align: usize) -> Self {
        let bytes = vec![0; len + align];
        let start = bytes.as_ptr().align_offset(align);
        Self { bytes, start, len }
    }

    fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}
