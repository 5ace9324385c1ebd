//! virtio-rng: random bytes of the host's kernel, as many as the guest may have.
//!
//! For the machine: [`Entropy::new`]. The thread is named `entropy` ([`ThreadRole::Entropy`]).

use std::io;

use vm_memory::{Bytes, GuestAddress};

use super::buffers::SEGMENTS_MAX;
use super::limiter::{Cost, Limiter};
use super::queue::{BrokenQueue, VirtQueue};
use super::worker::{SOURCES_MAX, Service, Sources, ThreadRole, ThreadStart, Worker};
use crate::vmm::config::{EntropyConfig, Limits};
use crate::vmm::memory::GuestMemory;
use crate::vmm::metrics::EntropyCounters;
use crate::vmm::transport::{ActivateError, Activation, Interrupt, VirtioDevice};
use rustix::event::PollFlags;
use rustix::rand::{GetRandomFlags, getrandom};
use std::sync::Arc;
use std::time::{Duration, Instant};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

const QUEUE_SIZES: &[u16] = &[64];
/// Most bytes given for one request: a driver that wants more asks again.
const REQUEST_BYTES_MAX: usize = 4096;
/// Most requests served before the mailbox is looked at again.
const REQUESTS_PER_TURN: usize = 64;

pub struct Entropy {
    worker: Worker<Never>,
    counters: Arc<EntropyCounters>,
}

/// The service takes no commands.
enum Never {}

impl Entropy {
    pub fn new(config: EntropyConfig, hook: &ThreadStart) -> io::Result<Self> {
        let limits = Limits { bandwidth: config.limit, operations: None };
        let counters = Arc::new(EntropyCounters::default());
        let limiter = Limiter::new(limits, Instant::now());
        let service = EntropyService { limiter, counters: counters.clone(), active: None };
        let worker = Worker::spawn("entropy".into(), ThreadRole::Entropy, hook, service)?;
        Ok(Self { worker, counters })
    }

    pub fn counters(&self) -> Arc<EntropyCounters> {
        self.counters.clone()
    }
}

impl VirtioDevice for Entropy {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.worker.start(activation)
    }

    fn reset(&mut self) {
        self.worker.stop();
    }
}

struct EntropyService {
    /// It outlives resets: a guest gains nothing by one.
    limiter: Limiter,
    counters: Arc<EntropyCounters>,
    active: Option<Active>,
}

struct Active {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    queue: VirtQueue,
    next: Next,
}

/// When to look at the queue again.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    /// More is available than one turn may serve.
    Now,
    /// The next request may pass then.
    At(Instant),
    Kick,
}

impl Service for EntropyService {
    type Command = Never;

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Some(queue) = activation.queues.into_iter().find(|queue| queue.index == 0) else {
            return Err(ActivateError("the request queue is not ready".into()));
        };
        self.active = Some(Active {
            memory: activation.memory,
            interrupt: activation.interrupt,
            queue: VirtQueue::new(queue),
            next: Next::Now,
        });
        Ok(())
    }

    fn stop(&mut self) {
        self.active = None;
    }

    fn command(&mut self, command: Never) {
        match command {}
    }

    fn sources(&self) -> Sources<'_> {
        let mut sources = Sources::default();
        let Some(active) = &self.active else { return sources };
        match active.next {
            Next::Now => sources.timeout = Some(Duration::ZERO),
            Next::At(at) => sources.timeout = Some(at.saturating_duration_since(Instant::now())),
            Next::Kick => sources.fds[0] = Some((active.queue.kick_fd(), PollFlags::IN)),
        }
        sources
    }

    fn serve(&mut self, _ready: [bool; SOURCES_MAX]) {
        let Some(active) = &mut self.active else { return };
        active.queue.clear_kick();
        if active.serve(&mut self.limiter, &self.counters).is_err() {
            active.interrupt.signal_needs_reset();
            self.active = None;
        }
    }
}

