//! The PVH boot protocol (Xen's `hvm_start_info`): for an uncompressed vmlinux.

use linux_loader::loader::KernelLoaderResult;
use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::{Bytes as _, GuestAddress};

use super::{BootError, Initrd};
use crate::vmm::layout;
use crate::vmm::memory::GuestMemory;

const START_MAGIC: u32 = 0x336e_c578;
const START_VERSION: u32 = 1;

/// The entry that the kernel's PVH note names.
pub(super) fn entry(kernel: &KernelLoaderResult) -> Result<u64, BootError> {
    match kernel.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(address) => Ok(address.0),
        PvhBootCapability::PvhEntryNotPresent | PvhBootCapability::PvhEntryIgnored => {
            Err(BootError::NoPvhNote)
        }
    }
}

pub(super) fn write_start_info(
    memory: &GuestMemory,
    memory_bytes: u64,
    initrd: Option<Initrd>,
    rsdp: u64,
) -> Result<(), BootError> {
    let map = layout::memory_map(memory_bytes);
    let info = hvm_start_info {
        magic: START_MAGIC,
        version: START_VERSION,
        nr_modules: initrd.is_some().into(),
        modlist_paddr: if initrd.is_some() { layout::PVH_MODULES } else { 0 },
        cmdline_paddr: layout::CMDLINE_START,
        rsdp_paddr: rsdp,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    memory.write_obj(info, GuestAddress(layout::PVH_START_INFO))?;
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry { paddr: initrd.address, size: initrd.bytes, ..Default::default() };
        memory.write_obj(module, GuestAddress(layout::PVH_MODULES))?;
    }
    let mut address = layout::PVH_MEMORY_MAP;
    for (start, length, kind) in map {
        let entry = hvm_memmap_table_entry { addr: start, size: length, type_: kind as u32, reserved: 0 };
        memory.write_obj(entry, GuestAddress(address))?;
        address += size_of::<hvm_memmap_table_entry>() as u64;
    }
    Ok(())
}
