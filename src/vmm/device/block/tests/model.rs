//! Random requests against a model in memory: every format, any number of queues, each cache mode,
//! with resets and growth in the middle.

use super::*;

const START_BYTES: u64 = 2 * MIB;
const SECTORS: u64 = START_BYTES / 512;
const SLOTS: usize = 48;
const SLOT_BYTES: u64 = 64 * 1024;

/// What a disk is made of.
#[derive(Clone, Copy, Debug)]
struct Row {
    format: DiskFormat,
    cache: CacheMode,
    queues: u16,
    engine: Engine,
    /// The backing storage writes no less than this at once.
    block_bytes: u32,
}

const fn row(format: DiskFormat, cache: CacheMode, queues: u16) -> Row {
    Row { format, cache, queues, engine: Engine::Best, block_bytes: 512 }
}

/// Without io_uring.
const fn plain(row: Row) -> Row {
    Row { engine: Engine::Thread, ..row }
}

const ROWS: &[Row] = &[
    row(DiskFormat::Raw, CacheMode::Writeback, 1),
    row(DiskFormat::Raw, CacheMode::Writeback, 4),
    row(DiskFormat::Raw, CacheMode::Direct, 1),
    row(DiskFormat::Raw, CacheMode::Direct, 3),
    row(DiskFormat::Raw, CacheMode::Writethrough, 2),
    plain(row(DiskFormat::Raw, CacheMode::Writeback, 1)),
    plain(row(DiskFormat::Raw, CacheMode::Writeback, 4)),
    plain(row(DiskFormat::Raw, CacheMode::Direct, 3)),
    plain(row(DiskFormat::Raw, CacheMode::Writethrough, 2)),
    row(DiskFormat::Raw, CacheMode::Unsafe, 2),
    row(DiskFormat::Qcow2, CacheMode::Writeback, 1),
    row(DiskFormat::Qcow2, CacheMode::Writeback, 4),
    row(DiskFormat::Qcow2, CacheMode::Direct, 3),
    row(DiskFormat::Qcow2, CacheMode::Writethrough, 2),
    row(DiskFormat::Qcow2, CacheMode::Unsafe, 2),
];

#[derive(Clone, Copy, Debug)]
enum Kind {
    Read,
    Write,
    Flush,
    Discard,
    WriteZeroes { unmap: bool },
}

/// One request: the queue and the range are taken modulo what there is.
#[derive(Clone, Copy, Debug)]
struct Shot {
    kind: Kind,
    queue: u16,
    sector: u64,
    sectors: u64,
    /// Added to the address of the data.
    skew: u64,
}

/// Requests that are on their way together, and what happens meanwhile.
#[derive(Clone, Debug)]
struct Volley {
    shots: Vec<Shot>,
    grow: bool,
    reset_after_us: Option<u64>,
}

fn shot() -> impl Strategy<Value = Shot> {
    let kind = prop_oneof![
        4 => Just(Kind::Read),
        6 => Just(Kind::Write),
        1 => Just(Kind::Flush),
        1 => Just(Kind::Discard),
        1 => any::<bool>().prop_map(|unmap| Kind::WriteZeroes { unmap }),
    ];
    // Few places, so that requests meet; some at the disk's end.
    let sector = prop_oneof![3 => 0..300u64, 1 => 0..SECTORS];
    let skew = prop_oneof![4 => Just(0u64), 1 => Just(512), 1 => 1..100u64];
    (kind, 0..8u16, sector, 1..=120u64, skew).prop_map(|(kind, queue, sector, sectors, skew)| Shot {
        kind,
        queue,
        sector,
        sectors: sectors.min(SECTORS - sector),
        skew,
    })
}

fn volleys() -> impl Strategy<Value = Vec<Volley>> {
    let shots = prop::collection::vec(shot(), 1..SLOTS);
    let reset = prop_oneof![3 => Just(None), 1 => (0..2000u64).prop_map(Some)];
    let volley = (shots, prop::bool::weighted(0.2), reset).prop_map(|(shots, grow, reset_after_us)| Volley {
        shots,
        grow,
        reset_after_us,
    });
    prop::collection::vec(volley, 1..12)
}

/// What each sector may hold: whole sectors of one byte.
struct Model(Vec<Vec<u8>>);

/// The sectors of a write differ from one another and from those of other writes.
fn fill(tag: u8, sector: u64) -> u8 {
    tag.wrapping_mul(37).wrapping_add(sector as u8)
}

