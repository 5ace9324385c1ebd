//! A driver for tests: sets a device up through its registers and drives its rings by hand, as
//! carefully or as wrongly as a test wants.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};
use vm_memory::{Bytes, GuestAddress};

use super::worker::{ThreadStart, share_one_heap};
use crate::vmm::bus::BusDevice;
use crate::vmm::memory::GuestMemory;
use crate::vmm::transport::VirtioDevice;
use crate::vmm::transport::mmio::MmioTransport;

pub const EVENT_IDX: u64 = 1 << 29;
pub const VERSION_1: u64 = 1 << 32;
pub const QUEUE_SIZE: u16 = 256;
pub const WRITE: u16 = 2;
pub const NEXT: u16 = 1;
pub const NEEDS_RESET: u32 = 64;

/// RAM below a hole and RAM above it, so that buffers can cross regions' ends.
pub const LOW_BYTES: u64 = 64 << 20;
pub const HIGH_START: u64 = 4 << 30;
pub const HIGH_BYTES: u64 = 1 << 20;

/// The hook of a sandbox: allows exactly what the role says that it needs. Anything else kills the
/// test process, but for opening files, which is only refused: the tests' own threads made heaps
/// before anyone could say [`share_one_heap`], and glibc looks into `/proc` when it trims those.
pub fn sandbox_hook() -> ThreadStart {
    share_one_heap();
    Arc::new(|role| {
        let requests = role.ioctls().iter().map(|request| {
            let is_request =
                SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, *request).unwrap();
            SeccompRule::new(vec![is_request]).unwrap()
        });
        let mut rules: BTreeMap<_, _> = role.system_calls().map(|call| (call, Vec::new())).collect();
        if let Some(ioctl) = rules.get_mut(&libc::SYS_ioctl) {
            ioctl.extend(requests);
        }
        let (kill, allow) = (SeccompAction::KillProcess, SeccompAction::Allow);
        rules.insert(libc::SYS_openat, Vec::new());
        let opening = BTreeMap::from([(libc::SYS_openat, Vec::new())]);
        let refuse = SeccompAction::Errno(libc::EACCES as u32);
        for (rules, mismatch, matched) in [(opening, allow.clone(), refuse), (rules, kill, allow)] {
            let filter = SeccompFilter::new(rules, mismatch, matched, TargetArch::x86_64).unwrap();
            seccompiler::apply_filter(&BpfProgram::try_from(filter).unwrap()).unwrap();
        }
        Ok(())
    })
}

pub fn memory() -> GuestMemory {
    let ranges = [(GuestAddress(0), LOW_BYTES as usize), (GuestAddress(HIGH_START), HIGH_BYTES as usize)];
    GuestMemory::from_ranges(&ranges).unwrap()
}

/// One descriptor: address, length, flags without NEXT.
pub type Buffer = (u64, u32, u16);

pub struct Ring {
    base: u64,
    pub available: u16,
    used: u16,
    next_descriptor: u16,
    size: u16,
}

impl Ring {
    pub fn descriptors(&self) -> u64 {
        self.base
    }
    pub fn available_ring(&self) -> u64 {
        self.base + 0x1000
    }
    pub fn used_ring(&self) -> u64 {
        self.base + 0x2000
    }
}

pub struct Driver {
    pub transport: MmioTransport,
    pub memory: GuestMemory,
    pub rings: Vec<Ring>,
    pub interrupts: u64,
    event_idx: bool,
}

impl Driver {
    pub fn new(device: impl VirtioDevice + 'static) -> Self {
        let memory = memory();
        let transport = MmioTransport::new(Box::new(device), memory.clone()).unwrap();
        Self { transport, memory, rings: Vec::new(), interrupts: 0, event_idx: false }
    }

