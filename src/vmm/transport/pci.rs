//! virtio over PCI (virtio 1.2, section 4.1), without the legacy interface: one function with one BAR.
//!
//! ```text
//!   0x0000  common configuration     features, status, queues
//!   0x1000  ISR status               for drivers without MSI-X, who poll
//!   0x2000  device configuration
//!   0x3000  notifications            a doorbell of 4 bytes for each queue
//!   0x4000  MSI-X table              one vector for each queue, and one for the configuration
//!   0x5000  MSI-X pending bits
//! ```
//!
//! For the machine: [`PciTransport::new`] takes the device; put the result into a slot of the bus
//! ([`PciFunction`]) and its BAR on the MMIO bus ([`BusDevice`], [`PciTransport::doorbells`]). A
//! notification that reaches the register file all the same works, too.
//!
//! A vCPU thread in here makes the system calls of the MMIO transport, and those that connect vectors
//! and notifications to KVM.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_DRIVER_OK;
use virtio_bindings::virtio_ids::{VIRTIO_ID_BLOCK, VIRTIO_ID_NET, VIRTIO_ID_VSOCK};
use vmm_sys_util::eventfd::EventFd;

use super::driver::{DriverState, TransportInterrupt, set_high, set_low};
use super::{Interrupt, Transport, VirtioDevice};
use crate::vmm::bus::BusDevice;
use crate::vmm::memory::GuestMemory;
use crate::vmm::pci::bars::Doorbell;
use crate::vmm::pci::config::{ConfigSpace, Identity};
use crate::vmm::pci::msix::{ENTRY_BYTES, MessageRoutes, Msix};
use crate::vmm::pci::{Bar, PciFunction};

/// Length of the BAR.
pub const BAR_BYTES: u32 = 0x8000;
/// Most vectors, and so most queues but one: the table has a page to itself.
pub const VECTORS_MAX: u16 = 32;

const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
const AREA_BYTES: u64 = 0x1000;
const NOTIFY_MULTIPLIER: u32 = 4;

const VENDOR: u16 = 0x1af4;
/// Device ids of virtio 1.x start here.
const DEVICE_ID_BASE: u16 = 0x1040;
/// 1 and more: no transitional device.
const REVISION: u8 = 1;
const NO_VECTOR: u16 = 0xffff;

const CAPABILITY_MSIX: u8 = 0x11;
const CAPABILITY_VENDOR: u8 = 0x09;
/// Kinds of virtio capabilities.
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;
/// Offsets in the capability that is a window to the BAR.
const WINDOW_BAR: u16 = 4;
const WINDOW_OFFSET: u16 = 8;
const WINDOW_LENGTH: u16 = 12;
const WINDOW_DATA: u16 = 16;

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;

/// What device threads and the register file share.
struct Vectors {
    msix: Arc<Msix>,
    /// As in message control; a device thread looks at each interrupt.
    msix_enabled: AtomicBool,
    queues: Vec<AtomicU16>,
    config: AtomicU16,
    isr: AtomicU8,
    config_generation: AtomicU8,
    needs_reset: AtomicBool,
}

impl Vectors {
    fn raise(&self, vector: &AtomicU16, isr: u8) {
        if !self.msix_enabled.load(Ordering::SeqCst) {
            self.isr.fetch_or(isr, Ordering::SeqCst);
        } else if let Some(event) = self.msix.event(vector.load(Ordering::SeqCst)) {
            // Fails only when the counter is full, and then the vector is signalled already.
            let _ = event.write(1);
        }
    }
}

impl Interrupt for Vectors {
    fn signal_queue(&self, queue_index: u16) {
        if let Some(vector) = self.queues.get(usize::from(queue_index)) {
            self.raise(vector, ISR_QUEUE);
        }
    }

    fn queue_event(&self, queue_index: u16) -> Option<Arc<EventFd>> {
        // Vectors don't change once the driver is ready, so the event stays the queue's.
        let vector = self.queues.get(usize::from(queue_index))?.load(Ordering::SeqCst);
        let enabled = self.msix_enabled.load(Ordering::SeqCst);
        self.msix.event(vector).filter(|_| enabled).cloned()
    }

