//! A file or block device of the host that holds an image, or a layer of one. Opened by someone else:
//! nothing here opens, closes, locks or knows a path.

use std::fmt::{self, Display, Formatter};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use imago::Storage;
use imago::io_buffers::{IoVector, IoVectorMut};
use imago::storage::PreallocateMode;
use imago::storage::drivers::CommonStorageHelper;
use rustix::fs::{FallocateFlags, FileType, SeekFrom, fallocate, fdatasync, fstat, ftruncate, seek};
use rustix::io::Errno;

use super::direct::{Direct, Entered};
use crate::vmm::device::buffers::{Cursor, IoVectors};

/// Zeroes are written in pieces of this size where the file system can't make them.
const ZERO_PIECE_BYTES: u64 = 64 * 1024;
/// A block device zeroes and discards whole blocks; this is a multiple of every common block size.
const BLOCK_DEVICE_ALIGN: usize = 4096;
/// Most I/O vectors that we pass to one system call.
const IOVECS_MAX: usize = 128;

#[derive(Debug)]
pub(super) struct HostFile {
    fd: OwnedFd,
    is_block_device: bool,
    size_bytes: AtomicU64,
    /// Where the page cache is passed by.
    direct: Option<Direct>,
    helper: CommonStorageHelper,
}

impl HostFile {
    pub fn new(fd: OwnedFd, direct: bool) -> io::Result<Self> {
        let is_block_device = match FileType::from_raw_mode(fstat(&fd)?.st_mode) {
            FileType::RegularFile => false,
            FileType::BlockDevice => true,
            other => return Err(io::Error::other(format!("neither a file nor a block device: {other:?}"))),
        };
        let direct = if direct { Some(Direct::enable(fd.as_fd())?) } else { None };
        let size_bytes = AtomicU64::new(0);
        let file = Self { fd, is_block_device, size_bytes, direct, helper: Default::default() };
        file.reload_size()?;
        Ok(file)
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// What offsets and lengths of the file must be multiples of.
    pub fn offset_align(&self) -> u64 {
        self.direct.as_ref().map_or(1, |direct| direct.offset_align as u64)
    }

    /// Whether the kernel takes these buffers for this place in the file as they are. Where it writes
    /// more than a sector at once, changing a part of that must keep others out, so that nothing but
    /// this file's own methods may write.
    pub fn takes(&self, vectors: &IoVectors<'_>, offset: u64) -> bool {
        self.direct.as_ref().is_none_or(|direct| {
            direct.writes_sectors()
                && direct.is_aligned(offset, vectors.len_bytes())
                && vectors.are_aligned(direct.memory_align)
        })
    }

    pub fn is_block_device(&self) -> bool {
        self.is_block_device
    }

    pub fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Relaxed)
    }

    /// Asks the host again: others may have grown it.
    pub fn reload_size(&self) -> io::Result<u64> {
        // A block device has no size in its inode. The file offset moves, but nobody uses it.
        let size = match self.is_block_device {
            true => seek(&self.fd, SeekFrom::End(0))?,
            false => fstat(&self.fd)?.st_size as u64,
        };
        self.size_bytes.store(size, Ordering::Relaxed);
        Ok(size)
    }

    /// Makes the file this long if it is shorter.
    pub fn grow(&self, size_bytes: u64) -> io::Result<()> {
        if self.reload_size()? < size_bytes {
            ftruncate(&self.fd, size_bytes)?;
            self.size_bytes.store(size_bytes, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Reads up to the end of the file; returns how much that was.
    pub fn read_available(&self, mut target: Cursor<'_>, mut offset: u64) -> io::Result<u64> {
        let mut total = 0;
        while target.len() > 0 {
            let vectors = target.io_vectors()?;
            let len = match &self.direct {
                Some(direct) if !fits(direct, &vectors, offset) => {
                    direct.read(self.fd(), offset, target.len(), |data| target.clone().write_all(data))?
                }
                _ => vectors.preadv(self.fd(), offset)? as u64,
            };
            if len == 0 {
                break;
            }
            target.skip(len);
            total += len;
            offset += len;
        }
        Ok(total)
    }

    /// Reads into memory of ours. Fails where the file ends before.
    pub fn read_exact(&self, mut data: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !data.is_empty() {
            let wanted = data.len() as u64;
            let len = match &self.direct {
                // The buffer may lie anywhere.
                Some(direct) => direct.read(self.fd(), offset, wanted, |read| {
                    data[..read.len()].copy_from_slice(read);
                    Ok(())
                })? as usize,
                None => match rustix::io::pread(&self.fd, &mut *data, offset) {
                    Err(Errno::INTR) => continue,
                    result => result?,
                },
            };
            if len == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            data = &mut data[len..];
            offset += len as u64;
        }
        Ok(())
    }

    pub fn write_all(&self, mut source: Cursor<'_>, mut offset: u64) -> io::Result<()> {
        let _entered = self.enter(offset, source.len());
        while source.len() > 0 {
            let vectors = source.io_vectors()?;
            let len = match &self.direct {
                Some(direct) if !fits(direct, &vectors, offset) => {
                    direct.write(self.fd(), offset, source.len(), |data| source.clone().read_exact(data))?
                }
                _ => vectors.pwritev(self.fd(), offset)? as u64,
            };
            if len == 0 {
                return Err(io::ErrorKind::WriteZero.into());
            }
            source.skip(len);
            offset += len;
            self.size_bytes.fetch_max(offset, Ordering::Relaxed);
        }
        Ok(())
    }

    pub fn sync_data(&self) -> io::Result<()> {
        Ok(fdatasync(&self.fd)?)
    }

    /// Frees the range; it reads as zeroes. Never grows the file.
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        retry(|| fallocate(&self.fd, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len))
    }

    /// A hint: where the file system can't, nothing happens.
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let (start, len) = self.whole_blocks(offset, len);
        if len == 0 {
            return Ok(());
        }
        match self.punch_hole(start, len) {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
            result => result,
        }
    }

    /// The range must lie within the file.
    pub fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        let (start, whole) = self.whole_blocks(offset, len);
        if whole == 0 {
            return self.write_plain_zeroes(offset, len);
        }
        let result = match may_unmap {
            true => self.punch_hole(start, whole),
            false => retry(|| {
                fallocate(&self.fd, FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, start, whole)
            }),
        };
        match result {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => self.write_plain_zeroes(offset, len),
            Err(error) => Err(error),
            Ok(()) => {
                self.write_plain_zeroes(offset, start - offset)?;
                self.write_plain_zeroes(start + whole, offset + len - start - whole)
            }
        }
    }

    /// What of a range can be zeroed without being written: its start and length, which may be nothing.
    /// Files take any, block devices only whole blocks.
    fn whole_blocks(&self, offset: u64, len: u64) -> (u64, u64) {
        if !self.is_block_device {
            return (offset, len);
        }
        let align = BLOCK_DEVICE_ALIGN as u64;
        let end = (offset + len) / align * align;
        let start = offset.next_multiple_of(align);
        (start, end.saturating_sub(start))
    }

    /// To be held while a range is written.
    fn enter(&self, offset: u64, len: u64) -> Entered<'_> {
        self.direct.as_ref().map_or(Entered::Free, |direct| direct.enter(offset, len))
    }

    fn write_plain_zeroes(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        if let Some(direct) = &self.direct {
            let _entered = direct.enter(offset, len);
            while len > 0 {
                // The buffer's part of a block that is read first is not zero.
                let zero = |data: &mut [u8]| {
                    data.fill(0);
                    Ok(())
                };
                let written = direct.write(self.fd(), offset, len, zero)?;
                offset += written;
                len -= written;
            }
            return Ok(());
        }
        let zeroes = vec![0; len.min(ZERO_PIECE_BYTES) as usize];
        while len > 0 {
            let piece = &zeroes[..len.min(ZERO_PIECE_BYTES) as usize];
            let written = match rustix::io::pwrite(&self.fd, piece, offset) {
                Err(Errno::INTR) => continue,
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                result => result? as u64,
            };
            offset += written;
            len -= written;
        }
        Ok(())
    }
}

