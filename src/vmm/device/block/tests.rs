use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;
use crate::vmm::device::testing::{
    Driver, EVENT_IDX, HIGH_START, LOW_BYTES, NEXT, WRITE, sandbox_hook, tool,
};

mod bench;
mod limits;
mod model;
mod qcow2;
mod room;

const HEADER: u64 = 0x10_0000;
const STATUS: u64 = 0x10_1000;
const DATA: u64 = 0x20_0000;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_DISCARD: u64 = 1 << 13;
const FEATURE_WRITE_ZEROES: u64 = 1 << 14;
const MIB: u64 = 1 << 20;

/// A directory of its own for each test, gone at its end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        Self::below(std::env::temp_dir(), name)
    }

    fn below(directory: PathBuf, name: &str) -> Self {
        let path = directory.join(format!("vmctl-block-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().into()
    }

    fn raw(&self, name: &str, bytes: u64) -> String {
        let path = self.path(name);
        File::create(&path).unwrap().set_len(bytes).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Where nobody listens.
fn events() -> EventSender {
    let wake = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    EventSender { queue: std::sync::mpsc::channel().0, wake }
}

fn config(path: &str, format: DiskFormat) -> DiskConfig {
    DiskConfig::new("root-disk-with-a-long-name", path, format)
}

fn open_rw(path: &str) -> OwnedFd {
    File::options().read(true).write(true).open(path).unwrap().into()
}

fn open_ro(path: &str) -> OwnedFd {
    File::open(path).unwrap().into()
}

fn block(path: &str, format: DiskFormat) -> Block {
    Block::new(&config(path, format), open_rw(path), Vec::new(), &sandbox_hook(), events()).unwrap()
}

fn started(block: Block) -> Driver {
    let mut driver = Driver::new(block);
    let features = driver.offered();
    driver.start(features & !(1 << 5));
    driver
}

impl Driver {
    fn header(&self, kind: u32, sector: u64) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.put(HEADER, &header);
        self.put(STATUS, &[0xff]);
    }

    /// One request to its end: its status.
    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> u8 {
        self.header(kind, sector);
        let mut chain = vec![(HEADER, 16, 0)];
        chain.extend(data);
        chain.push((STATUS, 1, WRITE));
        let head = self.add(0, &chain);
        self.publish(0);
        assert_eq!(self.used(0).0, head);
        self.get(STATUS, 1)[0]
    }

    fn write_disk(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.put(DATA, data);
        self.request(OUT, sector, &[(DATA, data.len() as u32, 0)])
    }

    fn read_disk(&mut self, sector: u64, len: usize) -> Vec<u8> {
        self.put(DATA, &vec![0xee; len]);
        assert_eq!(self.request(IN, sector, &[(DATA, len as u32, WRITE)]), OK);
        self.get(DATA, len)
    }

    fn zero(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        let mut segment = [0; 16];
        segment[..8].copy_from_slice(&sector.to_le_bytes());
        segment[8..12].copy_from_slice(&sectors.to_le_bytes());
        segment[12..].copy_from_slice(&flags.to_le_bytes());
        self.put(DATA, &segment);
        self.request(kind, 0, &[(DATA, 16, 0)])
    }
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(31).wrapping_add(seed).wrapping_add((at >> 9) as u8)).collect()
}

#[test]
fn raw_reads_what_was_written() {
    let scratch = Scratch::new("raw-rw");
    let path = scratch.raw("disk", 4 * MIB);
    let mut driver = started(block(&path, DiskFormat::Raw));
    let data = pattern(40960, 3);
    assert_eq!(driver.write_disk(100, &data), OK);
    assert_eq!(driver.read_disk(100, data.len()), data);
    assert_eq!(driver.request(FLUSH, 0, &[]), OK);
    let mut on_disk = vec![0; data.len()];
    File::open(&path).unwrap().read_exact_at(&mut on_disk, 51200).unwrap();
    assert_eq!(on_disk, data);
}

#[test]
fn buffers_may_be_cut_anywhere_and_cross_regions() {
    let scratch = Scratch::new("cut");
    let mut driver = started(block(&scratch.raw("disk", MIB), DiskFormat::Raw));
    let data = pattern(1024, 9);
    driver.put(HIGH_START + 64, &data);
    driver.header(OUT, 4);
    // The header in three pieces, the data in odd pieces, an empty descriptor between.
    driver.add(
        0,
        &[
            (HEADER, 3, 0),
            (HEADER + 3, 12, 0),
            (HEADER + 15, 1, 0),
            (HIGH_START + 64, 511, 0),
            (HIGH_START, 0, 0),
            (HIGH_START + 64 + 511, 513, 0),
            (STATUS, 1, WRITE),
        ],
    );
    driver.publish(0);
    assert_eq!(driver.used(0).1, 1);
    assert_eq!(driver.get(STATUS, 1), [OK]);
    // The status is the last byte of a buffer that also takes data.
    driver.header(IN, 4);
    driver.add(0, &[(HEADER, 16, 0), (DATA, 1025, WRITE)]);
    driver.publish(0);
    assert_eq!(driver.used(0).1, 1025);
    assert_eq!(driver.get(DATA, 1024), data);
    assert_eq!(driver.get(DATA + 1024, 1), [OK]);
}

#[test]
fn indirect_descriptors_work() {
    let scratch = Scratch::new("indirect");
    let mut driver = started(block(&scratch.raw("disk", MIB), DiskFormat::Raw));
    driver.header(IN, 0);
    for (at, (address, len, flags, next)) in
        [(HEADER, 16u32, NEXT, 1u16), (DATA, 512, NEXT | WRITE, 2), (STATUS, 1, WRITE, 0)].iter().enumerate()
    {
        let mut raw = [0; 16];
        raw[..8].copy_from_slice(&address.to_le_bytes());
        raw[8..12].copy_from_slice(&len.to_le_bytes());
        raw[12..14].copy_from_slice(&flags.to_le_bytes());
        raw[14..].copy_from_slice(&next.to_le_bytes());
        driver.put(0x11_0000 + 16 * at as u64, &raw);
    }
    driver.add(0, &[(0x11_0000, 48, 4)]);
    driver.publish(0);
    assert_eq!(driver.used(0).1, 513);
    assert_eq!(driver.get(STATUS, 1), [OK]);
}

#[test]
fn requests_outside_the_disk_or_of_odd_length_fail() {
    let scratch = Scratch::new("range");
    let path = scratch.raw("disk", MIB + 100);
    let mut driver = started(block(&path, DiskFormat::Raw));
    let last = MIB / 512 - 1;
    assert_eq!(driver.request(IN, last, &[(DATA, 512, WRITE)]), OK);
    for (kind, flags) in [(IN, WRITE), (OUT, 0)] {
        assert_eq!(driver.request(kind, last + 1, &[(DATA, 512, flags)]), IOERR);
        assert_eq!(driver.request(kind, last, &[(DATA, 1024, flags)]), IOERR);
        assert_eq!(driver.request(kind, u64::MAX, &[(DATA, 512, flags)]), IOERR);
        assert_eq!(driver.request(kind, u64::MAX / 512, &[(DATA, 512, flags)]), IOERR);
        assert_eq!(driver.request(kind, 0, &[(DATA, 100, flags)]), IOERR);
        // Into the hole between the regions of guest memory, and off its end.
        assert_eq!(driver.request(kind, 0, &[(LOW_BYTES - 256, 512, flags)]), IOERR);
        assert_eq!(driver.request(kind, 0, &[(u64::MAX - 100, 512, flags)]), IOERR);
    }
    assert_eq!(driver.request(99, 0, &[]), UNSUPP);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), MIB + 100, "the file must not have grown");
}

