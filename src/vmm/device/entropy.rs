//! virtio-rng: random bytes of the host's kernel.
//!
//! For the machine: [`Entropy::new`]. The thread is named `entropy` ([`ThreadRole::Entropy`]).

use std::io;

use vm_memory::Bytes;

use super::buffers::SEGMENTS_MAX;
use super::queue::{BrokenQueue, VirtQueue};
use super::worker::{SOURCES_MAX, Service, Sources, ThreadRole, ThreadStart, Worker};
use crate::vmm::memory::GuestMemory;
use crate::vmm::transport::{ActivateError, Activation, Interrupt, VirtioDevice};
use rustix::event::PollFlags;
use rustix::rand::{GetRandomFlags, getrandom};
use std::sync::Arc;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;

const QUEUE_SIZES: &[u16] = &[64];
/// Most bytes given for one request: a driver that wants more asks again.
const REQUEST_BYTES_MAX: usize = 4096;
/// Most requests served before the mailbox is looked at again.
const REQUESTS_PER_TURN: usize = 64;

pub struct Entropy {
    worker: Worker<Never>,
}

/// The service takes no commands.
enum Never {}

impl Entropy {
    pub fn new(hook: &ThreadStart) -> io::Result<Self> {
        let service = EntropyService { active: None };
        Ok(Self { worker: Worker::spawn("entropy".into(), ThreadRole::Entropy, hook, service)? })
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
    active: Option<Active>,
}

struct Active {
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
    queue: VirtQueue,
    /// More is available than one turn may serve.
    again: bool,
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
            again: true,
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
        let Some(active) = &self.active else { return Sources::default() };
        Sources {
            fds: [Some((active.queue.kick_fd(), PollFlags::IN)), None, None, None],
            timeout: active.again.then_some(std::time::Duration::ZERO),
        }
    }

    fn serve(&mut self, _ready: [bool; SOURCES_MAX]) {
        let Some(active) = &mut self.active else { return };
        active.queue.clear_kick();
        if active.serve().is_err() {
            active.interrupt.signal_needs_reset();
            self.active = None;
        }
    }
}

impl Active {
    fn serve(&mut self) -> Result<(), BrokenQueue> {
        self.again = true;
        for _ in 0..REQUESTS_PER_TURN {
            let Some(chain) = self.queue.pop(&self.memory)? else {
                self.again = self.queue.enable_notifications(&self.memory)?;
                break;
            };
            let head = chain.head_index();
            let mut written = 0;
            for descriptor in chain.writable().take(SEGMENTS_MAX) {
                let len = (descriptor.len() as usize).min(REQUEST_BYTES_MAX - written);
                let mut bytes = [0; REQUEST_BYTES_MAX];
                let Ok(len) = getrandom(&mut bytes[..len], GetRandomFlags::empty()) else { break };
                if self.memory.write_slice(&bytes[..len], descriptor.addr()).is_err() {
                    break;
                }
                written += len;
                if written == REQUEST_BYTES_MAX {
                    break;
                }
            }
            self.queue.push_used(&self.memory, head, written as u32)?;
        }
        self.queue.publish_and_signal(&self.memory, self.interrupt.as_ref())
    }
}
