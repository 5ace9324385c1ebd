//! How the guest's ACPI code learns of devices that come and are to go, and how it lets them go. Three
//! registers of 32 bits, a bit for each slot, behind an interrupt of the Generic Event Device:
//!
//! ```text
//!   0x620  read    devices that came since the last read     → Notify(slot, device check)
//!   0x624  read    devices that are to go                    → Notify(slot, eject request)
//!   0x628  write   these slots are ejected                   ← _EJ0
//! ```
//!
//! A device goes only if somebody here asked for it: an ejection that nobody asked for is ignored, for
//! what a guest does on its own account must not take a disk from what was declared.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::root::PciRoot;
use crate::vmm::bus::BusDevice;
use crate::vmm::event::{EventSender, MachineEvent};

pub const PORTS_START: u16 = 0x620;
pub const PORTS: u16 = 12;
pub const ADDED: u16 = 0;
pub const ASKED: u16 = 4;
pub const EJECT: u16 = 8;

#[derive(Clone, Copy, Default)]
struct State {
    /// Not yet read.
    added: u32,
    /// Not yet read.
    asked: u32,
    /// Asked for and not yet ejected.
    leaving: u32,
}

/// What the machine and the guest's registers share.
pub struct Hotplug {
    state: Mutex<State>,
    interrupt: EventFd,
}

impl Hotplug {
    /// `interrupt` raises the event device's.
    pub fn new(interrupt: EventFd) -> Self {
        Self { state: Mutex::new(State::default()), interrupt }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock, and a panic ends the process.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn raise(&self) {
        // Fails only when the counter is full, and then it is raised already.
        let _ = self.interrupt.write(1);
    }

    /// There is a new device in this slot.
    pub fn added(&self, slot: u8) {
        self.lock().added |= bit(slot);
        self.raise();
    }

    /// Asks the guest to let go of the device in this slot. May be asked again.
    pub fn ask(&self, slot: u8) {
        let mut state = self.lock();
        state.asked |= bit(slot);
        state.leaving |= bit(slot);
        drop(state);
        self.raise();
    }

    pub fn is_leaving(&self, slot: u8) -> bool {
        self.lock().leaving & bit(slot) != 0
    }

    /// The slot is empty.
    pub fn removed(&self, slot: u8) {
        let mut state = self.lock();
        state.added &= !bit(slot);
        state.asked &= !bit(slot);
        state.leaving &= !bit(slot);
    }

    /// The guest starts anew, and finds what is there by looking.
    pub fn reset(&self) {
        let mut state = self.lock();
        state.added = 0;
        state.asked = 0;
    }
}

/// Slots are below 32.
fn bit(slot: u8) -> u32 {
    1_u32.checked_shl(slot.into()).unwrap_or(0)
}

pub struct HotplugRegisters {
    pub hotplug: Arc<Hotplug>,
    pub root: Arc<Mutex<PciRoot>>,
    pub events: EventSender,
}

impl BusDevice for HotplugRegisters {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let [_, _, _, _] = data else { return };
        let mut state = self.hotplug.lock();
        let value = match u16::try_from(offset) {
            Ok(ADDED) => std::mem::take(&mut state.added),
            Ok(ASKED) => std::mem::take(&mut state.asked),
            _ => 0,
        };
        data.copy_from_slice(&value.to_le_bytes());
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let (Ok(EJECT), &[a, b, c, d]) = (u16::try_from(offset), data) else { return };
        let slots = u32::from_le_bytes([a, b, c, d]);
        let ejected = {
            let mut state = self.hotplug.lock();
            let ejected = slots & state.leaving;
            state.leaving &= !ejected;
            state.asked &= !ejected;
            ejected
        };
        for slot in (0..super::SLOTS).filter(|&slot| ejected & bit(slot) != 0) {
            // At once: a guest that looks again right away must not find it.
            self.root.lock().unwrap_or_else(PoisonError::into_inner).hide(slot);
            self.events.send(MachineEvent::Ejected { slot });
        }
    }
}
