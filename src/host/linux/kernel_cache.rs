//! Kernels as their guests run them, uncompressed: a bzImage that unpacks itself by XZ spends most of a
//! guest's start on it (0.7 s, at each start), an uncompressed vmlinux starts at once.
//!
//! `<state>/kernels/<sha256 of the bzImage>` is its vmlinux, or empty if that can't be entered. Only what
//! this host's operator names as a kernel gets there; nothing that a guest wrote does. Files appear whole
//! or not at all, whoever is killed, and are never changed; those used longest ago go first. Where
//! anything goes wrong the bzImage itself is booted, which always works.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _};
use std::path::Path;
use std::time::SystemTime;

use lzma_rust2::XzReader;
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use sha2::Digest as _;

const KEPT: usize = 8;
const BZIMAGE_BYTES_MAX: u64 = 256 << 20;
const VMLINUX_BYTES_MAX: u64 = 1 << 30;
const DECODER_KIB_MAX: u32 = 512 << 10;
const XZ_MAGIC: &[u8] = b"\xfd7zXZ\0";
/// `XEN_ELFNOTE_PHYS32_ENTRY`: where a kernel is entered uncompressed.
const PVH_NOTE: u32 = 18;
const PT_NOTE: u32 = 4;

/// The kernel uncompressed, if that makes its guest start sooner; else the kernel as it is.
pub fn uncompressed(directory: &Path, kernel: File) -> File {
    match cached(directory, &kernel) {
        Ok(Some(vmlinux)) => vmlinux,
        Ok(None) | Err(_) => kernel,
    }
}

fn cached(directory: &Path, kernel: &File) -> io::Result<Option<File>> {
    let Some(payload) = xz_payload(kernel)? else { return Ok(None) };
    let name = directory.join(hash(kernel)?);
    if !name.exists() {
        DirBuilder::new().mode(0o700).recursive(true).create(directory)?;
        let vmlinux = unpack(directory, kernel, payload)?;
        drop_old(directory, KEPT - 1)?;
        // Another run may have been faster; then its file is as good.
        let fd = format!("/proc/self/fd/{}", vmlinux.as_raw_fd());
        match rustix::fs::linkat(CWD, fd.as_str(), CWD, &name, AtFlags::SYMLINK_FOLLOW) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    let vmlinux = File::open(&name)?;
    let _ = vmlinux.set_modified(SystemTime::now());
    let metadata = vmlinux.metadata()?;
    Ok((metadata.is_file() && metadata.size() > 0).then_some(vmlinux))
}

/// Where the compressed kernel lies in a bzImage (Documentation/arch/x86/boot.rst), if it is by XZ.
fn xz_payload(kernel: &File) -> io::Result<Option<(u64, u64)>> {
    let mut header = [0; 0x250];
    let bytes = kernel.metadata()?.len();
    if bytes > BZIMAGE_BYTES_MAX || bytes < header.len() as u64 {
        return Ok(None);
    }
    kernel.read_exact_at(&mut header, 0)?;
    let u32_at = |at: usize| {
        u64::from(u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]))
    };
    let version = u16::from_le_bytes([header[0x206], header[0x207]]);
    if header[0x202..0x206] != *b"HdrS" || version < 0x208 {
        return Ok(None);
    }
    let setup_sectors = if header[0x1f1] == 0 { 4 } else { u64::from(header[0x1f1]) };
    let (start, length) = ((setup_sectors + 1) * 512 + u32_at(0x248), u32_at(0x24c));
    let mut magic = [0; XZ_MAGIC.len()];
    if start + length > bytes || length < magic.len() as u64 + 4 {
        return Ok(None);
    }
    kernel.read_exact_at(&mut magic, start)?;
    Ok((magic == XZ_MAGIC).then_some((start, length)))
}

