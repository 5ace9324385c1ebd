//! Storage on real file systems: ext4 (or what the build directory is on), tmpfs, ramfs (which has
//! no extended attributes), btrfs on a loop device (which has reflinks), and full ones.
//!
//! Needs root for mounts, which stay in a mount namespace of the test's thread.

mod storage;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use storage::*;
use vmctl::host::Scope;
use vmctl::host::error::StepError;
use vmctl::host::linux::storage::{Storage, open_disk, read_header};
use vmctl::host::snapshot::Pool;
use vmctl::host::step::{ImageFile, NewVolume, NewVolumeContent, Step};
use vmctl::vmm::config::DiskFormat::{self, Qcow2, Raw};

const MIB: u64 = 1 << 20;

/// Everything that a pool is for, on one file system.
fn whole_life(ground: &Ground) {
    let host = Host::new(ground);
    host.make_pool();
    host.make_pool();
    let pool = host.pool();
    assert_eq!(pool.directory.as_ref().unwrap().mark, Some(host.pool_mark()));
    assert_eq!(pool.registered, Some(host.pool_mark()));
    assert_eq!(host.path.metadata().unwrap().permissions().mode() & 0o777, 0o711);

    // Images of both formats.
    let raw_source = host.raw_source("source.raw", 24 * MIB);
    let qcow2_source = host.outside("source.qcow2");
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", text(&raw_source), text(&qcow2_source)]);
    let raw_image = host.import(&raw_source, Raw).unwrap();
    let qcow2_image = host.import(&qcow2_source, Qcow2).unwrap();
    host.import(&raw_source, Raw).unwrap();
    assert_eq!(fs::read(raw_image.path()).unwrap(), fs::read(&raw_source).unwrap());
    let images = host.directory().images;
    assert_eq!(images.len(), 2);
    let facts = &images[&raw_image.file];
    assert_eq!(facts.sha256.as_deref(), Some(sha256_of(&raw_source).to_string().as_str()));
    assert_eq!(facts.mark, Some(host.image_mark()));
    assert_eq!(facts.header.virtual_size_bytes, 24 * MIB);

    // Blank volumes.
    for (name, format, preallocate) in [
        ("blank-raw", Raw, false),
        ("blank-qcow2", Qcow2, false),
        ("full-raw", Raw, true),
        ("full-qcow2", Qcow2, true),
    ] {
        let file = host.create(name, format, 8 * MIB, NewVolumeContent::Blank, preallocate).unwrap();
        let facts = host.file(&file);
        assert_eq!(facts.header.virtual_size_bytes, 8 * MIB, "{name}");
        assert_eq!(facts.header.format, format, "{name}");
        assert_eq!(facts.mark, Some(mark("Volume", name)), "{name}");
        let enough = facts.allocated_bytes >= 8 * MIB;
        assert_eq!(enough, preallocate, "{name} has {} bytes allocated", facts.allocated_bytes);
        assert_eq!(host.path.join(&file).metadata().unwrap().permissions().mode() & 0o777, 0o600);
        check(&host.path.join(&file), format);
        is_zero(&host.path.join(&file), format, 8 * MIB);
    }

    // Copies, of the same format and across formats, grown and not.
    for (image, from) in [(&raw_image, Raw), (&qcow2_image, Qcow2)] {
        for to in [Raw, Qcow2] {
            for (capacity, preallocate) in [(24 * MIB, false), (40 * MIB, false), (40 * MIB, true)] {
                let name = format!("copy-{}-{}-{}-{preallocate}", tag(from), tag(to), capacity / MIB);
                let content = NewVolumeContent::CopyOf(image.clone());
                let file = host.create(&name, to, capacity, content, preallocate).unwrap();
                let path = host.path.join(&file);
                assert_eq!(read_header(&path).unwrap().virtual_size_bytes, capacity, "{name}");
                check(&path, to);
                same_content(&raw_source, Raw, &path, to, capacity);
                if preallocate {
                    assert!(host.file(&file).allocated_bytes >= capacity, "{name}");
                } else if ground.has_holes {
                    let allocated = host.file(&file).allocated_bytes;
                    assert!(allocated < 6 * MIB, "{name} isn't sparse: {allocated} bytes");
                }
            }
        }
    }

    // Overlays.
    for (image, from) in [(&raw_image, Raw), (&qcow2_image, Qcow2)] {
        let name = format!("overlay-{}", tag(from));
        let content = NewVolumeContent::OverlayOn(image.clone());
        let file = host.create(&name, Qcow2, 40 * MIB, content.clone(), false).unwrap();
        let path = host.path.join(&file);
        assert_eq!(read_header(&path).unwrap().backing, Some(image.path()));
        let info = info(&path);
        assert_eq!(info["backing-filename-format"], tag(from), "{info}");
        check(&path, Qcow2);
        same_content(&raw_source, Raw, &path, Qcow2, 40 * MIB);
        host.grow(&file, Qcow2, 64 * MIB).unwrap();
        check(&path, Qcow2);
        same_content(&raw_source, Raw, &path, Qcow2, 64 * MIB);
        let small = host.create("small", Qcow2, 8 * MIB, content, false).unwrap_err();
        assert!(small.to_string().contains("is less than the image's 25165824 bytes"), "{small}");
    }

    grow_and_remove(&host, &raw_image);
    assert_eq!(host.leftovers(), Vec::<String>::new());
}