fn fits(direct: &Direct, vectors: &IoVectors<'_>, offset: u64) -> bool {
    direct.is_aligned(offset, vectors.len_bytes()) && vectors.are_aligned(direct.memory_align)
}

/// Repeats an interrupted call, and names what the file system lacks by one kind of error.
fn retry(mut call: impl FnMut() -> rustix::io::Result<()>) -> io::Result<()> {
    loop {
        return match call() {
            Err(Errno::INTR) => continue,
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NODEV | Errno::NOTTY) => {
                Err(io::ErrorKind::Unsupported.into())
            }
            result => Ok(result?),
        };
    }
}

impl Display for HostFile {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        f.write_str(if self.is_block_device { "block device" } else { "file" })
    }
}

/// What imago's formats need of a file: for metadata, compressed clusters and copies on write.
impl Storage for HostFile {
    fn mem_align(&self) -> usize {
        self.direct.as_ref().map_or(1, |direct| direct.memory_align)
    }

    fn req_align(&self) -> usize {
        self.direct.as_ref().map_or(1, |direct| direct.offset_align)
    }

    fn zero_align(&self) -> usize {
        let align = if self.is_block_device { BLOCK_DEVICE_ALIGN } else { 1 };
        align.max(self.req_align())
    }

    fn discard_align(&self) -> usize {
        self.zero_align()
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.size_bytes())
    }

    unsafe fn pure_readv(&self, vectors: IoVectorMut<'_>, mut offset: u64) -> io::Result<()> {
        let mut vectors = vectors.into_inner();
        let mut rest = &mut vectors[..];
        while rest.iter().any(|vector| !vector.is_empty()) {
            let count = rest.len().min(IOVECS_MAX);
            let len = match rustix::io::preadv(&self.fd, &mut rest[..count], offset) {
                Err(Errno::INTR) => continue,
                result => result?,
            };
            io::IoSliceMut::advance_slices(&mut rest, len);
            offset += len as u64;
            if len == 0 || !offset.is_multiple_of(self.offset_align()) {
                // Past the end of the file everything is zero.
                rest.iter_mut().for_each(|vector| vector.fill(0));
                break;
            }
        }
        Ok(())
    }

    unsafe fn pure_writev(&self, vectors: IoVector<'_>, mut offset: u64) -> io::Result<()> {
        let mut vectors = vectors.into_inner();
        let mut rest = &mut vectors[..];
        while rest.iter().any(|vector| !vector.is_empty()) {
            let len = match rustix::io::pwritev(&self.fd, &rest[..rest.len().min(IOVECS_MAX)], offset) {
                Err(Errno::INTR) => continue,
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                result => result?,
            };
            io::IoSlice::advance_slices(&mut rest, len);
            offset += len as u64;
            self.size_bytes.fetch_max(offset, Ordering::Relaxed);
        }
        Ok(())
    }

    unsafe fn pure_write_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        let end = offset.checked_add(length).ok_or(io::ErrorKind::InvalidInput)?;
        self.punch_hole(offset, length)?;
        // Unlike discarding, this must grow the file.
        if end > self.size_bytes() { self.grow(end) } else { Ok(()) }
    }

    unsafe fn pure_write_allocated_zeroes(&self, offset: u64, length: u64) -> io::Result<()> {
        retry(|| fallocate(&self.fd, FallocateFlags::ZERO_RANGE, offset, length))?;
        self.size_bytes.fetch_max(offset.saturating_add(length), Ordering::Relaxed);
        Ok(())
    }

    unsafe fn pure_discard(&self, offset: u64, length: u64) -> io::Result<()> {
        self.discard(offset, length)
    }

    fn flush(&self) -> io::Result<()> {
        // Nothing is buffered here.
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }

    unsafe fn invalidate_cache(&self) -> io::Result<()> {
        Ok(())
    }

    fn get_storage_helper(&self) -> &CommonStorageHelper {
        &self.helper
    }

    fn resize(&self, new_size: u64, mode: PreallocateMode) -> io::Result<()> {
        match mode {
            // We never shrink an image.
            _ if new_size < self.size_bytes() => Err(io::ErrorKind::Unsupported.into()),
            PreallocateMode::None | PreallocateMode::Zero => self.grow(new_size),
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}
