//! pvpanic: the port to which a guest's kernel writes its last words (QEMU's docs/specs/pvpanic). A driver
//! finds it by ACPI (`QEMU0001`).

use super::bus::BusDevice;
use super::event::{EventSender, MachineEvent};

/// The kernel is at its end.
const PANICKED: u8 = 1 << 0;
/// It crashed, and has a second kernel that writes the dump.
const CRASH_LOADED: u8 = 1 << 1;

pub struct Pvpanic {
    events: EventSender,
    /// What was said since the last reset. A word said twice says nothing new, and a guest that repeats
    /// itself mustn't fill the event loop's queue.
    said: u8,
}

impl Pvpanic {
    pub fn new(events: EventSender) -> Self {
        Self { events, said: 0 }
    }

    pub fn reset(&mut self) {
        self.said = 0;
    }
}

impl BusDevice for Pvpanic {
    /// Which words are understood.
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let [value] = data {
            *value = PANICKED | CRASH_LOADED;
        }
    }

    fn write(&mut self, _offset: u64, data: &[u8]) {
        let &[word] = data else { return };
        let new = word & (PANICKED | CRASH_LOADED) & !self.said;
        self.said |= new;
        // A driver says one of the two. Should it say both, the end counts.
        if new & PANICKED != 0 {
            self.events.send(MachineEvent::GuestPanicked { dumps: false });
        } else if new & CRASH_LOADED != 0 {
            self.events.send(MachineEvent::GuestPanicked { dumps: true });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, mpsc};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    #[test]
    fn each_word_is_heard_once_until_a_reset() {
        let (queue, events) = mpsc::channel();
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let mut pvpanic = Pvpanic::new(EventSender { queue, wake });
        let mut understood = [0xff];
        pvpanic.read(0, &mut understood);
        assert_eq!(understood, [3]);
        let said = |pvpanic: &mut Pvpanic, data: &[u8]| {
            pvpanic.write(0, data);
            events.try_iter().collect::<Vec<_>>()
        };
        let panicked = || [MachineEvent::GuestPanicked { dumps: false }];
        let crashed = || [MachineEvent::GuestPanicked { dumps: true }];
        for nothing in [&[0][..], &[4], &[0xfc], &[1, 0], &[1, 0, 0, 0], &[]] {
            assert_eq!(said(&mut pvpanic, nothing), []);
        }
        assert_eq!(said(&mut pvpanic, &[2]), crashed());
        assert_eq!(said(&mut pvpanic, &[2]), []);
        assert_eq!(said(&mut pvpanic, &[3]), panicked());
        assert_eq!(said(&mut pvpanic, &[1]), []);
        pvpanic.reset();
        assert_eq!(said(&mut pvpanic, &[0xff]), panicked());
        assert_eq!(said(&mut pvpanic, &[2]), []);
        pvpanic.reset();
        assert_eq!(said(&mut pvpanic, &[2]), crashed());
    }
}
