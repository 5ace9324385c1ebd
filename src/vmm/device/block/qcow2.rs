//! qcow2 images, by `imago`. The file and its backing chain are handed in as descriptors: whatever
//! the image's header names, nothing is opened by path.
//!
//! Images are hostile. Before imago sees one, its header is checked for what we refuse: encryption
//! (imago would write plaintext into it), data files, a dirty or corrupt mark, a backing file that
//! was not declared, tables of absurd size. Formats are declared, never guessed.
//!
//! Data goes directly between guest memory and the file wherever a range is mapped to it; compressed
//! clusters pass a bounded buffer.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use imago::format::PreallocateMode;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatDriverBuilder, Mapping};

use super::host_file::HostFile;
use super::image::{Image, SECTOR_BYTES};
use crate::vmm::config::DiskFormat;
use crate::vmm::device::buffers::Cursor;

/// Most bytes of a range that has to be copied at once.
const BOUNCE_BYTES: u64 = 64 * 1024;
/// The limits that QEMU sets for its own images, too.
const L1_TABLE_BYTES_MAX: u64 = 32 << 20;
const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;

const MAGIC: u32 = 0x5146_49fb;
const HEADER_V2_BYTES: usize = 72;
const HEADER_V3_BYTES: usize = 104;
const INCOMPATIBLE_DIRTY: u64 = 1;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;

