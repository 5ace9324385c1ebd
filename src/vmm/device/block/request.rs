//! One request of a guest (virtio 1.2, section 5.2.6): what it asks for, and doing it.
//!
//! The layout of the buffers is free: the header is the first 16 readable bytes, the status the last
//! writable one, however they are cut.

use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
    VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};

use super::image::{Image, SECTOR_BYTES};
use super::{SERIAL_BYTES, ZERO_SECTORS_MAX, ZERO_SEGMENTS_MAX};
use crate::vmm::device::buffers::{Buffers, Cursor};
use crate::vmm::memory::GuestMemory;

const HEADER_BYTES: usize = 16;
/// `struct virtio_blk_discard_write_zeroes`.
const ZERO_SEGMENT_BYTES: usize = 16;

/// Why a request fails; each is a status of its own.
#[derive(Debug)]
enum Failure {
    Io,
    Unsupported,
}

impl From<io::Error> for Failure {
    fn from(_: io::Error) -> Self {
        Self::Io
    }
}

/// What a disk is to a request.
pub(super) struct Disk {
    pub image: Box<dyn Image>,
    pub read_only: bool,
    pub serial: [u8; SERIAL_BYTES],
    /// Whether the driver flushes for itself.
    pub driver_flushes: bool,
    /// Whether the driver accepted discarding and writing zeroes.
    pub driver_discards: bool,
    pub driver_writes_zeroes: bool,
}

impl Disk {
    /// Serves one request; returns how many bytes were written to the guest. A chain without a header
    /// or a place for the status gets nothing at all.
    pub fn serve(&mut self, buffers: &Buffers, memory: &GuestMemory) -> u32 {
        let mut readable = buffers.readable(memory);
        let mut writable = buffers.writable(memory);
        let mut header = [0; HEADER_BYTES];
        if readable.read_exact(&mut header).is_err() || writable.len() == 0 {
            return 0;
        }
        let data = writable.prefix(writable.len() - 1);
        writable.skip(data.len());
        let [kind, sector] = [u64_at(&header, 0) & u64::from(u32::MAX), u64_at(&header, 8)];
        let (status, written) = match self.perform(kind as u32, sector, readable, data) {
            Ok(written) => (VIRTIO_BLK_S_OK, written),
            Err(Failure::Io) => (VIRTIO_BLK_S_IOERR, 0),
            Err(Failure::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
        };
        match writable.write_all(&[status as u8]) {
            // More than 4 GiB can't be written: a chain is shorter than that.
            Ok(()) => written as u32 + 1,
            Err(_) => 0,
        }
    }

    /// Returns how many bytes of `target` were written.
    fn perform(
        &mut self,
        kind: u32,
        sector: u64,
        source: Cursor<'_>,
        target: Cursor<'_>,
    ) -> Result<u64, Failure> {
        match kind {
            VIRTIO_BLK_T_IN => {
                let (len, offset) = (target.len(), self.range(sector, target.len())?);
                self.image.read(target, offset)?;
                return Ok(len);
            }
            VIRTIO_BLK_T_GET_ID => {
                let mut target = target;
                let len = target.len().min(SERIAL_BYTES as u64);
                target.write_all(&self.serial[..len as usize])?;
                return Ok(len);
            }
            VIRTIO_BLK_T_FLUSH => self.image.flush()?,
            VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if self.read_only => {
                return Err(Failure::Io);
            }
            VIRTIO_BLK_T_OUT => {
                let offset = self.range(sector, source.len())?;
                self.image.write(source, offset)?;
                if !self.driver_flushes {
                    self.image.flush()?;
                }
            }
            VIRTIO_BLK_T_DISCARD if self.driver_discards => self.zero_segments(source, true)?,
            VIRTIO_BLK_T_WRITE_ZEROES if self.driver_writes_zeroes => self.zero_segments(source, false)?,
            _ => return Err(Failure::Unsupported),
        }
        Ok(0)
    }

    /// The byte offset of a range of whole sectors within the disk.
    fn range(&self, sector: u64, len: u64) -> Result<u64, Failure> {
        let offset = sector.checked_mul(SECTOR_BYTES).ok_or(Failure::Io)?;
        let end = offset.checked_add(len).ok_or(Failure::Io)?;
        let fits = len.is_multiple_of(SECTOR_BYTES) && end <= self.image.capacity_bytes();
        if fits { Ok(offset) } else { Err(Failure::Io) }
    }

    fn zero_segments(&mut self, mut source: Cursor<'_>, discard: bool) -> Result<(), Failure> {
        let count = source.len() / ZERO_SEGMENT_BYTES as u64;
        if !source.len().is_multiple_of(ZERO_SEGMENT_BYTES as u64) || count > u64::from(ZERO_SEGMENTS_MAX) {
            return Err(Failure::Io);
        }
        for _ in 0..count {
            let mut segment = [0; ZERO_SEGMENT_BYTES];
            source.read_exact(&mut segment)?;
            let (sector, rest) = (u64_at(&segment, 0), u64_at(&segment, 8));
            let (sectors, flags) = (rest as u32, (rest >> 32) as u32);
            let unmap = flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0;
            if flags & !VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0 || discard && unmap {
                return Err(Failure::Unsupported);
            }
            if sectors > ZERO_SECTORS_MAX {
                return Err(Failure::Io);
            }
            let len = u64::from(sectors) * SECTOR_BYTES;
            let offset = self.range(sector, len)?;
            if len == 0 {
                continue;
            }
            match discard {
                true => self.image.discard(offset, len)?,
                false => self.image.write_zeroes(offset, len, unmap)?,
            }
        }
        if !self.driver_flushes {
            self.image.flush()?;
        }
        Ok(())
    }
}

fn u64_at(bytes: &[u8; 16], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}
