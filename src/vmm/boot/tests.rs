use std::io::{Seek as _, Write as _};

use super::*;
use crate::vmm::memory;

const MEMORY_BYTES: u64 = 32 << 20;

fn file(content: &[u8]) -> File {
    let fd = rustix::fs::memfd_create("vmctl-boot-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(fd);
    file.write_all(content).unwrap();
    file.rewind().unwrap();
    file
}

/// A bzImage as far as a loader looks: a setup header and 4 KiB of "kernel".
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 1024 + 4096];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1f1, &[1]); // setup_sects
    put(0x202, b"HdrS");
    put(0x206, &0x020f_u16.to_le_bytes()); // version
    put(0x211, &[1]); // loaded high
    put(0x214, &0x10_0000_u32.to_le_bytes()); // code32_start
    put(0x22c, &0x7fff_ffff_u32.to_le_bytes()); // initrd_addr_max
    put(0x236, &1_u16.to_le_bytes()); // xloadflags: 64-bit entry
    put(0x238, &2047_u32.to_le_bytes()); // cmdline_size
    put(0x258, &0x100_0000_u64.to_le_bytes()); // pref_address
    put(0x260, &0x20_0000_u32.to_le_bytes()); // init_size
    put(1024, b"KERNEL");
    image
}

fn load_files(
    kernel: &[u8],
    initrd: Option<&[u8]>,
    cmdline: &str,
) -> Result<(GuestMemory, Entry), BootError> {
    let memory = memory::create(&layout::ram_ranges(MEMORY_BYTES)).unwrap();
    let files = BootFiles { kernel: file(kernel), initrd: initrd.map(file), cmdline: cmdline.into() };
    let entry = load(&memory, MEMORY_BYTES, &files, 0xe_0000)?;
    // The same open files load again: a reset does so.
    assert_eq!(load(&memory, MEMORY_BYTES, &files, 0xe_0000)?, entry);
    Ok((memory, entry))
}

#[test]
fn a_bzimage_gets_its_zero_page() {
    let (memory, entry) = load_files(&bzimage(), Some(b"initrd"), "console=ttyS0").unwrap();
    assert_eq!(entry, Entry::Linux64 { address: 0x10_0200 });
    let u32_at = |offset: u64| memory.read_obj::<u32>(GuestAddress(layout::ZERO_PAGE + offset)).unwrap();
    let text_at = |address: u64, length: usize| {
        let mut text = vec![0; length];
        memory.read_slice(&mut text, GuestAddress(address)).unwrap();
        text
    };
    assert_eq!(text_at(0x10_0000, 6), b"KERNEL");
    assert_eq!(u32_at(0x070), 0xe_0000, "RSDP");
    assert_eq!(u32_at(0x228), layout::CMDLINE_START as u32);
    assert_eq!(text_at(layout::CMDLINE_START, 14), b"console=ttyS0\0");
    let (initrd, bytes) = (u32_at(0x218), u32_at(0x21c));
    assert_eq!((initrd % 4096, bytes), (0, 6));
    assert_eq!(u64::from(initrd), MEMORY_BYTES - 4096);
    assert_eq!(text_at(initrd.into(), 6), b"initrd");
    assert_eq!(text_at(layout::ZERO_PAGE + 0x1e8, 1), [4], "memory ranges");
    // The last range is the RAM from 1 MiB on.
    assert_eq!(u32_at(0x2d0 + 40), 0x10_0000);
    assert_eq!(u32_at(0x2d0 + 48), (MEMORY_BYTES - 0x10_0000) as u32);
    // The page tables map 3 GiB + 2 MiB to itself.
    let entry = memory.read_obj::<u64>(GuestAddress(layout::PAGE_TABLES + 0x2000 + 3 * 0x1000 + 8)).unwrap();
    assert_eq!(entry, (3 << 30) + (2 << 20) + 0x83);
}

#[test]
fn bad_kernels_are_named() {
    let refused = |kernel: &[u8], initrd: Option<&[u8]>, cmdline: &str| {
        load_files(kernel, initrd, cmdline).map(|(_, entry)| entry).unwrap_err()
    };
    assert!(matches!(refused(b"", None, ""), BootError::UnknownKernel));
    assert!(matches!(refused(&[0; 2000], None, ""), BootError::UnknownKernel));
    assert!(matches!(refused(b"\x7fELF", None, ""), BootError::Load(_)));
    let mut old = bzimage();
    old[0x206] = 0x0b;
    assert!(matches!(refused(&old, None, ""), BootError::No64BitEntry));
    let mut only_32_bits = bzimage();
    only_32_bits[0x236] = 0;
    assert!(matches!(refused(&only_32_bits, None, ""), BootError::No64BitEntry));
    let mut large = bzimage();
    large[0x260..0x264].copy_from_slice(&0x4000_0000_u32.to_le_bytes());
    assert!(matches!(refused(&large, None, ""), BootError::KernelTooLarge { .. }));
    let mut overflowing = bzimage();
    overflowing[0x258..0x260].copy_from_slice(&u64::MAX.to_le_bytes());
    assert!(matches!(refused(&overflowing, None, ""), BootError::Load(_)));
    let large_initrd = vec![0; 20 << 20];
    assert!(matches!(refused(&bzimage(), Some(&large_initrd), ""), BootError::InitrdTooLarge { .. }));
    assert!(matches!(refused(&bzimage(), None, &"x".repeat(2048)), BootError::Cmdline { max: 2047 }));
    assert!(matches!(refused(&bzimage(), None, "a\0b"), BootError::Cmdline { .. }));
}