fn grow_and_remove(host: &Host, raw_image: &ImageFile) {
    for (file, name, format) in
        [("blank-raw.raw", "blank-raw", Raw), ("blank-qcow2.qcow2", "blank-qcow2", Qcow2)]
    {
        host.grow(file, format, 3 << 30).unwrap();
        host.grow(file, format, 3 << 30).unwrap();
        assert_eq!(host.file(file).header.virtual_size_bytes, 3 << 30);
        check(&host.path.join(file), format);
        let shrunk = host.grow(file, format, 1 << 30).unwrap_err();
        assert!(shrunk.to_string().contains("never shrunk"), "{shrunk}");
        let odd = host.grow(file, format, (3 << 30) + 1).unwrap_err();
        assert!(odd.to_string().contains("multiple of 512"), "{odd}");

        let (pool_path, file, mark) = (host.path.clone(), file.to_owned(), mark("Volume", name));
        for delete in [true, true, false, true] {
            host.run(&Step::SetReclaim {
                pool_path: pool_path.clone(),
                file: file.clone(),
                mark: mark.clone(),
                delete,
            })
            .unwrap();
            assert_eq!(host.file(&file).reclaim_delete, delete);
        }
        let retain =
            Step::RetainVolume { pool_path: pool_path.clone(), file: file.clone(), mark: mark.clone() };
        host.run(&retain).unwrap();
        host.run(&retain).unwrap();
        let facts = host.file(&file);
        assert_eq!((facts.mark, facts.retained), (None, Some(mark.clone())));
        let trash =
            Step::TrashVolume { pool_path: pool_path.clone(), file: file.clone(), mark: mark.clone() };
        assert!(matches!(host.run(&trash), Err(StepError::NotOurs { .. })), "retained data isn't trashed");
        let adopt =
            Step::AdoptVolume { pool_path, file: file.clone(), mark: mark.clone(), reclaim_delete: false };
        host.run(&adopt).unwrap();
        host.run(&adopt).unwrap();
        let facts = host.file(&file);
        assert_eq!((facts.mark, facts.retained, facts.reclaim_delete), (Some(mark), None, false));
        host.run(&trash).unwrap();
        host.run(&trash).unwrap();
        assert!(!host.directory().files.contains_key(&file));
    }
    assert_eq!(host.trash().len(), 2);

    // The image backs an overlay, then one in the trash, then none.
    let delete = Step::DeleteImage { image: raw_image.clone(), mark: host.image_mark() };
    let refused = host.run(&delete).unwrap_err();
    assert!(refused.to_string().contains("overlay-raw.qcow2"), "{refused}");
    host.trash_volume("overlay-raw").unwrap();
    host.run(&delete).unwrap();
    let kept = &host.directory().images[&raw_image.file];
    assert_eq!((&kept.mark, &kept.retained), (&None, &Some(host.image_mark())));
    assert_eq!(
        host.storage.expire_trash(&host.path, Duration::from_secs(3600)).unwrap(),
        Vec::<String>::new()
    );
    assert_eq!(host.trash().len(), 3);
    assert_eq!(host.storage.expire_trash(&host.path, Duration::ZERO).unwrap().len(), 4);
    assert_eq!(host.trash(), Vec::<String>::new());
    assert!(!raw_image.path().exists());
    host.run(&delete).unwrap();

    let forget = Step::ForgetPool { name: name("pool"), path: host.path.clone(), mark: host.pool_mark() };
    host.run(&forget).unwrap();
    host.run(&forget).unwrap();
    let pool = host.observe_declared();
    assert_eq!((pool.registered, pool.directory.unwrap().mark), (None, None));
}

#[test]
fn whole_life_here() {
    whole_life(&Ground::here());
}

#[test]
fn whole_life_on_tmpfs() {
    in_mount_namespace(|| whole_life(&Ground::tmpfs("512m")));
}

#[test]
fn whole_life_without_xattrs() {
    in_mount_namespace(|| {
        let ground = Ground::ramfs();
        whole_life(&ground);
        let host = Host::new(&ground);
        host.make_pool();
        let file = host.create("a", Raw, MIB, NewVolumeContent::Blank, false).unwrap();
        let sidecar = host.path.join(".vmctl/marks/volumes/a.raw.json");
        assert!(fs::read_to_string(&sidecar).unwrap().contains("vmctl:default:Volume/a"));
        // A foreign file under the old name is another inode: not ours.
        fs::remove_file(host.path.join(&file)).unwrap();
        fs::write(host.path.join(&file), "foreign").unwrap();
        assert_eq!(host.file(&file).mark, None);
        assert!(matches!(host.trash_volume_of("a", Raw), Err(StepError::NotOurs { .. })));
        host.storage.expire_trash(&host.path, Duration::ZERO).unwrap();
        assert!(!sidecar.exists(), "the orphan is cleaned");
        fs::write(&sidecar, "{").unwrap();
        assert_eq!(host.file(&file).mark, None);
    });
}

