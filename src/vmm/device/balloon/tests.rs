use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::vmm::device::testing::{Driver, HIGH_BYTES, HIGH_START, LOW_BYTES, WRITE, sandbox_hook};

const MEMORY_BYTES: u64 = LOW_BYTES + HIGH_BYTES;
const INFLATE: usize = 0;
const DEFLATE: usize = 1;
const STATISTICS: usize = 2;
/// As Linux counts when free page hints aren't offered.
const REPORTING: usize = 3;

/// Where the page numbers of a request stand, and where pages to be given back lie.
const REQUEST: u64 = 1 << 20;
const PAGES: u64 = 16 << 20;

const ALL: u64 = STATS_VQ | DEFLATE_ON_OOM | PAGE_POISON | PAGE_REPORTING;

fn config() -> BalloonConfig {
    BalloonConfig { target_bytes: 0, free_page_reporting: true, deflate_on_oom: true }
}

fn start(features: u64) -> (Driver, BalloonHandle) {
    let hook = sandbox_hook();
    let balloon = Balloon::with_interval(config(), MEMORY_BYTES, &hook, Duration::from_millis(50)).unwrap();
    let handle = balloon.handle();
    let mut driver = Driver::new(balloon);
    driver.start(features);
    (driver, handle)
}

fn config_field(driver: &mut Driver, offset: u64) -> u32 {
    driver.read(0x100 + offset)
}

/// Names the pages to the queue and waits until it has been dealt with.
fn name_pages(driver: &mut Driver, queue: usize, pages: &[u32]) {
    let raw: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
    driver.put(REQUEST, &raw);
    let head = driver.add(queue, &[(REQUEST, raw.len() as u32, 0)]);
    driver.publish(queue);
    assert_eq!(driver.used(queue), (head, 0));
}

fn report_ranges(driver: &mut Driver, ranges: &[(u64, u32)]) {
    let buffers: Vec<_> = ranges.iter().map(|&(start, len)| (start, len, WRITE)).collect();
    let head = driver.add(REPORTING, &buffers);
    driver.publish(REPORTING);
    assert_eq!(driver.used(REPORTING), (head, 0));
}

fn page(address: u64) -> u32 {
    (address / PAGE_BYTES) as u32
}

fn fill(driver: &Driver, address: u64, pages: u64) {
    driver.put(address, &vec![0x5a; (pages * PAGE_BYTES) as usize]);
}

/// Which of the pages from this address on still hold what [`fill`] wrote.
fn held(driver: &Driver, address: u64, pages: u64) -> Vec<bool> {
    (0..pages)
        .map(|number| {
            let bytes = driver.get(address + number * PAGE_BYTES, PAGE_BYTES as usize);
            let (first, uniform) = (bytes[0], bytes.iter().all(|byte| *byte == bytes[0]));
            assert!(uniform && (first == 0 || first == 0x5a), "a page is whole or empty");
            first == 0x5a
        })
        .collect()
}

#[test]
fn inflated_pages_are_the_hosts_and_come_back_empty() {
    let (mut driver, handle) = start(ALL);
    fill(&driver, PAGES, 8);
    fill(&driver, HIGH_START, 1);
    let first = page(PAGES);
    // In no order, with one twice.
    name_pages(&mut driver, INFLATE, &[first + 3, first, first + 2, first + 3, page(HIGH_START), first + 6]);
    assert_eq!(held(&driver, PAGES, 8), [false, true, false, false, true, true, false, true]);
    assert_eq!(held(&driver, HIGH_START, 1), [false]);
    assert_eq!(handle.counters().errors.get(), 0);
    driver.write(0x104, 5);
    assert_eq!((config_field(&mut driver, 4), handle.counters().actual_bytes.get()), (5, 5 * PAGE_BYTES));

    name_pages(&mut driver, DEFLATE, &[first, first + 2]);
    driver.write(0x104, 3);
    fill(&driver, PAGES, 1);
    assert_eq!(held(&driver, PAGES, 1), [true]);
    assert_eq!(handle.counters().actual_bytes.get(), 3 * PAGE_BYTES);
}

#[test]
fn numbers_of_no_page_harm_nothing() {
    let (mut driver, handle) = start(ALL);
    fill(&driver, PAGES, 1);
    let beyond = page(LOW_BYTES);
    name_pages(&mut driver, INFLATE, &[beyond, u32::MAX, u32::MAX - 1, page(HIGH_START + HIGH_BYTES)]);
    assert!(handle.counters().errors.get() >= 3);
    assert_eq!(held(&driver, PAGES, 1), [true]);
    // Its own rings, and all else that the machine's loader left: they are the guest's to lose.
    name_pages(&mut driver, INFLATE, &(0..page(REQUEST)).collect::<Vec<_>>()[32..]);
    // The rings were forgotten: what the driver sees next is empty, but the device lives.
    driver.start(ALL);
    name_pages(&mut driver, INFLATE, &[page(PAGES)]);
    assert_eq!(held(&driver, PAGES, 1), [false]);
}

