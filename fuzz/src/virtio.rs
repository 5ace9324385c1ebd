//! A driver with no manners: what a guest can do to a virtio device, as a list of operations that the
//! fuzzer makes up. Each is either what a real driver would do, so that sequences get deep, or any write
//! to a register, a ring or memory.

use arbitrary::Arbitrary;
use vm_memory::{Bytes as _, GuestAddress};
use vmctl::vmm::memory::GuestMemory;

/// RAM with a hole in it, so that buffers can lie in both parts, cross an end, or lie nowhere.
pub const LOW_BYTES: u64 = 256 << 10;
const HIGH_START: u64 = 4 << 30;
pub const HIGH_BYTES: u64 = 64 << 10;
/// The rings of queue `n` lie in 16 KiB from here on; what the fuzzer's buffers hold, below.
const RINGS: u64 = 0x1_0000;
const RING_STRIDE: u64 = 0x4000;
const RING_QUEUES: u8 = 8;
/// More operations than any bug needs, and few enough that a case takes milliseconds.
const OPERATIONS_MAX: usize = 64;

/// Unmapped when the last clone is dropped, unlike a real guest's, so that millions of cases fit.
pub fn memory() -> GuestMemory {
    let range = |start, bytes: u64| (GuestAddress(start), bytes as usize);
    GuestMemory::from_ranges(&[range(0, LOW_BYTES), range(HIGH_START, HIGH_BYTES)]).expect("guest memory")
}

/// An address in guest memory, or beside it.
#[derive(Clone, Copy, Debug, Arbitrary)]
pub enum Place {
    Low(u16),
    Ring(u8, u16),
    BeforeTheHole(u8),
    High(u16),
    BeforeTheEnd(u8),
    Anywhere(u64),
}

impl Place {
    pub fn address(self) -> u64 {
        match self {
            Self::Low(at) => at.into(),
            Self::Ring(queue, at) => ring(queue) + u64::from(at) % RING_STRIDE,
            Self::BeforeTheHole(back) => LOW_BYTES - u64::from(back),
            Self::High(at) => HIGH_START + u64::from(at),
            Self::BeforeTheEnd(back) => HIGH_START + HIGH_BYTES - u64::from(back),
            Self::Anywhere(at) => at,
        }
    }
}

fn ring(queue: u8) -> u64 {
    RINGS + RING_STRIDE * u64::from(queue % RING_QUEUES)
}

#[derive(Clone, Copy, Debug, Arbitrary)]
pub enum Length {
    Small(u8),
    Medium(u16),
    Any(u32),
}

impl Length {
    fn bytes(self) -> u32 {
        match self {
            Self::Small(len) => len.into(),
            Self::Medium(len) => len.into(),
            Self::Any(len) => len,
        }
    }
}

#[derive(Clone, Debug, Arbitrary)]
pub struct Buffer {
    place: Place,
    length: Length,
    writable: bool,
    /// What the guest put there.
    content: Vec<u8>,
}

#[derive(Clone, Copy, Debug, Arbitrary)]
pub struct Rings {
    pub descriptors: Place,
    pub available: Place,
    pub used: Place,
}

#[derive(Clone, Debug, Arbitrary)]
pub enum Operation {
    /// From reset to DRIVER_OK as a driver should, with rings where they belong.
    Start {
        refused_features: u64,
        size_log2: u8,
    },
    /// The same, with one queue's rings wherever.
    StartOdd {
        queue: u8,
        size: u16,
        rings: Rings,
    },
    Reset,
    /// A chain of descriptors, made available. The driver is notified when `kick`.
    Chain {
        queue: u8,
        buffers: Vec<Buffer>,
        indirect: bool,
        kick: bool,
    },
    /// One descriptor as it comes: loops, nonsense, indirect tables within one another.
    Descriptor {
        queue: u8,
        index: u8,
        place: Place,
        length: Length,
        flags: u8,
        next: u16,
    },
    /// The available ring's index or one of its entries.
    Available {
        queue: u8,
        slot: u8,
        value: u16,
    },
    Index {
        queue: u8,
        value: u16,
    },
    Memory {
        place: Place,
        content: Vec<u8>,
    },
    Kick {
        queue: u8,
    },
    ReadRegister {
        offset: u16,
        width: u8,
    },
    WriteRegister {
        offset: u16,
        width: u8,
        value: u64,
    },
    ReadConfig {
        offset: u8,
        width: u8,
    },
    WriteConfig {
        offset: u8,
        width: u8,
        value: u64,
    },
    /// Something from the host's side: a frame that arrives, a disk that grows.
    Host(u8, Vec<u8>),
}