impl Active {
    fn serve(&mut self, limiter: &mut Limiter, counters: &EntropyCounters) -> Result<(), BrokenQueue> {
        self.next = Next::Now;
        for _ in 0..REQUESTS_PER_TURN {
            let Some(chain) = self.queue.pop(&self.memory)? else {
                if !self.queue.enable_notifications(&self.memory)? {
                    self.next = Next::Kick;
                }
                break;
            };
            let head = chain.head_index();
            // Addresses and lengths are read once; they may change behind our back.
            let mut segments = [(GuestAddress(0), 0); SEGMENTS_MAX];
            let mut wanted = 0;
            let mut count = 0;
            for descriptor in chain.writable().take(SEGMENTS_MAX) {
                let len = (descriptor.len() as usize).min(REQUEST_BYTES_MAX - wanted);
                segments[count] = (descriptor.addr(), len);
                count += 1;
                wanted += len;
                if wanted == REQUEST_BYTES_MAX {
                    break;
                }
            }
            let now = Instant::now();
            if let Err(wait) = limiter.take(Cost::one(wanted as u64), now) {
                self.queue.unpop(1);
                counters.throttled.increment();
                self.next = Next::At(now + wait);
                break;
            }
            let written = fill(&self.memory, &segments[..count]);
            counters.requests.increment();
            counters.bytes.add(written as u64);
            if written < wanted {
                counters.errors.increment();
            }
            self.queue.push_used(&self.memory, head, written as u32)?;
        }
        self.queue.publish_and_signal(&self.memory, self.interrupt.as_ref())
    }
}

/// Gives how many bytes were written before the kernel refused or there was no memory.
fn fill(memory: &GuestMemory, segments: &[(GuestAddress, usize)]) -> usize {
    let mut written = 0;
    for &(address, len) in segments {
        let mut bytes = [0; REQUEST_BYTES_MAX];
        let Ok(len) = getrandom(&mut bytes[..len], GetRandomFlags::empty()) else { break };
        if memory.write_slice(&bytes[..len], address).is_err() {
            break;
        }
        written += len;
    }
    written
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::config::Bucket;
    use crate::vmm::device::testing::{Driver, LOW_BYTES, WRITE, sandbox_hook};

    const AT: u64 = 1 << 20;

    fn start(limit: Option<Bucket>) -> (Driver, Arc<EntropyCounters>) {
        let entropy = Entropy::new(EntropyConfig { limit }, &sandbox_hook()).unwrap();
        let counters = entropy.counters();
        let mut driver = Driver::new(entropy);
        driver.start(0);
        (driver, counters)
    }

    fn ask(driver: &mut Driver, buffers: &[(u64, u32, u16)]) -> u32 {
        let head = driver.add(0, buffers);
        driver.publish(0);
        let (used, len) = driver.used(0);
        assert_eq!(used, head);
        len
    }

    #[test]
    fn bytes_are_random_and_bounded() {
        let (mut driver, counters) = start(None);
        assert_eq!(ask(&mut driver, &[(AT, 64, WRITE), (AT + 64, 64, WRITE)]), 128);
        let first = driver.get(AT, 128);
        assert_eq!(ask(&mut driver, &[(AT, 128, WRITE)]), 128);
        assert_ne!(driver.get(AT, 128), first);
        assert_eq!(ask(&mut driver, &[(AT, u32::MAX, WRITE)]), REQUEST_BYTES_MAX as u32);
        let counted = counters.snapshot();
        assert_eq!((counted.requests, counted.bytes, counted.errors), (3, 256 + 4096, 0));
    }

    #[test]
    fn nonsense_gets_nothing() {
        let (mut driver, counters) = start(None);
        assert_eq!(ask(&mut driver, &[(AT, 64, 0)]), 0);
        assert_eq!(ask(&mut driver, &[(AT, 0, WRITE)]), 0);
        assert_eq!(counters.errors.get(), 0);
        assert_eq!(ask(&mut driver, &[(LOW_BYTES, 64, WRITE)]), 0);
        assert_eq!(ask(&mut driver, &[(AT, 10, WRITE), (u64::MAX, 64, WRITE)]), 10);
        assert_eq!(counters.errors.get(), 2);
    }

    #[test]
    fn who_wants_more_than_its_rate_waits() {
        let (mut driver, counters) = start(Some(Bucket { per_second: 10_000, burst: 1000 }));
        let begun = Instant::now();
        assert_eq!(ask(&mut driver, &[(AT, 1000, WRITE)]), 1000);
        assert_eq!(ask(&mut driver, &[(AT, 1000, WRITE)]), 1000);
        let waited = begun.elapsed();
        assert!(waited >= Duration::from_millis(95), "{waited:?}");
        assert_eq!(counters.throttled.get(), 1);
        // A reset neither fills the bucket nor leaves the device waiting.
        driver.start(0);
        assert_eq!(ask(&mut driver, &[(AT, 500, WRITE)]), 500);
        assert!(begun.elapsed() >= Duration::from_millis(145));
        assert_eq!(counters.bytes.get(), 2500);
    }
}