impl Model {
    fn check(&mut self, sector: u64, data: &[u8]) {
        for (at, bytes) in data.chunks(512).enumerate() {
            let may = &mut self.0[sector as usize + at];
            assert!(bytes.iter().all(|byte| *byte == bytes[0]), "sector {} is torn", sector as usize + at);
            assert!(
                may.is_empty() || may.contains(&bytes[0]),
                "sector {}: {}",
                sector as usize + at,
                bytes[0]
            );
            *may = vec![bytes[0]];
        }
    }

    /// An empty list: nobody knows.
    fn set(&mut self, shot: &Shot, tag: u8, is_done: bool) {
        for sector in shot.sector..shot.sector + shot.sectors {
            let may = &mut self.0[sector as usize];
            match (shot.kind, is_done) {
                (Kind::Write, true) => *may = vec![fill(tag, sector)],
                (Kind::WriteZeroes { .. }, true) => *may = vec![0],
                (Kind::Discard, _) => may.clear(),
                (Kind::Write, false) if !may.is_empty() => may.push(fill(tag, sector)),
                (Kind::WriteZeroes { .. }, false) if !may.is_empty() => may.push(0),
                _ => {}
            }
        }
    }
}

impl Shot {
    fn meets(&self, other: &Shot) -> bool {
        let reads = matches!((self.kind, other.kind), (Kind::Read, Kind::Read));
        !reads && self.sector < other.sector + other.sectors && other.sector < self.sector + self.sectors
    }

    fn fire(&self, driver: &mut Driver, slot: usize, tag: u8) -> u16 {
        let header = HEADER + 32 * slot as u64;
        let data = DATA + 2 * SLOT_BYTES * slot as u64 + self.skew;
        let len = self.sectors as u32 * 512;
        let (kind, sector, buffer) = match self.kind {
            Kind::Read => (IN, self.sector, Some((data, len, WRITE))),
            Kind::Write => {
                for at in 0..self.sectors {
                    driver.put(data + at * 512, &[fill(tag, self.sector + at); 512]);
                }
                (OUT, self.sector, Some((data, len, 0)))
            }
            Kind::Flush => (FLUSH, 0, None),
            Kind::Discard | Kind::WriteZeroes { .. } => {
                let unmap = u32::from(matches!(self.kind, Kind::WriteZeroes { unmap: true }));
                driver.put(data, &self.sector.to_le_bytes());
                driver.put(data + 8, &[(self.sectors as u32).to_le_bytes(), unmap.to_le_bytes()].concat());
                let kind = if matches!(self.kind, Kind::Discard) { DISCARD } else { WRITE_ZEROES };
                (kind, 0, Some((data, 16, 0)))
            }
        };
        let mut words = [0; 16];
        words[..4].copy_from_slice(&kind.to_le_bytes());
        words[8..].copy_from_slice(&sector.to_le_bytes());
        driver.put(header, &words);
        driver.put(STATUS + slot as u64, &[0xff]);
        let mut chain = vec![(header, 16, 0)];
        chain.extend(buffer);
        chain.push((STATUS + slot as u64, 1, WRITE));
        driver.add(usize::from(self.queue) % driver.rings.len(), &chain)
    }
}

/// Fires all, waits for all that are answered, and compares.
fn fire(driver: &mut Driver, handle: &BlockHandle, model: &mut Model, volley: &Volley, tag: &mut u8) {
    let features = driver.offered();
    let mut fired: Vec<(Shot, u8)> = Vec::new();
    for shot in &volley.shots {
        if fired.iter().any(|(other, _)| other.meets(shot)) {
            continue;
        }
        *tag = tag.wrapping_add(1);
        shot.fire(driver, fired.len(), *tag);
        fired.push((*shot, *tag));
    }
    for queue in 0..driver.rings.len() {
        driver.publish(queue);
    }
    if volley.grow {
        handle.resize(handle.capacity_bytes() + 4096).unwrap();
    }
    if let Some(us) = volley.reset_after_us {
        std::thread::sleep(Duration::from_micros(us));
        driver.write(0x70, 0);
    } else {
        for queue in 0..driver.rings.len() {
            let count =
                fired.iter().filter(|(shot, _)| usize::from(shot.queue) % driver.rings.len() == queue);
            for _ in 0..count.count() {
                driver.used(queue);
            }
        }
    }
    for (slot, (shot, tag)) in fired.iter().enumerate() {
        let status = driver.get(STATUS + slot as u64, 1)[0];
        assert!(status == OK || volley.reset_after_us.is_some() && status == 0xff, "{shot:?}: {status}");
        model.set(shot, *tag, status == OK);
        if matches!(shot.kind, Kind::Read) && status == OK {
            let data = DATA + 2 * SLOT_BYTES * slot as u64 + shot.skew;
            model.check(shot.sector, &driver.get(data, shot.sectors as usize * 512));
        }
    }
    if volley.reset_after_us.is_some() {
        // From here on the device may not touch guest memory.
        driver.put(DATA, &vec![0xdd; SLOTS * 2 * SLOT_BYTES as usize]);
        std::thread::sleep(Duration::from_micros(300));
        let after = driver.get(DATA, SLOTS * 2 * SLOT_BYTES as usize);
        assert!(after.iter().all(|byte| *byte == 0xdd), "guest memory was written after a reset");
        driver.start(features);
        assert_eq!(handle.metrics().in_flight, 0);
    }
}