#[test]
fn whole_life_on_btrfs() {
    in_mount_namespace(|| {
        let ground = Ground::btrfs("1G");
        whole_life(&ground);
        // A copy in the same file system takes no room.
        let host = Host::new(&ground);
        host.make_pool();
        let source = host.path.join("source.raw");
        fs::write(&source, random(64 * MIB as usize)).unwrap();
        let before = used(&host.path);
        let image = host.import(&source, Raw).unwrap();
        host.create("copy", Raw, 64 * MIB, NewVolumeContent::CopyOf(image), false).unwrap();
        sync();
        let taken = used(&host.path).saturating_sub(before);
        assert!(taken < 96 * MIB, "two copies of 64 MiB took {} MiB", taken / MIB);
    });
}

#[test]
fn a_wrong_digest_leaves_nothing() {
    let host = Host::new(&Ground::here());
    host.make_pool();
    let source = host.raw_source("source.raw", 4 * MIB);
    let wrong = "ab".repeat(32);
    let image = host.image_file(&wrong, Raw);
    let error = host
        .run(&Step::ImportImage {
            image,
            source: source.clone().into(),
            sha256: wrong.parse().unwrap(),
            mark: host.image_mark(),
        })
        .unwrap_err()
        .to_string();
    assert!(error.contains(&wrong) && error.contains(&sha256_of(&source).to_string()), "{error}");
    assert!(host.directory().images.is_empty());
    assert!(host.leftovers().is_empty());
}

#[test]
fn unusable_images_are_refused_with_the_reason() {
    let host = Host::new(&Ground::here());
    host.make_pool();
    let raw = host.raw_source("plain.raw", 2 * MIB);
    let make = |name: &str, options: &[&str]| {
        let path = host.outside(name);
        qemu_img(&[&["create", "-q", "-f", "qcow2"], options, &[text(&path), "4M"]].concat());
        path
    };
    let plain = make("plain.qcow2", &[]);
    let secret = "secret,id=s,data=passphrase";
    let luks = make(
        "luks",
        &["--object", secret, "-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"],
    );
    let data_file = host.outside("data");
    let external = make("external", &["-o", &format!("data_file={}", text(&data_file))]);
    let backed = make("backed", &["-b", text(&raw), "-F", "raw"]);
    let zstd = make("zstd", &["-o", "compression_type=zstd"]);
    let subclusters = make("subclusters", &["-o", "extended_l2=on"]);
    let version2 = make("version2", &["-o", "compat=0.10"]);
    let clusters = make("clusters", &["-o", "cluster_size=2M"]);
    let flagged = |name: &str, bit: u8| {
        let path = make(name, &[]);
        fs::File::options().write(true).open(&path).unwrap().write_all_at(&[bit], 79).unwrap();
        path
    };
    for (source, declared, reason) in [
        (&plain, Raw, "declared as raw and begins with a qcow2 header"),
        (&raw, Qcow2, "declared as qcow2 and has no qcow2 header"),
        (&luks, Qcow2, "encrypted"),
        (&external, Qcow2, "external data file"),
        (&backed, Qcow2, "plain.raw`, which is not declared"),
        (&zstd, Qcow2, "another method than zlib"),
        (&subclusters, Qcow2, "extended L2"),
        (&flagged("dirty", 1), Qcow2, "dirty bit"),
        (&flagged("corrupt", 2), Qcow2, "corrupt bit"),
        (&flagged("unknown", 0x40), Qcow2, "unknown here (0x40)"),
        (&host.outside("missing"), Raw, "No such file"),
        (&host.path, Raw, "not a regular file"),
        (&PathBuf::from("/dev/null"), Raw, "not a regular file"),
    ] {
        let error = host.import(source, declared).unwrap_err().to_string();
        assert!(error.contains(reason), "{error}");
    }
    assert!(host.directory().images.is_empty());
    assert!(host.leftovers().is_empty());
    // And these are fine.
    for source in [&plain, &version2, &clusters] {
        let header = read_header(source).unwrap();
        assert_eq!((header.virtual_size_bytes, header.encrypted, header.unusable), (4 * MIB, false, None));
        host.import(source, Qcow2).unwrap();
    }
    // A compressed image is read cluster by cluster.
    let compressed = host.outside("compressed");
    let source = host.raw_source("compressible.raw", 24 * MIB);
    qemu_img(&["convert", "-c", "-O", "qcow2", "-f", "raw", text(&source), text(&compressed)]);
    let image = host.import(&compressed, Qcow2).unwrap();
    let file = host.create("from-compressed", Raw, 24 * MIB, NewVolumeContent::CopyOf(image), false).unwrap();
    same_content(&source, Raw, &host.path.join(file), Raw, 24 * MIB);
}

