//! Where BARs are on the MMIO bus: the guest says where each is to be, and here it is decided whether it
//! can be there.
//!
//! A function that stops decoding keeps its place until another one wants it: a guest switches decoding
//! off and on again to learn a BAR's length, and moving the notifications each time costs it dearly.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use super::Bar;
use crate::vmm::bus::{Bus, BusDevice};
use crate::vmm::layout;

/// Who makes KVM turn writes to an address into events. A call that fails costs speed, or is harmless:
/// the same write also reaches the device by way of the bus.
pub trait Notifications: Send + Sync {
    fn connect(&self, address: u64, event: &EventFd);
    fn disconnect(&self, address: u64, event: &EventFd);
}

/// Where in a BAR a write is an event.
pub struct Doorbell {
    pub offset: u64,
    pub event: Arc<EventFd>,
}

/// A BAR's content.
pub struct Window {
    pub bytes: u64,
    pub device: Arc<Mutex<dyn BusDevice>>,
    pub doorbells: Vec<Doorbell>,
}

struct Place {
    window: Window,
    wanted: Bar,
    mapped: Option<u64>,
}

pub struct BarMap {
    bus: Arc<Bus>,
    notifications: Arc<dyn Notifications>,
    places: Mutex<BTreeMap<u8, Place>>,
}

