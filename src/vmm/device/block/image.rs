//! A disk image as the block device sees it: a range of bytes that can be read, written, zeroed,
//! flushed and grown. Callers check bounds against [`Image::capacity_bytes`] first.

use std::io;
use std::os::fd::OwnedFd;

use super::host_file::HostFile;
use crate::vmm::device::buffers::Cursor;

pub(super) const SECTOR_BYTES: u64 = 512;

pub(super) trait Image: Send {
    /// A multiple of [`SECTOR_BYTES`]; what is left over at the end can't be reached.
    fn capacity_bytes(&self) -> u64;
    /// Whether discarding, and zeroing without writing, can do any good.
    fn can_discard(&self) -> bool;
    fn read(&mut self, target: Cursor<'_>, offset: u64) -> io::Result<()>;
    fn write(&mut self, source: Cursor<'_>, offset: u64) -> io::Result<()>;
    /// Everything written is on stable storage when it returns.
    fn flush(&mut self) -> io::Result<()>;
    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()>;
    fn write_zeroes(&mut self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()>;
    /// Grows to at least this capacity, which is no less than the present one.
    fn grow(&mut self, capacity_bytes: u64) -> io::Result<()>;
}

/// The file's bytes are the disk's bytes.
pub(super) struct RawImage {
    file: HostFile,
}

impl RawImage {
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        Ok(Self { file: HostFile::new(fd)? })
    }
}

impl Image for RawImage {
    fn capacity_bytes(&self) -> u64 {
        self.file.size_bytes() / SECTOR_BYTES * SECTOR_BYTES
    }

    fn can_discard(&self) -> bool {
        true
    }

    fn read(&mut self, target: Cursor<'_>, offset: u64) -> io::Result<()> {
        let wanted = target.len();
        match self.file.read_available(target, offset)? {
            got if got == wanted => Ok(()),
            // Someone cut the file short: the guest must not take that for zeroes.
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn write(&mut self, source: Cursor<'_>, offset: u64) -> io::Result<()> {
        self.file.write_all(source, offset)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.file.discard(offset, len)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        self.file.write_zeroes(offset, len, may_unmap)
    }

    fn grow(&mut self, capacity_bytes: u64) -> io::Result<()> {
        if !self.file.is_block_device() {
            return self.file.grow(capacity_bytes);
        }
        // A block device is grown by its owner; all we can do is look.
        match self.file.reload_size()? {
            size if size < capacity_bytes => {
                Err(io::Error::other(format!("the block device has only {size} bytes: grow it first")))
            }
            _ => Ok(()),
        }
    }
}