#[test]
fn a_full_file_system_leaves_nothing() {
    in_mount_namespace(|| {
        let big_ground = Ground::tmpfs("512m");
        let big = Host::new(&big_ground);
        big.make_pool();
        let source = big.outside("random.raw");
        fs::write(&source, random(32 * MIB as usize)).unwrap();
        let qcow2 = big.outside("random.qcow2");
        qemu_img(&["convert", "-f", "raw", "-O", "qcow2", text(&source), text(&qcow2)]);
        let raw_image = big.import(&source, Raw).unwrap();
        let qcow2_image = big.import(&qcow2, Qcow2).unwrap();

        for ground in [Ground::tmpfs("16m"), Ground::loop_device("ext4", "24M")] {
            let host = Host::new(&ground);
            host.make_pool();
            let free = || host.directory().available_bytes;
            let before = free();
            let copy = |name: &str, format, image: &ImageFile, preallocate| {
                host.create(name, format, 32 * MIB, NewVolumeContent::CopyOf(image.clone()), preallocate)
            };
            for result in [
                host.import(&source, Raw).map(drop),
                copy("a", Raw, &raw_image, false).map(drop),
                copy("b", Qcow2, &raw_image, false).map(drop),
                copy("c", Raw, &qcow2_image, false).map(drop),
                copy("d", Qcow2, &qcow2_image, false).map(drop),
                copy("e", Raw, &raw_image, true).map(drop),
                host.create("f", Raw, 64 * MIB, NewVolumeContent::Blank, true).map(drop),
                host.create("g", Qcow2, 64 * MIB, NewVolumeContent::Blank, true).map(drop),
            ] {
                let error = result.unwrap_err().to_string();
                assert!(error.contains("is full") && error.contains("needed"), "{error}");
                assert!(host.directory().files.is_empty() && host.directory().images.is_empty());
                assert!(host.leftovers().is_empty());
            }
            assert!(free().abs_diff(before) < MIB, "{before} bytes were free, now {}", free());
            host.create("fits", Raw, MIB, NewVolumeContent::Blank, true).unwrap();
        }
    });
}

#[test]
fn foreign_things_are_never_touched() {
    let host = Host::new(&Ground::here());
    host.make_pool();
    let path = host.path.join("foreign.raw");
    fs::write(&path, "precious").unwrap();
    let other = mark("Volume", "other");
    let (pool_path, file) = (host.path.clone(), "foreign.raw".to_owned());
    let target = |mark: &vmctl::name::Mark| (pool_path.clone(), file.clone(), mark.clone());
    let steps = |owner: &vmctl::name::Mark| {
        let ((pool_path, file, mark), (p2, f2, m2), (p3, f3, m3), (p4, f4, m4)) =
            (target(owner), target(owner), target(owner), target(owner));
        [
            Step::TrashVolume { pool_path, file, mark },
            Step::RetainVolume { pool_path: p2, file: f2, mark: m2 },
            Step::SetReclaim { pool_path: p3, file: f3, mark: m3, delete: true },
            Step::GrowVolume { pool_path: p4, file: f4, format: Raw, capacity_bytes: MIB, mark: m4 },
        ]
    };
    let mine = mark("Volume", "foreign");
    let refuse_all = || {
        for step in steps(&mine) {
            assert!(matches!(host.run(&step), Err(StepError::NotOurs { .. })), "{step:?}");
        }
        let created = host.create("foreign", Raw, MIB, NewVolumeContent::Blank, false);
        assert!(matches!(created, Err(StepError::NotOurs { .. })), "{created:?}");
        assert_eq!(fs::read(&path).unwrap(), b"precious");
    };
    refuse_all();
    let adopt = |mark| Step::AdoptVolume {
        pool_path: pool_path.clone(),
        file: file.clone(),
        mark,
        reclaim_delete: false,
    };
    host.run(&adopt(other)).unwrap();
    refuse_all();
    assert!(matches!(host.run(&adopt(mine.clone())), Err(StepError::NotOurs { .. })));

    // What isn't a regular file isn't listed and isn't followed.
    let outside = host.outside("outside");
    fs::write(&outside, "outside").unwrap();
    symlink(&outside, host.path.join("link.raw")).unwrap();
    fs::create_dir(host.path.join("directory.raw")).unwrap();
    assert!(Command::new("mkfifo").arg(host.path.join("fifo.raw")).status().unwrap().success());
    assert_eq!(host.directory().files.into_keys().collect::<Vec<_>>(), ["foreign.raw"]);
    for name in ["link", "directory", "fifo"] {
        let error = host.create(name, Raw, MIB, NewVolumeContent::Blank, false).unwrap_err();
        assert!(matches!(error, StepError::NotOurs { .. }), "{name}: {error}");
        assert!(open_disk(&host.path.join(format!("{name}.raw")), true).is_err(), "{name}");
    }
    assert_eq!(fs::read(&outside).unwrap(), b"outside");
    for name in ["../outside", "a/b", "", ".", "..", ".vmctl", "a\nb", &"x".repeat(201)] {
        let step =
            Step::TrashVolume { pool_path: pool_path.clone(), file: name.to_owned(), mark: mine.clone() };
        assert!(host.run(&step).is_err(), "{name:?}");
    }
    assert!(host.leftovers().is_empty());
}

