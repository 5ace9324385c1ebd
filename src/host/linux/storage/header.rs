//! What an image file's first bytes say, read without trusting them.
//!
//! Only the qcow2 header is parsed, at most [`HEADER_BYTES_MAX`] bytes of it, with no allocation
//! larger than a backing file's name. The format is never guessed beyond qcow2's magic: what that
//! is good for is to refuse a file that isn't what its manifest declares.

use std::os::fd::AsFd;
use std::path::PathBuf;

use rustix::io::Errno;

use crate::host::snapshot::ImageHeader;
use crate::vmm::config::DiskFormat;

/// Most bytes that are read of any header.
pub const HEADER_BYTES_MAX: usize = 64 << 10;
/// What nearly every header fits into.
const FIRST_READ_BYTES: usize = 4 << 10;

const MAGIC: &[u8; 4] = b"QFI\xfb";
const V2_HEADER_BYTES: usize = 72;
const V3_HEADER_BYTES: usize = 104;
/// The format's own limit.
const BACKING_NAME_BYTES_MAX: u64 = 1023;
/// QEMU's limits: without them, opening a hostile image would take gigabytes of memory.
const L1_BYTES_MAX: u64 = 32 << 20;
const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
const SNAPSHOTS_MAX: u32 = 65536;

const EXTENSION_END: u32 = 0;
const EXTENSION_DATA_FILE: u32 = 0x4441_5441;

const INCOMPATIBLE_DIRTY: u64 = 1 << 0;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;
const INCOMPATIBLE_COMPRESSION: u64 = 1 << 3;
const INCOMPATIBLE_EXTENDED_L2: u64 = 1 << 4;
const INCOMPATIBLE_KNOWN: u64 = (1 << 5) - 1;

/// The header of an open regular file of `file_bytes`.
pub fn of_file(file: impl AsFd, file_bytes: u64) -> Result<ImageHeader, Errno> {
    let mut first = [0; FIRST_READ_BYTES];
    let read = read_at_most(&file, &mut first)?;
    match parse(&first[..read], file_bytes) {
        Some(header) => Ok(header),
        None => {
            let mut all = vec![0; HEADER_BYTES_MAX];
            let read = read_at_most(&file, &mut all)?;
            let cut_off = || broken("its header goes on beyond the first 64 KiB".to_owned(), 0);
            Ok(parse(&all[..read], file_bytes).unwrap_or_else(cut_off))
        }
    }
}

fn read_at_most(file: impl AsFd, buffer: &mut [u8]) -> Result<usize, Errno> {
    let mut done = 0;
    while done < buffer.len() {
        match rustix::io::pread(&file, &mut buffer[done..], done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(done)
}

fn broken(why: String, virtual_size_bytes: u64) -> ImageHeader {
    ImageHeader {
        format: DiskFormat::Qcow2,
        virtual_size_bytes,
        backing: None,
        encrypted: false,
        unusable: Some(why),
    }
}

/// Big-endian fields at fixed places; a header's length is checked before they are taken.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn u32(&self, at: usize) -> Option<u32> {
        Some(u32::from_be_bytes(self.0.get(at..at.checked_add(4)?)?.try_into().ok()?))
    }
    fn u64(&self, at: usize) -> Option<u64> {
        Some(u64::from_be_bytes(self.0.get(at..at.checked_add(8)?)?.try_into().ok()?))
    }
}

/// Parses the first bytes of a file of `file_bytes`. `None`: more of the file is needed (`prefix`
/// is shorter than the file and than the header).
pub fn parse(prefix: &[u8], file_bytes: u64) -> Option<ImageHeader> {
    if !prefix.starts_with(MAGIC) {
        return Some(ImageHeader {
            format: DiskFormat::Raw,
            virtual_size_bytes: file_bytes,
            backing: None,
            encrypted: false,
            unusable: None,
        });
    }
    let whole = prefix.len() as u64 >= file_bytes;
    let fields = Fields(prefix);
    if prefix.len() < V2_HEADER_BYTES {
        return whole.then(|| broken("its qcow2 header is cut off".to_owned(), 0));
    }
    let mut header = broken(String::new(), fields.u64(24)?);
    header.encrypted = fields.u32(32)? != 0;
    let fixed = match FixedPart::read(&fields, file_bytes) {
        Ok(fixed) => fixed,
        Err(why) => return Some(ImageHeader { unusable: Some(why), ..header }),
    };

    let mut reasons = Vec::new();
    match extensions(prefix, &fixed) {
        Ok(extensions) => reasons.extend(incompatible(fixed.incompatible, extensions.data_file.as_deref())),
        Err(Stop::Malformed(why)) => reasons.push(why),
        Err(Stop::CutOff) if !whole => return None,
        Err(Stop::CutOff) => reasons.push("its header extensions are cut off".to_owned()),
    }
    match backing_name(prefix, &fields, &fixed) {
        Ok(backing) => header.backing = backing,
        Err(Stop::Malformed(why)) => reasons.push(why),
        Err(Stop::CutOff) if !whole => return None,
        Err(Stop::CutOff) => reasons.push("the name of its backing file is cut off".to_owned()),
    }
    header.unusable = (!reasons.is_empty()).then(|| reasons.join("; "));
    Some(header)
}

