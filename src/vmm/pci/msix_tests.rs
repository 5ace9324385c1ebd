use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// Notes what KVM would have been told. What is written to a connected descriptor counts as delivered when
/// it is looked at.
#[derive(Default)]
struct Recorder {
    state: Mutex<Recorded>,
}

#[derive(Default)]
struct Recorded {
    routes: BTreeMap<u32, Message>,
    connected: BTreeMap<u32, EventFd>,
    route_changes: usize,
}

impl MessageRoutes for Recorder {
    fn set_route(&self, gsi: u32, message: Message) -> std::io::Result<()> {
        let mut state = self.state.lock().unwrap();
        state.routes.insert(gsi, message);
        state.route_changes += 1;
        Ok(())
    }

    fn connect(&self, event: &EventFd, gsi: u32) -> std::io::Result<()> {
        let mut state = self.state.lock().unwrap();
        assert!(state.routes.contains_key(&gsi), "connected without a route");
        assert!(state.connected.insert(gsi, event.try_clone().unwrap()).is_none(), "connected twice");
        Ok(())
    }

    fn disconnect(&self, _event: &EventFd, gsi: u32) -> std::io::Result<()> {
        assert!(self.state.lock().unwrap().connected.remove(&gsi).is_some(), "disconnected twice");
        Ok(())
    }
}

impl Recorder {
    /// Takes what was delivered: the messages.
    fn delivered(&self) -> Vec<Message> {
        let state = self.state.lock().unwrap();
        state
            .connected
            .iter()
            .filter(|(_, event)| event.read().is_ok())
            .map(|(gsi, _)| state.routes[gsi])
            .collect()
    }
}

const FIRST_GSI: u32 = 100;

fn msix() -> (Msix, Arc<Recorder>) {
    let recorder = Arc::<Recorder>::default();
    (Msix::new(3, FIRST_GSI, recorder.clone()).unwrap(), recorder)
}

fn program(msix: &Msix, vector: u64, data: u32) {
    msix.write_table(vector * 16, &0xfee0_1000_u64.to_le_bytes());
    msix.write_table(vector * 16 + 8, &data.to_le_bytes());
}

fn mask(msix: &Msix, vector: u64, masked: bool) {
    msix.write_table(vector * 16 + 12, &u32::from(masked).to_le_bytes());
}

fn pending(msix: &Msix) -> u8 {
    let mut byte = [0];
    msix.read_pending(0, &mut byte);
    byte[0]
}

fn signal(msix: &Msix, vector: u16) {
    msix.event(vector).unwrap().write(1).unwrap();
}

#[test]
fn what_comes_while_masked_is_pending_and_delivered_once_when_unmasked() {
    let (msix, recorder) = msix();
    program(&msix, 1, 0x41);
    msix.set_control(CONTROL_ENABLE);
    signal(&msix, 1);
    signal(&msix, 1);
    assert_eq!((recorder.delivered(), pending(&msix)), (vec![], 0b10));
    mask(&msix, 1, false);
    assert_eq!(recorder.delivered(), [Message { address: 0xfee0_1000, data: 0x41 }]);
    assert_eq!((recorder.delivered(), pending(&msix)), (vec![], 0));
    signal(&msix, 1);
    assert_eq!(recorder.delivered().len(), 1);
    // The whole function's mask does the same.
    msix.set_control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
    signal(&msix, 1);
    assert_eq!((recorder.delivered(), pending(&msix)), (vec![], 0b10));
    msix.set_control(CONTROL_ENABLE);
    assert_eq!(recorder.delivered().len(), 1);
    // Nothing outlives disabling.
    mask(&msix, 1, true);
    signal(&msix, 1);
    msix.set_control(0);
    assert_eq!(pending(&msix), 0);
    msix.set_control(CONTROL_ENABLE);
    mask(&msix, 1, false);
    assert_eq!(recorder.delivered(), []);
}

#[test]
fn a_route_changes_only_with_its_message_and_never_while_masked() {
    let (msix, recorder) = msix();
    let changes = || recorder.state.lock().unwrap().route_changes;
    msix.set_control(CONTROL_ENABLE);
    for data in [1, 2, 3] {
        program(&msix, 0, data);
    }
    assert_eq!(changes(), 0);
    for _ in 0..3 {
        mask(&msix, 0, false);
        mask(&msix, 0, true);
    }
    assert_eq!(changes(), 1);
    mask(&msix, 0, false);
    program(&msix, 0, 4);
    assert_eq!(changes(), 2);
    signal(&msix, 0);
    assert_eq!(recorder.delivered(), [Message { address: 0xfee0_1000, data: 4 }]);
}

#[test]
fn a_dropped_function_leaves_nothing_connected() {
    let (msix, recorder) = msix();
    program(&msix, 2, 7);
    msix.set_control(CONTROL_ENABLE);
    mask(&msix, 2, false);
    assert_eq!(recorder.state.lock().unwrap().connected.len(), 1);
    drop(msix);
    assert!(recorder.state.lock().unwrap().connected.is_empty());
}

#[derive(Clone, Debug)]
enum Deed {
    Write(u64, Vec<u8>),
    Control(u16),
    Signal(u16),
    Reset,
    Read(u64, usize),
}

fn deed() -> impl Strategy<Value = Deed> {
    prop_oneof![
        4 => (0u64..64, prop::sample::select(vec![1usize, 2, 4, 8]))
            .prop_flat_map(|(offset, length)| (Just(offset), prop::collection::vec(any::<u8>(), length)))
            .prop_map(|(offset, data)| Deed::Write(offset, data)),
        3 => (0u64..3, any::<bool>())
            .prop_map(|(vector, masked)| Deed::Write(vector * 16 + 12, u32::from(masked).to_le_bytes().to_vec())),
        2 => any::<u16>().prop_map(Deed::Control),
        3 => (0u16..3).prop_map(Deed::Signal),
        1 => Just(Deed::Reset),
        1 => (any::<u64>(), prop::sample::select(vec![1usize, 2, 4, 8]))
            .prop_map(|(offset, length)| Deed::Read(offset, length)),
    ]
}

proptest! {
    /// Whatever a guest does to the table: a vector is connected if and only if it isn't masked, and is
    /// never both pending and connected.
    #[test]
    fn the_table_and_kvm_agree(deeds in prop::collection::vec(deed(), 1..60)) {
        let (msix, recorder) = msix();
        for deed in deeds {
            match deed {
                Deed::Write(offset, data) => msix.write_table(offset, &data),
                Deed::Control(control) => msix.set_control(control),
                Deed::Signal(vector) => signal(&msix, vector),
                Deed::Reset => msix.reset(),
                Deed::Read(offset, length) => {
                    let mut data = vec![0; length];
                    msix.read_table(offset, &mut data);
                    msix.read_pending(offset, &mut data);
                }
            }
            let table = msix.lock();
            let on = table.control & (CONTROL_ENABLE | CONTROL_FUNCTION_MASK) == CONTROL_ENABLE;
            let state = recorder.state.lock().unwrap();
            for (vector, entry) in table.entries.iter().enumerate() {
                let gsi = FIRST_GSI + vector as u32;
                let unmasked = on && entry.control & VECTOR_MASKED == 0;
                prop_assert_eq!(state.connected.contains_key(&gsi), unmasked);
                if unmasked {
                    prop_assert_eq!(state.routes.get(&gsi), Some(&entry.message));
                }
            }
        }
    }
}