#[test]
fn pools_are_refused_and_adopted_by_the_rules() {
    let ground = Ground::here();
    let host = Host::new(&ground);
    let create = |path: &Path, mark: vmctl::name::Mark| {
        host.run(&Step::CreatePool { name: name("pool"), path: path.to_owned(), mark })
    };
    let mine = host.pool_mark();
    let real = host.outside("real");
    fs::create_dir(&real).unwrap();
    fs::write(real.join("data.raw"), "old").unwrap();
    let link = host.outside("link");
    symlink(&real, &link).unwrap();
    fs::write(host.outside("file"), "").unwrap();
    for path in [
        link,
        host.outside("file"),
        host.outside("file/below"),
        PathBuf::from("/"),
        PathBuf::from("rel"),
        host.outside("a/../b"),
    ] {
        assert!(create(&path, mine.clone()).is_err(), "{}", path.display());
    }
    assert!(!host.outside("real/.vmctl").exists());
    create(&real, mine.clone()).unwrap();
    assert_eq!(fs::read(real.join("data.raw")).unwrap(), b"old");
    let foreign: vmctl::name::Mark = "vmctl:prod:StoragePool/pool".parse().unwrap();
    assert!(matches!(create(&real, foreign.clone()), Err(StepError::NotOurs { .. })));
    // Neither may another set take the name for another directory.
    assert!(matches!(create(&host.outside("new"), foreign), Err(StepError::NotOurs { .. })));
    let forget = |mark| Step::ForgetPool { name: name("pool"), path: real.clone(), mark };
    assert!(matches!(host.run(&forget(mark("StoragePool", "other"))), Err(StepError::NotOurs { .. })));
    // An undeclared pool is remembered; without its directory it is absent, not unknown.
    let (pools, _) = host.storage.observe(&Scope::default());
    assert_eq!(pools[&name("pool")].as_ref().unwrap().path, real);
    // The same set may rename it: one name is left.
    let (renamed, owner) = (name("renamed"), mark("StoragePool", "renamed"));
    host.run(&Step::CreatePool { name: renamed.clone(), path: real.clone(), mark: owner.clone() }).unwrap();
    let (pools, _) = host.storage.observe(&Scope::default());
    assert_eq!(pools.keys().collect::<Vec<_>>(), [&renamed]);
    assert_eq!(pools[&renamed].as_ref().unwrap().directory.as_ref().unwrap().mark, Some(owner));
    create(&real, mine.clone()).unwrap();
    fs::rename(&real, host.outside("moved")).unwrap();
    let (pools, _) = host.storage.observe(&Scope::default());
    assert_eq!(pools[&name("pool")].as_ref().unwrap().directory, None);
    host.run(&forget(mine)).unwrap();
    assert!(host.storage.observe(&Scope::default()).0.is_empty());
}

#[test]
fn what_cannot_be_looked_at_is_not_absent() {
    let host = Host::new(&Ground::here());
    host.make_pool();
    host.create("a", Raw, MIB, NewVolumeContent::Blank, false).unwrap();
    let scope = host.scope();
    let look = |storage: &Storage| storage.observe(&scope).0.remove(&name("pool")).unwrap();
    // As somebody who may not enter: capabilities go with the file system identity of the thread.
    let state = host.outside("readable");
    fs::create_dir_all(&state).unwrap();
    for directory in
        host.path.ancestors().skip(1).take_while(|path| path.starts_with(env!("CARGO_TARGET_TMPDIR")))
    {
        fs::set_permissions(directory, fs::Permissions::from_mode(0o755)).unwrap();
    }
    fs::set_permissions(&host.path, fs::Permissions::from_mode(0o700)).unwrap();
    let denied = std::thread::scope(|scope| {
        scope
            .spawn(|| {
                become_nobody();
                look(&Storage::new(state))
            })
            .join()
            .unwrap()
    });
    assert!(denied.unwrap_err().to_string().contains("ermission denied"));
    // A file in the way, a broken index entry, a broken index.
    fs::write(host.state.join("pools/pool.json"), "{").unwrap();
    assert!(look(&host.storage).is_err());
    fs::remove_dir_all(host.state.join("pools")).unwrap();
    assert!(look(&host.storage).unwrap().registered.is_none());
    fs::write(host.state.join("pools"), "").unwrap();
    assert!(look(&host.storage).is_err());
    fs::remove_file(host.state.join("pools")).unwrap();
    fs::rename(&host.path, host.outside("elsewhere")).unwrap();
    assert_eq!(look(&host.storage).unwrap().directory, None);
    fs::write(&host.path, "").unwrap();
    assert!(look(&host.storage).is_err());
}

