//! The search over whole disks: file systems made by the tools that make them in the world, in partition
//! tables made here.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use crc::{CRC_32_ISO_HDLC, Crc};
use proptest::prelude::*;

use super::*;

const SECTOR: usize = 512;
const LINUX_GUID: [u8; 16] =
    [0xe3, 0xbc, 0x68, 0x4f, 0xcd, 0xe8, 0xb1, 0x4d, 0x96, 0xe7, 0xfb, 0xca, 0xf9, 0x84, 0xb7, 0x09];
const ESP_GUID: [u8; 16] =
    [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b];

/// Files of a file system to be: path and content. A content that starts with `->` is a link.
type Files<'f> = &'f [(&'f str, &'f str)];

struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("vmctl-boot-disk-{}-{number}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn tree(&self, files: Files<'_>) -> PathBuf {
        let root = self.0.join("tree");
        fs::create_dir_all(&root).unwrap();
        for (path, content) in files {
            let path = root.join(path.trim_start_matches('/'));
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            match content.strip_prefix("->") {
                Some(target) => std::os::unix::fs::symlink(target, path).unwrap(),
                None => fs::write(path, content).unwrap(),
            }
        }
        root
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn tool(program: &str, arguments: &[&str]) {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(program).args(arguments).env("PATH", path).output();
    let output = output.unwrap_or_else(|error| panic!("{program} (see tests/setup): {error}"));
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn ext(options: &[&str], files: Files<'_>) -> Vec<u8> {
    let scratch = Scratch::new();
    let (tree, image) = (scratch.tree(files), scratch.0.join("image"));
    let mut arguments = vec!["-q", "-F", "-d", text(&tree), "-U", "6f1b0d7c-6a1e-4f0b-9d53-0b5c5d1f2a11"];
    arguments.extend(options);
    arguments.extend([text(&image), "4M"]);
    tool("mke2fs", &arguments);
    fs::read(image).unwrap()
}

fn ext4(files: Files<'_>) -> Vec<u8> {
    ext(&["-t", "ext4"], files)
}

/// `bits` are 12, 16 or 32.
fn fat(bits: &str, files: Files<'_>) -> Vec<u8> {
    let scratch = Scratch::new();
    let (tree, image) = (scratch.tree(files), scratch.0.join("image"));
    let size: u64 = match bits {
        "12" => 2 << 20,
        "16" => 16 << 20,
        _ => 34 << 20,
    };
    fs::File::create(&image).unwrap().set_len(size).unwrap();
    tool("mkfs.vfat", &["-F", bits, "-s", "1", "-i", "5A17D15C", "-n", "BOOT", text(&image)]);
    let entries: Vec<PathBuf> = fs::read_dir(&tree).unwrap().map(|entry| entry.unwrap().path()).collect();
    let mut arguments = vec!["-s", "-i", text(&image)];
    arguments.extend(entries.iter().map(|path| text(path)));
    arguments.push("::/");
    tool("mcopy", &arguments);
    fs::read(image).unwrap()
}

fn mbr_entry(sector: &mut [u8], index: usize, kind: u8, start: usize, sectors: usize) {
    let entry = &mut sector[446 + index * 16..][..16];
    entry[4] = kind;
    entry[8..12].copy_from_slice(&(start as u32).to_le_bytes());
    entry[12..16].copy_from_slice(&(sectors as u32).to_le_bytes());
    sector[510..512].copy_from_slice(&[0x55, 0xaa]);
}

/// A disk with a GPT, its partitions from 1 MiB on, one after the other.
fn gpt(partitions: &[([u8; 16], &[u8])]) -> Vec<u8> {
    const FIRST: usize = 2048;
    let data: usize = partitions.iter().map(|(_, content)| content.len()).sum();
    let mut disk = vec![0; FIRST * SECTOR + data + 34 * SECTOR];
    let sectors = disk.len() / SECTOR;
    mbr_entry(&mut disk, 0, 0xee, 1, sectors - 1);
    let mut table = vec![0; 128 * 128];
    let mut start = FIRST;
    for (entry, (kind, content)) in table.chunks_exact_mut(128).zip(partitions) {
        let end = start + content.len() / SECTOR - 1;
        entry[..16].copy_from_slice(kind);
        entry[32..40].copy_from_slice(&(start as u64).to_le_bytes());
        entry[40..48].copy_from_slice(&(end as u64).to_le_bytes());
        disk[start * SECTOR..][..content.len()].copy_from_slice(content);
        start = end + 1;
    }
    let crc = Crc::<u32>::new(&CRC_32_ISO_HDLC);
    for (at, table_at) in [(1, 2), (sectors - 1, sectors - 33)] {
        let mut header = [0; SECTOR];
        header[..16].copy_from_slice(b"EFI PART\0\0\x01\0\x5c\0\0\0");
        header[24..32].copy_from_slice(&(at as u64).to_le_bytes());
        header[72..80].copy_from_slice(&(table_at as u64).to_le_bytes());
        header[80..84].copy_from_slice(&128_u32.to_le_bytes());
        header[84..88].copy_from_slice(&128_u32.to_le_bytes());
        header[88..92].copy_from_slice(&crc.checksum(&table).to_le_bytes());
        let checksum = crc.checksum(&header[..92]);
        header[16..20].copy_from_slice(&checksum.to_le_bytes());
        disk[at * SECTOR..][..SECTOR].copy_from_slice(&header);
        disk[table_at * SECTOR..][..table.len()].copy_from_slice(&table);
    }
    disk
}

fn request(entry: Option<&str>, append: &str) -> Request {
    Request { entry: entry.map(str::to_owned), append: append.to_owned() }
}

fn search(disk: &[u8], request: &Request) -> Result<Found, NotBootable> {
    find(Box::new(disk.to_vec()), request, Limits::default())
}

/// What a disk boots, in one line: `kernel content | initrd contents | arguments`.
fn boots(disk: &[u8], wanted: &Request) -> String {
    let mut found = search(disk, wanted).unwrap_or_else(|error| panic!("{error}"));
    let kernel = String::from_utf8(found.kernel.read_kernel().unwrap()).unwrap();
    let mut initrds = Vec::new();
    for initrd in &mut found.initrds {
        let mut content = Vec::new();
        let take = |piece: &[u8]| {
            content.extend_from_slice(piece);
            Ok(())
        };
        initrd.each_piece(3, take).unwrap();
        initrds.push(String::from_utf8(content).unwrap());
    }
    format!("{kernel} | {} | {}", initrds.join(" "), found.cmdline)
}

fn refused(disk: &[u8]) -> String {
    match search(disk, &Request::default()) {
        Ok(found) => panic!("it boots {}", found.kernel.name),
        Err(error) => error.to_string(),
    }
}

const DEBIAN_CFG: &str = include_str!("grub/debian12.cfg");
const DEBIAN_FILES: Files<'_> = &[
    ("boot/grub/grub.cfg", DEBIAN_CFG),
    ("boot/vmlinuz-6.1.0-56-cloud-amd64", "kernel"),
    ("boot/initrd.img-6.1.0-56-cloud-amd64", "initrd"),
];
const DEBIAN_BOOTS: &str = "kernel | initrd | BOOT_IMAGE=/boot/vmlinuz-6.1.0-56-cloud-amd64 root=UUID=6f1b0d7c-6a1e-4f0b-9d53-0b5c5d1f2a11 ro console=tty0 console=ttyS0,115200 consoleblank=0 quiet";

#[test]
fn a_debian_disk_boots() {
    let root = ext4(DEBIAN_FILES);
    let disk = gpt(&[(LINUX_GUID, &root)]);
    assert_eq!(boots(&disk, &Request::default()), DEBIAN_BOOTS);
    assert_eq!(boots(&disk, &request(None, " debug ")), format!("{DEBIAN_BOOTS} debug"));
    let recovery = "Debian GNU/Linux, with Linux 6.1.0-56-cloud-amd64 (recovery mode)";
    assert!(boots(&disk, &request(Some(recovery), "")).contains(" ro single "));
    assert_eq!(boots(&disk, &request(Some("6.1.0-56-cloud-amd64"), "")), DEBIAN_BOOTS);
    let error = search(&disk, &request(Some("6.2"), "")).err().unwrap().to_string();
    assert!(error.contains("\"6.2\"") && error.contains("\"Debian GNU/Linux\""), "{error}");
    // Without a partition table, too; GRUB would call it hd0.
    assert!(boots(&root, &Request::default()).starts_with("kernel | initrd | "));
}

#[test]
fn every_kind_of_ext_is_read() {
    for options in [
        &["-t", "ext2"][..],
        &["-t", "ext3"],
        &["-t", "ext4", "-b", "1024"],
        &["-t", "ext4", "-O", "^metadata_csum,^64bit,^has_journal"],
        &["-t", "ext4", "-O", "^extents,^64bit"],
    ] {
        assert!(
            boots(&gpt(&[(LINUX_GUID, &ext(options, DEBIAN_FILES))]), &Request::default())
                .starts_with("kernel |"),
            "{options:?}"
        );
    }
}

#[test]
fn a_gpt_is_read_from_its_backup() {
    let root = ext4(DEBIAN_FILES);
    let good = gpt(&[(LINUX_GUID, &root)]);
    for at in [SECTOR, SECTOR + 0x50, 2 * SECTOR + 33] {
        let mut disk = good.clone();
        disk[at] ^= 1;
        assert_eq!(boots(&disk, &Request::default()), DEBIAN_BOOTS, "{at}");
        let backup = disk.len() - SECTOR + 0x50;
        disk[backup] ^= 1;
        let error = refused(&disk);
        assert!(error.contains("partition table") && error.contains("and its backup"), "{error}");
    }
}

#[test]
fn logical_partitions_are_found() {
    let root = ext4(DEBIAN_FILES);
    let sectors = root.len() / SECTOR;
    let mut disk = vec![0; 4096 * SECTOR + 2 * root.len()];
    mbr_entry(&mut disk[..SECTOR], 0, 0x82, 100, 100);
    mbr_entry(&mut disk[..SECTOR], 1, 0x05, 1000, 3000 + 2 * sectors);
    // The first logical partition is empty, the second one holds it.
    mbr_entry(&mut disk[1000 * SECTOR..][..SECTOR], 0, 0x83, 8, 8);
    mbr_entry(&mut disk[1000 * SECTOR..][..SECTOR], 1, 0x05, 500, 2000);
    mbr_entry(&mut disk[1500 * SECTOR..][..SECTOR], 0, 0x83, 100, sectors);
    disk[1600 * SECTOR..][..root.len()].copy_from_slice(&root);
    assert_eq!(boots(&disk, &Request::default()), DEBIAN_BOOTS);
    // A chain that bites its tail ends, and is no trouble.
    mbr_entry(&mut disk[1500 * SECTOR..][..SECTOR], 1, 0x05, 0, 1);
    mbr_entry(&mut disk[1500 * SECTOR..][..SECTOR], 1, 0x05, 500, 1);
    assert_eq!(boots(&disk, &Request::default()), DEBIAN_BOOTS);
}

#[test]
fn a_boot_partition_and_an_esp_are_found() {
    // As Debian and Fedora lay it out: the ESP leads to /boot, whose paths have no /boot in them.
    let esp = fat(
        "32",
        &[(
            "EFI/debian/grub.cfg",
            "search.fs_uuid 6F1B0D7C-6a1e-4f0b-9d53-0b5c5d1f2a11 root hd0,gpt2\nset prefix=($root)'/grub'\nconfigfile $prefix/grub.cfg\n",
        )],
    );
    let boot = ext4(&[
        ("vmlinuz", "kernel"),
        ("a.img", "one"),
        ("b.img", "two"),
        (
            "grub/grub.cfg",
            "load_env\nset default=\"${saved_entry}\"\nmenuentry x { linux /nothing\n}\nmenuentry y --id z { linux ($root)/vmlinuz root=/dev/vda3 'a b'\ninitrd /a.img /b.img\n}",
        ),
        ("grub/grubenv", "# GRUB Environment Block\nsaved_entry=z\nnext_entry=x\n####"),
    ]);
    let disk = gpt(&[(ESP_GUID, &esp), (LINUX_GUID, &boot)]);
    let expected = "kernel | one two | BOOT_IMAGE=(hd0,gpt2)/vmlinuz root=/dev/vda3 \"a b\"";
    assert_eq!(boots(&disk, &Request::default()), expected);
}

#[test]
fn boot_loader_entries_are_in_order() {
    let entry = |version: &str| {
        format!(
            "title T\nversion {version}\nlinux /k{version}\ninitrd /i\ninitrd /j\noptions a\noptions b=$kernelopts $none\n"
        )
    };
    let (e9, e10, e11) = (entry("6.9"), entry("6.10"), entry("6.11"));
    let mut files = vec![
        ("loader/entries/x-6.9.conf", e9.as_str()),
        ("loader/entries/x-6.10+2-1.conf", &e10),
        ("loader/entries/x-6.11+0-3.conf", &e11),
        ("loader/entries/arm.conf", "linux /arm\narchitecture aa64\n"),
        ("k6.9", "old"),
        ("k6.10", "new"),
        ("k6.11", "bad"),
        ("i", "i"),
        ("j", "j"),
    ];
    for bits in ["12", "16", "32"] {
        let disk = gpt(&[(ESP_GUID, &fat(bits, &files))]);
        assert_eq!(boots(&disk, &Request::default()), "new | i j | a b=$kernelopts", "FAT{bits}");
        assert_eq!(boots(&disk, &request(Some("x-6.9"), "")), "old | i j | a b=$kernelopts");
    }
    files.push(("loader/loader.conf", "timeout 3\ndefault x-6.9*\n"));
    assert!(boots(&gpt(&[(LINUX_GUID, &ext4(&files))]), &Request::default()).starts_with("old |"));
    // As Fedora has it: on the root's file system, with variables of GRUB's environment.
    let disk = gpt(&[(
        LINUX_GUID,
        &ext4(&[
            (
                "boot/loader/entries/abc.conf",
                "linux /boot/k\noptions $kernelopts quiet ${more}\ninitrd /boot/i $tuned_initrd\n",
            ),
            ("boot/grub2/grubenv", "# GRUB Environment Block\nkernelopts=root=UUID=1 ro\n"),
            ("boot/k", "kernel"),
            ("boot/i", "initrd"),
        ]),
    )]);
    assert_eq!(boots(&disk, &Request::default()), "kernel | initrd | root=UUID=1 ro quiet");
}

/// A PE file with these sections, each at a sector's start.
fn pe(sections: &[(&str, &str)]) -> String {
    let mut file = vec![0; 1024];
    file[..2].copy_from_slice(b"MZ");
    file[0x3c] = 0x40;
    file[0x40..0x44].copy_from_slice(b"PE\0\0");
    file[0x46] = sections.len() as u8;
    for (index, (name, content)) in sections.iter().enumerate() {
        let at = 0x58 + index * 40;
        let offset = file.len() as u32;
        file[at..at + name.len()].copy_from_slice(name.as_bytes());
        file[at + 8..at + 12].copy_from_slice(&(content.len() as u32).to_le_bytes());
        file[at + 16..at + 20].copy_from_slice(&512_u32.to_le_bytes());
        file[at + 20..at + 24].copy_from_slice(&offset.to_le_bytes());
        file.extend(content.bytes().chain(std::iter::repeat(0)).take(512));
    }
    String::from_utf8(file).unwrap()
}

#[test]
fn a_unified_kernel_image_is_taken_apart() {
    let image = pe(&[
        (".osrel", "ID=debian\nPRETTY_NAME=\"Debian 12\"\n"),
        (".cmdline", "root=/dev/vda2 quiet\n"),
        (".initrd", "initrd"),
        (".linux", "kernel"),
    ]);
    let files = [("EFI/Linux/debian-6.1+3.efi", image.as_str()), ("EFI/Linux/broken.efi", "MZ")];
    let disk = gpt(&[(ESP_GUID, &fat("16", &files))]);
    assert_eq!(boots(&disk, &request(Some("Debian 12"), "")), "kernel | initrd | root=/dev/vda2 quiet");
    assert_eq!(boots(&disk, &Request::default()), "kernel | initrd | root=/dev/vda2 quiet");
    let cut = &image[..1500];
    let error = refused(&gpt(&[(ESP_GUID, &fat("16", &[("EFI/Linux/cut.efi", cut)]))]));
    assert!(error.contains("cut.efi") && error.contains("beyond the file's end"), "{error}");
}

#[test]
fn extlinux_is_understood() {
    let files = [
        (
            "boot/extlinux/extlinux.conf",
            "DEFAULT menu.c32\nAPPEND global\nLABEL one\n  KERNEL ../k1\n\nlabel two\n menu label ^Two\n menu default\n linux /boot/k2\n append initrd=/boot/i root=/dev/vda1 \nINCLUDE more.conf\n",
        ),
        ("boot/extlinux/more.conf", "LABEL three\nLINUX k3\nINITRD i,../i\nAPPEND -\nINCLUDE more.conf"),
        ("boot/k1", "k1"),
        ("boot/k2", "k2"),
        ("boot/extlinux/k3", "k3"),
        ("boot/extlinux/i", "i3"),
        ("boot/i", "i"),
    ];
    let disk = ext4(&files);
    assert_eq!(boots(&disk, &Request::default()), "k2 | i | root=/dev/vda1");
    assert_eq!(boots(&disk, &request(Some("one"), "")), "k1 |  | global");
    assert_eq!(boots(&disk, &request(Some("three"), "")), "k3 | i3 i | ");
}

#[test]
fn arguments_are_not_guessed() {
    let files = [
        ("vmlinuz", "->boot/vmlinuz-6"),
        ("boot/vmlinuz-6", "kernel"),
        ("initrd.img", "->/boot/i"),
        ("boot/i", "initrd"),
    ];
    let disk = ext4(&files);
    let error = refused(&disk);
    assert!(
        error.contains("/vmlinuz") && error.contains("root=") && error.contains("boot.append"),
        "{error}"
    );
    assert_eq!(boots(&disk, &request(None, "root=/dev/vda")), "kernel | initrd | root=/dev/vda");
}

#[test]
fn links_are_followed_within_bounds() {
    let mut files = vec![
        (
            "boot/extlinux.conf",
            "LABEL a\nLINUX /a/b/c\nLABEL loop\nLINUX /loop\nLABEL up\nLINUX /a/../../../../k\nLABEL long\nLINUX /long",
        ),
        ("a", "->/boot/x"),
        ("boot/x/b", "->../y/./z"),
        ("boot/y/z/c", "->../../../k"),
        ("k", "kernel"),
        ("loop", "->loop"),
    ];
    let long = format!("->{}k", "./".repeat(450));
    files.push(("long", &long));
    let disk = ext4(&files);
    assert_eq!(boots(&disk, &Request::default()), "kernel |  | ");
    assert_eq!(boots(&disk, &request(Some("up"), "")), "kernel |  | ");
    assert_eq!(boots(&disk, &request(Some("long"), "")), "kernel |  | ");
    let error = search(&disk, &request(Some("loop"), "")).err().unwrap().to_string();
    assert!(error.contains("symbolic links"), "{error}");
}

#[test]
fn an_error_names_what_was_looked_for_and_the_remedy() {
    let esp = fat("12", &[("EFI/BOOT/BOOTX64.EFI", "MZ")]);
    let data = ext4(&[("etc/fstab", "")]);
    let error = refused(&gpt(&[(ESP_GUID, &esp), (LINUX_GUID, &data)]));
    assert_eq!(
        error,
        "nothing bootable was found. partition 1 (vfat): no loader/entries, no EFI/Linux, no boot/grub/grub.cfg, grub2/grub.cfg or EFI/*/grub.cfg, no extlinux.conf or syslinux.cfg; partition 2 (ext4): no loader/entries, no EFI/Linux, no boot/grub/grub.cfg, grub2/grub.cfg or EFI/*/grub.cfg, no extlinux.conf or syslinux.cfg; install a kernel with a boot loader's configuration on it, or name a kernel file of the host in boot.kernel"
    );
    let missing = ext4(&[("boot/grub/grub.cfg", DEBIAN_CFG)]);
    let error = refused(&gpt(&[(LINUX_GUID, &missing)]));
    assert!(
        error.contains(
            "entry \"Debian GNU/Linux\": /boot/vmlinuz-6.1.0-56-cloud-amd64 on partition 1 (ext4): not there"
        ),
        "{error}"
    );
    assert!(
        refused(&vec![0; 1 << 20]).contains("the disk without partitions: no file system"),
        "a blank disk"
    );
    assert!(refused(&[]).contains("partition table"), "no disk at all");
    let error = refused(&ext4(&[("boot/grub/grub.cfg", "if true; then\n")]));
    assert!(error.contains("/boot/grub/grub.cfg: line 2"), "{error}");
}

#[test]
fn foreign_roots_are_told_by_name() {
    for (offset, magic, name) in [
        (0, &b"XFSB"[..], "XFS"),
        (0x1_0040, b"_BHRfS_M", "btrfs"),
        (512, b"LABELONE", "LVM"),
        (0, b"LUKS\xba\xbe", "LUKS"),
        ((128 << 10) + 1024, &0x00ba_b10c_u64.to_le_bytes(), "ZFS"),
    ] {
        let mut partition = vec![0; 1 << 20];
        partition[offset..offset + magic.len()].copy_from_slice(magic);
        let error = refused(&gpt(&[(LINUX_GUID, &partition)]));
        assert!(error.contains(&format!("partition 1 ({name})")), "{error}");
        assert!(error.contains(&format!("{name} is not read here: put /boot on")), "{error}");
    }
}

#[test]
fn a_search_that_never_ends_is_given_up() {
    let disk = gpt(&[(LINUX_GUID, &ext4(DEBIAN_FILES))]);
    let limits = Limits { bytes: 300 << 10, ..Limits::default() };
    let error = find(Box::new(disk), &Request::default(), limits).err().unwrap();
    assert!(matches!(error, NotBootable::GaveUp(_)), "{error}");
}

/// Disks with one kind of everything, for hostile changes.
fn seeds() -> &'static [Vec<u8>] {
    static SEEDS: std::sync::OnceLock<Vec<Vec<u8>>> = std::sync::OnceLock::new();
    SEEDS.get_or_init(|| {
        let entry = "title T\nlinux /k\ninitrd /i\noptions a\n";
        let files = [("loader/entries/a-name-that-is-long.conf", entry), ("k", "kernel"), ("i", "initrd")];
        vec![
            gpt(&[(LINUX_GUID, &ext4(DEBIAN_FILES))]),
            ext(&["-t", "ext4", "-O", "^metadata_csum,^extents,^64bit"], DEBIAN_FILES),
            ext(&["-t", "ext4", "-O", "^metadata_csum", "-b", "1024"], DEBIAN_FILES),
            fat("12", &files),
            fat("16", &files),
            gpt(&[(ESP_GUID, &fat("32", &files))]),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever is changed where structures lie, the search ends with an answer.
    #[test]
    fn hostile_disks_are_survived(
        seed in 0..6_usize,
        changes in prop::collection::vec((0..120_000_usize, prop_oneof![any::<u8>(), Just(0xff), Just(0)]), 1..12),
        cut in prop::option::of(0..200_000_usize),
    ) {
        let mut disk = seeds()[seed].clone();
        for (at, value) in changes {
            // In a partitioned disk all but the tables lies behind the first MiB.
            let start = if at % 4 > 0 && disk[510] == 0x55 && disk[450] == 0xee { 1 << 20 } else { 0 };
            let at = (start + at) % disk.len();
            disk[at] = value;
        }
        if let Some(cut) = cut {
            disk.truncate((1 << 20) + cut);
        }
        let _ = search_bytes(&disk);
    }
}
