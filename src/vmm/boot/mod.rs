//! Direct kernel boot: puts a kernel, its initrd and its command line into guest memory and says how
//! the first vCPU enters it. Called at the start and again at every reset, from the same open files.
//!
//! An uncompressed vmlinux is entered by its PVH note, a bzImage by the 64-bit boot protocol. The files
//! are read straight into guest memory; a hostile one can at worst make an error or a broken guest.

mod linux;
mod pvh;

use std::fs::File;
use std::io::{self, Seek as _};
use std::os::unix::fs::FileExt as _;

use linux_loader::loader::{KernelLoaderResult, bzimage::BzImage, elf::Elf};
use vm_memory::{Bytes as _, GuestAddress};

use super::layout;
use super::memory::GuestMemory;

/// The open files of a guest's kernel. Kept for the whole life of the VM: a reset loads them again.
#[derive(Debug)]
pub struct BootFiles {
    pub kernel: File,
    pub initrd: Option<File>,
    pub cmdline: String,
}

/// How the first vCPU starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode without paging, start info in `rbx`.
    Pvh { address: u64 },
    /// 64-bit mode on identity-mapped page tables, zero page in `rsi`.
    Linux64 { address: u64 },
}

#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("read the kernel")]
    ReadKernel(#[source] io::Error),
    #[error("the kernel is neither a bzImage nor an uncompressed ELF vmlinux")]
    UnknownKernel,
    #[error(
        "the kernel is an ELF file without a PVH note (CONFIG_PVH): build it with one, or use its bzImage"
    )]
    NoPvhNote,
    #[error("load the kernel: {0} (is the file cut off, or the memory too small?)")]
    Load(String),
    #[error("the bzImage is older than the 64-bit boot protocol, or for 32 bits")]
    No64BitEntry,
    #[error("the kernel needs memory up to {needed:#x}, but there is RAM up to {end:#x}")]
    KernelTooLarge { needed: u64, end: u64 },
    #[error("read the initrd")]
    ReadInitrd(#[source] io::Error),
    #[error(
        "the initrd has {bytes} bytes, which don't fit between the kernel's end at {from:#x} and {to:#x}"
    )]
    InitrdTooLarge { bytes: u64, from: u64, to: u64 },
    #[error("the command line is longer than the {max} bytes that the kernel takes, or holds a zero byte")]
    Cmdline { max: usize },
    #[error("write the boot information into guest memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Where the initrd lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Initrd {
    address: u64,
    bytes: u64,
}

/// Loads everything; `rsdp` is where the ACPI tables start.
pub fn load(
    memory: &GuestMemory,
    memory_bytes: u64,
    files: &BootFiles,
    rsdp: u64,
) -> Result<Entry, BootError> {
    let low_ram_end = memory_bytes.min(layout::GAP_START);
    match kind_of(&files.kernel)? {
        Kind::Elf => {
            let kernel = load_with::<Elf>(memory, &files.kernel)?;
            let address = pvh::entry(&kernel)?;
            check_end(kernel.kernel_end, low_ram_end)?;
            let initrd = load_initrd(memory, files.initrd.as_ref(), kernel.kernel_end, low_ram_end)?;
            write_cmdline(memory, &files.cmdline, layout::CMDLINE_BYTES_MAX - 1)?;
            pvh::write_start_info(memory, memory_bytes, initrd, rsdp)?;
            Ok(Entry::Pvh { address })
        }
        Kind::BzImage => {
            let kernel = load_with::<BzImage>(memory, &files.kernel)?;
            let header = linux::Header::of(&kernel)?;
            check_end(header.memory_end, low_ram_end)?;
            let initrd_end = low_ram_end.min(header.initrd_address_max.saturating_add(1));
            let initrd = load_initrd(memory, files.initrd.as_ref(), header.memory_end, initrd_end)?;
            write_cmdline(memory, &files.cmdline, header.cmdline_bytes_max)?;
            linux::write_zero_page(memory, memory_bytes, &header, &files.cmdline, initrd, rsdp)?;
            linux::write_page_tables(memory)?;
            Ok(Entry::Linux64 { address: header.entry })
        }
    }
}

enum Kind {
    Elf,
    BzImage,
}

fn kind_of(kernel: &File) -> Result<Kind, BootError> {
    let mut magic = [0; 4];
    match kernel.read_exact_at(&mut magic, 0) {
        Ok(()) if magic == *b"\x7fELF" => return Ok(Kind::Elf),
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(BootError::UnknownKernel),
        Err(error) => return Err(BootError::ReadKernel(error)),
    }
    match kernel.read_exact_at(&mut magic, 0x202) {
        Ok(()) if magic == *b"HdrS" => Ok(Kind::BzImage),
        Ok(()) => Err(BootError::UnknownKernel),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(BootError::UnknownKernel),
        Err(error) => Err(BootError::ReadKernel(error)),
    }
}

fn load_with<L: linux_loader::loader::KernelLoader>(
    memory: &GuestMemory,
    kernel: &File,
) -> Result<KernelLoaderResult, BootError> {
    // The loader moves the file's offset, which a duplicate shares; nobody else uses it meanwhile.
    let mut kernel = kernel.try_clone().map_err(BootError::ReadKernel)?;
    L::load(memory, None, &mut kernel, Some(GuestAddress(layout::KERNEL_MIN)))
        .map_err(|error| BootError::Load(error.to_string()))
}

fn check_end(needed: u64, end: u64) -> Result<(), BootError> {
    if needed > end { Err(BootError::KernelTooLarge { needed, end }) } else { Ok(()) }
}

/// Puts the initrd as high as it may go, page-aligned, so that it is out of the kernel's way.
fn load_initrd(
    memory: &GuestMemory,
    initrd: Option<&File>,
    from: u64,
    to: u64,
) -> Result<Option<Initrd>, BootError> {
    let Some(mut file) = initrd else { return Ok(None) };
    let bytes = file.metadata().map_err(BootError::ReadInitrd)?.len();
    let address = to.checked_sub(bytes).map(|address| address & !0xfff);
    let Some(address) = address.filter(|&address| address >= from) else {
        return Err(BootError::InitrdTooLarge { bytes, from, to });
    };
    file.rewind().map_err(BootError::ReadInitrd)?;
    // It fits between two addresses below 4 GiB, so usize holds it.
    memory.read_exact_volatile_from(GuestAddress(address), &mut file, bytes as usize)?;
    Ok(Some(Initrd { address, bytes }))
}

fn write_cmdline(memory: &GuestMemory, cmdline: &str, max: usize) -> Result<(), BootError> {
    let max = max.min(layout::CMDLINE_BYTES_MAX - 1);
    if cmdline.len() > max || cmdline.contains('\0') {
        return Err(BootError::Cmdline { max });
    }
    memory.write_slice(cmdline.as_bytes(), GuestAddress(layout::CMDLINE_START))?;
    memory.write_obj(0u8, GuestAddress(layout::CMDLINE_START + cmdline.len() as u64))?;
    Ok(())
}

#[cfg(test)]
mod tests;