/// A transport with a device behind it, as a driver meets it.
pub trait Transport {
    /// Reset to FEATURES_OK with all that is offered but `refused`.
    fn negotiate(&mut self, refused: u64);
    /// The largest size of each queue.
    fn queue_sizes(&mut self) -> Vec<u16>;
    fn set_up_queue(&mut self, queue: u16, size: u16, descriptors: u64, available: u64, used: u64);
    fn driver_ok(&mut self);
    /// Notifies, and waits until the device has seen it, as far as it looks at all.
    fn kick(&mut self, queue: u16);
    fn reset(&mut self);
    fn read(&mut self, offset: u64, data: &mut [u8]);
    fn write(&mut self, offset: u64, data: &[u8]);
    fn read_config(&mut self, offset: u64, data: &mut [u8]);
    fn write_config(&mut self, offset: u64, data: &[u8]);
}

pub struct Driver<'a> {
    pub transport: &'a mut dyn Transport,
    pub memory: GuestMemory,
    queue_sizes: Vec<u16>,
    /// Of each queue: its size and ring addresses, the next available index and the next descriptor.
    queues: Vec<Queue>,
}

#[derive(Clone, Copy)]
struct Queue {
    size: u16,
    descriptors: u64,
    available: u64,
    used: u64,
    index: u16,
    next: u16,
}

impl<'a> Driver<'a> {
    pub fn new(transport: &'a mut dyn Transport, memory: GuestMemory) -> Self {
        let queue_sizes = transport.queue_sizes();
        Self { transport, memory, queue_sizes, queues: Vec::new() }
    }

    /// Runs the operations; `host` is what acts for the host's side. Ends with the device reset, so that
    /// it has finished all that it was asked for.
    pub fn run(&mut self, operations: &[Operation], host: &mut dyn FnMut(u8, &[u8])) {
        self.start(0, 8, None);
        for operation in operations.iter().take(OPERATIONS_MAX) {
            match operation {
                Operation::Host(what, data) => host(*what, data),
                operation => self.operate(operation),
            }
        }
        self.transport.reset();
    }

    fn operate(&mut self, operation: &Operation) {
        match *operation {
            Operation::Start { refused_features, size_log2 } => {
                self.start(refused_features, size_log2 % 9, None);
            }
            Operation::StartOdd { queue, size, rings } => self.start(0, 4, Some((queue, size, rings))),
            Operation::Reset => self.transport.reset(),
            Operation::Chain { queue, ref buffers, indirect, kick } => {
                self.chain(queue, buffers, indirect);
                if kick {
                    self.transport.kick(queue.into());
                }
            }
            Operation::Descriptor { queue, index, place, length, flags, next } => {
                if let Some(queue) = self.queue(queue) {
                    let table = queue.descriptors;
                    let flags = u16::from(flags);
                    self.descriptor(table, index.into(), place.address(), length.bytes(), flags, next);
                }
            }
            Operation::Available { queue, slot, value } => {
                let Some(queue) = self.queue(queue) else { return };
                let at = queue.available.wrapping_add(4 + 2 * u64::from(slot));
                self.put(at, &value.to_le_bytes());
            }
            Operation::Index { queue, value } => {
                let Some(queue) = self.queue_mut(queue) else { return };
                queue.index = value;
                let at = queue.available.wrapping_add(2);
                self.put(at, &value.to_le_bytes());
            }
            Operation::Memory { place, ref content } => self.put(place.address(), content),
            Operation::Kick { queue } => self.transport.kick(queue.into()),
            Operation::ReadRegister { offset, width } => {
                self.transport.read(offset.into(), &mut [0; 8][..1 << (width % 4)]);
            }
            Operation::WriteRegister { offset, width, value } => {
                self.transport.write(offset.into(), &value.to_le_bytes()[..1 << (width % 4)]);
            }
            Operation::ReadConfig { offset, width } => {
                self.transport.read_config(offset.into(), &mut [0; 8][..1 << (width % 4)]);
            }
            Operation::WriteConfig { offset, width, value } => {
                self.transport.write_config(offset.into(), &value.to_le_bytes()[..1 << (width % 4)]);
            }
            Operation::Host(..) => {}
        }
    }

