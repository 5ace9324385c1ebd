//! VMware's sparse disks, read without trusting them: `monolithicSparse` and `streamOptimized`, which is what
//! OVAs hold. Nothing is ever opened that a descriptor names: a disk is the one file that it is in.
//!
//! A file costs what it holds, not what it claims: tables are read piece by piece, and one that has more
//! tables or grains than the file has room for is refused, so neither memory nor time nor the output of a
//! small file can grow without bound.

use std::fs::File;
use std::io;

use flate2::{Decompress, FlushDecompress, Status};

use super::copy;

const SECTOR_BYTES: u64 = 512;
const MAGIC: &[u8; 4] = b"KDMV";
/// Of ESX's own sparse extents, which always belong to a descriptor in another file.
const ESX_MAGIC: &[u8; 4] = b"COWD";
const DESCRIPTOR_BEGIN: &[u8] = b"# Disk DescriptorFile";
/// In place of the grain directory: it stands at the end, behind a second header.
const DIRECTORY_AT_END: u64 = u64::MAX;
const FOOTER_FROM_END_BYTES: u64 = 1024;
const TABLE_ENTRIES: u64 = 512;
const TABLE_BYTES: u64 = TABLE_ENTRIES * 4;
const CAPACITY_BYTES_MAX: u64 = 64 << 40;
const GRAIN_BYTES: std::ops::RangeInclusive<u64> = (4 << 10)..=(2 << 20);
const DESCRIPTOR_BYTES_MAX: u64 = 64 << 10;
const DIRECTORY_PIECE_BYTES: u64 = 16 << 10;
const GRAIN_MARKER_BYTES: u64 = 12;

const FLAG_NEWLINES: u32 = 1 << 0;
const FLAG_ZERO_GRAINS: u32 = 1 << 2;
const FLAG_COMPRESSED: u32 = 1 << 16;
const FLAGS_KNOWN: u32 = 0b111 | FLAG_COMPRESSED | 1 << 17;

/// A part of a file: a disk may lie in the middle of an archive.
#[derive(Clone, Copy, Debug)]
pub struct Window<'a> {
    pub file: &'a File,
    pub start: u64,
    pub bytes: u64,
}

impl Window<'_> {
    pub fn read(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        match at.checked_add(buffer.len() as u64) {
            Some(end) if end <= self.bytes => Ok(copy::read_exact(self.file, buffer, self.start + at)?),
            _ => Err(malformed("it is cut off, or points beyond its end")),
        }
    }
}

fn malformed(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why.into())
}

/// Whether a file begins as one of VMware's.
pub fn is_vmdk(prefix: &[u8]) -> bool {
    prefix.starts_with(MAGIC) || prefix.starts_with(ESX_MAGIC) || prefix.starts_with(DESCRIPTOR_BEGIN)
}

/// A disk whose every table is still to be read.
#[derive(Debug)]
pub struct Vmdk<'a> {
    window: Window<'a>,
    header: Header,
}

#[derive(Clone, Copy, Debug)]
struct Header {
    flags: u32,
    capacity_bytes: u64,
    grain_bytes: u64,
    descriptor: (u64, u64),
    /// In bytes, or [`DIRECTORY_AT_END`].
    directory: u64,
}