#[test]
fn files_outside_of_pools() {
    let host = Host::new(&Ground::here());
    let kernel = host.outside("kernel");
    fs::write(&kernel, "bytes").unwrap();
    symlink(&kernel, host.outside("link")).unwrap();
    let files = ["kernel", "link", "missing", "."].map(|name| host.outside(name));
    let scope = Scope { files: BTreeSet::from(files.clone()), ..Scope::default() };
    let (_, seen) = host.storage.observe(&scope);
    let facts = seen[&files[0]].as_ref().unwrap();
    assert_eq!(facts.size_bytes, 5);
    let modified = kernel.metadata().unwrap();
    assert_eq!(
        facts.modified_unix_ns,
        i128::from(modified.mtime()) * 1_000_000_000 + i128::from(modified.mtime_nsec())
    );
    assert!(seen[&files[1]].is_ok());
    assert!(!seen.contains_key(&files[2]));
    assert!(seen[&files[3]].is_err());
}

#[test]
fn a_disk_in_use_is_left_alone_and_its_user_named() {
    let host = Host::new(&Ground::here());
    host.make_pool();
    let file = host.create("disk", Raw, MIB, NewVolumeContent::Blank, false).unwrap();
    let path = host.path.join(&file);
    let writer = open_disk(&path, false).unwrap();
    for error in [
        open_disk(&path, true).unwrap_err(),
        open_disk(&path, false).unwrap_err(),
        host.grow(&file, Raw, 2 * MIB).unwrap_err(),
        host.trash_volume_of("disk", Raw).unwrap_err(),
    ] {
        let wanted = format!("in use by this process, {}", std::process::id());
        assert!(error.to_string().contains(&wanted), "{error}");
    }
    // The policy may change and the data may be let go of while a VM runs.
    host.run(&Step::SetReclaim {
        pool_path: host.path.clone(),
        file: file.clone(),
        mark: mark("Volume", "disk"),
        delete: true,
    })
    .unwrap();
    drop(writer);
    let readers = [open_disk(&path, true).unwrap(), open_disk(&path, true).unwrap()];
    assert!(open_disk(&path, false).is_err());
    drop(readers);
    host.grow(&file, Raw, 2 * MIB).unwrap();
}

#[test]
fn two_at_once_make_one() {
    let host = Arc::new(Host::new(&Ground::here()));
    host.make_pool();
    let source = host.raw_source("source.raw", 24 * MIB);
    for round in 0..10 {
        let name = format!("volume-{round}");
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    let image = host.import(&source, Raw).unwrap();
                    host.create(&name, Qcow2, 32 * MIB, NewVolumeContent::CopyOf(image), false).unwrap();
                });
            }
        });
        check(&host.path.join(format!("{name}.qcow2")), Qcow2);
        host.trash_volume(&name).unwrap();
    }
    // Two owners: one gets it.
    let results = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for owner in ["one", "two"] {
            let (host, results) = (&host, &results);
            scope.spawn(move || {
                let new = NewVolume { mark: mark("Volume", owner), ..host.new_volume("shared", Raw, MIB) };
                results.lock().unwrap().push(host.run(&Step::CreateVolume(new)).is_ok());
            });
        }
    });
    let mut results = results.into_inner().unwrap();
    results.sort();
    assert_eq!(results, [false, true]);
    assert!(host.leftovers().is_empty());
}

#[test]
fn a_nobodys_image_is_taken_in_only_with_the_right_content() {
    let host = Host::new(&Ground::here());
    host.make_pool();
    let source = host.raw_source("source.raw", 4 * MIB);
    let image = host.import(&source, Raw).unwrap();
    let retain = Step::RetainImage { image: image.clone(), mark: host.image_mark() };
    host.run(&retain).unwrap();
    host.run(&retain).unwrap();
    assert_eq!(host.directory().images[&image.file].mark, None);
    host.import(&source, Raw).unwrap();
    assert_eq!(host.directory().images[&image.file].mark, Some(host.image_mark()));
    let other = Step::DeleteImage { image: image.clone(), mark: mark("Image", "other") };
    assert!(matches!(host.run(&other), Err(StepError::NotOurs { .. })));
    // Another name of the same set takes it over, another set doesn't.
    let import = |owner: &str| {
        let (image, source, sha256) = (image.clone(), source.clone(), sha256_of(&source));
        host.run(&Step::ImportImage { image, source: source.into(), sha256, mark: owner.parse().unwrap() })
    };
    import("vmctl:default:Image/renamed").unwrap();
    assert!(matches!(import("vmctl:prod:Image/image"), Err(StepError::NotOurs { .. })));
    // Somebody put it there himself: with the content it is taken, without it isn't.
    fs::remove_file(image.path()).unwrap();
    fs::copy(&source, image.path()).unwrap();
    host.import(&source, Raw).unwrap();
    assert_eq!(host.directory().images[&image.file].mark, Some(host.image_mark()));
    fs::remove_file(image.path()).unwrap();
    fs::write(image.path(), "something else").unwrap();
    assert!(matches!(host.import(&source, Raw), Err(StepError::NotOurs { .. })));
    assert_eq!(fs::read(image.path()).unwrap(), b"something else");
}