    fn signal_config(&self) {
        self.config_generation.fetch_add(1, Ordering::SeqCst);
        self.raise(&self.config, ISR_CONFIG);
    }

    fn signal_needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.raise(&self.config, ISR_CONFIG);
    }
}

impl TransportInterrupt for Vectors {
    fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    fn reset(&self) {
        for vector in self.queues.iter().chain([&self.config]) {
            vector.store(NO_VECTOR, Ordering::SeqCst);
        }
        self.isr.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
    }
}

/// One function: its configuration space and its BAR.
pub struct PciTransport {
    driver: DriverState<Vectors>,
    config: ConfigSpace,
    msix_control: u16,
    window: u16,
}

impl PciTransport {
    /// The BAR is at `bar_address` until the guest moves it; the vectors have the GSIs from `first_gsi`
    /// on, [`VECTORS_MAX`] at most.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        memory: GuestMemory,
        routes: Arc<dyn MessageRoutes>,
        bar_address: u32,
        first_gsi: u32,
    ) -> io::Result<Self> {
        let queue_count = device.queue_sizes().len();
        let vector_count = u16::try_from(queue_count + 1).ok().filter(|&count| count <= VECTORS_MAX);
        let vector_count = vector_count.ok_or_else(|| io::Error::other("more queues than vectors"))?;
        let mut config = ConfigSpace::new(identity(device.device_type()));
        config.add_bar(bar_address, BAR_BYTES);
        let msix_capability = add_msix(&mut config, vector_count);
        let window = add_virtio_capabilities(&mut config, queue_count as u32);
        let vectors = Vectors {
            msix: Arc::new(Msix::new(vector_count, first_gsi, routes)?),
            msix_enabled: AtomicBool::new(false),
            queues: (0..queue_count).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            config: AtomicU16::new(NO_VECTOR),
            isr: AtomicU8::new(0),
            config_generation: AtomicU8::new(0),
            needs_reset: AtomicBool::new(false),
        };
        let driver = DriverState::new(device, memory, Arc::new(vectors), true)?;
        Ok(Self { driver, config, msix_control: msix_capability + 2, window })
    }

    /// Where in the BAR the driver's notifications go.
    pub fn doorbells(&self) -> Vec<Doorbell> {
        let at = |index: usize| NOTIFY + index as u64 * u64::from(NOTIFY_MULTIPLIER);
        let doorbell =
            |(index, event): (usize, &Arc<EventFd>)| Doorbell { offset: at(index), event: event.clone() };
        self.driver.kicks.iter().enumerate().map(doorbell).collect()
    }

    fn msix_control_written(&self) {
        let vectors = &self.driver.interrupt;
        vectors.msix.set_control(self.config.u16_at(self.msix_control));
        vectors.msix_enabled.store(vectors.msix.enabled(), Ordering::SeqCst);
    }

    /// The vector register of the selected queue, or of the configuration.
    fn vector(&self, of_queue: bool) -> Option<&AtomicU16> {
        let vectors = &self.driver.interrupt;
        if of_queue { vectors.queues.get(self.driver.queue_select as usize) } else { Some(&vectors.config) }
    }

    fn read_common(&self, offset: u64, data: &mut [u8]) {
        let driver = &self.driver;
        let queue = driver.selected_queue().copied().unwrap_or_default();
        let vector = |of_queue| self.vector(of_queue).map_or(NO_VECTOR, |v| v.load(Ordering::SeqCst));
        let value: u64 = match (offset, data.len()) {
            (0x00, 4) => driver.device_features_select.into(),
            (0x04, 4) => driver.device_features().into(),
            (0x08, 4) => driver.driver_features_select.into(),
            (0x0c, 4) => driver.driver_features().into(),
            (0x10, 2) => vector(false).into(),
            (0x12, 2) => driver.queues.len() as u64,
            (0x14, 1) => driver.status().into(),
            (0x15, 1) => driver.interrupt.config_generation.load(Ordering::SeqCst).into(),
            (0x16, 2) => driver.queue_select.into(),
            (0x18, 2) => queue.size.into(),
            (0x1a, 2) => vector(true).into(),
            (0x1c, 2) => queue.ready.into(),
            (0x1e, 2) => driver.queue_select.into(),
            (0x20 | 0x28 | 0x30, 4 | 8) => address_of(&queue, offset),
            (0x24 | 0x2c | 0x34, 4) => address_of(&queue, offset - 4) >> 32,
            _ => 0,
        };
        data.copy_from_slice(&value.to_le_bytes()[..data.len()]);
    }

    fn write_common(&mut self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let driver = &mut self.driver;
        match (offset, data.len()) {
            (0x00, 4) => driver.device_features_select = value as u32,
            (0x08, 4) => driver.driver_features_select = value as u32,
            (0x0c, 4) => driver.set_driver_features(value as u32),
            (0x10, 2) => self.set_vector(false, value as u16),
            (0x14, 1) => driver.set_status(value as u32),
            (0x16, 2) => driver.queue_select = value as u32,
            (0x1a, 2) => self.set_vector(true, value as u16),
            // A driver can't take a queue back but by a reset.
            (0x1c, 2) if value == 1 => driver.set_queue_ready(true),
            (0x18, 2) | (0x20..=0x37, 4 | 8) => self.write_queue(offset, data.len(), value),
            _ => {}
        }
    }

    /// What isn't a vector of ours reads back as "none", which tells the driver. Drivers set vectors
    /// before they are ready; who wants others resets the device.
    fn set_vector(&self, of_queue: bool, vector: u16) {
        if self.driver.has(VIRTIO_CONFIG_S_DRIVER_OK) {
            return;
        }
        let vector = if vector < self.driver.interrupt.msix.vectors() { vector } else { NO_VECTOR };
        if let Some(register) = self.vector(of_queue) {
            register.store(vector, Ordering::SeqCst);
        }
    }

    /// Size and addresses: they may change only while the queue isn't ready.
    fn write_queue(&mut self, offset: u64, width: usize, value: u64) {
        let Some(queue) = self.driver.queue_in_setup().filter(|queue| !queue.ready) else { return };
        let address = match offset {
            0x18 => {
                queue.size = value as u32;
                return;
            }
            0x20 | 0x24 => &mut queue.descriptors,
            0x28 | 0x2c => &mut queue.available,
            0x30 | 0x34 => &mut queue.used,
            _ => return,
        };
        match (offset.is_multiple_of(8), width) {
            (true, 8) => *address = value,
            (true, _) => set_low(address, value as u32),
            (false, 4) => set_high(address, value as u32),
            (false, _) => {}
        }
    }

    /// The window of the PCI configuration access capability: where in the BAR, if it makes sense.
    fn window(&self, length: usize) -> Option<u64> {
        let mut bar = [0];
        self.config.read(self.window + WINDOW_BAR, &mut bar);
        let offset = u64::from(self.config.u32_at(self.window + WINDOW_OFFSET));
        let wanted = self.config.u32_at(self.window + WINDOW_LENGTH) as usize;
        let fits = matches!(length, 1 | 2 | 4) && length == wanted && offset.is_multiple_of(length as u64);
        (bar == [0] && fits && offset + length as u64 <= BAR_BYTES.into()).then_some(offset)
    }
}