#[test]
fn the_serial_is_the_name() {
    let scratch = Scratch::new("serial");
    let mut driver = started(block(&scratch.raw("disk", MIB), DiskFormat::Raw));
    assert_eq!(driver.request(GET_ID, 0, &[(DATA, 20, WRITE)]), OK);
    assert_eq!(driver.get(DATA, 20), b"root-disk-with-a-lon");
    assert_eq!(driver.request(GET_ID, 0, &[(DATA, 4, WRITE)]), OK);
}

#[test]
fn a_read_only_disk_is_never_written() {
    let scratch = Scratch::new("ro");
    let path = scratch.raw("disk", MIB);
    let mut config = config(&path, DiskFormat::Raw);
    config.read_only = true;
    let block = Block::new(&config, open_ro(&path), Vec::new(), &sandbox_hook(), events()).unwrap();
    let handle = block.handle();
    let mut driver = Driver::new(block);
    let offered = driver.offered();
    assert_ne!(offered & 1 << 5, 0);
    assert_eq!(offered & (FEATURE_DISCARD | FEATURE_WRITE_ZEROES), 0);
    driver.start(offered);
    assert_eq!(driver.write_disk(0, &[1; 512]), IOERR);
    assert_eq!(driver.zero(DISCARD, 0, 8, 0), IOERR);
    assert_eq!(driver.zero(WRITE_ZEROES, 0, 8, 0), IOERR);
    assert_eq!(driver.request(FLUSH, 0, &[]), OK);
    assert!(handle.resize(2 * MIB).is_err());
    assert_eq!(driver.read_disk(0, 512), [0; 512]);
}