#[test]
fn requests_of_any_length_are_bounded() {
    let (mut driver, handle) = start(ALL);
    // The same 4 GiB of "page numbers" in many descriptors, most of them no memory.
    let buffers = vec![(REQUEST, u32::MAX, 0); 100];
    let head = driver.add(INFLATE, &buffers);
    driver.publish(INFLATE);
    assert_eq!(driver.used(INFLATE), (head, 0));
    let errors = handle.counters().errors.get();
    for buffers in [
        // A piece of a number, nothing at all, no memory, and buffers of the wrong kind.
        vec![(REQUEST, 3, 0)],
        vec![(REQUEST, 0, 0)],
        vec![(LOW_BYTES, 4096, 0)],
        vec![(u64::MAX - 3, 8, 0)],
        vec![(REQUEST, 16, WRITE)],
        vec![(REQUEST, 16, WRITE), (REQUEST, 16, 0)],
    ] {
        let head = driver.add(INFLATE, &buffers);
        driver.publish(INFLATE);
        assert_eq!(driver.used(INFLATE), (head, 0));
    }
    assert!(handle.counters().errors.get() >= errors + 3);
    assert_eq!(driver.status() & 0x40, 0);
}

#[test]
fn a_head_beyond_the_queue_asks_for_a_reset() {
    let (mut driver, _) = start(ALL);
    driver.add_head(REPORTING, 5000);
    driver.publish(REPORTING);
    driver.wait_needs_reset();
    driver.start(ALL);
    fill(&driver, PAGES, 1);
    name_pages(&mut driver, INFLATE, &[page(PAGES)]);
    assert_eq!(held(&driver, PAGES, 1), [false]);
}

#[test]
fn reported_ranges_are_given_back_unless_poisoned() {
    let (mut driver, handle) = start(ALL);
    fill(&driver, PAGES, 6);
    report_ranges(&mut driver, &[(PAGES, 8192), (PAGES + 3 * 4096, 4096 + 1000), (LOW_BYTES, 1 << 30)]);
    assert_eq!(held(&driver, PAGES, 6), [false, false, true, false, true, true]);
    assert_eq!(handle.counters().reported_bytes.get(), 3 * PAGE_BYTES);
    assert_eq!(handle.counters().errors.get(), 1);

    driver.write(0x10c, 0xaaaa_aaaa);
    fill(&driver, PAGES, 1);
    report_ranges(&mut driver, &[(PAGES, 4096)]);
    assert_eq!(held(&driver, PAGES, 1), [true]);
    // The next driver has no poison.
    driver.start(ALL);
    report_ranges(&mut driver, &[(PAGES, 4096)]);
    assert_eq!(held(&driver, PAGES, 1), [false]);
}

/// By the specification reporting is queue 4; Linux leaves no gap, also not for statistics.
#[test]
fn the_reporting_queue_is_found_by_either_count() {
    for (features, unused, reporting) in
        [(ALL, &[3][..], 4), (PAGE_REPORTING, &[3, 4], 2), (PAGE_REPORTING, &[2, 3], 4)]
    {
        let balloon = Balloon::new(config(), MEMORY_BYTES, PageKind::Small, &sandbox_hook()).unwrap();
        let mut driver = Driver::new(balloon);
        driver.negotiate(features);
        driver.set_up_queues();
        for queue in unused {
            driver.write(0x30, *queue);
            driver.write(0x44, 0);
        }
        driver.write(0x70, 15);
        fill(&driver, PAGES, 1);
        driver.add(reporting, &[(PAGES, 4096, WRITE)]);
        driver.publish(reporting);
        driver.used(reporting);
        assert_eq!(held(&driver, PAGES, 1), [false]);
    }
}

#[test]
fn a_new_target_is_announced_and_outlives_a_reset() {
    let (mut driver, handle) = start(ALL);
    assert_eq!(config_field(&mut driver, 0), 0);
    let generation = driver.read(0xfc);
    handle.set_target_bytes(10 << 20).unwrap();
    assert!(driver.wait_interrupt(Duration::from_secs(5)));
    assert_ne!(driver.read(0xfc), generation);
    assert_eq!(config_field(&mut driver, 0), 2560);
    for refused in [MEMORY_BYTES + 4096, 4095, u64::MAX] {
        assert!(handle.set_target_bytes(refused).is_err());
    }
    driver.write(0x104, 2560);
    driver.start(ALL);
    assert_eq!((config_field(&mut driver, 0), config_field(&mut driver, 4)), (2560, 0));
    assert_eq!(handle.counters().target_bytes.get(), 10 << 20);
    assert!(
        Balloon::new(
            BalloonConfig { target_bytes: 1, ..config() },
            MEMORY_BYTES,
            PageKind::Small,
            &sandbox_hook()
        )
        .is_err()
    );
}