enum Stop {
    Malformed(String),
    CutOff,
}

/// The fields whose values other reads lean on.
struct FixedPart {
    cluster_bytes: u64,
    incompatible: u64,
    header_bytes: usize,
}

impl FixedPart {
    fn read(fields: &Fields<'_>, file_bytes: u64) -> Result<Self, String> {
        let cut_off = || "its qcow2 header is cut off".to_owned();
        let u32_at = |at| fields.u32(at).ok_or_else(cut_off);
        let u64_at = |at| fields.u64(at).ok_or_else(cut_off);

        let version = u32_at(4)?;
        let cluster_bits = u32_at(20)?;
        if !(9..=21).contains(&cluster_bits) {
            return Err(format!("its cluster size is 2^{cluster_bits} bytes, and 2^9 to 2^21 are allowed"));
        }
        let cluster_bytes = 1u64 << cluster_bits;
        let (incompatible, header_bytes) = match version {
            2 => (0, V2_HEADER_BYTES),
            3 => {
                let header_bytes = u32_at(100)?;
                let refcount_order = u32_at(96)?;
                if refcount_order > 6 {
                    return Err(format!(
                        "its refcounts have 2^{refcount_order} bits, and at most 2^6 are allowed"
                    ));
                }
                let longest = cluster_bytes.min(HEADER_BYTES_MAX as u64);
                if u64::from(header_bytes) > longest || (header_bytes as usize) < V3_HEADER_BYTES {
                    return Err(format!("its header claims to be {header_bytes} bytes long"));
                }
                (u64_at(72)?, header_bytes as usize)
            }
            _ => return Err(format!("it has qcow2 version {version}, and 2 and 3 are known")),
        };
        let fixed = Self { cluster_bytes, incompatible, header_bytes };
        fixed.check_tables(fields, file_bytes).ok_or_else(cut_off)??;
        Ok(fixed)
    }

    /// Whether the tables are of a bearable size and inside of the file. `None`: cut off.
    fn check_tables(&self, fields: &Fields<'_>, file_bytes: u64) -> Option<Result<(), String>> {
        let virtual_bytes = fields.u64(24)?;
        let (l1_entries, l1_offset) = (u64::from(fields.u32(36)?), fields.u64(40)?);
        let (refcount_offset, refcount_clusters) = (fields.u64(48)?, u64::from(fields.u32(56)?));
        let snapshots = fields.u32(60)?;
        let refuse = |why: String| Some(Err(why));

        if virtual_bytes > i64::MAX as u64 {
            return refuse(format!("its size, {virtual_bytes} bytes, is beyond what Linux can address"));
        }
        if l1_entries * 8 > L1_BYTES_MAX {
            return refuse(format!("its L1 table has {l1_entries} entries (at most {})", L1_BYTES_MAX / 8));
        }
        // An L1 entry covers one L2 table of 8-byte entries (16 bytes with extended L2, which is
        // refused elsewhere), each a cluster.
        let covered =
            u128::from(l1_entries) * u128::from(self.cluster_bytes / 8) * u128::from(self.cluster_bytes);
        if covered < u128::from(virtual_bytes) && self.incompatible & INCOMPATIBLE_EXTENDED_L2 == 0 {
            return refuse(format!("its L1 table is too small for its size, {virtual_bytes} bytes"));
        }
        if refcount_clusters * self.cluster_bytes > REFCOUNT_TABLE_BYTES_MAX.max(self.cluster_bytes) {
            return refuse(format!("its refcount table has {refcount_clusters} clusters, which is too many"));
        }
        if snapshots > SNAPSHOTS_MAX {
            return refuse(format!("it claims {snapshots} internal snapshots"));
        }
        let tables = [("L1", l1_entries, l1_offset), ("refcount", refcount_clusters, refcount_offset)];
        for (name, entries, offset) in tables {
            if entries != 0 && offset % self.cluster_bytes != 0 {
                return refuse(format!("its {name} table isn't aligned to a cluster"));
            }
            if entries != 0 && offset >= file_bytes {
                return refuse(format!("its {name} table lies beyond the file's end (the file is cut off)"));
            }
        }
        Some(Ok(()))
    }
}

