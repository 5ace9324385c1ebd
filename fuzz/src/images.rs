//! qcow2 images that somebody else made.

use std::os::fd::OwnedFd;

use arbitrary::{Arbitrary, Unstructured};
use vmctl::host::linux::storage::header;
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
