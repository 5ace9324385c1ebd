//! A disk image as the block device sees it: a range of bytes that can be read, written, zeroed,
//! flushed and grown, by several threads at once. Callers check bounds against [`Image::capacity_bytes`] first.

use std::io;
use std::os::fd::OwnedFd;

use super::host_file::HostFile;
use crate::vmm::device::buffers::Cursor;

pub(super) const SECTOR_BYTES: u64 = 512;

pub(super) trait Image: Send + Sync {
    /// A multiple of [`SECTOR_BYTES`]; what is left over at the end can't be reached.
    fn capacity_bytes(&self) -> u64;
    /// Whether discarding, and zeroing without writing, can do any good.
    fn can_discard(&self) -> bool;
    fn read(&self, target: Cursor<'_>, offset: u64) -> io::Result<()>;
    /// Reads into memory of ours: a boot from the disk looks for its kernel.
    fn read_to(&self, data: &mut [u8], offset: u64) -> io::Result<()>;
    fn write(&self, source: Cursor<'_>, offset: u64) -> io::Result<()>;
    /// What is kept in memory of the image's own tables goes to the file.
    fn write_back(&self) -> io::Result<()>;
    /// Everything written to the file, and written back, is on stable storage when it returns.
    fn sync(&self) -> io::Result<()>;
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()>;
    /// Grows to at least this capacity, which is no less than the present one.
    fn grow(&self, capacity_bytes: u64) -> io::Result<()>;
    /// The file whose bytes are the disk's, where there is one: then reads and writes may go to it
    /// without the image.
    fn plain_file(&self) -> Option<&HostFile>;
}

/// The file's bytes are the disk's bytes.
pub(super) struct RawImage {
    file: HostFile,
}

impl RawImage {
    pub fn new(fd: OwnedFd, direct: bool) -> io::Result<Self> {
        let image = Self { file: HostFile::new(fd, direct)? };
        image.check_size(image.file.size_bytes())?;
        Ok(image)
    }

    /// Direct I/O can't write the last part of a block without making the file longer.
    fn check_size(&self, bytes: u64) -> io::Result<()> {
        let align = self.file.offset_align();
        if bytes.is_multiple_of(align) {
            return Ok(());
        }
        let text = format!("{bytes} bytes are not a multiple of {align}, as direct I/O needs it here");
        Err(io::Error::new(io::ErrorKind::Unsupported, text))
    }
}

impl Image for RawImage {
    fn capacity_bytes(&self) -> u64 {
        self.file.size_bytes() / SECTOR_BYTES * SECTOR_BYTES
    }

    fn can_discard(&self) -> bool {
        true
    }

    fn read(&self, target: Cursor<'_>, offset: u64) -> io::Result<()> {
        let wanted = target.len();
        match self.file.read_available(target, offset)? {
            got if got == wanted => Ok(()),
            // Someone cut the file short: the guest must not take that for zeroes.
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    fn read_to(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact(data, offset)
    }

    fn write(&self, source: Cursor<'_>, offset: u64) -> io::Result<()> {
        self.file.write_all(source, offset)
    }

    fn write_back(&self) -> io::Result<()> {
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        self.file.write_zeroes(offset, len, may_unmap)
    }

    fn grow(&self, capacity_bytes: u64) -> io::Result<()> {
        if !self.file.is_block_device() {
            self.check_size(capacity_bytes)?;
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

    fn plain_file(&self) -> Option<&HostFile> {
        Some(&self.file)
    }
}
