//! Rate limits and cache modes, and what is counted.

use super::*;
use crate::vmm::config::Bucket;

fn limited(config: &DiskConfig) -> Driver {
    let block = Block::new(config, open_rw(&config.path), Vec::new(), &sandbox_hook(), events()).unwrap();
    started(block)
}

fn operations(per_second: u64, burst: u64) -> Limits {
    Limits { operations: Some(Bucket { per_second, burst }), bandwidth: None }
}

/// Puts reads of 512 bytes onto a queue.
fn put_reads(driver: &mut Driver, queue: usize, count: usize) {
    driver.header(IN, 0);
    for _ in 0..count {
        driver.add(queue, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    }
    driver.publish(queue);
}

#[test]
fn queues_share_their_disks_limit() {
    let scratch = Scratch::new("limits");
    let mut config = config(&scratch.raw("disk", MIB), DiskFormat::Raw);
    (config.queues, config.limits) = (2, operations(100, 10));
    let mut driver = limited(&config);
    let start = Instant::now();
    put_reads(&mut driver, 0, 20);
    put_reads(&mut driver, 1, 20);
    for _ in 0..20 {
        driver.used(0);
        driver.used(1);
    }
    // 30 of 40 beyond the burst.
    let took = start.elapsed();
    assert!((290..10_000).contains(&took.as_millis()), "{took:?}");
}

#[test]
fn limits_change_at_once_for_what_waits() {
    let scratch = Scratch::new("live-limits");
    let mut config = config(&scratch.raw("disk", MIB), DiskFormat::Raw);
    config.limits = Limits { bandwidth: Some(Bucket { per_second: 1, burst: 512 }), operations: None };
    let block = Block::new(&config, open_rw(&config.path), Vec::new(), &sandbox_hook(), events()).unwrap();
    let handle = block.handle();
    let mut driver = started(block);
    put_reads(&mut driver, 0, 8);
    driver.used(0);
    assert_eq!(driver.used_within(0, Duration::from_millis(100)), None);
    assert!(handle.metrics().throttled > 0);
    handle.set_limits(Limits::default()).unwrap();
    for _ in 0..7 {
        driver.used(0);
    }
    let counted = handle.metrics();
    assert_eq!((counted.reads, counted.read_bytes, counted.in_flight), (8, 4096, 0));
    assert_eq!(counted.read_latency.count(), 8);
    // A reset doesn't wait for tokens, and leaves none in the line.
    handle.set_limits(operations(1, 1)).unwrap();
    assert!(handle.set_limits(operations(0, 1)).is_err() && handle.set_limits(operations(1, 0)).is_err());
    put_reads(&mut driver, 0, 8);
    driver.used(0);
    let start = Instant::now();
    driver.write(0x70, 0);
    assert!(start.elapsed() < Duration::from_secs(5));
    assert_eq!(handle.metrics().in_flight, 0);
}

#[test]
fn a_number_of_queues_that_none_has_is_refused() {
    let scratch = Scratch::new("queues");
    for queues in [0, QUEUES_MAX + 1] {
        let mut config = config(&scratch.raw("disk", MIB), DiskFormat::Raw);
        config.queues = queues;
        let result = Block::new(&config, open_rw(&config.path), Vec::new(), &sandbox_hook(), events());
        assert!(refusal(result).contains("queues, not 1 to 8"));
    }
}

#[test]
fn requests_are_counted_by_what_they_do() {
    let scratch = Scratch::new("counted");
    let block = block(&scratch.raw("disk", MIB), DiskFormat::Raw);
    let handle = block.handle();
    let mut driver = started(block);
    assert_eq!(driver.write_disk(0, &[1; 1024]), OK);
    assert_eq!(driver.request(FLUSH, 0, &[]), OK);
    assert_eq!(driver.zero(DISCARD, 0, 8, 0), OK);
    assert_eq!(driver.request(IN, u64::MAX, &[(DATA, 512, WRITE)]), IOERR);
    let counted = handle.metrics();
    assert_eq!((counted.writes, counted.written_bytes, counted.flushes), (1, 1024, 1));
    assert_eq!((counted.discards, counted.discarded_bytes), (1, 4096));
    assert_eq!((counted.errors, counted.in_flight), (1, 0));
    assert!(counted.interrupts > 0 && counted.notifications == 4, "{counted:?}");
}

#[test]
fn cache_modes_say_whether_there_is_something_to_flush() {
    let scratch = Scratch::new("modes");
    let path = scratch.raw("disk", MIB);
    for (cache, flushes) in [
        (CacheMode::Writeback, true),
        (CacheMode::Direct, true),
        (CacheMode::Writethrough, false),
        (CacheMode::Unsafe, false),
    ] {
        let mut config = config(&path, DiskFormat::Raw);
        config.cache = cache;
        let file = open_rw(&path);
        let same = file.try_clone().unwrap();
        let block = Block::new(&config, file, Vec::new(), &sandbox_hook(), events()).unwrap();
        let is_direct = rustix::fs::fcntl_getfl(&same).unwrap().contains(rustix::fs::OFlags::DIRECT);
        assert_eq!(is_direct, cache == CacheMode::Direct);
        let mut driver = started(block);
        assert_eq!(driver.offered() & FEATURE_FLUSH != 0, flushes, "{cache:?}");
        // Whether offered or not, asked for it is done.
        assert_eq!(driver.request(FLUSH, 0, &[]), OK);
    }
}

#[test]
fn direct_io_takes_buffers_that_lie_anywhere() {
    let scratch = Scratch::new("direct");
    for format in [DiskFormat::Raw, DiskFormat::Qcow2] {
        let path = scratch.path("disk");
        match format {
            DiskFormat::Raw => drop(scratch.raw("disk", 4 * MIB)),
            DiskFormat::Qcow2 => {
                drop(tool("qemu-img", &["create", "-q", "-f", "qcow2", &path, "4M"]).unwrap())
            }
        }
        let mut config = config(&path, format);
        config.cache = CacheMode::Direct;
        let mut driver = limited(&config);
        let data = pattern(300 * 1024, 3);
        // At odd addresses, in odd pieces, and across the end of a region of guest memory.
        driver.put(DATA + 1, &data);
        let pieces = [(DATA + 1, 777, 0), (DATA + 1 + 777, data.len() as u32 - 777, 0)];
        assert_eq!(driver.request(OUT, 9, &pieces), OK);
        driver.put(DATA, &vec![0; 512 * 1024]);
        let pieces = [(DATA + 7, 5000, WRITE), (DATA + 5007, data.len() as u32 - 5000, WRITE)];
        assert_eq!(driver.request(IN, 9, &pieces), OK);
        assert!(driver.get(DATA + 7, data.len()) == data, "{format:?}");
        assert_eq!(driver.read_disk(9, data.len()), data);
        let end = 4 * MIB / 512 - 1;
        assert_eq!(driver.request(IN, end, &[(DATA + 3, 512, WRITE)]), OK);
    }
}

#[test]
fn direct_io_that_the_file_system_lacks_is_refused_by_name() {
    // proc has none; nor does it have disks, but that is for others to say.
    let file: OwnedFd = File::open("/proc/self/status").unwrap().into();
    let mut config = config("", DiskFormat::Raw);
    (config.cache, config.read_only) = (CacheMode::Direct, true);
    let text = refusal(Block::new(&config, file, Vec::new(), &sandbox_hook(), events()));
    assert!(text.contains("O_DIRECT"), "{text}");
}