impl Header {
    fn parse(bytes: &[u8; 512]) -> io::Result<Self> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|i| bytes[at + i]));
        let u64_at = |at: usize| u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|i| bytes[at + i]));
        if &bytes[..4] != MAGIC {
            return Err(malformed("it has no header of a sparse vmdk"));
        }
        let (version, flags) = (u32_at(4), u32_at(8));
        if !(1..=3).contains(&version) {
            return Err(malformed(format!("it has vmdk version {version}, and 1 to 3 are known")));
        }
        if flags & !FLAGS_KNOWN != 0 {
            let unknown = flags & !FLAGS_KNOWN;
            return Err(malformed(format!("it needs features that are unknown here ({unknown:#x})")));
        }
        if flags & FLAG_NEWLINES != 0 && &bytes[73..77] != b"\n \r\n" {
            return Err(malformed("its line ends were changed: it was copied as text"));
        }
        if bytes[72] != 0 {
            return Err(malformed("it was not closed cleanly (or is in use)"));
        }
        let method = u16_at(77);
        if (flags & FLAG_COMPRESSED != 0) != (method == 1) || method > 1 {
            return Err(malformed(format!("its grains are compressed by an unknown method ({method})")));
        }
        let sectors = |at: usize, what: &str| {
            let bytes = u64_at(at).checked_mul(SECTOR_BYTES);
            bytes.ok_or_else(|| malformed(format!("its {what} is beyond all bounds")))
        };
        let (capacity_bytes, grain_bytes) = (sectors(12, "capacity")?, sectors(20, "grain size")?);
        if capacity_bytes == 0 || capacity_bytes > CAPACITY_BYTES_MAX {
            return Err(malformed(format!("its capacity is {capacity_bytes} bytes (1 sector to 64 TiB)")));
        }
        if !GRAIN_BYTES.contains(&grain_bytes) || !grain_bytes.is_power_of_two() {
            return Err(malformed(format!("its grains have {grain_bytes} bytes (4 KiB to 2 MiB)")));
        }
        let entries = u32_at(44);
        if u64::from(entries) != TABLE_ENTRIES {
            return Err(malformed(format!("its grain tables have {entries} entries, and 512 are usual")));
        }
        let directory = match u64_at(56) {
            DIRECTORY_AT_END => DIRECTORY_AT_END,
            _ => sectors(56, "grain directory")?,
        };
        let descriptor = (sectors(28, "descriptor")?, sectors(36, "descriptor")?);
        Ok(Self { flags, capacity_bytes, grain_bytes, descriptor, directory })
    }

    fn same_disk(&self, other: &Self) -> bool {
        (self.capacity_bytes, self.grain_bytes, self.flags & FLAG_COMPRESSED)
            == (other.capacity_bytes, other.grain_bytes, other.flags & FLAG_COMPRESSED)
    }
}

impl<'a> Vmdk<'a> {
    /// Reads header and descriptor. An error says why the disk can't be imported.
    pub fn open(window: Window<'a>) -> io::Result<Self> {
        let mut first = [0; 512];
        let known = window.bytes.min(512) as usize;
        window.read(&mut first[..known], 0)?;
        if first.starts_with(ESX_MAGIC) {
            return Err(malformed("it is an extent of a VMware ESX disk, whose descriptor is another file"));
        }
        if first.starts_with(DESCRIPTOR_BEGIN) {
            return Err(Self::explain_descriptor(window));
        }
        if known < 512 {
            return Err(malformed("it is cut off"));
        }
        let mut header = Header::parse(&first)?;
        if header.directory == DIRECTORY_AT_END {
            let mut footer = [0; 512];
            let at = window.bytes.checked_sub(FOOTER_FROM_END_BYTES);
            window.read(&mut footer, at.ok_or_else(|| malformed("it is cut off"))?)?;
            let last = Header::parse(&footer)
                .map_err(|error| malformed(format!("its end is not a footer (is it cut off?): {error}")))?;
            if !last.same_disk(&header) || last.directory == DIRECTORY_AT_END {
                return Err(malformed("its footer is that of another disk"));
            }
            header.directory = last.directory;
        }
        if header.descriptor.0 == 0 {
            return Err(malformed("it is one extent of a disk whose descriptor is another file"));
        }
        let text = read_descriptor(&window, header.descriptor)?;
        check_descriptor(&text, header.capacity_bytes)?;
        Ok(Self { window, header })
    }

