//! qcow2 images, with QEMU as the judge of what was written.

use super::*;
use crate::vmm::config::BackingConfig;

fn overlay(path: &str, backing: &[(&str, DiskFormat)]) -> Result<Block, BlockError> {
    let mut config = config(path, DiskFormat::Qcow2);
    config.backing = backing
        .iter()
        .map(|(path, format)| BackingConfig { path: path.to_string(), format: *format })
        .collect();
    let fds = backing.iter().map(|(path, _)| open_ro(path)).collect();
    Block::new(&config, open_rw(path), fds, &sandbox_hook(), events())
}

#[test]
fn qcow2_discards_and_writes_zeroes() {
    let scratch = Scratch::new("zero-qcow2");
    let path = scratch.path("disk");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &path, "4M"]).unwrap();
    check_zeroing(&path, DiskFormat::Qcow2);
    tool("qemu-img", &["check", "-q", &path]).unwrap();
}

#[test]
fn qcow2_is_what_qemu_says_it_is() {
    let scratch = Scratch::new("qcow2");
    for options in
        ["cluster_size=65536", "cluster_size=512", "cluster_size=2M", "compat=0.10", "refcount_bits=1"]
    {
        let path = scratch.path("disk");
        tool("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, &path, "20M"]).unwrap();
        tool("qemu-io", &["-f", "qcow2", "-c", "write -q -P 0x5a 1M 64k", &path]).unwrap();
        let mut driver = started(block(&path, DiskFormat::Qcow2));
        assert_eq!(driver.read_disk(2048, 65536), [0x5a; 65536], "{options}");
        assert_eq!(driver.write_disk(2049, &[0xa5; 512]), OK);
        assert_eq!(driver.write_disk(40950, &[0x11; 5120]), OK);
        assert_eq!(driver.request(FLUSH, 0, &[]), OK);
        drop(driver);
        tool("qemu-img", &["check", "-q", &path]).unwrap();
        for read in [
            "read -P 0x5a 1M 512",
            "read -P 0xa5 1049088 512",
            "read -P 0x5a 1049600 64512",
            "read -P 0x11 20966400 5120",
        ] {
            let said = tool("qemu-io", &["-f", "qcow2", "-r", "-c", read, &path]).unwrap();
            assert!(!said.contains("failed"), "{options}: {said}");
        }
    }
}

#[test]
fn a_file_that_ends_within_its_last_cluster_reads_as_zeroes_there() {
    let scratch = Scratch::new("short");
    let path = scratch.path("disk");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &path, "1M"]).unwrap();
    tool("qemu-io", &["-f", "qcow2", "-c", "write -q -P 0x5a 0 64k", &path]).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.set_len(file.metadata().unwrap().len() - 4096).unwrap();
    let read = started(block(&path, DiskFormat::Qcow2)).read_disk(0, 65536);
    assert_eq!(read[..61440], [0x5a; 61440]);
    assert_eq!(read[61440..], [0; 4096]);
}

#[test]
fn a_reset_leaves_a_whole_image() {
    let scratch = Scratch::new("reset-flush");
    let path = scratch.path("disk");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &path, "8M"]).unwrap();
    let mut driver = started(block(&path, DiskFormat::Qcow2));
    assert_eq!(driver.write_disk(1000, &[0x21; 65536]), OK);
    driver.write(0x70, 0);
    // The device still lives, but nothing is left in its memory alone.
    tool("qemu-img", &["check", "-q", &path]).unwrap();
    let said = tool("qemu-io", &["-f", "qcow2", "-r", "-c", "read -P 0x21 512000 65536", &path]).unwrap();
    assert!(!said.contains("failed"), "{said}");
}

#[test]
fn compressed_clusters_are_read_and_written_over() {
    let scratch = Scratch::new("compressed");
    let (raw, path) = (scratch.path("raw"), scratch.path("disk"));
    let data = pattern(3 * MIB as usize, 1);
    std::fs::write(&raw, &data).unwrap();
    tool("qemu-img", &["convert", "-c", "-f", "raw", "-O", "qcow2", &raw, &path]).unwrap();
    let mut driver = started(block(&path, DiskFormat::Qcow2));
    assert_eq!(driver.read_disk(0, MIB as usize), data[..MIB as usize]);
    assert_eq!(driver.write_disk(130, &[7; 1024]), OK);
    drop(driver);
    tool("qemu-img", &["check", "-q", &path]).unwrap();
    let mut expected = data;
    expected[130 * 512..132 * 512].fill(7);
    std::fs::write(&raw, &expected).unwrap();
    tool("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", &raw, &path]).unwrap();
}

