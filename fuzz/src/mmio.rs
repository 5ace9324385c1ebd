//! The MMIO transport as the driver meets it.

use std::os::fd::{AsRawFd as _, RawFd};

use vmctl::vmm::bus::BusDevice as _;
use vmctl::vmm::memory::GuestMemory;
use vmctl::vmm::transport::mmio::MmioTransport;
use vmctl::vmm::transport::{Transport as _, VirtioDevice};

use super::virtio::Transport;

/// How often the fuzzer's thread lets the device's run before it goes on without.
const TURNS_MAX: usize = 200;

/// Waits until the device has taken note of all notifications, as far as it looks at all.
pub fn wait_until_taken(events: &[RawFd]) {
    let pollfd = |&fd: &RawFd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut fds: Vec<_> = events.iter().map(pollfd).collect();
    for _ in 0..TURNS_MAX {
        // SAFETY: so many valid `pollfd`s.
        if unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, 0) } == 0 {
            return;
        }
        std::thread::yield_now();
    }
}

pub struct Mmio(MmioTransport);

impl Mmio {
    pub fn new(device: impl VirtioDevice + 'static, memory: GuestMemory) -> Self {
        Self(MmioTransport::new(Box::new(device), memory).expect("a transport"))
    }

    fn get(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.0.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&mut self, offset: u64, value: u32) {
        self.0.write(offset, &value.to_le_bytes());
    }
}

impl Transport for Mmio {
    fn negotiate(&mut self, refused: u64) {
        const VERSION_1: u64 = 1 << 32;
        for status in [0, 1, 3] {
            self.set(0x70, status);
        }
        for half in [0, 1] {
            self.set(0x14, half);
            self.set(0x24, half);
            let offered = self.get(0x10);
            self.set(0x20, offered & !((refused & !VERSION_1) >> (32 * half)) as u32);
        }
        self.set(0x70, 11);
    }

    fn queue_sizes(&mut self) -> Vec<u16> {
        let mut sizes = Vec::new();
        loop {
            self.set(0x30, sizes.len() as u32);
            match self.get(0x34) {
                0 => return sizes,
                size => sizes.push(size as u16),
            }
        }
    }

    fn set_up_queue(&mut self, queue: u16, size: u16, descriptors: u64, available: u64, used: u64) {
        self.set(0x30, queue.into());
        self.set(0x38, size.into());
        for (register, address) in [(0x80, descriptors), (0x90, available), (0xa0, used)] {
            self.set(register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
        self.set(0x44, 1);
    }

    fn driver_ok(&mut self) {
        self.set(0x70, 15);
    }

    fn kick(&mut self, queue: u16) {
        self.set(0x50, queue.into());
        let events: Vec<_> = self.0.notifiers().map(|notifier| notifier.event.as_raw_fd()).collect();
        wait_until_taken(&events);
    }

    fn reset(&mut self) {
        self.0.reset();
    }

    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.0.write(offset, data);
    }

    fn read_config(&mut self, offset: u64, data: &mut [u8]) {
        self.0.read(0x100 + offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.0.write(0x100 + offset, data);
    }
}