fn check(row: Row, path: &str, volleys: &[Volley]) {
    let mut config = config(path, row.format);
    (config.cache, config.queues) = (row.cache, row.queues);
    let hook = sandbox_hook();
    let block = Block::with_engine(&config, open_rw(path), Vec::new(), &hook, events(), row.engine).unwrap();
    let handle = block.handle();
    if row.format == DiskFormat::Qcow2 || row.engine == Engine::Thread {
        assert!(!handle.uses_io_uring());
    } else if !handle.uses_io_uring() {
        println!("this kernel has no io_uring for us: {row:?} is served without");
    }
    let mut driver = Driver::new(block);
    let features = driver.offered();
    driver.start(features);
    assert_eq!(driver.rings.len(), usize::from(row.queues));
    assert_eq!(features & 1 << VIRTIO_BLK_F_MQ != 0, row.queues > 1);
    assert_eq!(driver.read(0x120) >> 16, u32::from(row.queues), "num_queues at offset 34");
    let mut model = Model(vec![vec![0]; SECTORS as usize]);
    let mut tag = 0;
    for volley in volleys {
        fire(&mut driver, &handle, &mut model, volley, &mut tag);
    }
    let all = driver.read_disk(0, START_BYTES as usize);
    model.check(0, &all);
    handle.flush().unwrap();
}

fn run(row: Row, cases: u32) {
    let scratch = Scratch::new(&format!("model-{row:?}").replace([' ', '{', '}', ',', ':'], ""));
    let mut runner = proptest::test_runner::TestRunner::new(ProptestConfig {
        cases,
        failure_persistence: None,
        max_shrink_iters: 30,
        ..ProptestConfig::default()
    });
    let result = runner.run(&volleys(), |volleys| {
        let _ = std::fs::remove_file(scratch.path("disk"));
        let path = match row.format {
            DiskFormat::Raw => scratch.raw("disk", START_BYTES),
            DiskFormat::Qcow2 => {
                let path = scratch.path("disk");
                tool("qemu-img", &["create", "-q", "-f", "qcow2", &path, &START_BYTES.to_string()]).unwrap();
                path
            }
        };
        if row.block_bytes == 512 {
            check(row, &path, &volleys);
        } else {
            let bytes = row.block_bytes.to_string();
            let device = Loop(tool("losetup", &["-f", "--show", "-b", &bytes, &path]).unwrap().trim().into());
            // Nobody grows it.
            let volleys: Vec<_> =
                volleys.iter().map(|volley| Volley { grow: false, ..volley.clone() }).collect();
            check(row, &device.0, &volleys);
        }
        if row.format == DiskFormat::Qcow2 {
            tool("qemu-img", &["check", "-q", &path]).unwrap();
        }
        Ok(())
    });
    if let Err(error) = result {
        panic!("{row:?}: {error}");
    }
}

#[test]
fn raw_disks_do_what_the_model_does() {
    ROWS.iter().filter(|row| row.format == DiskFormat::Raw).for_each(|row| run(*row, 12));
}

#[test]
fn qcow2_disks_do_what_the_model_does() {
    ROWS.iter().filter(|row| row.format == DiskFormat::Qcow2).for_each(|row| run(*row, 12));
}

/// Direct I/O to storage that writes 4096 bytes at once, of sectors of 512: several queues change parts
/// of the same blocks.
#[test]
fn sectors_that_share_a_block_keep_out_of_one_anothers_way() {
    if !std::path::Path::new("/dev/loop-control").exists() {
        println!("skipped: this kernel has no loop devices");
        return;
    }
    run(Row { block_bytes: 4096, ..row(DiskFormat::Raw, CacheMode::Direct, 4) }, 10);
}
