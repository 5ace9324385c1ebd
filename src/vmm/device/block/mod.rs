//! virtio-blk over a raw or qcow2 image.
//!
//! For the machine: [`Block::new`] takes the open files (nothing is opened, closed or locked by
//! path), [`Block::handle`] gives the control side. The thread is named `disk-<name>`
//! ([`ThreadRole::Block`]).
//! All work on the image, growing included, is done by the thread; a handle only sends it messages.
//!
//! Requests are served in order, each to its end: a flush covers all writes completed before it.
//! Without VIRTIO_BLK_F_FLUSH accepted by the driver every write is flushed before it completes.

mod host_file;
mod image;
mod qcow2;
mod request;
mod service;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use self::image::{Image, RawImage, SECTOR_BYTES};
use self::qcow2::{Layer, Qcow2Image};
use self::service::{BlockService, Command};
use super::buffers::SEGMENTS_MAX;
use super::worker::{Mailbox, ThreadRole, ThreadStart, Worker};
use crate::vmm::config::{DiskConfig, DiskFormat};
use crate::vmm::transport::{ActivateError, Activation, VirtioDevice};

pub use self::qcow2::ImageRefused;

/// What the thread needs beyond what all workers do.
pub(super) const SYSTEM_CALLS: &[libc::c_long] = &[
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_statx,
];

const QUEUE_SIZES: &[u16] = &[256];
/// Header and status take two descriptors of a chain.
const SEGMENTS_PER_REQUEST_MAX: u32 = SEGMENTS_MAX as u32 - 2;
/// 4096-byte physical blocks, as a power of two of 512-byte logical ones.
const PHYSICAL_BLOCK_EXPONENT: u8 = 3;
const MIN_IO_BLOCKS: u16 = 8;
/// Bounds on what one discard or write-zeroes request may ask for, so that none holds the disk long.
const ZERO_SECTORS_MAX: u32 = 1 << 20;
const ZERO_SEGMENTS_MAX: u32 = 16;
const DISCARD_ALIGNMENT_SECTORS: u32 = 8;
/// Length of the serial number (VIRTIO_BLK_ID_BYTES).
const SERIAL_BYTES: usize = 20;

#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    #[error("open the image of disk {disk}")]
    Open {
        disk: String,
        #[source]
        source: ImageRefused,
    },
    #[error("start the thread of disk {disk}")]
    Start {
        disk: String,
        #[source]
        source: io::Error,
    },
    #[error("resize disk {disk}: {wanted_bytes} bytes is less than its {capacity_bytes} bytes")]
    Shrink { disk: String, wanted_bytes: u64, capacity_bytes: u64 },
    #[error("resize disk {disk}: {wanted_bytes} bytes is not a multiple of 512")]
    Odd { disk: String, wanted_bytes: u64 },
    #[error("grow disk {disk}")]
    Grow {
        disk: String,
        #[source]
        source: io::Error,
    },
    #[error("flush disk {disk}")]
    Flush {
        disk: String,
        #[source]
        source: io::Error,
    },
}

/// The device. Dropping it flushes the image and closes the files.
pub struct Block {
    worker: Worker<Command>,
    handle: BlockHandle,
    read_only: bool,
    can_discard: bool,
}

/// The control side of a disk. It may be used from any thread while the guest runs; calls wait for
/// the request in flight.
#[derive(Clone)]
pub struct BlockHandle {
    disk: Arc<str>,
    capacity_bytes: Arc<AtomicU64>,
    mailbox: Mailbox<Command>,
}

impl Block {
    /// `backing` are the files of `config.backing`, in its order. The files must be open as
    /// `config.read_only` says; backing files are only read.
    pub fn new(
        config: &DiskConfig,
        file: OwnedFd,
        backing: Vec<OwnedFd>,
        hook: &ThreadStart,
    ) -> Result<Self, BlockError> {
        let disk = || config.name.clone();
        let image =
            open(config, file, backing).map_err(|source| BlockError::Open { disk: disk(), source })?;
        let can_discard = image.can_discard() && !config.read_only;
        let capacity_bytes = Arc::new(AtomicU64::new(image.capacity_bytes()));
        let mut serial = [0; SERIAL_BYTES];
        serial.iter_mut().zip(config.name.bytes()).for_each(|(to, from)| *to = from);
        let service = BlockService::new(image, config.read_only, serial, capacity_bytes.clone());
        let worker = Worker::spawn(format!("disk-{}", config.name), ThreadRole::Block, hook, service)
            .map_err(|source| BlockError::Start { disk: disk(), source })?;
        let handle =
            BlockHandle { disk: config.name.as_str().into(), capacity_bytes, mailbox: worker.mailbox() };
        Ok(Self { worker, handle, read_only: config.read_only, can_discard })
    }

