use std::sync::Mutex;

use proptest::prelude::*;

use super::*;
use crate::vmm::device::entropy::Entropy;
use crate::vmm::device::testing::{Driver, HIGH_BYTES, HIGH_START, LOW_BYTES, WRITE, memory, sandbox_hook};
use crate::vmm::transport::driver::TRANSPORT_FEATURES;
use crate::vmm::transport::{ActivateError, Activation};
use virtio_queue::QueueT;

/// What happened to a [`Recorder`].
#[derive(Default)]
struct Record {
    activations: Vec<Vec<(u16, u16)>>,
    features: u64,
    active: bool,
    resets: usize,
    config_writes: usize,
    interrupt: Option<Arc<dyn Interrupt>>,
}

/// A device that only notes what the transport does with it.
struct Recorder {
    record: Arc<Mutex<Record>>,
    fail: bool,
}

const OFFERED: u64 = 0b1010 | 1 << 40;

impl VirtioDevice for Recorder {
    fn device_type(&self) -> u32 {
        42
    }
    fn queue_sizes(&self) -> &[u16] {
        &[256, 64]
    }
    fn features(&self) -> u64 {
        OFFERED
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {
        self.record.lock().unwrap().config_writes += 1;
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut record = self.record.lock().unwrap();
        assert!(!record.active, "activated twice without a reset");
        for active in &activation.queues {
            assert!(active.queue.is_valid(&activation.memory), "an invalid queue reached the device");
        }
        assert_eq!(activation.features & !(OFFERED | TRANSPORT_FEATURES), 0);
        record.active = true;
        record.features = activation.features;
        record.interrupt = Some(activation.interrupt);
        let queues = activation.queues.iter().map(|active| (active.index, active.queue.size())).collect();
        record.activations.push(queues);
        if self.fail { Err(ActivateError("no".into())) } else { Ok(()) }
    }
    fn reset(&mut self) {
        let mut record = self.record.lock().unwrap();
        record.resets += 1;
        record.active = false;
    }
}

fn recorder(fail: bool) -> (Driver, Arc<Mutex<Record>>) {
    let record = Arc::<Mutex<Record>>::default();
    (Driver::new(Recorder { record: record.clone(), fail }), record)
}

#[test]
fn a_driver_that_does_it_right_gets_the_device() {
    let (mut driver, record) = recorder(false);
    assert_eq!([0, 4, 8].map(|register| driver.read(register)), [0x7472_6976, 2, 42]);
    assert_eq!(driver.offered(), OFFERED | 1 << 32 | 1 << 29 | 1 << 28);
    driver.start(0b1000 | 1 << 29);
    let record = record.lock().unwrap();
    assert_eq!(record.activations, [[(0, 256), (1, 64)]]);
    assert_eq!(record.features, 0b1000 | 1 << 29 | 1 << 32);
}

#[test]
fn features_are_checked_and_then_fixed() {
    let (mut driver, _) = recorder(false);
    let attempt = |driver: &mut Driver, low: u32, high: u32| {
        for status in [0, 1, 3] {
            driver.write(0x70, status);
        }
        for (select, half) in [(0, low), (1, high)] {
            driver.write(0x24, select);
            driver.write(0x20, half);
        }
        driver.write(0x70, 11);
        driver.status()
    };
    assert_eq!(attempt(&mut driver, 0, 0), 3, "without VERSION_1");
    assert_eq!(attempt(&mut driver, 0b100, 1), 3, "a feature that was not offered");
    assert_eq!(attempt(&mut driver, 0b10, 1 | 1 << 8), 11);
    // Too late.
    driver.write(0x24, 0);
    driver.write(0x20, 0b100);
    driver.set_up_queues();
    driver.write(0x70, 15);
    assert_eq!(driver.status(), 15);
}

#[test]
fn steps_out_of_order_are_ignored() {
    let (mut driver, record) = recorder(false);
    for status in [2, 4, 8, 12] {
        driver.write(0x70, status);
        assert_eq!(driver.status(), 0, "{status}");
    }
    driver.write(0x70, 1);
    driver.write(0x70, 9);
    assert_eq!(driver.status(), 1, "FEATURES_OK before DRIVER");
    driver.write(0x70, 3);
    driver.write(0x70, 7);
    assert_eq!(driver.status(), 3, "DRIVER_OK before FEATURES_OK");
    driver.write(0x38, 64);
    driver.write(0x44, 1);
    assert_eq!(driver.read(0x44), 0, "queues before FEATURES_OK");
    driver.negotiate(0);
    driver.write(0x70, 2);
    assert_eq!(driver.status(), 11, "bits can't be taken back");
    driver.set_up_queues();
    driver.write(0x70, 15);
    assert_eq!(driver.status(), 15);
    // A ready queue of a running device can't be changed.
    driver.write(0x30, 0);
    driver.write(0x44, 0);
    assert_eq!(driver.read(0x44), 1);
    driver.write(0x70, 15);
    assert_eq!(record.lock().unwrap().activations.len(), 1);
    driver.write(0x70, 0);
    assert_eq!((driver.status(), driver.read(0x44)), (0, 0));
    driver.start(0);
    assert_eq!(record.lock().unwrap().activations.len(), 2);
}

#[test]
fn queues_that_make_no_sense_break_the_device_until_a_reset() {
    let (mut driver, record) = recorder(false);
    let end = HIGH_START + HIGH_BYTES;
    let cases = [
        (0, 0x1000, 0x2000, 0x3000),
        (3, 0x1000, 0x2000, 0x3000),
        (512, 0x1000, 0x2000, 0x3000),
        (0x10_0000, 0x1000, 0x2000, 0x3000),
        (16, 0x1008, 0x2000, 0x3000),
        (16, 0x1000, 0x2001, 0x3000),
        (16, 0x1000, 0x2000, 0x3002),
        (16, end - 128, 0x2000, 0x3000),
        (16, 0x1000, LOW_BYTES - 2, 0x3000),
        (16, 0x1000, 0x2000, end),
        (16, u64::MAX - 15, 0x2000, 0x3000),
        (16, 0x1000, 0, 0x3000),
    ];
    for case in cases {
        let (size, descriptors, available, used): (u32, u64, u64, u64) = case;
        driver.negotiate(0);
        driver.write(0x30, 0);
        driver.write(0x38, size);
        for (register, address) in [(0x80, descriptors), (0x90, available), (0xa0, used)] {
            driver.write(register, address as u32);
            driver.write(register + 4, (address >> 32) as u32);
        }
        driver.write(0x44, 1);
        assert_eq!(driver.read(0x44), 0, "{case:x?}");
        assert_ne!(driver.status() & 64, 0, "{case:x?}");
        driver.write(0x70, 15);
        assert_eq!(driver.status() & 4, 0);
    }
    assert!(record.lock().unwrap().activations.is_empty());
    driver.start(0);
}

#[test]
fn a_device_that_fails_to_start_needs_a_reset() {
    let (mut driver, _) = recorder(true);
    driver.negotiate(0);
    driver.set_up_queues();
    driver.write(0x70, 15);
    assert_eq!(driver.status(), 15 | 64);
    assert_eq!(driver.read(0x60), 2);
    driver.write(0x70, 0);
    assert_eq!((driver.status(), driver.read(0x60)), (0, 0));
}

#[test]
fn interrupts_are_raised_and_acknowledged() {
    let (mut driver, record) = recorder(false);
    driver.start(0);
    let interrupt = record.lock().unwrap().interrupt.clone().unwrap();
    let generation = driver.read(0xfc);
    interrupt.signal_queue(0);
    assert_eq!(driver.read(0x60), 1);
    interrupt.signal_config();
    assert_eq!(driver.read(0x60), 3);
    assert_eq!(driver.transport.irq().read().unwrap(), 2);
    assert_ne!(driver.read(0xfc), generation);
    driver.write(0x64, 1);
    assert_eq!(driver.read(0x60), 2);
    interrupt.signal_needs_reset();
    assert_eq!(driver.status(), 15 | 64);
    // The driver may write back what it read, but it can't clear our bit.
    driver.write(0x70, 15 | 64);
    assert_eq!(driver.status(), 15 | 64);
}

#[test]
fn notifications_reach_the_queue_by_register_and_survive_resets() {
    let (mut driver, _) = recorder(false);
    let kicks = |driver: &Driver| {
        driver.transport.notifiers().map(|notifier| notifier.event.read().ok()).collect::<Vec<_>>()
    };
    driver.write(0x50, 0);
    assert_eq!(kicks(&driver), [None, None], "not before DRIVER_OK");
    for _ in 0..2 {
        driver.start(0);
        for queue in [1, 1, 2, u32::MAX] {
            driver.write(0x50, queue);
        }
        assert_eq!(kicks(&driver), [None, Some(2)]);
        driver.write(0x50, 0);
    }
    driver.write(0x70, 0);
    assert_eq!(kicks(&driver), [None, None], "a reset forgets them");
    let matches: Vec<_> =
        driver.transport.notifiers().map(|notifier| (notifier.offset, notifier.datamatch)).collect();
    assert_eq!(matches, [(0x50, 0), (0x50, 1)]);
}

#[test]
fn odd_accesses_do_nothing() {
    let (mut driver, record) = recorder(false);
    driver.start(0);
    for len in [1, 2, 3, 8] {
        driver.transport.write(0x70, &vec![0; len]);
        let mut data = vec![0xee; len];
        driver.transport.read(0, &mut data);
        assert_eq!(data, vec![0; len]);
    }
    driver.transport.write(0x6e, &[0; 4]);
    assert_eq!(driver.status(), 15);
    let mut data = [0; 3];
    driver.transport.read(0x123, &mut data);
    assert_eq!(data, [0x23; 3]);
    driver.transport.write(0x100, &[1]);
    assert_eq!(record.lock().unwrap().config_writes, 1);
}

#[test]
fn random_bytes_differ_and_are_bounded() {
    let mut driver = Driver::new(Entropy::new(Default::default(), &sandbox_hook()).unwrap());
    driver.start(1 << 29);
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..100 {
        driver.add(0, &[(0x20_0000, 64, WRITE)]);
        driver.publish(0);
        assert_eq!(driver.used(0).1, 64);
        assert!(seen.insert(driver.get(0x20_0000, 64)));
    }
    for (chain, len) in [
        (vec![(0x20_0000, 1 << 20, WRITE)], 4096),
        (vec![(0x20_0000, 100, WRITE), (0x20_1000, 5000, WRITE)], 4096),
        (vec![(0x20_0000, 64, 0)], 0),
        (vec![(u64::MAX, 64, WRITE)], 0),
        (vec![(0x20_0000, 0, WRITE), (0x20_0000, 8, WRITE)], 8),
    ] {
        driver.add(0, &chain);
        driver.publish(0);
        assert_eq!(driver.used(0).1, len, "{chain:?}");
    }
}

fn register() -> impl Strategy<Value = u64> {
    let known = [
        0x10u64, 0x14, 0x20, 0x24, 0x30, 0x34, 0x38, 0x44, 0x50, 0x60, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94,
        0xa0, 0xa4, 0xac, 0xb0, 0xc0, 0xfc, 0x100, 0x107,
    ];
    prop_oneof![8 => prop::sample::select(known.to_vec()), 1 => any::<u64>(), 1 => 0u64..0x1000]
}

fn value() -> impl Strategy<Value = u32> {
    let known = [0u32, 1, 2, 3, 4, 7, 8, 11, 15, 16, 64, 128, 256, 0x1000, 0x2000, 0x3000, u32::MAX];
    prop_oneof![6 => prop::sample::select(known.to_vec()), 1 => any::<u32>()]
}

/// A step towards a running device, so that random sequences get there at times.
fn sensible(step: u8) -> (u64, u32) {
    let steps = [
        (0x70, 0),
        (0x70, 1),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1),
        (0x24, 0),
        (0x20, 8),
        (0x70, 11),
        (0x30, 0),
        (0x38, 16),
        (0x80, 0x1000),
        (0x90, 0x2000),
        (0xa0, 0x3000),
        (0x84, 0),
        (0x94, 0),
        (0xa4, 0),
        (0x44, 1),
        (0x30, 1),
        (0x38, 8),
        (0x80, 0x4000),
        (0x90, 0x5000),
        (0xa0, 0x6000),
        (0x44, 1),
        (0x70, 15),
        (0x50, 0),
        (0x64, 3),
    ];
    steps[usize::from(step) % steps.len()]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    /// The recorder asserts that no invalid queue, no foreign feature and no second activation
    /// reaches a device, whatever the guest writes.
    #[test]
    fn no_sequence_of_writes_breaks_the_rules(
        noise in prop::collection::vec((0u8..40, register(), value(), prop::sample::select(vec![1usize, 2, 4, 4, 4, 4, 8])), 1..200),
        start in 0usize..26,
    ) {
        let record = Arc::<Mutex<Record>>::default();
        let device = Recorder { record: record.clone(), fail: false };
        let mut transport = MmioTransport::new(Box::new(device), memory()).unwrap();
        let mut next = 0u8;
        for step in 0..start as u8 {
            let (offset, value) = sensible(step);
            transport.write(offset, &value.to_le_bytes());
            next = step + 1;
        }
        for (kind, offset, value, width) in noise {
            let mut data = [0; 8];
            if kind < 20 {
                let (offset, value) = sensible(next);
                next = next.wrapping_add(1);
                transport.write(offset, &value.to_le_bytes());
            } else if kind < 30 {
                data[..4].copy_from_slice(&value.to_le_bytes());
                transport.write(offset, &data[..width]);
            } else {
                transport.read(offset, &mut data[..width]);
            }
            let mut status = [0; 4];
            transport.read(0x70, &mut status);
            let status = u32::from_le_bytes(status);
            prop_assert_eq!(record.lock().unwrap().active, status & 4 != 0, "DRIVER_OK means active");
            prop_assert!(status & 4 == 0 || status & 11 == 11, "DRIVER_OK without what comes before it");
        }
    }
}