#[test]
fn an_overlay_leaves_its_backing_files_alone() {
    let scratch = Scratch::new("overlay");
    let (base, middle, top) = (scratch.path("base"), scratch.path("middle"), scratch.path("top"));
    std::fs::write(&base, pattern(2 * MIB as usize, 8)).unwrap();
    let create = ["create", "-q", "-f", "qcow2", "-b"];
    tool("qemu-img", &[&create[..], &[&base, "-F", "raw", &middle]].concat()).unwrap();
    tool("qemu-io", &["-f", "qcow2", "-c", "write -q -P 0x33 64k 64k", &middle]).unwrap();
    tool("qemu-img", &[&create[..], &[&middle, "-F", "qcow2", &top]].concat()).unwrap();
    let before = (std::fs::read(&base).unwrap(), std::fs::read(&middle).unwrap());
    let chain = [(middle.as_str(), DiskFormat::Qcow2), (base.as_str(), DiskFormat::Raw)];
    let mut driver = started(overlay(&top, &chain).unwrap());
    assert_eq!(driver.read_disk(0, 65536), before.0[..65536]);
    assert_eq!(driver.read_disk(128, 65536), [0x33; 65536]);
    // A partial cluster: the rest of it is copied from below.
    assert_eq!(driver.write_disk(129, &[0x44; 512]), OK);
    assert_eq!(driver.write_disk(1000, &[0x55; 1024]), OK);
    assert_eq!(driver.zero(DISCARD, 0, 128, 0), OK);
    assert_eq!(driver.read_disk(128, 512), [0x33; 512]);
    drop(driver);
    assert_eq!((std::fs::read(&base).unwrap(), std::fs::read(&middle).unwrap()), before);
    tool("qemu-img", &["check", "-q", &top]).unwrap();
    let said = tool(
        "qemu-io",
        &["-f", "qcow2", "-r", "-c", "read -P 0x44 66048 512", "-c", "read -P 0x33 66560 64512", &top],
    );
    assert!(!said.unwrap().contains("failed"));
}

#[test]
fn growing_never_shows_what_the_backing_file_has_beyond() {
    let scratch = Scratch::new("grow-overlay");
    let (base, top) = (scratch.path("base"), scratch.path("top"));
    std::fs::write(&base, vec![0x77; 4 * MIB as usize]).unwrap();
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &top, "1M"]).unwrap();
    let block = overlay(&top, &[(&base, DiskFormat::Raw)]).unwrap();
    let handle = block.handle();
    let mut driver = started(block);
    handle.resize(8 * MIB).unwrap();
    assert_eq!(driver.read_disk(2048 - 128, 65536), [0x77; 65536]);
    assert_eq!(driver.read_disk(2048, 65536), [0; 65536]);
    drop((driver, handle));
    tool("qemu-img", &["check", "-q", &top]).unwrap();
}

fn opened(path: &str) -> Result<Block, BlockError> {
    Block::new(&config(path, DiskFormat::Qcow2), open_rw(path), Vec::new(), &sandbox_hook(), events())
}

#[test]
fn dangerous_images_are_refused_by_name() {
    let scratch = Scratch::new("refused");
    let path = scratch.path("disk");
    let patched = |at: u64, bytes: &[u8]| {
        tool("qemu-img", &["create", "-q", "-f", "qcow2", &path, "4M"]).unwrap();
        File::options().write(true).open(&path).unwrap().write_all_at(bytes, at).unwrap();
        refusal(opened(&path))
    };
    assert!(patched(32, &2u32.to_be_bytes()).contains("encrypted (method 2)"));
    assert!(patched(72, &1u64.to_be_bytes()).contains("dirty"));
    assert!(patched(72, &2u64.to_be_bytes()).contains("corrupt"));
    assert!(patched(72, &4u64.to_be_bytes()).contains("data in another file"));
    assert!(patched(72, &32u64.to_be_bytes()).contains("nrecognized incompatible"));
    assert!(patched(36, &u32::MAX.to_be_bytes()).contains("L1 table"));
    assert!(patched(56, &u32::MAX.to_be_bytes()).contains("refcount table"));
    assert!(patched(20, &63u32.to_be_bytes()).contains("cluster size"));
    assert!(patched(0, b"RAW!").contains("not a qcow2"));
    std::fs::write(&path, b"").unwrap();
    assert!(refusal(opened(&path)).contains("not a qcow2"));
    let pipe = rustix::pipe::pipe().unwrap().0;
    let result = Block::new(&config(&path, DiskFormat::Raw), pipe, Vec::new(), &sandbox_hook(), events());
    assert!(refusal(result).contains("neither a file nor a block device"));
}

#[test]
fn backing_files_must_be_declared_as_they_are() {
    let scratch = Scratch::new("backing");
    let (base, top) = (scratch.raw("base", MIB), scratch.path("top"));
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &top]).unwrap();
    assert!(refusal(opened(&top)).contains(&base));
    let plain = scratch.path("plain");
    tool("qemu-img", &["create", "-q", "-f", "qcow2", &plain, "1M"]).unwrap();
    assert!(refusal(overlay(&plain, &[(&base, DiskFormat::Raw)])).contains("it has none"));
    assert!(refusal(overlay(&top, &[(&plain, DiskFormat::Qcow2)])).contains("declared as qcow2"));
    let below_raw = [(base.as_str(), DiskFormat::Raw), (plain.as_str(), DiskFormat::Qcow2)];
    assert!(refusal(overlay(&top, &below_raw)).contains("raw layer"));
    // The header's path may be gone: only what was passed counts.
    std::fs::rename(&base, scratch.path("moved")).unwrap();
    overlay(&top, &[(&scratch.path("moved"), DiskFormat::Raw)]).unwrap();
}