fn check_zeroing(path: &str, format: DiskFormat) {
    let mut driver = started(block(path, format));
    let data = pattern(512 * 1024, 5);
    assert_eq!(driver.write_disk(0, &data), OK);
    // Unaligned on both sides, without and with permission to unmap.
    assert_eq!(driver.zero(WRITE_ZEROES, 3, 300, 0), OK);
    assert_eq!(driver.zero(WRITE_ZEROES, 400, 517, 1), OK);
    let mut expected = data.clone();
    expected[3 * 512..303 * 512].fill(0);
    expected[400 * 512..917 * 512].fill(0);
    assert_eq!(driver.read_disk(0, data.len()), expected);
    assert_eq!(driver.zero(DISCARD, 0, 1024, 0), OK);
    assert_eq!(driver.zero(DISCARD, 0, 8, 1), UNSUPP);
    assert_eq!(driver.zero(WRITE_ZEROES, 0, 8, 6), UNSUPP);
    assert_eq!(driver.zero(WRITE_ZEROES, u64::MAX, 8, 0), IOERR);
    assert_eq!(driver.zero(WRITE_ZEROES, 0, u32::MAX, 0), IOERR);
    assert_eq!(driver.zero(DISCARD, 0, 0, 0), OK);
    assert_eq!(driver.request(DISCARD, 0, &[(DATA, 15, 0)]), IOERR);
    assert_eq!(driver.request(DISCARD, 0, &[(DATA, 16 * 17, 0)]), IOERR);
}

#[test]
fn raw_discards_and_writes_zeroes() {
    let scratch = Scratch::new("zero-raw");
    check_zeroing(&scratch.raw("disk", 4 * MIB), DiskFormat::Raw);
}