fn hash(kernel: &File) -> io::Result<String> {
    let mut digest = sha2::Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    let mut offset = 0;
    loop {
        match kernel.read_at(&mut buffer, offset)? {
            0 => break,
            len => {
                digest.update(&buffer[..len]);
                offset += len as u64;
            }
        }
    }
    Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// A file without a name, on stable storage: the vmlinux, or nothing if it has no entry.
fn unpack(directory: &Path, kernel: &File, (start, length): (u64, u64)) -> io::Result<File> {
    // Behind the XZ stream stands how long it gets.
    let mut size = [0; 4];
    kernel.read_exact_at(&mut size, start + length - 4)?;
    let size = u64::from(u32::from_le_bytes(size));
    if size > VMLINUX_BYTES_MAX {
        return Err(io::ErrorKind::FileTooLarge.into());
    }
    let mut compressed = vec![0; length as usize - 4];
    kernel.read_exact_at(&mut compressed, start)?;
    let mut content = Vec::with_capacity(size as usize);
    // One more than there is: so the reader comes to the stream's end, and to its checks.
    XzReader::new_mem_limit(&compressed[..], false, DECODER_KIB_MAX)
        .take(size + 1)
        .read_to_end(&mut content)?;
    let whole = content.len() as u64 == size;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR)?);
    if whole && has_pvh_note(&content) {
        file.write_all(&content)?;
    }
    rustix::fs::fdatasync(file.as_fd())?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
}

