//! virtio-balloon (virtio 1.2, section 5.5): memory that the guest gives back, asked or unasked.
//!
//! For the machine: [`Balloon::new`], and [`Balloon::handle`] for the control side. The thread is named
//! `balloon` ([`ThreadRole::Balloon`]).
//!
//! - **Inflate**: the guest names pages that it won't use, and the host gets them back.
//! - **Deflate**: it takes them again. There is nothing to do: a page comes back, empty, when it is
//!   touched. So a guest needn't ask first (MUST_TELL_HOST isn't offered), and to deflate when it runs
//!   out of memory is a matter of its own driver.
//! - **Free page reporting**: the guest names free pages as it goes, and keeps them.
//! - **Statistics**: the guest tells of its memory every [`STATISTICS_INTERVAL`].
//!
//! Whatever the guest names, it can lose nothing but its own memory: see [`memory::discard`]. Huge pages
//! of the host's pool are never given back: then a balloon takes memory from the guest and gives the
//! host none.
//!
//! [`memory::discard`]: crate::vmm::memory::discard

mod service;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::SyncSender;
use std::time::Duration;

use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;

use self::service::BalloonService;
use super::worker::{Mailbox, ThreadRole, ThreadStart, Worker};
use crate::vmm::config::{BalloonConfig, PageKind};
use crate::vmm::metrics::BalloonCounters;
use crate::vmm::transport::{ActivateError, Activation, VirtioDevice};

/// The unit of everything in a balloon, whatever pages the guest or the host uses.
pub const PAGE_BYTES: u64 = 4096;

/// How often the guest is asked for its statistics. Each time costs it an interrupt.
pub const STATISTICS_INTERVAL: Duration = Duration::from_secs(5);

const STATS_VQ: u64 = 1 << 1;
const DEFLATE_ON_OOM: u64 = 1 << 2;
const PAGE_POISON: u64 = 1 << 4;
const PAGE_REPORTING: u64 = 1 << 5;

/// Inflate, deflate, statistics, and reporting. The specification gives the last two the fixed numbers
/// 2 and 4 (3 belongs to free page hints, which we don't offer); Linux counts only queues that it
/// negotiated. There is room for either, see [`service`].
const QUEUE_SIZES: &[u16] = &[128; 5];

/// Offsets in the configuration space: `num_pages`, `actual`, `free_page_hint_cmd_id`, `poison_val`.
const ACTUAL_OFFSET: u64 = 4;
const POISON_OFFSET: u64 = 12;

#[derive(Debug, thiserror::Error)]
pub enum BalloonError {
    #[error("{target_bytes} bytes: the balloon takes multiples of 4096 up to the guest's {memory_bytes}")]
    Target { target_bytes: u64, memory_bytes: u64 },
    #[error("reach the balloon's thread")]
    Thread(#[source] io::Error),
}

/// What the registers, the thread and the handle share.
struct Shared {
    /// Pages that the balloon is to hold, and that it holds, as the driver's registers say.
    target_pages: AtomicU32,
    actual_pages: AtomicU32,
    /// What the guest fills its free pages with.
    poison: AtomicU32,
    counters: Arc<BalloonCounters>,
}

impl Shared {
    fn set_target(&self, pages: u32) {
        self.target_pages.store(pages, Ordering::Release);
        self.counters.target_bytes.set(u64::from(pages) * PAGE_BYTES);
    }