    pub fn handle(&self) -> BlockHandle {
        self.handle.clone()
    }

    /// `struct virtio_blk_config` (virtio 1.2, section 5.2.4).
    fn config_space(&self) -> [u8; 60] {
        let mut space = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &(self.handle.capacity_bytes() / SECTOR_BYTES).to_le_bytes());
        put(12, &SEGMENTS_PER_REQUEST_MAX.to_le_bytes());
        put(20, &(SECTOR_BYTES as u32).to_le_bytes());
        put(24, &[PHYSICAL_BLOCK_EXPONENT]);
        put(26, &MIN_IO_BLOCKS.to_le_bytes());
        // The number of queues, which is there although VIRTIO_BLK_F_MQ is not offered.
        put(34, &1u16.to_le_bytes());
        if self.can_discard {
            put(36, &ZERO_SECTORS_MAX.to_le_bytes());
            put(40, &ZERO_SEGMENTS_MAX.to_le_bytes());
            put(44, &DISCARD_ALIGNMENT_SECTORS.to_le_bytes());
            put(48, &ZERO_SECTORS_MAX.to_le_bytes());
            put(52, &ZERO_SEGMENTS_MAX.to_le_bytes());
            // Write-zeroes may unmap.
            put(56, &[1]);
        }
        space
    }
}

fn open(config: &DiskConfig, file: OwnedFd, backing: Vec<OwnedFd>) -> Result<Box<dyn Image>, ImageRefused> {
    let (declared, passed) = (config.backing.len(), backing.len());
    if declared != passed {
        return Err(ImageRefused::BackingCount { declared, passed });
    }
    match config.format {
        DiskFormat::Raw if declared > 0 => Err(ImageRefused::RawWithBacking),
        DiskFormat::Raw => Ok(Box::new(RawImage::new(file)?)),
        DiskFormat::Qcow2 => {
            let mut chain = vec![Layer { format: config.format, fd: file }];
            let formats = config.backing.iter().map(|backing| backing.format);
            chain.extend(formats.zip(backing).map(|(format, fd)| Layer { format, fd }));
            Ok(Box::new(Qcow2Image::open(chain, config.read_only)?))
        }
    }
}

impl BlockHandle {
    pub fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes.load(Ordering::Acquire)
    }

    /// Grows the disk and tells the guest. A raw file that is shorter is made longer, a block device
    /// is looked at again, a qcow2 image is grown. The present capacity is no change; less is refused.
    pub fn resize(&self, capacity_bytes: u64) -> Result<(), BlockError> {
        let (disk, present) = (self.disk.to_string(), self.capacity_bytes());
        if capacity_bytes < present {
            return Err(BlockError::Shrink { disk, wanted_bytes: capacity_bytes, capacity_bytes: present });
        }
        if !capacity_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(BlockError::Odd { disk, wanted_bytes: capacity_bytes });
        }
        self.mailbox
            .call_briefly(|reply| Command::Grow { capacity_bytes, reply })
            .and_then(|result| result)
            .map_err(|source| BlockError::Grow { disk, source })
    }

    /// When it returns, everything that the guest was told is written is on stable storage.
    pub fn flush(&self) -> Result<(), BlockError> {
        self.mailbox
            .call(|reply| Command::Flush { reply })
            .and_then(|result| result)
            .map_err(|source| BlockError::Flush { disk: self.disk.to_string(), source })
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        let mut features = 1 << VIRTIO_BLK_F_SEG_MAX
            | 1 << VIRTIO_BLK_F_BLK_SIZE
            | 1 << VIRTIO_BLK_F_TOPOLOGY
            | 1 << VIRTIO_BLK_F_FLUSH;
        if self.read_only {
            features |= 1 << VIRTIO_BLK_F_RO;
        }
        if self.can_discard {
            features |= 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        }
        features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_space(&self.config_space(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.worker.start(activation)
    }

    fn reset(&mut self) {
        self.worker.stop();
    }
}
