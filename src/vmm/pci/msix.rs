//! MSI-X (PCI 3.0, section 6.8.2): a table of messages, each an event descriptor that KVM turns into that
//! message for as long as the vector isn't masked.
//!
//! ```text
//!   masked:    device ── write ──▶ eventfd counts                        (the pending bit)
//!   unmasked:  device ── write ──▶ eventfd ──▶ irqfd ──▶ GSI's route ──▶ the guest's local APIC
//! ```
//!
//! So a device only ever writes to the descriptor, whatever the guest does to the table at that moment:
//! masking takes the descriptor away from KVM, and what is written then stays in it, until unmasking gives
//! it back. The kernel may write to it, too (vhost).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bytes of a table entry.
pub const ENTRY_BYTES: u64 = 16;
/// Message control: enabled, and all vectors masked.
pub const CONTROL_ENABLE: u16 = 1 << 15;
pub const CONTROL_FUNCTION_MASK: u16 = 1 << 14;

const VECTOR_MASKED: u32 = 1;

/// What a vector sends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Message {
    pub address: u64,
    pub data: u32,
}

/// Who turns descriptors into interrupts: KVM, or a test. A call that fails leaves the vector silent, which
/// is the guest's loss alone; there is nobody on a vCPU's thread to tell.
pub trait MessageRoutes: Send + Sync {
    /// From now on this GSI means this message.
    fn set_route(&self, gsi: u32, message: Message) -> std::io::Result<()>;
    /// What is written to the descriptor raises the GSI.
    fn connect(&self, event: &EventFd, gsi: u32) -> std::io::Result<()>;
    fn disconnect(&self, event: &EventFd, gsi: u32) -> std::io::Result<()>;
}

#[derive(Clone, Copy)]
struct Entry {
    message: Message,
    control: u32,
    /// What KVM's route for the vector's GSI says.
    routed: Option<Message>,
    connected: bool,
}

impl Entry {
    const INITIAL: Self = Self {
        message: Message { address: 0, data: 0 },
        control: VECTOR_MASKED,
        routed: None,
        connected: false,
    };
}

struct Table {
    control: u16,
    entries: Vec<Entry>,
}

pub struct Msix {
    routes: Arc<dyn MessageRoutes>,
    first_gsi: u32,
    events: Vec<Arc<EventFd>>,
    table: Mutex<Table>,
}

impl Msix {
    /// The vectors have the GSIs from `first_gsi` on.
    pub fn new(vectors: u16, first_gsi: u32, routes: Arc<dyn MessageRoutes>) -> std::io::Result<Self> {
        let events =
            (0..vectors).map(|_| EventFd::new(EFD_NONBLOCK).map(Arc::new)).collect::<Result<Vec<_>, _>>()?;
        let table = Table { control: 0, entries: vec![Entry::INITIAL; vectors.into()] };
        Ok(Self { routes, first_gsi, events, table: Mutex::new(table) })
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // Nothing panics while it holds the lock, and a panic ends the process.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn vectors(&self) -> u16 {
        self.events.len() as u16
    }

    /// What is written here becomes the vector's interrupt, now or when it is unmasked.
    pub fn event(&self, vector: u16) -> Option<&Arc<EventFd>> {
        self.events.get(usize::from(vector))
    }

    pub fn enabled(&self) -> bool {
        self.lock().control & CONTROL_ENABLE != 0
    }

    /// The guest wrote the message control word.
    pub fn set_control(&self, control: u16) {
        let mut table = self.lock();
        let was_enabled = table.control & CONTROL_ENABLE != 0;
        table.control = control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        self.settle_all(&mut table);
        if was_enabled && table.control & CONTROL_ENABLE == 0 {
            self.drain();
        }
    }

    /// Back to the state after construction.
    pub fn reset(&self) {
        let mut table = self.lock();
        table.control = 0;
        for entry in &mut table.entries {
            *entry = Entry { connected: entry.connected, routed: entry.routed, ..Entry::INITIAL };
        }
        self.settle_all(&mut table);
        self.drain();
    }