#[derive(Default)]
struct Extensions {
    data_file: Option<String>,
}

/// Walks the header extensions. Ends after at most one step per 8 bytes.
fn extensions(prefix: &[u8], fixed: &FixedPart) -> Result<Extensions, Stop> {
    let fields = Fields(prefix);
    let mut found = Extensions::default();
    let mut at = fixed.header_bytes;
    loop {
        // A version 2 image may have no extensions, and then its backing file's name comes at once.
        let (Some(kind), Some(length)) = (fields.u32(at), fields.u32(at + 4)) else {
            return Err(Stop::CutOff);
        };
        if kind == EXTENSION_END {
            return Ok(found);
        }
        let (data, length) = (at + 8, length as usize);
        if length as u64 > fixed.cluster_bytes || (data + length) as u64 > fixed.cluster_bytes {
            return Err(Stop::Malformed("a header extension reaches beyond the first cluster".to_owned()));
        }
        let Some(bytes) = prefix.get(data..data + length) else { return Err(Stop::CutOff) };
        if kind == EXTENSION_DATA_FILE {
            found.data_file = Some(printable(bytes));
        }
        at = data + length.next_multiple_of(8);
    }
}

fn incompatible(bits: u64, data_file: Option<&str>) -> Option<String> {
    let mut reasons = Vec::new();
    if bits & INCOMPATIBLE_DIRTY != 0 {
        reasons.push(
            "its dirty bit is set (it was not closed cleanly; `qemu-img check -r all` repairs it)".to_owned(),
        );
    }
    if bits & INCOMPATIBLE_CORRUPT != 0 {
        reasons.push("its corrupt bit is set (`qemu-img check -r all` may repair it)".to_owned());
    }
    if bits & INCOMPATIBLE_DATA_FILE != 0 {
        let name = data_file.map(|name| format!(", `{name}`")).unwrap_or_default();
        reasons.push(format!("its data is in another file{name} (external data file)"));
    }
    if bits & INCOMPATIBLE_COMPRESSION != 0 {
        reasons.push("its clusters are compressed by another method than zlib".to_owned());
    }
    if bits & INCOMPATIBLE_EXTENDED_L2 != 0 {
        reasons.push("it has extended L2 entries (subclusters)".to_owned());
    }
    if bits & !INCOMPATIBLE_KNOWN != 0 {
        reasons.push(format!("it needs features that are unknown here ({:#x})", bits & !INCOMPATIBLE_KNOWN));
    }
    (!reasons.is_empty()).then(|| reasons.join("; "))
}

fn backing_name(prefix: &[u8], fields: &Fields<'_>, fixed: &FixedPart) -> Result<Option<PathBuf>, Stop> {
    let (Some(offset), Some(length)) = (fields.u64(8), fields.u32(16)) else { return Err(Stop::CutOff) };
    let length = u64::from(length);
    if offset == 0 {
        return Ok(None);
    }
    if length == 0 || length > BACKING_NAME_BYTES_MAX {
        return Err(Stop::Malformed(format!("the name of its backing file is {length} bytes long")));
    }
    if offset < fixed.header_bytes as u64 || offset > fixed.cluster_bytes - length.min(fixed.cluster_bytes) {
        return Err(Stop::Malformed(
            "the name of its backing file is outside of the first cluster".to_owned(),
        ));
    }
    let (from, to) = (offset as usize, (offset + length) as usize);
    let Some(bytes) = prefix.get(from..to) else { return Err(Stop::CutOff) };
    match std::str::from_utf8(bytes) {
        Ok(name) if !name.chars().any(char::is_control) => Ok(Some(PathBuf::from(name))),
        // Shown to people and kept as text: a name that is neither can't be declared either.
        _ => Err(Stop::Malformed(format!(
            "the name of its backing file holds control characters or isn't UTF-8: `{}`",
            printable(bytes)
        ))),
    }
}

