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

use super::disk::{Accepted, Disk};
use super::image::SECTOR_BYTES;
use super::{SERIAL_BYTES, ZERO_SECTORS_MAX, ZERO_SEGMENTS_MAX};
use crate::vmm::device::buffers::{Buffers, Cursor};
use crate::vmm::device::limiter::Cost;
use crate::vmm::memory::GuestMemory;

const HEADER_BYTES: u64 = 16;
/// `struct virtio_blk_discard_write_zeroes`.
const ZERO_SEGMENT_BYTES: usize = 16;

/// Why a request isn't done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Failure {
    Io,
    Unsupported,
    /// The storage is full. Not for the guest to see: the request is tried again.
    NoRoom,
}

impl From<io::Error> for Failure {
    fn from(_: io::Error) -> Self {
        Self::Io
    }
}

impl Failure {
    /// Of something that may need room.
    pub fn of_write(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::NoRoom,
            _ => Self::Io,
        }
    }
}

/// What a request asks for. Ranges are of whole sectors and lie within the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    Read { offset: u64, len: u64 },
    Write { offset: u64, len: u64 },
    Flush,
    GetId,
    Discard,
    WriteZeroes,
}

impl Operation {
    /// What the disk's limits count.
    pub fn cost(self) -> Cost {
        match self {
            Self::Read { len, .. } | Self::Write { len, .. } => Cost::one(len),
            _ => Cost::one(0),
        }
    }
}

/// What a request that was done did, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Done {
    /// Written to the guest, beside the status.
    pub written: u64,
    /// Discarded, or made zero.
    pub zeroed: u64,
}

/// A request taken from the queue.
pub(super) struct Request {
    /// Of its chain of descriptors.
    pub head: u16,
    pub buffers: Buffers,
}

impl Request {
    /// Reads the header, once. `None`: without a header or a place for the status nothing can be said
    /// to the guest.
    pub fn parse(
        &self,
        memory: &GuestMemory,
        disk: &Disk,
        accepted: Accepted,
    ) -> Option<Result<Operation, Failure>> {
        let mut header = [0; HEADER_BYTES as usize];
        self.buffers.readable(memory).read_exact(&mut header).ok()?;
        if self.buffers.writable(memory).len() == 0 {
            return None;
        }
        let (kind, sector) = (u64_at(&header, 0) as u32, u64_at(&header, 8));
        Some(self.operation(memory, disk, accepted, kind, sector))
    }

    fn operation(
        &self,
        memory: &GuestMemory,
        disk: &Disk,
        accepted: Accepted,
        kind: u32,
        sector: u64,
    ) -> Result<Operation, Failure> {
        match kind {
            VIRTIO_BLK_T_IN => {
                let len = self.target(memory).len();
                Ok(Operation::Read { offset: disk.range(sector, len)?, len })
            }
            VIRTIO_BLK_T_GET_ID => Ok(Operation::GetId),
            VIRTIO_BLK_T_FLUSH => Ok(Operation::Flush),
            VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if disk.read_only => {
                Err(Failure::Io)
            }
            VIRTIO_BLK_T_OUT => {
                let len = self.source(memory).len();
                Ok(Operation::Write { offset: disk.range(sector, len)?, len })
            }
            VIRTIO_BLK_T_DISCARD if accepted.discard => Ok(Operation::Discard),
            VIRTIO_BLK_T_WRITE_ZEROES if accepted.write_zeroes => Ok(Operation::WriteZeroes),
            _ => Err(Failure::Unsupported),
        }
    }

    /// What the guest sends beside the header.
    pub fn source<'a>(&'a self, memory: &'a GuestMemory) -> Cursor<'a> {
        let mut source = self.buffers.readable(memory);
        source.skip(HEADER_BYTES);
        source
    }

    /// What the guest gets beside the status.
    pub fn target<'a>(&'a self, memory: &'a GuestMemory) -> Cursor<'a> {
        let target = self.buffers.writable(memory);
        target.prefix(target.len().saturating_sub(1))
    }

    /// Does it, to its end.
    pub fn perform(
        &self,
        operation: Operation,
        memory: &GuestMemory,
        disk: &Disk,
        accepted: Accepted,
    ) -> Result<Done, Failure> {
        let mut done = Done::default();
        match operation {
            Operation::Read { offset, len } => {
                disk.image.read(self.target(memory), offset)?;
                done.written = len;
            }
            Operation::GetId => {
                let mut target = self.target(memory);
                let len = target.len().min(SERIAL_BYTES as u64);
                target.write_all(&disk.serial[..len as usize])?;
                done.written = len;
            }
            Operation::Flush => disk.flush()?,
            Operation::Write { offset, .. } => {
                disk.note_write();
                disk.image.write(self.source(memory), offset).map_err(Failure::of_write)?;
                disk.settle_write(accepted)?;
            }
            Operation::Discard | Operation::WriteZeroes => {
                disk.note_write();
                done.zeroed = zero_segments(disk, self.source(memory), operation == Operation::Discard)?;
                disk.settle_write(accepted)?;
            }
        }
        Ok(done)
    }

    /// Tells the guest the status; gives how many bytes of its buffers were written, all together.
    pub fn answer(&self, result: Result<Done, Failure>, memory: &GuestMemory) -> u32 {
        let (status, written) = match result {
            Ok(done) => (VIRTIO_BLK_S_OK, done.written),
            Err(Failure::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
            Err(Failure::Io | Failure::NoRoom) => (VIRTIO_BLK_S_IOERR, 0),
        };
        let mut writable = self.buffers.writable(memory);
        writable.skip(writable.len() - 1);
        match writable.write_all(&[status as u8]) {
            // More than 4 GiB can't be written: a chain is shorter than that.
            Ok(()) => written as u32 + 1,
            Err(_) => 0,
        }
    }
}

fn zero_segments(disk: &Disk, mut source: Cursor<'_>, discard: bool) -> Result<u64, Failure> {
    let count = source.len() / ZERO_SEGMENT_BYTES as u64;
    if !source.len().is_multiple_of(ZERO_SEGMENT_BYTES as u64) || count > u64::from(ZERO_SEGMENTS_MAX) {
        return Err(Failure::Io);
    }
    let mut zeroed = 0;
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
        let offset = disk.range(sector, len)?;
        if len == 0 {
            continue;
        }
        let result = match discard {
            true => disk.image.discard(offset, len),
            false => disk.image.write_zeroes(offset, len, unmap),
        };
        result.map_err(Failure::of_write)?;
        zeroed += len;
    }
    Ok(zeroed)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(std::array::from_fn(|index| bytes[at + index]))
}
