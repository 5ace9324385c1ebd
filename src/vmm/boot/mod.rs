//! Puts a kernel, its initrd and its command line into guest memory and says how the first vCPU enters it.
//! Called at the start and again at every reset: from the same open files of the host, or from the guest's
//! own disk ([`disk`]), which is searched anew each time, for the guest may have installed another kernel.
//!
//! An uncompressed vmlinux is entered by its PVH note, a bzImage by the 64-bit boot protocol. The files
//! are read straight into guest memory; a hostile one can at worst make an error or a broken guest.

pub mod disk;
mod linux;
mod loader;
mod pvh;

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use linux_loader::loader::{KernelLoaderResult, bzimage::BzImage, elf::Elf};
use vm_memory::{Bytes as _, GuestAddress, ReadVolatile};

use super::layout;
use super::memory::GuestMemory;

pub use self::loader::DiskLoader;

/// Where a guest's kernel comes from. Kept for the whole life of the VM: a reset loads it again.
#[derive(Debug)]
pub enum BootSource {
    Files(BootFiles),
    Disk(DiskLoader),
}

/// The open files of a guest's kernel.
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
    #[error("boot from disk {disk}: {source}")]
    Disk { disk: String, source: Box<disk::NotBootable> },
    #[error("boot from disk {disk}, {kernel}: {source}")]
    DiskKernel { disk: String, kernel: String, source: Box<BootError> },
    #[error("boot from disk {disk}: it took longer than {seconds} s")]
    DiskSlow { disk: String, seconds: u64 },
    #[error("the VM boots from disk {disk}, but has no disk of that name")]
    NoSuchDisk { disk: String },
    #[error("no kernel was passed")]
    NoKernel,
    #[error("boot from disk {disk}: its loader's thread has ended")]
    LoaderEnded { disk: String },
}

/// Where the initrd lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Initrd {
    address: u64,
    bytes: u64,
}

impl BootSource {
    /// Loads everything; `rsdp` is where the ACPI tables start.
    pub fn load(&self, memory: &GuestMemory, memory_bytes: u64, rsdp: u64) -> Result<Entry, BootError> {
        match self {
            Self::Files(files) => load(memory, memory_bytes, files, rsdp),
            Self::Disk(loader) => loader.load(memory, memory_bytes, rsdp),
        }
    }
}

fn load(memory: &GuestMemory, memory_bytes: u64, files: &BootFiles, rsdp: u64) -> Result<Entry, BootError> {
    // The loader moves the file's offset, which a duplicate shares; nobody else uses it meanwhile.
    let kernel = files.kernel.try_clone().map_err(BootError::ReadKernel)?;
    let initrd = files.initrd.as_ref().map(|file| file as &dyn Initrds);
    load_parts(memory, memory_bytes, kernel, initrd, &files.cmdline, rsdp)
}

/// What goes into the memory of the initrd.
trait Initrds {
    fn bytes(&self) -> Result<u64, BootError>;
    /// Puts these bytes here; they fit.
    fn copy_to(&self, memory: &GuestMemory, address: GuestAddress, bytes: u64) -> Result<(), BootError>;
}

impl Initrds for File {
    fn bytes(&self) -> Result<u64, BootError> {
        Ok(self.metadata().map_err(BootError::ReadInitrd)?.len())
    }

    fn copy_to(&self, memory: &GuestMemory, address: GuestAddress, bytes: u64) -> Result<(), BootError> {
        let mut file = self;
        file.rewind().map_err(BootError::ReadInitrd)?;
        // It fits between two addresses below 4 GiB, so usize holds it.
        Ok(memory.read_exact_volatile_from(address, &mut file, bytes as usize)?)
    }
}

fn load_parts<K: Read + Seek + ReadVolatile>(
    memory: &GuestMemory,
    memory_bytes: u64,
    mut kernel: K,
    initrd: Option<&dyn Initrds>,
    cmdline: &str,
    rsdp: u64,
) -> Result<Entry, BootError> {
    let low_ram_end = memory_bytes.min(layout::GAP_START);
    match kind_of(&mut kernel)? {
        Kind::Elf => {
            let kernel = load_with::<Elf, K>(memory, kernel)?;
            let address = pvh::entry(&kernel)?;
            check_end(kernel.kernel_end, low_ram_end)?;
            let initrd = load_initrd(memory, initrd, kernel.kernel_end, low_ram_end)?;
            write_cmdline(memory, cmdline, layout::CMDLINE_BYTES_MAX - 1)?;
            pvh::write_start_info(memory, memory_bytes, initrd, rsdp)?;
            Ok(Entry::Pvh { address })
        }
        Kind::BzImage => {
            let kernel = load_with::<BzImage, K>(memory, kernel)?;
            let header = linux::Header::of(&kernel)?;
            check_end(header.memory_end, low_ram_end)?;
            let initrd_end = low_ram_end.min(header.initrd_address_max.saturating_add(1));
            let initrd = load_initrd(memory, initrd, header.memory_end, initrd_end)?;
            write_cmdline(memory, cmdline, header.cmdline_bytes_max)?;
            linux::write_zero_page(memory, memory_bytes, &header, cmdline, initrd, rsdp)?;
            linux::write_page_tables(memory)?;
            Ok(Entry::Linux64 { address: header.entry })
        }
    }
}

enum Kind {
    Elf,
    BzImage,
}

fn kind_of(kernel: &mut (impl Read + Seek)) -> Result<Kind, BootError> {
    let mut magic_at = |offset| {
        let mut magic = [0; 4];
        kernel.seek(SeekFrom::Start(offset)).map_err(BootError::ReadKernel)?;
        match kernel.read_exact(&mut magic) {
            Ok(()) => Ok(magic),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(BootError::UnknownKernel),
            Err(error) => Err(BootError::ReadKernel(error)),
        }
    };
    if magic_at(0)? == *b"\x7fELF" {
        Ok(Kind::Elf)
    } else if magic_at(0x202)? == *b"HdrS" {
        Ok(Kind::BzImage)
    } else {
        Err(BootError::UnknownKernel)
    }
}

fn load_with<L: linux_loader::loader::KernelLoader, K: Read + Seek + ReadVolatile>(
    memory: &GuestMemory,
    mut kernel: K,
) -> Result<KernelLoaderResult, BootError> {
    L::load(memory, None, &mut kernel, Some(GuestAddress(layout::KERNEL_MIN)))
        .map_err(|error| BootError::Load(error.to_string()))
}

fn check_end(needed: u64, end: u64) -> Result<(), BootError> {
    if needed > end { Err(BootError::KernelTooLarge { needed, end }) } else { Ok(()) }
}

/// Puts the initrd as high as it may go, page-aligned, so that it is out of the kernel's way.
fn load_initrd(
    memory: &GuestMemory,
    initrd: Option<&dyn Initrds>,
    from: u64,
    to: u64,
) -> Result<Option<Initrd>, BootError> {
    let Some(initrd) = initrd else { return Ok(None) };
    let bytes = initrd.bytes()?;
    let address = to.checked_sub(bytes).map(|address| address & !0xfff);
    let Some(address) = address.filter(|&address| address >= from) else {
        return Err(BootError::InitrdTooLarge { bytes, from, to });
    };
    initrd.copy_to(memory, GuestAddress(address), bytes)?;
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