#[test]
fn progress_is_told() {
    let told = Arc::new(Mutex::new(Vec::new()));
    let mut host = Host::new(&Ground::here());
    let hook = told.clone();
    host.storage = Storage::new(host.state.clone()).with_progress(Arc::new(move |progress| {
        hook.lock().unwrap().push((progress.done_bytes, progress.total_bytes))
    }));
    host.make_pool();
    let source = host.raw_source("source.raw", 80 * MIB);
    host.import(&source, Raw).unwrap();
    let told = told.lock().unwrap();
    assert!(told.len() >= 4 && told.is_sorted() && told.last() == Some(&(80 * MIB, 80 * MIB)), "{told:?}");
}

/// An overlay that isn't ours may be smaller than its backing file: growing would uncover that.
#[test]
fn an_adopted_overlay_is_not_grown_over_hidden_data() {
    let host = Host::new(&Ground::here());
    host.make_pool();
    let base = host.raw_source("base.raw", 16 * MIB);
    for (volume, size, uncovers) in [("small", "4M", true), ("large", "16M", false)] {
        let file = format!("{volume}.qcow2");
        let path = host.path.join(&file);
        qemu_img(&["create", "-q", "-f", "qcow2", "-b", text(&base), "-F", "raw", text(&path), size]);
        let (pool_path, owner) = (host.path.clone(), mark("Volume", volume));
        let adopt = Step::AdoptVolume { pool_path, file: file.clone(), mark: owner, reclaim_delete: false };
        host.run(&adopt).unwrap();
        match host.grow(&file, Qcow2, 32 * MIB) {
            Err(error) => {
                assert!(uncovers && error.to_string().contains("base.raw is larger than it"), "{error}")
            }
            Ok(()) => {
                assert!(!uncovers);
                same_content(&base, Raw, &path, Qcow2, 32 * MIB);
            }
        }
        check(&path, Qcow2);
    }
}

/// Growing is one write of the header: what the table has room for, and not a byte more.
#[test]
fn qcow2_images_grow_within_their_table() {
    let host = Host::new(&Ground::here());
    host.make_pool();
    let tebibyte = 1u64 << 40;
    let ours = host.create("ours", Qcow2, MIB, NewVolumeContent::Blank, false).unwrap();
    let mut foreign = Vec::new();
    for (volume, options) in [
        ("plain", "cluster_size=65536"),
        ("old", "compat=0.10"),
        ("tiny", "cluster_size=512"),
        ("huge", "cluster_size=2M"),
        ("narrow", "refcount_bits=1"),
    ] {
        let file = format!("{volume}.qcow2");
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", options, text(&host.path.join(&file)), "1M"]);
        let (pool_path, mark) = (host.path.clone(), mark("Volume", volume));
        host.run(&Step::AdoptVolume { pool_path, file: file.clone(), mark, reclaim_delete: false }).unwrap();
        foreign.push(file);
    }
    for (file, room) in [
        (&ours, 4 * tebibyte),
        (&foreign[0], 4 * tebibyte),
        (&foreign[1], 4 * tebibyte),
        (&foreign[2], 2 * MIB),
        (&foreign[3], 131_072 * tebibyte),
        (&foreign[4], 4 * tebibyte),
    ] {
        let path = host.path.join(file);
        let error = host.grow(file, Qcow2, room + 512).unwrap_err().to_string();
        assert!(error.contains(&format!("room for {room} bytes")), "{file}: {error}");
        host.grow(file, Qcow2, room).unwrap();
        check(&path, Qcow2);
        // It is a disk to write to, up to its last sector.
        for at in [0, room / 2, room - 512] {
            run("qemu-io", &["-f", "qcow2", "-c", &format!("write -P 0x5a {at} 512"), text(&path)]);
        }
        for at in [0, room / 2, room - 512] {
            let output =
                run("qemu-io", &["-f", "qcow2", "-c", &format!("read -P 0x5a {at} 512"), text(&path)]);
            assert!(!output.contains("failed"), "{file}: {output}");
        }
        check(&path, Qcow2);
    }
    // Made large, whatever it takes: that happens where nobody sees it yet.
    let file = host.create("large", Qcow2, 16 * tebibyte, NewVolumeContent::Blank, false).unwrap();
    check(&host.path.join(file), Qcow2);
}