    /// A descriptor alone: its data is in files that it names, which are never opened.
    fn explain_descriptor(window: Window<'_>) -> io::Error {
        let text = match read_descriptor(&window, (0, window.bytes)) {
            Ok(text) => text,
            Err(error) => return error,
        };
        let kind = field(&text, "createType").unwrap_or_default();
        malformed(format!(
            "it is a descriptor alone ({kind}), whose data is in other files that its digest doesn't cover; the \
             data of a flat disk is a raw image: declare `…-flat.vmdk` itself, with `format: raw`"
        ))
    }

    pub fn capacity_bytes(&self) -> u64 {
        self.header.capacity_bytes
    }

    /// Calls `write` with each grain that is stored, and where it belongs; all else is zeroes.
    pub fn each_grain(&self, mut write: impl FnMut(&[u8], u64) -> io::Result<()>) -> io::Result<()> {
        let Header { capacity_bytes, grain_bytes, directory, .. } = self.header;
        let covered = grain_bytes * TABLE_ENTRIES;
        let entries = capacity_bytes.div_ceil(covered);
        let mut grains = Grains::new(self);
        let tables_max = self.window.bytes / TABLE_BYTES;
        let (mut tables, mut index) = (0, 0);
        let mut piece = vec![0; DIRECTORY_PIECE_BYTES as usize];
        let mut table = [0; TABLE_BYTES as usize];
        while index < entries {
            let count = (entries - index).min(DIRECTORY_PIECE_BYTES / 4);
            let piece = &mut piece[..(count * 4) as usize];
            let at = directory.checked_add(index * 4).ok_or_else(|| malformed("its directory is far off"))?;
            self.window.read(piece, at)?;
            for (number, entry) in (index..).zip(piece.chunks_exact(4)) {
                let entry = entry_at(entry);
                if entry == 0 {
                    continue;
                }
                tables += 1;
                if tables > tables_max {
                    return Err(malformed("it has more grain tables than it has room for"));
                }
                self.window.read(&mut table, entry * SECTOR_BYTES)?;
                for (place, entry) in (0..).zip(table.chunks_exact(4)) {
                    grains.one(entry_at(entry), number * covered + place * grain_bytes, &mut write)?;
                }
            }
            index += count;
        }
        Ok(())
    }
}

fn entry_at(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte))
}

/// Reads grains one after the other, in one buffer.
struct Grains<'a> {
    disk: &'a Vmdk<'a>,
    count: u64,
    count_max: u64,
    grain: Vec<u8>,
    packed: Vec<u8>,
}

impl<'a> Grains<'a> {
    fn new(disk: &'a Vmdk<'a>) -> Self {
        let compressed = disk.header.flags & FLAG_COMPRESSED != 0;
        // Each grain is somewhere in the file: a compressed one takes a sector at least.
        let least = if compressed { SECTOR_BYTES } else { disk.header.grain_bytes };
        let count_max = disk.window.bytes / least + 1;
        let grain = vec![0; disk.header.grain_bytes as usize];
        Self { disk, count: 0, count_max, grain, packed: Vec::new() }
    }

    fn one(
        &mut self,
        entry: u64,
        at: u64,
        write: &mut impl FnMut(&[u8], u64) -> io::Result<()>,
    ) -> io::Result<()> {
        let Header { flags, capacity_bytes, .. } = self.disk.header;
        if entry == 0 || (entry == 1 && flags & FLAG_ZERO_GRAINS != 0) {
            return Ok(());
        }
        self.count += 1;
        if self.count > self.count_max {
            return Err(malformed("it has more grains than it has room for"));
        }
        if at >= capacity_bytes {
            return Err(malformed("it has a grain beyond its end"));
        }
        let wanted = (capacity_bytes - at).min(self.grain.len() as u64) as usize;
        if flags & FLAG_COMPRESSED != 0 {
            self.unpack(entry * SECTOR_BYTES, at, wanted)?;
        } else {
            self.disk.window.read(&mut self.grain[..wanted], entry * SECTOR_BYTES)?;
        }
        write(&self.grain[..wanted], at)
    }

