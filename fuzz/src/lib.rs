//! What is fuzzed: one function a target, from the fuzzer's bytes to the code that must not fall.
//!
//! `fuzz_targets/` puts libFuzzer around them; `tests/fuzz_corpus.rs` runs them over the committed
//! corpus as an ordinary test. A function here returns if all is well, and panics if not.

pub mod devices;
pub mod images;
pub mod messages;
mod mmio;
pub mod pci;
mod virtio;

/// What a target does with the fuzzer's bytes.
pub type Target = fn(&[u8]);

/// Each target by the name of its corpus.
pub const TARGETS: &[(&str, Target)] = &[
    ("block_raw", devices::block_raw),
    ("block_qcow2", devices::block_qcow2),
    ("block_read_only", devices::block_read_only),
    ("net", devices::net),
    ("entropy", devices::entropy),
    ("balloon", devices::balloon),
    ("vsock", devices::vsock),
    ("virtio_pci", devices::virtio_pci),
    ("pci_bus", pci::bus),
    ("qcow2_image", images::qcow2_image),
    ("qcow2_header", images::qcow2_header),
    ("boot_disk", images::boot_disk),
    ("vmdk", images::vmdk),
    ("control", messages::control),
];