    fn start(&mut self, refused: u64, size_log2: u8, odd: Option<(u8, u16, Rings)>) {
        self.transport.reset();
        self.transport.negotiate(refused);
        self.queues.clear();
        for (number, &size_max) in self.queue_sizes.clone().iter().enumerate() {
            let base = ring(number as u8);
            let size = size_max.min(1 << size_log2);
            let mut queue = Queue {
                size,
                descriptors: base,
                available: base + 0x1000,
                used: base + 0x2000,
                index: 0,
                next: 0,
            };
            if let Some((odd, size, rings)) = odd
                && usize::from(odd) % self.queue_sizes.len() == number
            {
                queue.size = size;
                queue.descriptors = rings.descriptors.address();
                queue.available = rings.available.address();
                queue.used = rings.used.address();
            }
            self.put(queue.available, &[0; 4]);
            self.put(queue.used, &[0; 4]);
            let Queue { size, descriptors, available, used, .. } = queue;
            self.transport.set_up_queue(number as u16, size, descriptors, available, used);
            self.queues.push(queue);
        }
        self.transport.driver_ok();
    }

    fn queue_mut(&mut self, queue: u8) -> Option<&mut Queue> {
        let count = self.queues.len();
        self.queues.get_mut(usize::from(queue).checked_rem(count)?)
    }

    fn queue(&mut self, queue: u8) -> Option<Queue> {
        self.queue_mut(queue).copied()
    }

    fn chain(&mut self, queue: u8, buffers: &[Buffer], indirect: bool) {
        const NEXT: u16 = 1;
        const WRITE: u16 = 2;
        const INDIRECT: u16 = 4;
        let Some(Queue { size, descriptors, available, index, next, .. }) = self.queue(queue) else { return };
        if size == 0 || buffers.is_empty() {
            return;
        }
        // An indirect table lies in the high memory, where buffers may overwrite it.
        let (table, first, modulus) = match indirect {
            true => (HIGH_START, 0, buffers.len().min(u16::MAX.into()) as u16),
            false => (descriptors, next, size),
        };
        for (at, buffer) in buffers.iter().take(usize::from(modulus)).enumerate() {
            let address = buffer.place.address();
            self.put(address, &buffer.content);
            let this = first.wrapping_add(at as u16) % modulus;
            let last = at + 1 == buffers.len().min(modulus.into());
            let flags = if buffer.writable { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.descriptor(table, this, address, buffer.length.bytes(), flags, (this + 1) % modulus);
        }
        let head = next % size;
        if indirect {
            self.descriptor(descriptors, head, HIGH_START, 16 * u32::from(modulus), INDIRECT, 0);
        }
        self.put(available.wrapping_add(4 + 2 * u64::from(index % size)), &head.to_le_bytes());
        self.put(available.wrapping_add(2), &index.wrapping_add(1).to_le_bytes());
        if let Some(queue) = self.queue_mut(queue) {
            queue.index = index.wrapping_add(1);
            queue.next = next.wrapping_add(if indirect { 1 } else { buffers.len() as u16 }) % size;
        }
    }

    fn descriptor(&self, table: u64, index: u16, address: u64, length: u32, flags: u16, next: u16) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&address.to_le_bytes());
        raw[8..12].copy_from_slice(&length.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        self.put(table.wrapping_add(16 * u64::from(index)), &raw);
    }

    /// What the guest writes where it has no memory is lost.
    fn put(&self, address: u64, data: &[u8]) {
        let _ = self.memory.write(data, GuestAddress(address));
    }
}
