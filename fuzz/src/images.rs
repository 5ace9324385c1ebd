//! Images that somebody else made: qcow2, and disks to be booted.

use std::os::fd::OwnedFd;

use arbitrary::{Arbitrary, Unstructured};
use crc::{CRC_32_ISO_HDLC, Crc};
use vmctl::host::linux::storage::header;
use vmctl::host::linux::storage::vmdk::{Vmdk, Window};
use vmctl::vmm::config::{DiskConfig, DiskFormat};
use vmctl::vmm::device::block::Block;

use super::devices::{empty_qcow2, events, memory_file, no_filter};
use super::mmio::Mmio;
use super::virtio::{Driver, Operation, memory};

/// A good image with some bytes changed, and what is then done with it.
#[derive(Debug, Arbitrary)]
struct Image {
    patches: Vec<(u16, Vec<u8>)>,
    cut: Option<u16>,
    read_only: bool,
    operations: Vec<Operation>,
}

/// Through the VM process's gate, and if it lets the image pass, through all that a guest can do with it.
pub fn qcow2_image(data: &[u8]) {
    let Ok(case) = Image::arbitrary_take_rest(Unstructured::new(data)) else { return };
    let mut image = empty_qcow2();
    for (at, bytes) in &case.patches {
        let at = usize::from(*at);
        for (to, from) in image.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
    }
    if let Some(cut) = case.cut {
        image.truncate(cut.into());
    }
    let config =
        DiskConfig { read_only: case.read_only, ..DiskConfig::new("image", "image", DiskFormat::Qcow2) };
    let file = OwnedFd::from(memory_file(&image));
    let Ok(block) = Block::new(&config, file, Vec::new(), &no_filter(), events()) else { return };
    let memory = memory();
    let mut transport = Mmio::new(block, memory.clone());
    Driver::new(&mut transport, memory).run(&case.operations, &mut |_, _| {});
}

/// What the reconciler reads of a file's first bytes.
pub fn qcow2_header(data: &[u8]) {
    let Some((length, prefix)) = data.split_first_chunk::<8>() else { return };
    let file_bytes = u64::from_le_bytes(*length);
    if let Some(found) = header::parse(prefix, file_bytes) {
        assert!(
            found.unusable.is_some() || found.format == DiskFormat::Raw || prefix.starts_with(b"QFI\xfb")
        );
    }
    // With the file's true length, and however much is needed.
    let file = memory_file(prefix);
    header::of_file(&file, prefix.len() as u64).expect("a read from memory");
}

/// A vmdk from its first byte to its last grain: it ends in grains that fit, or in a reason. The bytes are a
/// disk's sectors as [`sparse_disk`] has them, so that tables can lie apart.
pub fn vmdk(data: &[u8]) {
    let bytes = sparse_disk(data);
    let file = memory_file(&bytes);
    let window = Window { file: &file, start: 0, bytes: bytes.len() as u64 };
    let Ok(disk) = Vmdk::open(window) else { return };
    let (mut written, mut end) = (0u64, 0u64);
    let result = disk.each_grain(|grain, at| {
        assert!(!grain.is_empty() && at + grain.len() as u64 <= disk.capacity_bytes());
        (written, end) = (written + grain.len() as u64, end.max(at + grain.len() as u64));
        Ok(())
    });
    // No file becomes more than all of its sectors could hold as compressed grains of the largest kind.
    assert!(written <= (bytes.len() as u64 / 512 + 1) << 21, "{written} bytes of {}", bytes.len());
    assert!(result.is_err() || end <= disk.capacity_bytes());
}

/// A disk's sectors that aren't zero: after their count (16 bits) each with its number (16 bits).
fn sparse_disk(data: &[u8]) -> Vec<u8> {
    const SECTOR: usize = 512;
    let Some((sectors, records)) = data.split_first_chunk::<2>() else { return Vec::new() };
    let mut disk = vec![0; usize::from(u16::from_le_bytes(*sectors)) * SECTOR];
    for record in records.chunks(2 + SECTOR) {
        let Some((number, content)) = record.split_first_chunk::<2>() else { break };
        let at = usize::from(u16::from_le_bytes(*number)) * SECTOR;
        if let Some(place) = disk.get_mut(at..at + content.len()) {
            place.copy_from_slice(content);
        }
    }
    disk
}

/// Makes the checksums of a GPT right, for else no change would ever be looked at.
fn seal_gpt(disk: &mut [u8]) {
    const HEADER: std::ops::Range<usize> = 512..512 + 92;
    if !disk.get(HEADER).is_some_and(|header| header.starts_with(b"EFI PART")) {
        return;
    }
    let number =
        |disk: &[u8], at: usize| u32::from_le_bytes([disk[at], disk[at + 1], disk[at + 2], disk[at + 3]]);
    let crc = Crc::<u32>::new(&CRC_32_ISO_HDLC);
    let (count, bytes) = (number(disk, 512 + 80) as usize, number(disk, 512 + 84) as usize);
    let length = count.saturating_mul(bytes).min(128 * 128);
    if let Some(entries) = disk.get(1024..1024 + length) {
        let sum = crc.checksum(entries);
        disk[512 + 88..512 + 92].copy_from_slice(&sum.to_le_bytes());
    }
    disk[512 + 16..512 + 20].fill(0);
    let sum = crc.checksum(&disk[HEADER]);
    disk[512 + 16..512 + 20].copy_from_slice(&sum.to_le_bytes());
}

/// GPT and MBR, ext4 and FAT, grub.cfg, BLS, extlinux and unified kernels: whatever is found is read.
pub fn boot_disk(data: &[u8]) {
    let mut disk = sparse_disk(data);
    seal_gpt(&mut disk);
    // An error is a good answer.
    let _ = vmctl::vmm::boot::disk::search_bytes(&disk);
}
