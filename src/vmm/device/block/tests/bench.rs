//! Figures, for a person: `cargo test --release --lib block::tests::bench -- --ignored --nocapture`.

use super::*;

const FILE_BYTES: u64 = 512 * MIB;
const DEPTH: u64 = 32;
const TIME: Duration = Duration::from_millis(1500);

struct Load {
    name: &'static str,
    kind: u32,
    bytes: u64,
    random: bool,
    /// One flush for so many requests.
    flush_every: u64,
}

const LOADS: &[Load] = &[
    Load { name: "seq read 256K", kind: IN, bytes: 256 << 10, random: false, flush_every: u64::MAX },
    Load { name: "rand read 4K", kind: IN, bytes: 4096, random: true, flush_every: u64::MAX },
    Load { name: "seq write 256K", kind: OUT, bytes: 256 << 10, random: false, flush_every: u64::MAX },
    Load { name: "rand write 4K", kind: OUT, bytes: 4096, random: true, flush_every: u64::MAX },
    Load { name: "write 4K + flush", kind: OUT, bytes: 4096, random: true, flush_every: 16 },
];

/// Keeps `DEPTH` requests on their way; gives how many were done in [`TIME`].
fn load(driver: &mut Driver, load: &Load) -> u64 {
    let (start, mut sent, mut done, mut seed) = (Instant::now(), 0u64, 0u64, 0x9e37_79b9_7f4a_7c15u64);
    let places = FILE_BYTES / load.bytes;
    while start.elapsed() < TIME || done < sent {
        while start.elapsed() < TIME && sent - done < DEPTH {
            let slot = sent % 64;
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let place = if load.random { (seed >> 20) % places } else { sent % places };
            let is_flush = sent % load.flush_every == load.flush_every - 1;
            let mut words = [0; 16];
            words[0] = if is_flush { FLUSH as u8 } else { load.kind as u8 };
            words[8..].copy_from_slice(&(if is_flush { 0 } else { place * load.bytes / 512 }).to_le_bytes());
            let header = HEADER + 16 * slot;
            driver.put(header, &words);
            let flags = if load.kind == IN { WRITE } else { 0 };
            let data = (DATA + slot % DEPTH * load.bytes, load.bytes as u32, flags);
            let status = (STATUS + slot, 1, WRITE);
            match is_flush {
                true => driver.add(0, &[(header, 16, 0), status]),
                false => driver.add(0, &[(header, 16, 0), data, status]),
            };
            sent += 1;
        }
        driver.want_interrupt_after(0, (sent - done).min(8) as u16);
        driver.publish(0);
        while done < sent && driver.used_within(0, Duration::from_millis(2)).is_some() {
            done += 1;
            if sent - done <= DEPTH - 8 {
                break;
            }
        }
    }
    done
}

#[test]
#[ignore = "takes minutes, and asserts nothing but that all is answered"]
fn figures() {
    let scratch = Scratch::new("bench");
    let path = scratch.raw("disk", FILE_BYTES);
    let file = File::options().write(true).open(&path).unwrap();
    let chunk = pattern(MIB as usize, 1);
    (0..FILE_BYTES / MIB).for_each(|at| file.write_all_at(&chunk, at * MIB).unwrap());
    file.sync_all().unwrap();
    for cache in [CacheMode::Writeback, CacheMode::Direct, CacheMode::Writethrough] {
        for what in LOADS {
            let mut line = format!("{cache:?}, {}:", what.name);
            for engine in [Engine::Thread, Engine::Best, Engine::Thread, Engine::Best] {
                let mut config = config(&path, DiskFormat::Raw);
                config.cache = cache;
                let hook = sandbox_hook();
                let block =
                    Block::with_engine(&config, open_rw(&path), Vec::new(), &hook, events(), engine).unwrap();
                let handle = block.handle();
                let mut driver = Driver::new(block);
                let features = driver.offered();
                driver.start(features);
                let start = Instant::now();
                let done = load(&mut driver, what);
                let per_second = done as f64 / start.elapsed().as_secs_f64();
                let counted = handle.metrics();
                let interrupts = counted.interrupts as f64 / done as f64;
                line += &format!("  {engine:?} {per_second:.0}/s ({interrupts:.2} irq)");
                assert_eq!(counted.errors, 0);
            }
            println!("{line}");
        }
    }
}
