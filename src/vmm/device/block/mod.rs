//! virtio-blk over a raw or qcow2 image.
//!
//! For the machine: [`Block::new`] takes the open files (nothing is opened, closed or locked by
//! path), [`Block::handle`] gives the control side. Each queue has a thread ([`ThreadRole::Block`]),
//! named `disk-<name>`, `disk-<name>-1` and so on. All work on the image, growing included, is done by
//! these threads; a handle only sends them messages.
//!
//! A flush covers all writes that completed before it. Without VIRTIO_BLK_F_FLUSH accepted by the
//! driver every write is flushed before it completes; nor is the feature offered where there is nothing
//! to flush ([`CacheMode::Writethrough`]) or nothing is flushed ([`CacheMode::Unsafe`]).
//!
//! A write that finds the storage full is not failed but held, and the machine's event loop told: see
//! [`service`] and [`disk::Room`].

mod direct;
mod disk;
mod host_file;
mod image;
mod qcow2;
mod request;
mod ring;
mod service;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;

use self::disk::Disk;
use self::image::{Image, RawImage, SECTOR_BYTES};
use self::qcow2::{Layer, Qcow2Image};
use self::ring::Ring;
use self::service::{Command, QueueService};
use super::buffers::SEGMENTS_MAX;
use super::worker::{Mailbox, ThreadRole, ThreadStart, Worker};
use crate::vmm::boot::disk::ReadAt;
use crate::vmm::config::{Bucket, CacheMode, DiskConfig, DiskFormat, Limits, QUEUES_MAX};
use crate::vmm::event::EventSender;
use crate::vmm::metrics::{DiskCounters, DiskMetrics};
use crate::vmm::transport::{ActivateError, Activation, VirtioDevice};

pub use self::qcow2::ImageRefused;

/// What the thread needs beyond what all workers do.
pub(super) const SYSTEM_CALLS: &[libc::c_long] = &[
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fstat,
    libc::SYS_ftruncate,
    // On a ring that is made and restricted before: see `ring`.
    libc::SYS_io_uring_enter,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_statx,
];

const QUEUE_SIZES: [u16; QUEUES_MAX as usize] = [256; QUEUES_MAX as usize];
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
    #[error("disk {disk}: {queues} queues, not 1 to {QUEUES_MAX}")]
    Queues { disk: String, queues: u16 },
    #[error("disk {disk}: a limit of nothing")]
    NoLimit { disk: String },
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
    /// One for each queue.
    workers: Vec<Worker<Command>>,
    handle: BlockHandle,
    can_discard: bool,
}

/// The control side of a disk. It may be used from any thread while the guest runs; calls wait for
/// the requests in flight.
#[derive(Clone)]
pub struct BlockHandle {
    name: Arc<str>,
    disk: Arc<Disk>,
    mailboxes: Arc<[Mailbox<Command>]>,
    counters: Arc<[Arc<DiskCounters>]>,
    uses_io_uring: bool,
}

/// Who does the I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Engine {
    /// The kernel by io_uring, where it can, for images that are plain files.
    Best,
    /// The queue's thread itself, request by request.
    #[cfg_attr(not(test), expect(dead_code, reason = "what `Best` comes to without io_uring, to be tested"))]
    Thread,
}

impl Engine {
    /// The kernel may not have io_uring, or the host's administrator may have turned it off: then it is
    /// done without.
    fn make_ring(self, disk: &Disk) -> Option<Ring> {
        let file = disk.image.plain_file().filter(|_| self == Self::Best)?;
        Ring::new(file.fd()).ok()
    }
}

impl Block {
    /// `backing` are the files of `config.backing`, in its order. The files must be open as
    /// `config.read_only` says; backing files are only read. `events` hears of storage that is full.
    pub fn new(
        config: &DiskConfig,
        file: OwnedFd,
        backing: Vec<OwnedFd>,
        hook: &ThreadStart,
        events: EventSender,
    ) -> Result<Self, BlockError> {
        Self::with_engine(config, file, backing, hook, events, Engine::Best)
    }

    fn with_engine(
        config: &DiskConfig,
        file: OwnedFd,
        backing: Vec<OwnedFd>,
        hook: &ThreadStart,
        events: EventSender,
        engine: Engine,
    ) -> Result<Self, BlockError> {
        let name = || config.name.clone();
        if !(1..=QUEUES_MAX).contains(&config.queues) {
            return Err(BlockError::Queues { disk: name(), queues: config.queues });
        }
        check_limits(config.limits).map_err(|()| BlockError::NoLimit { disk: name() })?;
        let image =
            open(config, file, backing).map_err(|source| BlockError::Open { disk: name(), source })?;
        let can_discard = image.can_discard() && !config.read_only;
        let disk = Arc::new(Disk::new(image, config, events));
        let mut workers = Vec::new();
        let mut counters = Vec::new();
        let mut uses_io_uring = true;
        for queue in 0..usize::from(config.queues) {
            counters.push(Arc::new(DiskCounters::default()));
            let ring = engine.make_ring(&disk);
            uses_io_uring &= ring.is_some();
            let service = QueueService::new(queue, disk.clone(), counters[queue].clone(), ring);
            let thread = match queue {
                0 => format!("disk-{}", config.name),
                queue => format!("disk-{}-{queue}", config.name),
            };
            let worker = Worker::spawn(thread, ThreadRole::Block, hook, service)
                .map_err(|source| BlockError::Start { disk: name(), source })?;
            workers.push(worker);
        }
        let handle = BlockHandle {
            name: config.name.as_str().into(),
            disk,
            mailboxes: workers.iter().map(Worker::mailbox).collect(),
            counters: counters.into(),
            uses_io_uring,
        };
        Ok(Self { workers, handle, can_discard })
    }