fn address_of(queue: &super::driver::QueueSetup, offset: u64) -> u64 {
    match offset {
        0x20 => queue.descriptors,
        0x28 => queue.available,
        _ => queue.used,
    }
}

fn identity(device_type: u32) -> Identity {
    let class = match device_type {
        VIRTIO_ID_BLOCK => [0x01, 0x80, 0x00],
        VIRTIO_ID_NET => [0x02, 0x00, 0x00],
        VIRTIO_ID_VSOCK => [0x07, 0x80, 0x00],
        _ => [0x00, 0xff, 0x00],
    };
    // Virtio's device types are small numbers.
    let device = DEVICE_ID_BASE + device_type as u16;
    Identity {
        vendor: VENDOR,
        device,
        revision: REVISION,
        class,
        subsystem_vendor: VENDOR,
        subsystem: device,
    }
}

fn add_msix(config: &mut ConfigSpace, vectors: u16) -> u16 {
    let mut body = [0; 10];
    body[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
    // The low three bits say which BAR: 0.
    body[2..6].copy_from_slice(&(TABLE as u32).to_le_bytes());
    body[6..].copy_from_slice(&(PENDING as u32).to_le_bytes());
    let mut writable = [0; 10];
    // Enable, and the mask of the whole function.
    writable[1] = 0xc0;
    config.add_capability(CAPABILITY_MSIX, &body, &writable)
}

/// `struct virtio_pci_cap`, without its first two bytes.
fn virtio_capability(kind: u8, length: u8, offset: u64, bytes: u32) -> [u8; 14] {
    let mut body = [0; 14];
    body[0] = length;
    body[1] = kind;
    body[6..10].copy_from_slice(&(offset as u32).to_le_bytes());
    body[10..].copy_from_slice(&bytes.to_le_bytes());
    body
}

/// Gives the offset of the window's capability.
fn add_virtio_capabilities(config: &mut ConfigSpace, queues: u32) -> u16 {
    for (kind, offset, bytes) in
        [(COMMON_CFG, COMMON, 0x38), (ISR_CFG, ISR, 1), (DEVICE_CFG, DEVICE, AREA_BYTES as u32)]
    {
        config.add_capability(CAPABILITY_VENDOR, &virtio_capability(kind, 16, offset, bytes), &[0; 14]);
    }
    let mut notify = [0; 18];
    notify[..14].copy_from_slice(&virtio_capability(NOTIFY_CFG, 20, NOTIFY, queues * NOTIFY_MULTIPLIER));
    notify[14..].copy_from_slice(&NOTIFY_MULTIPLIER.to_le_bytes());
    config.add_capability(CAPABILITY_VENDOR, &notify, &[0; 18]);
    let mut window = [0; 18];
    window[..14].copy_from_slice(&virtio_capability(PCI_CFG, 20, 0, 0));
    let mut writable = [0; 18];
    writable[2] = 0xff;
    writable[6..14].fill(0xff);
    config.add_capability(CAPABILITY_VENDOR, &window, &writable)
}

impl Transport for PciTransport {
    fn reset(&mut self) {
        self.driver.reset();
        self.driver.interrupt.msix.reset();
        self.driver.interrupt.msix_enabled.store(false, Ordering::SeqCst);
        self.config.reset();
    }
}

impl PciFunction for PciTransport {
    fn read_config(&mut self, offset: u16, data: &mut [u8]) {
        if offset >= self.window + WINDOW_DATA && offset < self.window + WINDOW_DATA + 4 {
            data.fill(0);
            if offset == self.window + WINDOW_DATA
                && let Some(at) = self.window(data.len())
            {
                self.read(at, data);
            }
            return;
        }
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: u16, data: &[u8]) {
        if offset == self.window + WINDOW_DATA
            && let Some(at) = self.window(data.len())
        {
            return self.write(at, data);
        }
        self.config.write(offset, data);
        let end = offset + data.len() as u16;
        if offset < self.msix_control + 2 && end > self.msix_control {
            self.msix_control_written();
        }
    }

    fn bar(&self) -> Option<Bar> {
        Some(self.config.bar())
    }
}

impl BusDevice for PciTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let within = offset % AREA_BYTES;
        match offset - within {
            COMMON => self.read_common(within, data),
            // Reading takes what is there.
            ISR if within == 0 => {
                if let Some(first) = data.first_mut() {
                    *first = self.driver.interrupt.isr.swap(0, Ordering::SeqCst);
                }
            }
            DEVICE => self.driver.read_config(within, data),
            TABLE if within < u64::from(VECTORS_MAX) * ENTRY_BYTES => {
                self.driver.interrupt.msix.read_table(within, data);
            }
            PENDING => self.driver.interrupt.msix.read_pending(within, data),
            _ => {}
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let within = offset % AREA_BYTES;
        match offset - within {
            COMMON => self.write_common(within, data),
            DEVICE => self.driver.write_config(within, data),
            NOTIFY if within.is_multiple_of(NOTIFY_MULTIPLIER.into()) => {
                self.driver.notify((within / u64::from(NOTIFY_MULTIPLIER)) as u32);
            }
            TABLE => self.driver.interrupt.msix.write_table(within, data),
            _ => {}
        }
    }
}

#[cfg(test)]
#[path = "pci_tests.rs"]
mod tests;