    pub fn read(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.transport.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub fn write(&mut self, offset: u64, value: u32) {
        self.transport.write(offset, &value.to_le_bytes());
    }

    pub fn status(&mut self) -> u32 {
        self.read(0x70)
    }

    pub fn offered(&mut self) -> u64 {
        self.write(0x14, 0);
        let low = self.read(0x10);
        self.write(0x14, 1);
        u64::from(self.read(0x10)) << 32 | u64::from(low)
    }

    /// All the way to DRIVER_OK with these features (and VERSION_1).
    pub fn start(&mut self, features: u64) {
        self.negotiate(features);
        self.set_up_queues();
        self.write(0x70, 15);
        assert_eq!(self.status(), 15);
    }

    pub fn negotiate(&mut self, features: u64) {
        self.write(0x70, 0);
        self.write(0x70, 1);
        self.write(0x70, 3);
        let features = features | VERSION_1;
        self.write(0x24, 0);
        self.write(0x20, features as u32);
        self.write(0x24, 1);
        self.write(0x20, (features >> 32) as u32);
        self.write(0x70, 11);
        assert_eq!(self.status(), 11, "the features {features:#x} were refused");
        self.event_idx = features & EVENT_IDX != 0;
    }

    pub fn set_up_queues(&mut self) {
        self.rings.clear();
        for index in 0.. {
            self.write(0x30, index);
            let max = self.read(0x34);
            if max == 0 {
                return;
            }
            let base = 0x10000 * u64::from(index + 1);
            self.memory.write_slice(&[0; 0x4000], GuestAddress(base)).unwrap();
            let size = max.min(u32::from(QUEUE_SIZE));
            let ring = Ring { base, available: 0, used: 0, next_descriptor: 0, size: size as u16 };
            self.write(0x38, size);
            for (register, address) in
                [(0x80, ring.descriptors()), (0x90, ring.available_ring()), (0xa0, ring.used_ring())]
            {
                self.write(register, address as u32);
                self.write(register + 4, (address >> 32) as u32);
            }
            self.write(0x44, 1);
            assert_eq!(self.read(0x44), 1);
            self.rings.push(ring);
        }
    }

    pub fn write_descriptor(&self, queue: usize, index: u16, address: u64, len: u32, flags: u16, next: u16) {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&address.to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        let at = self.rings[queue].descriptors() + 16 * u64::from(index);
        self.memory.write_slice(&raw, GuestAddress(at)).unwrap();
    }

    /// Makes a chain available; returns its head. Not visible to the device before `publish`.
    pub fn add(&mut self, queue: usize, buffers: &[Buffer]) -> u16 {
        let size = self.rings[queue].size;
        let head = self.rings[queue].next_descriptor;
        for (at, (address, len, flags)) in buffers.iter().enumerate() {
            let index = (head + at as u16) % size;
            let (flags, next) = match at + 1 < buffers.len() {
                true => (flags | NEXT, (index + 1) % size),
                false => (*flags, 0),
            };
            self.write_descriptor(queue, index, *address, *len, flags, next);
        }
        self.rings[queue].next_descriptor = (head + buffers.len() as u16) % size;
        self.add_head(queue, head);
        head
    }

    pub fn add_head(&mut self, queue: usize, head: u16) {
        let size = self.rings[queue].size;
        let ring = &mut self.rings[queue];
        let at = ring.available_ring() + 4 + 2 * u64::from(ring.available % size);
        self.memory.write_obj(head.to_le(), GuestAddress(at)).unwrap();
        ring.available = ring.available.wrapping_add(1);
    }

    pub fn publish(&mut self, queue: usize) {
        let ring = &self.rings[queue];
        let at = GuestAddress(ring.available_ring() + 2);
        self.memory.store(ring.available.to_le(), at, Ordering::Release).unwrap();
        self.write(0x50, queue as u32);
    }

    /// Asks for an interrupt at the next used buffer, or (event index) after `count` of them.
    pub fn want_interrupt_after(&mut self, queue: usize, count: u16) {
        let size = self.rings[queue].size;
        let ring = &self.rings[queue];
        let at = ring.available_ring() + 4 + 2 * u64::from(size);
        let event = ring.used.wrapping_add(count - 1);
        self.memory.write_obj(event.to_le(), GuestAddress(at)).unwrap();
    }

    pub fn used_index(&self, queue: usize) -> u16 {
        let at = GuestAddress(self.rings[queue].used_ring() + 2);
        u16::from_le(self.memory.load(at, Ordering::Acquire).unwrap())
    }

    /// The next used element, waiting up to five seconds for it.
    pub fn used(&mut self, queue: usize) -> (u16, u32) {
        self.used_within(queue, Duration::from_secs(5)).expect("the device used no buffer in time")
    }

    pub fn used_within(&mut self, queue: usize, timeout: Duration) -> Option<(u16, u32)> {
        let deadline = Instant::now() + timeout;
        while self.used_index(queue) == self.rings[queue].used {
            if Instant::now() > deadline {
                return None;
            }
            self.wait_interrupt(Duration::from_millis(1));
        }
        let size = self.rings[queue].size;
        let ring = &mut self.rings[queue];
        let at = ring.used_ring() + 4 + 8 * u64::from(ring.used % size);
        ring.used = ring.used.wrapping_add(1);
        let [id, len]: [u32; 2] = self.memory.read_obj(GuestAddress(at)).unwrap();
        Some((id as u16, len))
    }

    /// Waits for an interrupt; counts and acknowledges it.
    pub fn wait_interrupt(&mut self, timeout: Duration) -> bool {
        let mut poll =
            libc::pollfd { fd: self.transport.irq().as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid `pollfd`.
        let ready = unsafe { libc::poll(&mut poll, 1, timeout.as_millis() as i32) } == 1;
        if ready {
            self.interrupts += self.transport.irq().read().unwrap();
            let status = self.read(0x60);
            self.write(0x64, status);
        }
        ready
    }

    /// Waits until the device asks for a reset.
    pub fn wait_needs_reset(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.status() & NEEDS_RESET == 0 {
            assert!(Instant::now() < deadline, "the device did not ask for a reset");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn put(&self, address: u64, data: &[u8]) {
        self.memory.write_slice(data, GuestAddress(address)).unwrap();
    }

    pub fn get(&self, address: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.memory.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }
}

/// Runs a tool of the host and returns its output; a failure of the tool fails the test.
pub fn tool(name: &str, arguments: &[&str]) -> io::Result<String> {
    let output = std::process::Command::new(name).args(arguments).output()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{name} {arguments:?}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(text)
}