fn printable(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(BACKING_NAME_BYTES_MAX as usize)])
        .chars()
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A version 3 header of 1 GiB as `qemu-img create` writes it, with a backing file.
    fn sample() -> Vec<u8> {
        let mut bytes = vec![0; 512];
        bytes[..4].copy_from_slice(MAGIC);
        let mut put = |at: usize, value: u64, width: usize| {
            bytes[at..at + width].copy_from_slice(&value.to_be_bytes()[8 - width..]);
        };
        put(4, 3, 4);
        put(8, 256, 8);
        put(16, 9, 4);
        put(20, 16, 4);
        put(24, 1 << 30, 8);
        put(36, 2, 4);
        put(40, 0x30000, 8);
        put(48, 0x10000, 8);
        put(56, 1, 4);
        put(96, 4, 4);
        put(100, 112, 4);
        bytes[256..265].copy_from_slice(b"/base.img");
        bytes
    }

    const FILE_BYTES: u64 = 0x40000;

    fn with(change: impl FnOnce(&mut Vec<u8>)) -> ImageHeader {
        let mut bytes = sample();
        change(&mut bytes);
        parse(&bytes, FILE_BYTES).expect("512 bytes suffice")
    }

    #[test]
    fn a_plain_header_is_read() {
        let header = with(|_| {});
        assert_eq!(header.format, DiskFormat::Qcow2);
        assert_eq!(header.virtual_size_bytes, 1 << 30);
        assert_eq!(header.backing.as_deref(), Some(std::path::Path::new("/base.img")));
        assert_eq!((header.encrypted, header.unusable), (false, None));
    }

    #[test]
    fn what_is_not_qcow2_is_raw() {
        for bytes in [&b""[..], b"QFI", b"KDMV...."] {
            let header = parse(bytes, 7).expect("raw needs no more bytes");
            assert_eq!((header.format, header.virtual_size_bytes), (DiskFormat::Raw, 7));
        }
    }

    #[test]
    fn each_fault_has_its_reason() {
        let set = |at: usize, value: &'static [u8]| {
            with(|bytes| bytes[at..at + value.len()].copy_from_slice(value)).unusable.unwrap_or_default()
        };
        for (at, value, reason) in [
            (4, &[0, 0, 0, 4][..], "version 4"),
            (20, &[0, 0, 0, 40], "cluster size"),
            (24, &[0xff; 8], "beyond what Linux can address"),
            (24, &[0, 0xff], "L1 table is too small"),
            (36, &[0xff; 4], "L1 table has 4294967295 entries"),
            (40, &[0, 0, 0, 0, 0xff], "L1 table lies beyond"),
            (47, &[1], "L1 table isn't aligned"),
            (56, &[0xff; 4], "refcount table has"),
            (60, &[0xff; 4], "internal snapshots"),
            (79, &[1], "dirty bit"),
            (79, &[2], "corrupt bit"),
            (79, &[4], "external data file"),
            (79, &[8], "another method than zlib"),
            (79, &[16], "extended L2"),
            (72, &[0x80], "0x8000000000000000"),
            (96, &[0, 0, 0, 7], "refcounts have"),
            (100, &[0, 0, 0, 80], "80 bytes long"),
            (100, &[0xff; 4], "4294967295 bytes long"),
            (16, &[0, 0, 8, 0], "2048 bytes long"),
            (8, &[0xff; 8], "outside of the first cluster"),
            (256, &[0xff], "isn't UTF-8"),
            (256, b"\x1b", "control characters"),
            (112, &[0, 0, 0, 9, 0xff, 0xff, 0xff, 0xff], "header extension reaches beyond"),
        ] {
            let why = set(at, value);
            assert!(why.contains(reason), "byte {at}: {why:?} should hold {reason:?}");
        }
        assert!(with(|bytes| bytes[35] = 2).encrypted);
        assert_eq!(
            parse(&sample()[..60], 60).and_then(|header| header.unusable).as_deref(),
            Some("its qcow2 header is cut off")
        );
    }

    #[test]
    fn a_longer_header_asks_for_more() {
        assert_eq!(parse(&sample()[..200], FILE_BYTES), None);
        assert!(parse(&sample()[..200], 200).is_some());
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

        /// No bytes make it panic, and no text that it keeps is longer than the format allows.
        #[test]
        fn mutated_headers_are_survived(
            edits in proptest::collection::vec((0usize..512, any::<u8>()), 0..24),
            length in 0usize..=512,
            file_bytes in prop_oneof![0u64..600, Just(FILE_BYTES), any::<u64>()],
        ) {
            let mut bytes = sample();
            edits.iter().for_each(|&(at, value)| bytes[at] = value);
            if let Some(header) = parse(&bytes[..length], file_bytes) {
                let texts = [header.unusable.unwrap_or_default(),
                    header.backing.map(|path| path.display().to_string()).unwrap_or_default()];
                prop_assert!(texts.iter().all(|text| text.len() <= 8192));
            }
        }

        #[test]
        fn any_bytes_after_the_magic_are_survived(
            tail in proptest::collection::vec(any::<u8>(), 0..2048),
            file_bytes in any::<u64>(),
        ) {
            let bytes = [&MAGIC[..], &tail].concat();
            parse(&bytes, file_bytes);
        }
    }
}