    fn set_actual(&self, pages: u32) {
        self.actual_pages.store(pages, Ordering::Release);
        self.counters.actual_bytes.set(u64::from(pages) * PAGE_BYTES);
    }
}

enum Command {
    SetTarget { pages: u32, reply: SyncSender<()> },
}

/// The device.
pub struct Balloon {
    worker: Worker<Command>,
    shared: Arc<Shared>,
    features: u64,
    memory_bytes: u64,
}

/// The control side. It may be used from any thread while the guest runs.
#[derive(Clone)]
pub struct BalloonHandle {
    mailbox: Mailbox<Command>,
    shared: Arc<Shared>,
    memory_bytes: u64,
}

impl Balloon {
    /// `pages`: what guest memory is made of.
    pub fn new(
        config: BalloonConfig,
        memory_bytes: u64,
        pages: PageKind,
        hook: &ThreadStart,
    ) -> Result<Self, BalloonError> {
        // Huge pages stay: reports would only keep the guest busy.
        let free_page_reporting = config.free_page_reporting && pages == PageKind::Small;
        let config = BalloonConfig { free_page_reporting, ..config };
        Self::with_interval(config, memory_bytes, hook, STATISTICS_INTERVAL)
    }

    fn with_interval(
        config: BalloonConfig,
        memory_bytes: u64,
        hook: &ThreadStart,
        interval: Duration,
    ) -> Result<Self, BalloonError> {
        let target_pages = pages_of(config.target_bytes, memory_bytes)?;
        let mut features = STATS_VQ;
        if config.deflate_on_oom {
            features |= DEFLATE_ON_OOM;
        }
        if config.free_page_reporting {
            // Without the poison a guest that fills its free pages doesn't report them.
            features |= PAGE_REPORTING | PAGE_POISON;
        }
        let shared = Arc::new(Shared {
            target_pages: AtomicU32::new(0),
            actual_pages: AtomicU32::new(0),
            poison: AtomicU32::new(0),
            counters: Arc::default(),
        });
        shared.set_target(target_pages);
        let service = BalloonService::new(shared.clone(), interval);
        let worker = Worker::spawn("balloon".into(), ThreadRole::Balloon, hook, service)
            .map_err(BalloonError::Thread)?;
        Ok(Self { worker, shared, features, memory_bytes })
    }

    pub fn handle(&self) -> BalloonHandle {
        BalloonHandle {
            mailbox: self.worker.mailbox(),
            shared: self.shared.clone(),
            memory_bytes: self.memory_bytes,
        }
    }
}

fn pages_of(target_bytes: u64, memory_bytes: u64) -> Result<u32, BalloonError> {
    let refused = BalloonError::Target { target_bytes, memory_bytes };
    if target_bytes > memory_bytes || !target_bytes.is_multiple_of(PAGE_BYTES) {
        return Err(refused);
    }
    u32::try_from(target_bytes / PAGE_BYTES).map_err(|_| refused)
}

impl BalloonHandle {
    /// What the balloon is to hold. The guest is told at once, and takes its time.
    pub fn set_target_bytes(&self, target_bytes: u64) -> Result<(), BalloonError> {
        let pages = pages_of(target_bytes, self.memory_bytes)?;
        self.mailbox.call_briefly(|reply| Command::SetTarget { pages, reply }).map_err(BalloonError::Thread)
    }

    /// Target and actual size, and what the guest says of its memory.
    pub fn counters(&self) -> &Arc<BalloonCounters> {
        &self.shared.counters
    }
}

impl VirtioDevice for Balloon {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let field = |value: &AtomicU32| value.load(Ordering::Acquire).to_le_bytes();
        let mut space = [0; 16];
        space[..4].copy_from_slice(&field(&self.shared.target_pages));
        space[4..8].copy_from_slice(&field(&self.shared.actual_pages));
        space[12..].copy_from_slice(&field(&self.shared.poison));
        super::read_config_space(&space, offset, data);
    }

    /// A driver writes whole fields (virtio 1.2, section 4.2.2.2).
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let Ok(value) = data.try_into().map(u32::from_le_bytes) else { return };
        match offset {
            ACTUAL_OFFSET => self.shared.set_actual(value),
            POISON_OFFSET => self.shared.poison.store(value, Ordering::Release),
            _ => {}
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.worker.start(activation)
    }

    /// The target stays: the next driver finds it and inflates anew.
    fn reset(&mut self) {
        self.worker.stop();
        self.shared.set_actual(0);
        self.shared.poison.store(0, Ordering::Release);
    }
}