/// tmpfs punches holes but can't make zeroes in place: they are written.
#[test]
fn zeroes_are_written_where_the_file_system_has_none() {
    let scratch = Scratch::below("/dev/shm".into(), "zero-tmpfs");
    check_zeroing(&scratch.raw("disk", 4 * MIB), DiskFormat::Raw);
    let path = scratch.path("qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &path, "4M"]).unwrap();
    check_zeroing(&path, DiskFormat::Qcow2);
    tool("qemu-img", &["check", "-q", &path]).unwrap();
}

fn check_growing(path: &str, format: DiskFormat) {
    let block = block(path, format);
    let handle = block.handle();
    let mut driver = started(block);
    assert_eq!(handle.capacity_bytes(), 4 * MIB);
    let generation = driver.read(0xfc);
    assert!(matches!(handle.resize(2 * MIB), Err(BlockError::Shrink { .. })));
    assert!(matches!(handle.resize(8 * MIB + 1), Err(BlockError::Odd { .. })));
    handle.resize(4 * MIB).unwrap();
    assert_eq!(driver.read(0x60), 0, "no change, no interrupt");
    handle.resize(8 * MIB).unwrap();
    assert_eq!(handle.capacity_bytes(), 8 * MIB);
    assert_eq!(driver.read(0x60), 2);
    assert!(driver.wait_interrupt(Duration::from_secs(5)));
    assert_ne!(driver.read(0xfc), generation);
    assert_eq!(u64::from(driver.read(0x100)), 8 * MIB / 512);
    assert_eq!(driver.write_disk(16383, &[9; 512]), OK);
    handle.flush().unwrap();
}

#[test]
fn disks_grow_while_they_run() {
    let scratch = Scratch::new("grow");
    let raw = scratch.raw("raw", 4 * MIB);
    check_growing(&raw, DiskFormat::Raw);
    assert_eq!(std::fs::metadata(&raw).unwrap().len(), 8 * MIB);
    let path = scratch.path("qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &path, "4M"]).unwrap();
    check_growing(&path, DiskFormat::Qcow2);
    tool("qemu-img", &["check", "-q", &path]).unwrap();
    assert!(tool("qemu-img", &["info", &path]).unwrap().contains("8 MiB (8388608 bytes)"));
}

/// A loop device, detached at the end.
struct Loop(String);

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = std::process::Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn a_block_device_is_looked_at_again() {
    if !std::path::Path::new("/dev/loop-control").exists() {
        println!("skipped: this kernel has no loop devices");
        return;
    }
    let scratch = Scratch::new("device");
    let file = scratch.raw("file", 4 * MIB);
    let device = Loop(tool("losetup", &["-f", "--show", &file]).unwrap().trim().into());
    check_zeroing(&device.0, DiskFormat::Raw);
    let block = block(&device.0, DiskFormat::Raw);
    let handle = block.handle();
    let mut driver = started(block);
    assert_eq!(handle.capacity_bytes(), 4 * MIB);
    let Err(BlockError::Grow { source, .. }) = handle.resize(8 * MIB) else { panic!("it grew") };
    assert!(source.to_string().contains("only 4194304 bytes"));
    File::options().write(true).open(&file).unwrap().set_len(8 * MIB).unwrap();
    tool("losetup", &["-c", &device.0]).unwrap();
    handle.resize(8 * MIB).unwrap();
    assert_eq!(u64::from(driver.read(0x100)), 8 * MIB / 512);
    assert_eq!(driver.write_disk(16383, &[3; 512]), OK);
    assert_eq!(driver.request(FLUSH, 0, &[]), OK);
}

#[test]
fn a_file_that_is_longer_is_not_cut() {
    let scratch = Scratch::new("longer");
    let path = scratch.raw("disk", 4 * MIB);
    let block = block(&path, DiskFormat::Raw);
    File::options().write(true).open(&path).unwrap().set_len(16 * MIB).unwrap();
    block.handle().resize(8 * MIB).unwrap();
    assert_eq!(block.handle().capacity_bytes(), 16 * MIB);
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 16 * MIB);
}

fn refusal(result: Result<Block, BlockError>) -> String {
    let Err(error) = result else { panic!("the image was opened") };
    let mut text = error.to_string();
    let mut source = std::error::Error::source(&error);
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

#[test]
fn a_failing_hook_fails_the_device() {
    let scratch = Scratch::new("hook");
    let path = scratch.raw("disk", MIB);
    let hook: ThreadStart = Arc::new(|role| {
        assert_eq!(role, ThreadRole::Block);
        assert_eq!(std::thread::current().name(), Some("disk-root-disk-with-a-long-name"));
        Err(io::ErrorKind::PermissionDenied.into())
    });
    let result = Block::new(&config(&path, DiskFormat::Raw), open_rw(&path), Vec::new(), &hook, events());
    assert!(refusal(result).contains("permission denied"));
}

#[test]
fn malformed_chains_get_nothing_and_the_disk_goes_on() {
    let scratch = Scratch::new("malformed");
    let mut driver = started(block(&scratch.raw("disk", MIB), DiskFormat::Raw));
    driver.header(IN, 0);
    let chains: &[&[(u64, u32, u16)]] = &[
        &[(HEADER, 16, 0)],
        &[(HEADER, 15, 0), (STATUS, 1, WRITE)],
        &[(STATUS, 1, WRITE)],
        &[(DATA, 512, WRITE), (HEADER, 16, 0), (STATUS, 1, WRITE)],
        &[(u64::MAX, 16, 0), (STATUS, 1, WRITE)],
        &[(HEADER, 16, 0), (u64::MAX, 1, WRITE)],
        &[(HEADER, 0, 0), (STATUS, 0, WRITE)],
        &[(DATA, 17, 4)],
    ];
    for chain in chains {
        let head = driver.add(0, chain);
        driver.publish(0);
        assert_eq!(driver.used(0), (head, 0), "{chain:?}");
    }
    // A chain that bites its tail.
    driver.write_descriptor(0, 200, DATA, 512, NEXT | WRITE, 200);
    driver.add_head(0, 200);
    driver.publish(0);
    assert_eq!(driver.used(0), (200, 0));
    assert_eq!(driver.read_disk(0, 512), [0; 512]);
}

#[test]
fn a_broken_ring_asks_for_a_reset_and_gets_over_it() {
    let scratch = Scratch::new("broken");
    let mut driver = started(block(&scratch.raw("disk", MIB), DiskFormat::Raw));
    driver.add_head(0, 999);
    driver.publish(0);
    driver.wait_needs_reset();
    let features = driver.offered();
    driver.start(features);
    // More available than the queue holds.
    driver.rings[0].available = 300;
    driver.publish(0);
    driver.wait_needs_reset();
    driver.start(features);
    assert_eq!(driver.read_disk(0, 512), [0; 512]);
}

#[test]
fn writes_are_flushed_where_the_driver_does_not() {
    let scratch = Scratch::new("no-flush");
    let mut driver = Driver::new(block(&scratch.raw("disk", MIB), DiskFormat::Raw));
    driver.start(0);
    assert_eq!(driver.write_disk(0, &[1; 512]), OK);
    // Not accepted, so not there.
    assert_eq!(driver.zero(DISCARD, 0, 8, 0), UNSUPP);
    driver.start(FEATURE_FLUSH | FEATURE_DISCARD | FEATURE_WRITE_ZEROES);
    assert_eq!(driver.zero(DISCARD, 0, 8, 0), OK);
}

/// Fills the queue, resets in the middle, and starts again, many times.
fn check_reset(path: &str, format: DiskFormat) {
    let block = block(path, format);
    let handle = block.handle();
    let mut driver = Driver::new(block);
    let features = driver.offered();
    for round in 0..50u64 {
        driver.start(features);
        let data = [round as u8; 65536];
        driver.put(DATA, &data);
        for request in 0..60 {
            let header = HEADER + 32 * request;
            let mut bytes = [0; 16];
            bytes[0] = OUT as u8;
            bytes[8..].copy_from_slice(&(request * 128).to_le_bytes());
            driver.put(header, &bytes);
            driver.add(0, &[(header, 16, 0), (DATA, 65536, 0), (STATUS + request, 1, WRITE)]);
        }
        driver.publish(0);
        std::thread::sleep(Duration::from_micros(round * 37));
        driver.write(0x70, 0);
        assert_eq!(driver.status(), 0);
        // From here on the device may not touch guest memory.
        let used = driver.used_index(0);
        driver.put(DATA, &[0xdd; 65536]);
        std::thread::sleep(Duration::from_micros(200));
        assert_eq!(driver.used_index(0), used);
        driver.start(features);
        for request in 0..u64::from(used) {
            let read = driver.read_disk(request * 128, 65536);
            assert_eq!(read, data, "round {round}, request {request} of {used}");
        }
    }
    handle.flush().unwrap();
}

#[test]
fn resets_in_the_middle_of_requests() {
    let scratch = Scratch::new("reset");
    check_reset(&scratch.raw("raw", 8 * MIB), DiskFormat::Raw);
    let path = scratch.path("qcow2");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &path, "8M"]).unwrap();
    check_reset(&path, DiskFormat::Qcow2);
    tool("qemu-img", &["check", "-q", &path]).unwrap();
}