    /// Nothing is pending any more.
    fn drain(&self) {
        for event in &self.events {
            // Non-blocking: an error only says that nothing was pending.
            let _ = event.read();
        }
    }

    fn settle_all(&self, table: &mut Table) {
        for vector in 0..table.entries.len() {
            self.settle(table, vector);
        }
    }

    /// Makes KVM do what the table says about this vector.
    fn settle(&self, table: &mut Table, vector: usize) {
        let delivers = table.control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK) == CONTROL_ENABLE;
        let (Some(entry), Some(event)) = (table.entries.get_mut(vector), self.events.get(vector)) else {
            return;
        };
        let gsi = self.first_gsi + vector as u32;
        let unmasked = delivers && entry.control & VECTOR_MASKED == 0;
        if unmasked && entry.routed != Some(entry.message) {
            entry.routed = self.routes.set_route(gsi, entry.message).is_ok().then_some(entry.message);
        }
        if unmasked == entry.connected {
            return;
        }
        if unmasked {
            let pending = event.read().is_ok();
            entry.connected = self.routes.connect(event, gsi).is_ok();
            if pending {
                // Fails only when the counter is full, and then it is signalled already.
                let _ = event.write(1);
            }
        } else {
            entry.connected = self.routes.disconnect(event, gsi).is_err();
        }
    }

    /// Reads of the table: 4 or 8 bytes, aligned. Anything else reads as zeroes.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let Some((vector, field)) = place(offset, data.len()) else { return };
        let table = self.lock();
        let Some(entry) = table.entries.get(vector) else { return };
        let mut bytes = [0; ENTRY_BYTES as usize];
        bytes[..8].copy_from_slice(&entry.message.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&entry.message.data.to_le_bytes());
        bytes[12..].copy_from_slice(&entry.control.to_le_bytes());
        data.copy_from_slice(&bytes[field..field + data.len()]);
    }

    /// Writes of the table: 4 or 8 bytes, aligned. Anything else is ignored.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let Some((vector, field)) = place(offset, data.len()) else { return };
        let mut table = self.lock();
        let Some(entry) = table.entries.get_mut(vector) else { return };
        for (index, word) in data.chunks_exact(4).enumerate() {
            let value = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            let address = entry.message.address;
            match field + index * 4 {
                // A message's address is a multiple of 4.
                0 => entry.message.address = address & !0xffff_ffff | u64::from(value & !3),
                4 => entry.message.address = address & 0xffff_ffff | u64::from(value) << 32,
                8 => entry.message.data = value,
                _ => entry.control = value & VECTOR_MASKED,
            }
        }
        self.settle(&mut table, vector);
    }

    /// Reads of the pending bits.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        let table = self.lock();
        for (index, byte) in data.iter_mut().enumerate() {
            let first = (offset as usize).saturating_add(index).saturating_mul(8);
            *byte = (0..8).fold(0, |bits, bit| {
                let vector = first.saturating_add(bit);
                let pending = table.entries.get(vector).is_some_and(|entry| !entry.connected)
                    && self.events.get(vector).is_some_and(|event| is_readable(event));
                bits | u8::from(pending) << bit
            });
        }
    }
}

impl Drop for Msix {
    /// KVM holds on to a connected descriptor, and its GSI is to be given to another.
    fn drop(&mut self) {
        self.reset();
    }
}

/// The entry, and the offset in it.
fn place(offset: u64, length: usize) -> Option<(usize, usize)> {
    let aligned = matches!(length, 4 | 8) && offset.is_multiple_of(length as u64);
    aligned.then_some(((offset / ENTRY_BYTES) as usize, (offset % ENTRY_BYTES) as usize))
}

fn is_readable(event: &EventFd) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let fd = crate::vmm::device::worker::event_fd(event);
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
#[path = "msix_tests.rs"]
mod tests;