impl BarMap {
    pub fn new(bus: Arc<Bus>, notifications: Arc<dyn Notifications>) -> Self {
        Self { bus, notifications, places: Mutex::new(BTreeMap::new()) }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<u8, Place>> {
        // Nothing panics while it holds the lock, and a panic ends the process.
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn insert(&self, slot: u8, window: Window, wanted: Bar) {
        let mut places = self.lock();
        if let Some(mut old) = places.insert(slot, Place { window, wanted, mapped: None }) {
            self.unmap(&mut old);
        }
        self.settle(&mut places);
    }

    pub fn remove(&self, slot: u8) {
        let mut places = self.lock();
        if let Some(mut place) = places.remove(&slot) {
            self.unmap(&mut place);
        }
        self.settle(&mut places);
    }

    /// The guest wrote the command register or the BAR.
    pub fn want(&self, slot: u8, wanted: Bar) {
        let mut places = self.lock();
        match places.get_mut(&slot) {
            Some(place) if place.wanted != wanted => place.wanted = wanted,
            _ => return,
        }
        self.settle(&mut places);
    }

    /// Moves what is to be elsewhere. A place that is taken goes to whoever decodes; of two that do, to
    /// whoever has it.
    fn settle(&self, places: &mut BTreeMap<u8, Place>) {
        let wanting: Vec<(u64, u64)> = places
            .values()
            .filter(|place| place.wanted.decoding)
            .map(|place| (place.wanted.address.into(), place.window.bytes))
            .collect();
        for place in places.values_mut() {
            let Some(at) = place.mapped else { continue };
            let stays = if place.wanted.decoding {
                at == u64::from(place.wanted.address)
            } else {
                !wanting.iter().any(|&(start, bytes)| start < at + place.window.bytes && at < start + bytes)
            };
            if !stays {
                self.unmap(place);
            }
        }
        for place in places.values_mut() {
            if place.wanted.decoding && place.mapped.is_none() {
                self.map(place);
            }
        }
    }

    fn map(&self, place: &mut Place) {
        let (at, bytes) = (u64::from(place.wanted.address), place.window.bytes);
        let inside = layout::PCI_MEMORY_START <= at && at + bytes <= layout::PCI_MEMORY_END;
        // Where there is RAM, another device or nothing that PCI may use, the BAR answers nowhere.
        if !inside || self.bus.insert(at, bytes, place.window.device.clone()).is_err() {
            return;
        }
        for doorbell in &place.window.doorbells {
            self.notifications.connect(at + doorbell.offset, &doorbell.event);
        }
        place.mapped = Some(at);
    }

    fn unmap(&self, place: &mut Place) {
        let Some(at) = place.mapped.take() else { return };
        for doorbell in &place.window.doorbells {
            self.notifications.disconnect(at + doorbell.offset, &doorbell.event);
        }
        self.bus.remove(at);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    const BYTES: u64 = 0x8000;
    const HOME: u32 = layout::PCI_MEMORY_START as u32;

    /// Answers with its number.
    struct Device(u8);

    impl BusDevice for Device {
        fn read(&mut self, _offset: u64, data: &mut [u8]) {
            data.fill(self.0);
        }
        fn write(&mut self, _offset: u64, _data: &[u8]) {}
    }

    #[derive(Default)]
    struct Connected(Mutex<Vec<u64>>);

    impl Notifications for Connected {
        fn connect(&self, address: u64, _event: &EventFd) {
            self.0.lock().unwrap().push(address);
        }
        fn disconnect(&self, address: u64, _event: &EventFd) {
            let mut connected = self.0.lock().unwrap();
            let at = connected.iter().position(|&other| other == address).expect("disconnected twice");
            connected.remove(at);
        }
    }

    fn window(number: u8) -> Window {
        let event = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let doorbells = vec![Doorbell { offset: 0x3000, event }];
        Window { bytes: BYTES, device: Arc::new(Mutex::new(Device(number))), doorbells }
    }

    fn map(count: u8) -> (BarMap, Arc<Bus>, Arc<Connected>) {
        let (bus, connected) = (Arc::new(Bus::new()), Arc::<Connected>::default());
        let map = BarMap::new(bus.clone(), connected.clone());
        for slot in 0..count {
            let address = HOME + u32::from(slot) * BYTES as u32;
            map.insert(slot, window(slot), Bar { address, decoding: true });
        }
        (map, bus, connected)
    }

    fn answers(bus: &Bus, address: u32) -> Option<u8> {
        let mut data = [0];
        bus.read(address.into(), &mut data).then_some(data[0])
    }

    #[test]
    fn a_bar_moves_with_its_doorbells() {
        let (map, bus, connected) = map(2);
        assert_eq!((answers(&bus, HOME), answers(&bus, HOME + 0x8000)), (Some(0), Some(1)));
        let away = HOME + 0x10_0000;
        map.want(0, Bar { address: away, decoding: true });
        assert_eq!((answers(&bus, HOME), answers(&bus, away)), (None, Some(0)));
        assert!(connected.0.lock().unwrap().contains(&(u64::from(away) + 0x3000)));
        map.remove(0);
        map.remove(1);
        assert_eq!((answers(&bus, away), connected.0.lock().unwrap().len()), (None, 0));
    }

    #[test]
    fn two_bars_can_change_places() {
        let (map, bus, _) = map(2);
        let (here, there) = (HOME, HOME + 0x8000);
        map.want(0, Bar { address: here, decoding: false });
        map.want(0, Bar { address: there, decoding: false });
        map.want(1, Bar { address: there, decoding: false });
        map.want(1, Bar { address: here, decoding: false });
        map.want(0, Bar { address: there, decoding: true });
        map.want(1, Bar { address: here, decoding: true });
        assert_eq!((answers(&bus, here), answers(&bus, there)), (Some(1), Some(0)));
    }

    #[test]
    fn a_bar_outside_of_its_window_answers_nowhere() {
        let (map, bus, connected) = map(1);
        for address in [0, 0x10_0000, 0xfee0_0000, layout::PCI_MEMORY_END as u32, !0x7fff] {
            map.want(0, Bar { address, decoding: true });
            assert_eq!((answers(&bus, address), connected.0.lock().unwrap().len()), (None, 0));
        }
        map.want(0, Bar { address: HOME, decoding: true });
        assert_eq!(answers(&bus, HOME), Some(0));
    }

    proptest! {
        /// Whatever is wanted in whatever order: each place has one answer, only who decodes there has a
        /// right to it, and whoever alone wants a legal place has it.
        #[test]
        fn nobody_answers_for_another(
            deeds in prop::collection::vec((0u8..4, 0u32..8, any::<bool>()), 1..60)
        ) {
            let (map, bus, connected) = map(4);
            let mut wanted = std::collections::BTreeMap::new();
            for slot in 0..4u8 {
                wanted.insert(slot, (HOME + u32::from(slot) * 0x8000, true));
            }
            for (slot, place, decoding) in deeds {
                let address = HOME + place * 0x8000;
                map.want(slot, Bar { address, decoding });
                wanted.insert(slot, (address, decoding));
                for place in 0..8 {
                    let address = HOME + place * 0x8000;
                    let who: Vec<u8> =
                        wanted.iter().filter(|(_, want)| **want == (address, true)).map(|(slot, _)| *slot).collect();
                    let answer = answers(&bus, address);
                    if !who.is_empty() {
                        prop_assert!(answer.is_some_and(|slot| who.contains(&slot)));
                    }
                }
                let mapped = (0..8).filter(|place| answers(&bus, HOME + place * 0x8000).is_some()).count();
                prop_assert_eq!(connected.0.lock().unwrap().len(), mapped);
            }
        }
    }
}