    fn unpack(&mut self, from: u64, at: u64, wanted: usize) -> io::Result<()> {
        let mut marker = [0; GRAIN_MARKER_BYTES as usize];
        self.disk.window.read(&mut marker, from)?;
        let (sector, length) = (entry_at(&marker[..8]), entry_at(&marker[8..]));
        if sector.checked_mul(SECTOR_BYTES) != Some(at) {
            return Err(malformed("a grain says that it belongs elsewhere"));
        }
        // What can't be made smaller grows by a few bytes in each 16 KiB.
        if length == 0 || length > 2 * self.grain.len() as u64 {
            return Err(malformed(format!("a compressed grain has {length} bytes")));
        }
        self.packed.resize(length as usize, 0);
        self.disk.window.read(&mut self.packed, from + GRAIN_MARKER_BYTES)?;
        let mut unpacker = Decompress::new(true);
        match unpacker.decompress(&self.packed, &mut self.grain, FlushDecompress::Finish) {
            Ok(Status::StreamEnd) if unpacker.total_out() >= wanted as u64 => Ok(()),
            _ => Err(malformed("a grain can't be decompressed")),
        }
    }
}

fn read_descriptor(window: &Window<'_>, (at, bytes): (u64, u64)) -> io::Result<String> {
    if bytes == 0 || bytes > DESCRIPTOR_BYTES_MAX {
        return Err(malformed(format!("its descriptor has {bytes} bytes (at most 64 KiB)")));
    }
    let mut text = vec![0; bytes as usize];
    window.read(&mut text, at)?;
    let end = text.iter().position(|byte| *byte == 0).unwrap_or(text.len());
    Ok(String::from_utf8_lossy(&text[..end]).into_owned())
}

/// The value of `name=value`, without quotes, as far as it can be shown to people.
fn field(descriptor: &str, name: &str) -> Option<String> {
    let value = descriptor.lines().find_map(|line| {
        let (key, value) = line.split_once('=')?;
        key.trim().eq_ignore_ascii_case(name).then_some(value)
    })?;
    let value = value.trim().trim_matches('"').chars();
    Some(value.take(200).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect())
}

fn check_descriptor(text: &str, capacity_bytes: u64) -> io::Result<()> {
    let kind = field(text, "createType").ok_or_else(|| malformed("its descriptor has no createType"))?;
    if !["monolithicSparse", "streamOptimized"].iter().any(|known| kind.eq_ignore_ascii_case(known)) {
        return Err(malformed(format!(
            "it is a vmdk of the type `{kind}`; monolithicSparse and streamOptimized are known"
        )));
    }
    if text.lines().any(|line| line.trim_start().to_ascii_lowercase().starts_with("encryption.")) {
        return Err(malformed("it is encrypted; decrypt it first"));
    }
    let parent = field(text, "parentCID").unwrap_or_else(|| "ffffffff".to_owned());
    if !parent.eq_ignore_ascii_case("ffffffff") || field(text, "parentFileNameHint").is_some() {
        let hint = field(text, "parentFileNameHint").unwrap_or(parent);
        return Err(malformed(format!(
            "it is a difference to another disk ({hint}), which nothing declares"
        )));
    }
    let is_extent = |line: &&str| ["RW ", "RDONLY ", "NOACCESS "].iter().any(|word| line.starts_with(word));
    let extents: Vec<&str> = text.lines().map(str::trim).filter(is_extent).collect();
    let [extent] = extents[..] else {
        return Err(malformed(format!("it has {} extents, and one is known", extents.len())));
    };
    let mut words = extent.split_whitespace().skip(1);
    let sectors = words.next().and_then(|word| word.parse::<u64>().ok());
    let kind = words.next().unwrap_or_default();
    if kind != "SPARSE"
        || sectors.and_then(|sectors| sectors.checked_mul(SECTOR_BYTES)) != Some(capacity_bytes)
    {
        return Err(malformed("its extent is not what its header says"));
    }
    Ok(())
}