/// Does steps for ever, to be killed; see [`kill_at_random_instants`].
#[test]
fn crash_child() {
    let Some(base) = std::env::var_os("VMCTL_STORAGE_CRASH_BASE") else { return };
    let mut host = Host::at(Path::new(&base));
    host.is_crashed = true;
    // Before it says that it is ready: hashing takes longer than the steps.
    let imports = [("source.raw", Raw), ("source.qcow2", Qcow2)].map(|(source, format)| {
        let source = host.outside(source);
        let sha256 = sha256_of(&source);
        let image = host.image_file(&sha256.to_string(), format);
        Step::ImportImage { image, source: source.into(), sha256, mark: host.image_mark() }
    });
    println!("ready");
    for round in 0u64.. {
        host.make_pool();
        let [raw_image, qcow2_image] = imports.each_ref().map(|step| {
            host.run(step).unwrap();
            let Step::ImportImage { image, .. } = step else { unreachable!() };
            image.clone()
        });
        let contents = [
            ("blank", NewVolumeContent::Blank),
            ("from-raw", NewVolumeContent::CopyOf(raw_image.clone())),
            ("from-qcow2", NewVolumeContent::CopyOf(qcow2_image.clone())),
            ("over-raw", NewVolumeContent::OverlayOn(raw_image.clone())),
        ];
        for (name, content) in contents {
            for format in [Raw, Qcow2] {
                if format == Raw && matches!(content, NewVolumeContent::OverlayOn(_)) {
                    continue;
                }
                let file = Pool::volume_file(&storage::name(name), format);
                if !host.path.join(&file).exists() {
                    host.create(name, format, 24 * MIB, content.clone(), false).unwrap();
                }
                host.grow(&file, format, 32 * MIB).unwrap();
                host.trash_volume_of(name, format).unwrap();
            }
        }
        for image in [raw_image, qcow2_image] {
            host.run(&Step::DeleteImage { image, mark: host.image_mark() }).unwrap();
        }
        host.storage.expire_trash(&host.path, Duration::from_secs(round % 2)).unwrap();
    }
}

fn kill_at_random_instants(host: &Host, times: u32) {
    let raw_source = host.raw_source("source.raw", 24 * MIB);
    qemu_img(&[
        "convert",
        "-f",
        "raw",
        "-O",
        "qcow2",
        text(&raw_source),
        text(&host.outside("source.qcow2")),
    ]);
    let mut garbage = 0;
    for round in 0..times {
        kill_child_after(&host.base, Duration::from_micros(u64::from(random(1)[0]) * 500));
        garbage += usize::from(!host.leftovers().is_empty());
        // Complete and marked, or not there.
        let pool = host.observe_declared();
        let Some(directory) = pool.directory else { continue };
        for (file, facts) in &directory.files {
            let path = host.path.join(file);
            assert!(facts.mark.is_some(), "round {round}: {file} carries no mark");
            let bytes = facts.header.virtual_size_bytes;
            let raw = file.ends_with(".raw");
            assert!([24 * MIB, 32 * MIB].contains(&bytes), "round {round}: {file} has {bytes} bytes");
            check(&path, if raw { Raw } else { Qcow2 });
            if !file.starts_with("blank") {
                same_content(&raw_source, Raw, &path, if raw { Raw } else { Qcow2 }, bytes);
            }
        }
        for (file, facts) in &directory.images {
            assert!(facts.mark.is_some() || facts.retained.is_some(), "round {round}: {file}");
            let digest = sha256_of(&host.path.join(".vmctl/images").join(file)).to_string();
            assert_eq!(file.split('.').next(), Some(digest.as_str()), "round {round}");
        }
        // The next run, of any step, removes the garbage and does its work.
        host.make_pool();
        assert_eq!(host.leftovers(), Vec::<String>::new(), "round {round}");
    }
    assert!(garbage > 0, "no kill hit a step at work: the test proves nothing");
    println!("{garbage} of {times} kills left temporary files, all removed by the next run");
}

#[test]
fn killed_at_random_instants_it_leaves_whole_files() {
    kill_at_random_instants(&Host::new(&Ground::here()), 100);
}

#[test]
fn killed_at_random_instants_without_xattrs() {
    in_mount_namespace(|| {
        let ground = Ground::ramfs();
        kill_at_random_instants(&Host::new(&ground), 30);
    });
}

#[test]
fn ten_thousand_volumes_are_scanned() {
    in_mount_namespace(|| {
        let ground = Ground::tmpfs("1g");
        let host = Host::new(&ground);
        host.make_pool();
        let file = host.create("first", Qcow2, MIB, NewVolumeContent::Blank, false).unwrap();
        let bytes = fs::read(host.path.join(&file)).unwrap();
        for index in 0..10_000 {
            fs::write(host.path.join(format!("v{index}.qcow2")), &bytes[..4096]).unwrap();
        }
        let start = std::time::Instant::now();
        let directory = host.directory();
        let took = start.elapsed();
        assert_eq!(directory.files.len(), 10_001);
        assert_eq!(directory.files["v1.qcow2"].header.format, DiskFormat::Qcow2);
        println!("10,000 volumes scanned in {took:?}");
        assert!(took < Duration::from_secs(5), "{took:?}");
    });
}