#[test]
fn registers_that_are_not_the_drivers_to_write_stay() {
    let (mut driver, handle) = start(ALL);
    driver.write(0x100, 7);
    driver.write(0x108, 7);
    driver.write(0x110, 7);
    crate::vmm::bus::BusDevice::write(&mut driver.transport, 0x104, &[9]);
    crate::vmm::bus::BusDevice::write(&mut driver.transport, 0x102, &[9; 4]);
    assert_eq!([0, 4, 8, 12, 16].map(|offset| config_field(&mut driver, offset)), [0; 5]);
    assert_eq!(handle.counters().actual_bytes.get(), 0);
}

#[test]
fn only_what_is_configured_is_offered() {
    for (free_page_reporting, deflate_on_oom, features) in
        [(false, false, STATS_VQ), (true, false, STATS_VQ | PAGE_POISON | PAGE_REPORTING), (true, true, ALL)]
    {
        let config = BalloonConfig { target_bytes: 0, free_page_reporting, deflate_on_oom };
        let balloon = Balloon::new(config, MEMORY_BYTES, PageKind::Small, &sandbox_hook()).unwrap();
        assert_eq!(balloon.features(), features);
    }
    let huge = Balloon::new(config(), MEMORY_BYTES, PageKind::Huge2Mi, &sandbox_hook()).unwrap();
    assert_eq!(huge.features(), STATS_VQ | DEFLATE_ON_OOM);
}

#[test]
fn statistics_are_asked_for_again_and_again() {
    let (mut driver, handle) = start(ALL);
    for round in 1..=3u64 {
        let statistics: Vec<u8> = [(4u16, round << 20), (5, 64 << 20), (6, 7), (2, 9), (77, 1)]
            .iter()
            .flat_map(|(tag, value)| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat())
            .collect();
        driver.put(REQUEST, &statistics);
        let told = Instant::now();
        let head = driver.add(STATISTICS, &[(REQUEST, statistics.len() as u32, 0)]);
        driver.publish(STATISTICS);
        // It comes back when the next are wanted, and not before.
        assert_eq!(driver.used(STATISTICS), (head, 0));
        assert!(told.elapsed() >= Duration::from_millis(45));
        let counters = handle.counters().snapshot();
        assert_eq!((counters.free_bytes, counters.total_bytes), (round << 20, 64 << 20));
        assert_eq!((counters.available_bytes, counters.major_faults), (7, 9));
        assert!(counters.told_at_ms > 0);
    }
    driver.write(0x70, 0);
    assert_eq!(handle.counters().snapshot().total_bytes, 0);
}

#[test]
fn several_statistics_buffers_all_come_back_but_one() {
    let (mut driver, _) = start(ALL);
    let heads: Vec<u16> = (0..5).map(|_| driver.add(STATISTICS, &[(LOW_BYTES, 10, 0)])).collect();
    driver.publish(STATISTICS);
    for head in &heads[..4] {
        assert_eq!(driver.used_within(STATISTICS, Duration::from_millis(40)), Some((*head, 0)));
    }
    assert_eq!(driver.used(STATISTICS), (heads[4], 0));
}

/// Somebody writes pages while they are given back: each write lands in the page or is lost, and
/// nothing else happens.
#[test]
fn pages_in_use_may_be_given_back() {
    let (mut driver, handle) = start(ALL);
    let stop = AtomicBool::new(false);
    let memory = driver.memory.clone();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (mut source, block) = (std::fs::File::open("/dev/zero").unwrap(), 64 << 10);
            while !stop.load(Ordering::Relaxed) {
                memory.write_slice(&[1; 64 << 10], GuestAddress(PAGES)).unwrap();
                // By the kernel, as a disk's data would come.
                memory.read_exact_volatile_from(GuestAddress(PAGES), &mut source, block).unwrap();
            }
        });
        let pages: Vec<u32> = (0..16).map(|number| page(PAGES) + number).collect();
        for _ in 0..300 {
            name_pages(&mut driver, INFLATE, &pages);
            report_ranges(&mut driver, &[(PAGES, 64 << 10)]);
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(handle.counters().errors.get(), 0);
}