    pub fn handle(&self) -> BlockHandle {
        self.handle.clone()
    }

    fn disk(&self) -> &Disk {
        &self.handle.disk
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
        // Not above QUEUES_MAX.
        put(34, &(self.workers.len() as u16).to_le_bytes());
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

/// A disk that may do nothing is a mistake, and a burst of nothing lets nothing pass.
fn check_limits(limits: Limits) -> Result<(), ()> {
    let buckets = [limits.bandwidth, limits.operations];
    let is_empty = |bucket: Bucket| bucket.per_second == 0 || bucket.burst == 0;
    if buckets.into_iter().flatten().any(is_empty) { Err(()) } else { Ok(()) }
}

fn open(config: &DiskConfig, file: OwnedFd, backing: Vec<OwnedFd>) -> Result<Box<dyn Image>, ImageRefused> {
    let (declared, passed) = (config.backing.len(), backing.len());
    if declared != passed {
        return Err(ImageRefused::BackingCount { declared, passed });
    }
    let direct = config.cache == CacheMode::Direct;
    match config.format {
        DiskFormat::Raw if declared > 0 => Err(ImageRefused::RawWithBacking),
        DiskFormat::Raw => Ok(Box::new(RawImage::new(file, direct)?)),
        DiskFormat::Qcow2 => {
            let mut chain = vec![Layer { format: config.format, fd: file }];
            let formats = config.backing.iter().map(|backing| backing.format);
            chain.extend(formats.zip(backing).map(|(format, fd)| Layer { format, fd }));
            Ok(Box::new(Qcow2Image::open(chain, config.read_only, direct)?))
        }
    }
}

impl BlockHandle {
    pub fn capacity_bytes(&self) -> u64 {
        self.disk.image.capacity_bytes()
    }

    /// Grows the disk and tells the guest. A raw file that is shorter is made longer, a block device
    /// is looked at again, a qcow2 image is grown. The present capacity is no change; less is refused.
    pub fn resize(&self, capacity_bytes: u64) -> Result<(), BlockError> {
        let (disk, present) = (self.name.to_string(), self.capacity_bytes());
        if capacity_bytes < present {
            return Err(BlockError::Shrink { disk, wanted_bytes: capacity_bytes, capacity_bytes: present });
        }
        if !capacity_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(BlockError::Odd { disk, wanted_bytes: capacity_bytes });
        }
        self.mailboxes[0]
            .call_briefly(|reply| Command::Grow { capacity_bytes, reply })
            .and_then(|result| result)
            .map_err(|source| BlockError::Grow { disk, source })
    }

    /// When it returns, everything that the guest was told is written is on stable storage, unless the
    /// cache mode says that nothing need be.
    pub fn flush(&self) -> Result<(), BlockError> {
        self.mailboxes[0]
            .call(|reply| Command::Flush { reply })
            .and_then(|result| result)
            .map_err(|source| BlockError::Flush { disk: self.name.to_string(), source })
    }

    /// Other limits from now on, for what already waits too.
    pub fn set_limits(&self, limits: Limits) -> Result<(), BlockError> {
        check_limits(limits).map_err(|()| BlockError::NoLimit { disk: self.name.to_string() })?;
        self.disk.limiter.set(limits);
        self.look_again();
        Ok(())
    }

    /// Tries what waits, for tokens or for room, now and not when it would be time.
    pub fn look_again(&self) {
        for mailbox in self.mailboxes.iter() {
            // A queue whose thread has ended holds nothing back.
            let _ = mailbox.tell(Command::LookAgain);
        }
    }

    /// Whether this host's kernel does the I/O beside the queues' threads.
    pub fn uses_io_uring(&self) -> bool {
        self.uses_io_uring
    }

    /// What was counted, by all queues together.
    pub fn metrics(&self) -> DiskMetrics {
        let mut sum = DiskMetrics::default();
        for counters in self.counters.iter() {
            sum.merge(&counters.snapshot());
        }
        sum
    }
}

/// What a boot from the disk reads.
impl ReadAt for BlockHandle {
    fn size_bytes(&self) -> u64 {
        self.capacity_bytes()
    }

    fn read_at(&self, offset: u64, data: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(data.len() as u64);
        if end.is_none_or(|end| end > self.capacity_bytes()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let bytes = data.len();
        let read = self.mailboxes[0].call_briefly(|reply| Command::Read { offset, bytes, reply })??;
        data.copy_from_slice(&read);
        Ok(())
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES[..self.workers.len()]
    }

    fn features(&self) -> u64 {
        let mut features =
            1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_TOPOLOGY;
        if matches!(self.disk().cache, CacheMode::Writeback | CacheMode::Direct) {
            features |= 1 << VIRTIO_BLK_F_FLUSH;
        }
        if self.workers.len() > 1 {
            features |= 1 << VIRTIO_BLK_F_MQ;
        }
        if self.disk().read_only {
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
        let Activation { memory, queues, interrupt, features } = activation;
        if queues.is_empty() {
            return Err(ActivateError("no request queue is ready".into()));
        }
        self.disk().set_interrupt(Some(interrupt.clone()));
        for queue in queues {
            // The transport knows no other queues than those of `queue_sizes`.
            let Some(worker) = self.workers.get(usize::from(queue.index)) else { continue };
            worker.start(Activation {
                memory: memory.clone(),
                queues: vec![queue],
                interrupt: interrupt.clone(),
                features,
            })?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        self.disk().set_interrupt(None);
        for worker in &self.workers {
            worker.stop();
        }
    }
}
