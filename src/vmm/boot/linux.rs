//! The 64-bit Linux boot protocol (Documentation/arch/x86/boot.rst): for a bzImage.

use linux_loader::bootparam::setup_header;
use linux_loader::loader::KernelLoaderResult;
use vm_memory::{Bytes as _, GuestAddress};

use super::{BootError, Initrd};
use crate::vmm::layout;
use crate::vmm::memory::GuestMemory;

/// Offsets in the zero page (`struct boot_params`).
const RSDP_OFFSET: u64 = 0x070;
const E820_COUNT_OFFSET: u64 = 0x1e8;
const SETUP_HEADER_OFFSET: u64 = 0x1f1;
const E820_TABLE_OFFSET: u64 = 0x2d0;
const E820_ENTRY_BYTES: u64 = 20;

/// The 64-bit entry lies this far behind where the kernel was loaded.
const ENTRY_64_OFFSET: u64 = 0x200;
/// The first protocol with `xloadflags` and with it a 64-bit entry.
const VERSION_MIN: u16 = 0x020c;
const XLF_KERNEL_64: u16 = 1;
/// "No assigned id", as loaders without one use.
const LOADER_UNDEFINED: u8 = 0xff;

/// What the setup header of a bzImage demands.
pub(super) struct Header {
    pub entry: u64,
    /// The kernel unpacks itself into memory up to here.
    pub memory_end: u64,
    pub initrd_address_max: u64,
    pub cmdline_bytes_max: usize,
    raw: setup_header,
}

impl Header {
    pub fn of(kernel: &KernelLoaderResult) -> Result<Self, BootError> {
        let raw = kernel.setup_header.ok_or(BootError::UnknownKernel)?;
        if raw.version < VERSION_MIN || raw.xloadflags & XLF_KERNEL_64 == 0 {
            return Err(BootError::No64BitEntry);
        }
        let loaded = kernel.kernel_load.0;
        // A relocatable kernel unpacks itself where it was loaded, or at its preferred address if that
        // is higher.
        let unpacked = loaded.max(raw.pref_address);
        let memory_end = unpacked
            .checked_add(u64::from(raw.init_size))
            .ok_or_else(|| BootError::Load("its addresses overflow".into()))?;
        Ok(Self {
            entry: loaded + ENTRY_64_OFFSET,
            memory_end: memory_end.max(kernel.kernel_end),
            initrd_address_max: raw.initrd_addr_max.into(),
            cmdline_bytes_max: raw.cmdline_size as usize,
            raw,
        })
    }
}

pub(super) fn write_zero_page(
    memory: &GuestMemory,
    memory_bytes: u64,
    header: &Header,
    cmdline: &str,
    initrd: Option<Initrd>,
    rsdp: u64,
) -> Result<(), BootError> {
    let at = |offset: u64| GuestAddress(layout::ZERO_PAGE + offset);
    let mut raw = header.raw;
    raw.type_of_loader = LOADER_UNDEFINED;
    raw.cmd_line_ptr = layout::CMDLINE_START as u32;
    raw.cmdline_size = cmdline.len() as u32;
    if let Some(initrd) = initrd {
        // Both lie below 4 GiB: the initrd ends below the gap.
        raw.ramdisk_image = initrd.address as u32;
        raw.ramdisk_size = initrd.bytes as u32;
    }
    memory.write_slice(&[0; 0x1000], at(0))?;
    memory.write_obj(rsdp, at(RSDP_OFFSET))?;
    memory.write_obj(raw, at(SETUP_HEADER_OFFSET))?;
    let map = layout::memory_map(memory_bytes);
    memory.write_obj(map.len() as u8, at(E820_COUNT_OFFSET))?;
    for (index, (start, length, kind)) in map.into_iter().enumerate() {
        let entry = at(E820_TABLE_OFFSET + index as u64 * E820_ENTRY_BYTES);
        memory.write_obj(start, entry)?;
        memory.write_obj(length, GuestAddress(entry.0 + 8))?;
        memory.write_obj(kind as u32, GuestAddress(entry.0 + 16))?;
    }
    Ok(())
}

/// An identity map of the first 4 GiB in 2 MiB pages: one PML4, one PDPT, four page directories.
pub(super) fn write_page_tables(memory: &GuestMemory) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    const DIRECTORIES: u64 = 4;
    let pml4 = layout::PAGE_TABLES;
    let pdpt = pml4 + 0x1000;
    let directories = pdpt + 0x1000;
    memory.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(pml4))?;
    for directory in 0..DIRECTORIES {
        let table = directories + directory * 0x1000;
        memory.write_obj(table | PRESENT_WRITABLE, GuestAddress(pdpt + directory * 8))?;
        let mut entries = [0u8; 0x1000];
        for (index, entry) in entries.chunks_exact_mut(8).enumerate() {
            let address = (directory << 30) | ((index as u64) << 21);
            entry.copy_from_slice(&(address | PRESENT_WRITABLE | LARGE).to_le_bytes());
        }
        memory.write_slice(&entries, GuestAddress(table))?;
    }
    Ok(())
}