/// Whether this is a 64-bit ELF file with a PVH entry.
fn has_pvh_note(elf: &[u8]) -> bool {
    let get = |at: u64, len: usize| {
        let at = usize::try_from(at).ok()?;
        elf.get(at..at.checked_add(len)?)
    };
    let number = |at: u64, len: usize| {
        let bytes = get(at, len)?;
        Some(bytes.iter().rev().fold(0_u64, |value, &byte| value << 8 | u64::from(byte)))
    };
    let find = || {
        if get(0, 5)? != b"\x7fELF\x02" {
            return None;
        }
        let (table, entry_bytes, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        for index in 0..count {
            let header = table.checked_add(index * entry_bytes)?;
            if number(header, 4)? != u64::from(PT_NOTE) {
                continue;
            }
            let mut at = number(header.checked_add(8)?, 8)?;
            let end = at.checked_add(number(header.checked_add(32)?, 8)?)?;
            while at < end {
                let (name, description, kind) = (number(at, 4)?, number(at + 4, 4)?, number(at + 8, 4)?);
                if kind == u64::from(PVH_NOTE) && name == 4 && get(at + 12, 4)? == b"Xen\0" {
                    return Some(());
                }
                at += 12 + name.next_multiple_of(4) + description.next_multiple_of(4);
            }
        }
        None
    };
    find().is_some()
}

/// Leaves those that were used last.
fn drop_old(directory: &Path, kept: usize) -> io::Result<()> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        found.push((entry.metadata()?.modified()?, entry.path()));
    }
    found.sort();
    for (_, path) in found.iter().rev().skip(kept) {
        // Who has it open keeps it.
        fs::remove_file(path)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use lzma_rust2::{XzOptions, XzWriter};
    use std::path::PathBuf;

    struct Scratch(PathBuf);

    impl Scratch {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("vmctl-kernels-{}-{name}", std::process::id()));
            fs::create_dir_all(&path).unwrap();
            Self(path)
        }

        fn kernel(&self, content: &[u8]) -> File {
            let path = self.0.join("kernel");
            fs::write(&path, content).unwrap();
            File::open(path).unwrap()
        }

        fn cache(&self) -> PathBuf {
            self.0.join("kernels")
        }

        fn cached(&self) -> Vec<PathBuf> {
            let Ok(entries) = fs::read_dir(self.cache()) else { return Vec::new() };
            entries.map(|entry| entry.unwrap().path()).collect()
        }

        /// What would be booted in place of this kernel.
        fn boots(&self, kernel: &[u8]) -> Vec<u8> {
            let mut content = Vec::new();
            uncompressed(&self.cache(), self.kernel(kernel)).read_to_end(&mut content).unwrap();
            content
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    /// An ELF file with one note, and some bytes that don't compress to nothing.
    fn vmlinux(note: u32, seed: u8) -> Vec<u8> {
        let mut elf = vec![0; 64 + 56 + 20];
        elf[..5].copy_from_slice(b"\x7fELF\x02");
        elf[32] = 64;
        elf[54] = 56;
        elf[56] = 1;
        elf[64] = PT_NOTE as u8;
        elf[72] = 120;
        elf[96] = 20;
        elf[120..124].copy_from_slice(&4_u32.to_le_bytes());
        elf[124..128].copy_from_slice(&4_u32.to_le_bytes());
        elf[128..132].copy_from_slice(&note.to_le_bytes());
        elf[132..136].copy_from_slice(b"Xen\0");
        elf.extend((0..100_000_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8 ^ seed));
        elf
    }

    fn bzimage(vmlinux: &[u8]) -> Vec<u8> {
        let mut writer = XzWriter::new(Vec::new(), XzOptions::with_preset(1)).unwrap();
        writer.write_all(vmlinux).unwrap();
        let mut payload = writer.finish().unwrap();
        payload.extend((vmlinux.len() as u32).to_le_bytes());
        let mut image = vec![0; 1024 + 100];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20f_u16.to_le_bytes());
        image[0x248..0x24c].copy_from_slice(&100_u32.to_le_bytes());
        image[0x24c..0x250].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend(payload);
        image.extend([0; 100]);
        image
    }

    #[test]
    fn a_kernel_is_unpacked_once() {
        let scratch = Scratch::new("once");
        let vmlinux = vmlinux(PVH_NOTE, 0);
        assert_eq!(scratch.boots(&bzimage(&vmlinux)), vmlinux);
        let inode = fs::metadata(&scratch.cached()[0]).unwrap().ino();
        assert_eq!(scratch.boots(&bzimage(&vmlinux)), vmlinux);
        assert_eq!(fs::metadata(&scratch.cached()[0]).unwrap().ino(), inode);
        assert_eq!(fs::metadata(scratch.cache()).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn what_is_no_gain_is_booted_as_it_is() {
        let scratch = Scratch::new("as-is");
        let without_entry = bzimage(&vmlinux(1, 0));
        assert_eq!(scratch.boots(&without_entry), without_entry);
        assert_eq!(scratch.cached().len(), 1, "that is remembered");
        assert_eq!(scratch.boots(&without_entry), without_entry);
        let mut broken = bzimage(&vmlinux(PVH_NOTE, 0));
        let middle = broken.len() / 2;
        broken[middle] ^= 0xff;
        assert_eq!(scratch.boots(&broken), broken);
        let mut lz4 = broken.clone();
        lz4[1124] = 2;
        for kernel in [lz4.as_slice(), &lz4[..700], b"", &vmlinux(PVH_NOTE, 0)] {
            assert_eq!(scratch.boots(kernel), kernel);
        }
        assert_eq!(scratch.cached().len(), 1);
    }

    #[test]
    fn the_cache_is_bounded_and_what_is_used_stays() {
        let scratch = Scratch::new("bounded");
        let first = bzimage(&vmlinux(PVH_NOTE, 0));
        for seed in 0..KEPT as u8 + 3 {
            scratch.boots(&bzimage(&vmlinux(PVH_NOTE, seed)));
            assert_eq!(scratch.boots(&first), vmlinux(PVH_NOTE, 0));
            assert!(scratch.cached().len() <= KEPT);
        }
        let name = scratch.cache().join(hash(&scratch.kernel(&first)).unwrap());
        assert!(name.exists());
    }

    #[test]
    fn runs_at_the_same_time_do_not_disturb_one_another() {
        let scratch = Scratch::new("parallel");
        let vmlinux = vmlinux(PVH_NOTE, 0);
        scratch.kernel(&bzimage(&vmlinux));
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let kernel = File::open(scratch.0.join("kernel")).unwrap();
                    let mut content = Vec::new();
                    uncompressed(&scratch.cache(), kernel).read_to_end(&mut content).unwrap();
                    assert!(content == vmlinux);
                });
            }
        });
        assert_eq!(scratch.cached().len(), 1);
    }
}