#[test]
fn interrupts_come_in_batches_and_only_when_wanted() {
    let scratch = Scratch::new("interrupts");
    let mut driver = Driver::new(block(&scratch.raw("disk", MIB), DiskFormat::Raw));
    driver.start(EVENT_IDX | FEATURE_FLUSH);
    let add_reads = |driver: &mut Driver| {
        driver.header(IN, 0);
        for _ in 0..64 {
            driver.add(0, &[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
        }
        driver.publish(0);
        for _ in 0..64 {
            driver.used(0);
        }
        driver.wait_interrupt(Duration::from_millis(50));
    };
    driver.want_interrupt_after(0, 64);
    add_reads(&mut driver);
    assert_eq!(driver.interrupts, 1);
    driver.want_interrupt_after(0, 1000);
    add_reads(&mut driver);
    assert_eq!(driver.interrupts, 1);
    // Without the event index: one for each sixteen, none when the driver says so.
    driver.start(FEATURE_FLUSH);
    driver.interrupts = 0;
    add_reads(&mut driver);
    assert!((1..=5).contains(&driver.interrupts), "{}", driver.interrupts);
    let (flags, interrupts) = (driver.rings[0].available_ring(), driver.interrupts);
    driver.put(flags, &1u16.to_le_bytes());
    add_reads(&mut driver);
    assert_eq!(driver.interrupts, interrupts);
}

fn hostile_descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![
        4 => (0u64..64).prop_map(|at| HEADER + at * 8),
        3 => DATA..DATA + 0x10000,
        1 => Just(LOW_BYTES - 7),
        1 => Just(HIGH_START - 3),
        1 => any::<u64>(),
    ];
    let len =
        prop_oneof![4 => Just(16u32), 4 => Just(512), 2 => Just(1), 2 => 0u32..70000, 1 => any::<u32>()];
    (address, len, 0u16..8, 0u16..300)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, max_shrink_iters: 50, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn hostile_chains_never_panic(
        descriptors in prop::collection::vec(hostile_descriptor(), 1..64),
        heads in prop::collection::vec(0u16..80, 1..40),
        requests in prop::collection::vec((0u32..16, any::<u64>()), 4),
        qcow2 in any::<bool>(),
        features in any::<u64>(),
    ) {
        let scratch = Scratch::new(if qcow2 { "hostile-qcow2" } else { "hostile-raw" });
        let path = scratch.path("disk");
        let format = if qcow2 {
            // Made by hand, for speed: an empty image of QEMU's.
            std::fs::write(&path, include_bytes!("testdata/empty.qcow2")).unwrap();
            DiskFormat::Qcow2
        } else {
            scratch.raw("disk", MIB);
            DiskFormat::Raw
        };
        let mut driver = Driver::new(block(&path, format));
        let offered = driver.offered();
        driver.start(offered & features);
        for (at, (kind, sector)) in requests.iter().enumerate() {
            driver.header(*kind, if at % 2 == 0 { sector % 4096 } else { *sector });
            let header = driver.get(HEADER, 16);
            driver.put(HEADER + 16 * at as u64, &header);
        }
        for (at, (address, len, flags, next)) in descriptors.iter().enumerate() {
            driver.write_descriptor(0, at as u16, *address, *len, *flags, *next);
        }
        for head in &heads {
            driver.add_head(0, *head);
        }
        driver.publish(0);
        let deadline = Instant::now() + Duration::from_secs(10);
        while usize::from(driver.used_index(0)) < heads.len() && driver.status() & 64 == 0 {
            prop_assert!(Instant::now() < deadline, "the device hangs");
            std::thread::yield_now();
        }
        // Whatever it was: after a reset the disk works.
        driver.start(offered);
        prop_assert_eq!(driver.request(GET_ID, 0, &[(DATA, 20, WRITE)]), OK);
        prop_assert_eq!(driver.get(DATA, 4), b"root");
    }
}

/// Reads the disk from its start, 32 requests of 256 KiB at a time; returns the time and interrupts.
fn read_through(driver: &mut Driver, bytes: u64) -> (Duration, u64) {
    const REQUEST: u64 = 256 << 10;
    let (start, interrupts) = (Instant::now(), driver.interrupts);
    let (mut sent, mut done) = (0, 0);
    while done < bytes / REQUEST {
        while sent < bytes / REQUEST && sent - done < 32 {
            let header = HEADER + 16 * (sent % 64);
            let mut words = [0; 16];
            words[8..].copy_from_slice(&(sent * REQUEST / 512).to_le_bytes());
            driver.put(header, &words);
            let data = DATA + sent % 32 * REQUEST;
            driver.add(0, &[(header, 16, 0), (data, REQUEST as u32, WRITE), (STATUS + sent % 64, 1, WRITE)]);
            sent += 1;
        }
        driver.want_interrupt_after(0, 16.min(sent - done) as u16);
        driver.publish(0);
        assert_eq!(driver.used(0).1, REQUEST as u32 + 1);
        done += 1;
        while driver.used_within(0, Duration::ZERO).is_some() {
            done += 1;
        }
    }
    (start.elapsed(), driver.interrupts - interrupts)
}

/// Not a benchmark, but a floor: below it something is badly wrong.
#[test]
fn a_gibibyte_reads_in_reasonable_time() {
    let scratch = Scratch::new("throughput");
    let (raw, path) = (scratch.raw("raw", 1024 * MIB), scratch.path("qcow2"));
    File::options().write(true).open(&raw).unwrap().write_all_at(&vec![1; 256 * MIB as usize], 0).unwrap();
    tool("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &raw, &path]).unwrap();
    for (path, format) in [(&raw, DiskFormat::Raw), (&path, DiskFormat::Qcow2)] {
        let mut driver = started(block(path, format));
        let (elapsed, interrupts) = read_through(&mut driver, 1024 * MIB);
        println!("{format:?}: 1 GiB in {elapsed:?}, {interrupts} interrupts for 4096 requests");
        assert!(elapsed < Duration::from_secs(20));
        assert!(interrupts <= 4096 / 4);
    }
}