/// A step of a disk's life.
#[derive(Clone, Debug)]
enum Step {
    Write { sector: u64, sectors: u32, seed: u8 },
    Zero { sector: u64, sectors: u32, unmap: bool },
    Discard { sector: u64, sectors: u32 },
    Grow { sectors: u64 },
    Reopen,
}

const MODEL_SECTORS: u64 = 3000;

fn step() -> impl Strategy<Value = Step> {
    let range = || (0u64..MODEL_SECTORS, prop_oneof![1u32..20, 1u32..600]);
    prop_oneof![
        6 => (range(), any::<u8>()).prop_map(|((sector, sectors), seed)| Step::Write { sector, sectors, seed }),
        2 => (range(), any::<bool>()).prop_map(|((sector, sectors), unmap)| Step::Zero { sector, sectors, unmap }),
        2 => range().prop_map(|(sector, sectors)| Step::Discard { sector, sectors }),
        1 => (0u64..500).prop_map(|sectors| Step::Grow { sectors }),
        1 => Just(Step::Reopen),
    ]
}

/// Does the steps on an overlay and on bytes in memory; whatever is read must be the same, and QEMU
/// must find the image in order.
fn check_model(scratch: &Scratch, cluster: &str, steps: &[Step]) -> Result<(), TestCaseError> {
    let (base, top) = (scratch.path("base"), scratch.path("top"));
    // The backing file is longer than the overlay at first: what growing must never show.
    let below = pattern(2000 * 512, 77);
    std::fs::write(&base, &below).unwrap();
    let options = format!("cluster_size={cluster}");
    let arguments = ["create", "-q", "-f", "qcow2", "-o", &options, "-b", &base, "-F", "raw", &top, "750k"];
    tool("qemu-img", &arguments).unwrap();
    let mut model = below[..1500 * 512].to_vec();
    let open = || {
        let block = overlay(&top, &[(&base, DiskFormat::Raw)]).unwrap();
        let handle = block.handle();
        (started(block), handle)
    };
    let (mut driver, mut handle) = open();
    for step in steps {
        let fits = |sector: u64, sectors: u32| (sector + u64::from(sectors)) * 512 <= model.len() as u64;
        let status = |fits| if fits { OK } else { IOERR };
        match *step {
            Step::Write { sector, sectors, seed } => {
                let data = pattern(sectors as usize * 512, seed);
                prop_assert_eq!(driver.write_disk(sector, &data), status(fits(sector, sectors)));
                if fits(sector, sectors) {
                    model[sector as usize * 512..][..data.len()].copy_from_slice(&data);
                }
            }
            Step::Zero { sector, sectors, unmap } => {
                let done = driver.zero(WRITE_ZEROES, sector, sectors, u32::from(unmap));
                prop_assert_eq!(done, status(fits(sector, sectors)));
                if fits(sector, sectors) {
                    model[sector as usize * 512..][..sectors as usize * 512].fill(0);
                }
            }
            Step::Discard { sector, sectors } => {
                let done = driver.zero(DISCARD, sector, sectors, 0);
                prop_assert_eq!(done, status(fits(sector, sectors)));
                if fits(sector, sectors) {
                    // Anything may be there now, so ask; but not what was never there.
                    let now = driver.read_disk(sector, sectors as usize * 512);
                    let then = &mut model[sector as usize * 512..][..now.len()];
                    prop_assert!(now.iter().zip(&*then).all(|(now, then)| *now == 0 || now == then));
                    then.copy_from_slice(&now);
                }
            }
            Step::Grow { sectors } => {
                let bytes = model.len() as u64 + sectors * 512;
                if bytes <= MODEL_SECTORS * 512 {
                    handle.resize(bytes).unwrap();
                    model.resize(bytes as usize, 0);
                }
            }
            Step::Reopen => {
                drop((driver, handle));
                (driver, handle) = open();
            }
        }
    }
    for (at, expected) in model.chunks(256 * 512).enumerate() {
        prop_assert!(
            driver.read_disk(at as u64 * 256, expected.len()) == expected,
            "differs in piece {}",
            at
        );
    }
    drop((driver, handle));
    tool("qemu-img", &["check", "-q", &top]).unwrap();
    let raw = scratch.path("model");
    std::fs::write(&raw, &model).unwrap();
    tool("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", &raw, &top]).unwrap();
    prop_assert_eq!(std::fs::read(&base).unwrap(), below);
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, max_shrink_iters: 50, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn an_overlay_keeps_what_it_is_given(
        steps in prop::collection::vec(step(), 1..60),
        cluster in prop::sample::select(vec!["512", "4k", "64k", "2M"]),
    ) {
        let scratch = Scratch::new("model");
        check_model(&scratch, cluster, &steps)?;
    }
}