/// Why an image is not opened.
#[derive(Debug, thiserror::Error)]
pub enum ImageRefused {
    #[error("it is not a qcow2 image")]
    NotQcow2,
    #[error("it is encrypted (method {0}), which is not supported")]
    Encrypted(u32),
    #[error("it keeps its data in another file, which is not supported")]
    DataFile,
    #[error("it is marked dirty: it was not closed cleanly; repair it with `qemu-img check -r leaks`")]
    Dirty,
    #[error("it is marked corrupt; repair it with `qemu-img check -r all`")]
    Corrupt,
    #[error("its {0} is larger than any valid image needs")]
    TableSize(&'static str),
    #[error("its clusters of {0} bytes are smaller than the {1} bytes that direct I/O writes at once here")]
    ClusterSize(u64, u64),
    #[error("it has a backing file ({0:?}) that was not declared")]
    UndeclaredBacking(String),
    #[error("a backing file is declared, but it has none")]
    NoBacking,
    #[error("its backing file is declared as {declared}, but its header says {header}")]
    BackingFormat { declared: &'static str, header: String },
    #[error("a raw layer can't have a backing file")]
    RawWithBacking,
    #[error("{declared} backing files are declared, but {passed} were passed")]
    BackingCount { declared: usize, passed: usize },
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// One layer of a chain.
pub(super) struct Layer {
    pub format: DiskFormat,
    pub fd: OwnedFd,
}

pub(super) struct Qcow2Image {
    /// Reads, writes and flushes may run beside one another: imago locks what they share. What takes
    /// clusters away from the guest's data, or moves the tables, must be alone: another's data might be
    /// on its way into a cluster that is freed.
    access: RwLock<FormatAccess<HostFile>>,
    capacity_bytes: AtomicU64,
    backing_bytes: u64,
    can_discard: bool,
    cluster_bytes: u64,
}

impl Qcow2Image {
    /// Opens the chain, given from the top layer to the base. Only the top is ever written.
    pub fn open(chain: Vec<Layer>, read_only: bool, direct: bool) -> Result<Self, ImageRefused> {
        let layers = chain.len();
        let mut below: Option<(FormatAccess<HostFile>, DiskFormat)> = None;
        let mut backing_bytes = 0;
        let mut top = Header { version: 0, cluster_bytes: 1 };
        for (depth, Layer { format, fd }) in chain.into_iter().enumerate().rev() {
            let writable = depth == 0 && !read_only;
            backing_bytes = below.as_ref().map_or(0, |(access, _)| access.size());
            if format == DiskFormat::Raw && depth + 1 < layers {
                return Err(ImageRefused::RawWithBacking);
            }
            if format == DiskFormat::Qcow2 {
                top = check_header(&fd, below.is_some())?;
            }
            let file = HostFile::new(fd, direct)?;
            let access = match format {
                DiskFormat::Raw => FormatAccess::new(Raw::open_image(file, writable)?),
                DiskFormat::Qcow2 if top.cluster_bytes < file.offset_align() => {
                    return Err(ImageRefused::ClusterSize(top.cluster_bytes, file.offset_align()));
                }
                DiskFormat::Qcow2 => open_layer(file, below, writable)?,
            };
            below = Some((access, format));
        }
        let (access, _) = below.ok_or(ImageRefused::NotQcow2)?;
        // Version 2 can't mark clusters as zero.
        let (can_discard, cluster_bytes) = (top.version >= 3, top.cluster_bytes);
        let capacity_bytes = AtomicU64::new(access.size() / SECTOR_BYTES * SECTOR_BYTES);
        Ok(Self { access: RwLock::new(access), capacity_bytes, backing_bytes, can_discard, cluster_bytes })
    }

    fn shared(&self) -> RwLockReadGuard<'_, FormatAccess<HostFile>> {
        // A panic ends the process: there is no poisoned lock to see.
        self.access.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn alone(&self) -> RwLockWriteGuard<'_, FormatAccess<HostFile>> {
        self.access.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The whole clusters of a range: their start and length, which may be nothing.
    fn whole_clusters(&self, offset: u64, len: u64) -> (u64, u64) {
        let end = (offset + len) / self.cluster_bytes * self.cluster_bytes;
        let start = offset.next_multiple_of(self.cluster_bytes);
        (start, end.saturating_sub(start))
    }
}

/// Writes zeroes as data, but not where there are zeroes already.
fn write_plain_zeroes(access: &FormatAccess<HostFile>, mut offset: u64, mut len: u64) -> io::Result<()> {
    let zeroes = vec![0; len.min(BOUNCE_BYTES) as usize];
    while len > 0 {
        let (mapping, mapped) = access.get_mapping(offset, len)?;
        let mut piece = mapped.min(BOUNCE_BYTES);
        match mapping {
            Mapping::Zero { .. } => piece = mapped,
            _ => access.write(&zeroes[..piece as usize], offset)?,
        }
        if piece == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        offset += piece;
        len -= piece;
    }
    Ok(())
}

/// What we need to know of the top layer's header.
struct Header {
    version: u32,
    cluster_bytes: u64,
}

fn open_layer(
    file: HostFile,
    below: Option<(FormatAccess<HostFile>, DiskFormat)>,
    writable: bool,
) -> Result<FormatAccess<HostFile>, ImageRefused> {
    let (backing, format) = below.unzip();
    let builder = Qcow2::<HostFile>::builder(file).write(writable).backing(backing).data_file(None);
    let qcow2 = builder.open(DenyImplicitOpenGate::default())?;
    // Where the header names a format, the declared one must be the same: a guest that wrote a qcow2
    // header into its raw disk must not find it opened as qcow2.
    let declared = format.map(|format| match format {
        DiskFormat::Raw => "raw",
        DiskFormat::Qcow2 => "qcow2",
    });
    match (declared, qcow2.implicit_backing_format()) {
        (Some(declared), Some(header)) if header != declared => {
            Err(ImageRefused::BackingFormat { declared, header: header.clone() })
        }
        _ => Ok(FormatAccess::new(qcow2)),
    }
}

/// Checks what imago would accept but we don't; returns what we need of it.
fn check_header(fd: &OwnedFd, backing_declared: bool) -> Result<Header, ImageRefused> {
    let mut header = [0; HEADER_V3_BYTES];
    let len = read_at(fd, &mut header, 0)?;
    let u32_at = |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let u64_at = |at: usize| u64::from(u32_at(at)) << 32 | u64::from(u32_at(at + 4));
    let version = u32_at(4);
    let complete = match version {
        2 => len >= HEADER_V2_BYTES,
        3 => len >= HEADER_V3_BYTES,
        _ => false,
    };
    if u32_at(0) != MAGIC || !complete {
        return Err(ImageRefused::NotQcow2);
    }
    let method = u32_at(32);
    if method != 0 {
        return Err(ImageRefused::Encrypted(method));
    }
    let incompatible = if version == 3 { u64_at(72) } else { 0 };
    if incompatible & INCOMPATIBLE_DATA_FILE != 0 {
        return Err(ImageRefused::DataFile);
    }
    if incompatible & INCOMPATIBLE_CORRUPT != 0 {
        return Err(ImageRefused::Corrupt);
    }
    if incompatible & INCOMPATIBLE_DIRTY != 0 {
        return Err(ImageRefused::Dirty);
    }
    let (cluster_bits, l1_entries, refcount_clusters) = (u32_at(20), u32_at(36), u32_at(56));
    if u64::from(l1_entries) * 8 > L1_TABLE_BYTES_MAX {
        return Err(ImageRefused::TableSize("L1 table"));
    }
    if !(9..=21).contains(&cluster_bits)
        || u64::from(refcount_clusters) << cluster_bits > REFCOUNT_TABLE_BYTES_MAX
    {
        return Err(ImageRefused::TableSize("refcount table or cluster size"));
    }
    let (backing_offset, backing_len) = (u64_at(8), u32_at(16));
    match (backing_offset != 0, backing_declared) {
        (false, true) => Err(ImageRefused::NoBacking),
        (true, false) => {
            let mut name = vec![0; backing_len.min(1023) as usize];
            let len = read_at(fd, &mut name, backing_offset)?;
            Err(ImageRefused::UndeclaredBacking(String::from_utf8_lossy(&name[..len]).into_owned()))
        }
        _ => Ok(Header { version, cluster_bytes: 1 << cluster_bits }),
    }
}

fn read_at(fd: &OwnedFd, data: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while filled < data.len() {
        match rustix::io::pread(fd.as_fd(), &mut data[filled..], offset.saturating_add(filled as u64)) {
            Err(rustix::io::Errno::INTR) => {}
            Ok(0) => break,
            result => filled += result?,
        }
    }
    Ok(filled)
}

impl Image for Qcow2Image {
    fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes.load(Ordering::Acquire)
    }

    fn can_discard(&self) -> bool {
        self.can_discard
    }

    fn read(&self, mut target: Cursor<'_>, mut offset: u64) -> io::Result<()> {
        let access = self.shared();
        let mut bounce = Vec::new();
        while target.len() > 0 {
            let (mapping, mut len) = access.get_mapping(offset, target.len())?;
            match mapping {
                Mapping::Raw { storage, offset, .. } => {
                    let mut piece = target.prefix(len);
                    let got = storage.read_available(piece.clone(), offset)?;
                    // A file may end within its last cluster; the rest of that is zero.
                    piece.skip(got);
                    piece.fill_zero()?;
                }
                Mapping::Zero { .. } => target.prefix(len).fill_zero()?,
                Mapping::Eof { .. } => return Err(io::ErrorKind::UnexpectedEof.into()),
                _ => {
                    len = len.min(BOUNCE_BYTES);
                    bounce.resize(len as usize, 0);
                    access.read(&mut bounce[..], offset)?;
                    target.prefix(len).write_all(&bounce)?;
                }
            }
            if len == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            target.skip(len);
            offset += len;
        }
        Ok(())
    }

    fn read_to(&self, data: &mut [u8], offset: u64) -> io::Result<()> {
        self.shared().read(data, offset)
    }

    fn write(&self, mut source: Cursor<'_>, mut offset: u64) -> io::Result<()> {
        let access = self.shared();
        while source.len() > 0 {
            let mapping = access.prepare_data_mapping(offset, source.len(), true)?;
            let len = mapping.length();
            mapping.storage().write_all(source.prefix(len), mapping.offset())?;
            access.commit_data_mapping(mapping)?;
            source.skip(len);
            offset += len;
        }
        Ok(())
    }

    fn write_back(&self) -> io::Result<()> {
        self.shared().flush()
    }

    fn sync(&self) -> io::Result<()> {
        self.shared().sync()
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let (start, len) = self.whole_clusters(offset, len);
        if len == 0 { Ok(()) } else { self.alone().discard_to_any(start, len) }
    }

    /// The whole clusters become zero by their metadata; the edges are written. (imago would do the
    /// edges, too, but its arithmetic overflows in a cluster that is larger than the disk.)
    fn write_zeroes(&self, offset: u64, len: u64, may_unmap: bool) -> io::Result<()> {
        let mut access = self.alone();
        let (start, whole) = self.whole_clusters(offset, len);
        if whole == 0 {
            return write_plain_zeroes(&access, offset, len);
        }
        match may_unmap {
            true => access.discard_to_zero(start, whole)?,
            false => access.write_zeroes(start, whole)?,
        }
        write_plain_zeroes(&access, offset, start - offset)?;
        write_plain_zeroes(&access, start + whole, offset + len - start - whole)
    }

    fn grow(&self, capacity_bytes: u64) -> io::Result<()> {
        // What the backing file has beyond the old end must not show through.
        let access = self.alone();
        let mode = match self.backing_bytes > access.size() {
            true => PreallocateMode::Zero,
            false => PreallocateMode::None,
        };
        access.resize_grow(capacity_bytes, mode)?;
        access.flush()?;
        access.sync()?;
        self.capacity_bytes.store(access.size() / SECTOR_BYTES * SECTOR_BYTES, Ordering::Release);
        Ok(())
    }

    fn plain_file(&self) -> Option<&HostFile> {
        None
    }
}
