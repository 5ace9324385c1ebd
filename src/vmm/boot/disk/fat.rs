//! FAT12, FAT16 and FAT32 with long names, read-only.
//!
//! Our own, and small: the crates that there are write, too, and panic at images that were made to harm.
//! Every chain of clusters is bounded by the volume's number of clusters.

use super::filesystem::{FileReader, NAMES_MAX, Name};
use super::read::{ReadError, Volume, invalid, u16_at, u32_at};

const ENTRY_BYTES: usize = 32;
const ATTRIBUTE_LONG_NAME: u8 = 0x0f;
const ATTRIBUTE_LABEL: u8 = 0x08;
const ATTRIBUTE_DIRECTORY: u8 = 0x10;
/// The specification's bound for directories.
const DIRECTORY_BYTES_MAX: u64 = 2 << 20;
/// A long name has at most 20 entries of 13 characters.
const LONG_NAME_ENTRIES_MAX: u8 = 20;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Width {
    Fat12,
    Fat16,
    Fat32,
}

pub(super) struct Fat {
    volume: Volume,
    width: Width,
    table_start: u64,
    /// Of FAT12 and FAT16 alone.
    root: Place,
    data_start: u64,
    cluster_bytes: u64,
    clusters: u32,
    serial: u32,
    label: String,
}

/// Where a file or directory lies.
#[derive(Clone, Copy)]
enum Place {
    /// The fixed root of FAT12 and FAT16.
    Fixed { start: u64, bytes: u64 },
    /// A chain of clusters; 0 is an empty one.
    Chain { first: u32 },
}

struct Entry {
    name: String,
    short_name: String,
    is_directory: bool,
    bytes: u32,
    first: u32,
}

impl Fat {
    pub fn open_volume(volume: &Volume) -> Result<Self, ReadError> {
        let boot: [u8; 512] = volume.array(0)?;
        let sector_bytes = u64::from(u16_at(&boot, 11));
        let cluster_sectors = u64::from(boot[13]);
        if !matches!(sector_bytes, 512 | 1024 | 2048 | 4096) || !cluster_sectors.is_power_of_two() {
            return invalid("sectors or clusters of an absurd size");
        }
        let either = |short: u16, long: u32| if short != 0 { u64::from(short) } else { u64::from(long) };
        let sectors = either(u16_at(&boot, 19), u32_at(&boot, 32));
        let table_sectors = either(u16_at(&boot, 22), u32_at(&boot, 36));
        let (reserved, tables) = (u64::from(u16_at(&boot, 14)), u64::from(boot[16]));
        let root_bytes = u64::from(u16_at(&boot, 17)) * ENTRY_BYTES as u64;
        // All factors have at most 32 bits, so nothing overflows.
        let table_start = reserved * sector_bytes;
        let root_start = table_start + tables * table_sectors * sector_bytes;
        let data_start = root_start + root_bytes.next_multiple_of(sector_bytes);
        let end = (sectors * sector_bytes).min(volume.size_bytes());
        let cluster_bytes = cluster_sectors * sector_bytes;
        let clusters = end.saturating_sub(data_start) / cluster_bytes;
        if reserved == 0 || tables == 0 || table_sectors == 0 || clusters == 0 || clusters > 0x0fff_fff5 {
            return invalid("a FAT file system that makes no sense");
        }
        // As the kernel tells them apart: some tools make FAT32 smaller than its specification has it.
        let width = match clusters {
            _ if u16_at(&boot, 22) == 0 => Width::Fat32,
            ..4085 => Width::Fat12,
            _ => Width::Fat16,
        };
        let (root, extended) = match width {
            Width::Fat32 => (Place::Chain { first: u32_at(&boot, 44) }, 64),
            _ => (Place::Fixed { start: root_start, bytes: root_bytes }, 36),
        };
        let label = String::from_utf8_lossy(&boot[extended + 7..extended + 18]).trim_end().to_owned();
        Ok(Self {
            volume: volume.clone(),
            width,
            table_start,
            root,
            data_start,
            cluster_bytes,
            clusters: clusters as u32,
            serial: u32_at(&boot, extended + 3),
            label,
        })
    }

    pub fn uuid(&self) -> String {
        format!("{:04X}-{:04X}", self.serial >> 16, self.serial & 0xffff)
    }

    pub fn label(&self) -> String {
        self.label.clone()
    }

    pub fn open(&self, components: &[&str]) -> Result<Box<dyn FileReader>, ReadError> {
        match self.find(components)? {
            Some(entry) if !entry.is_directory => {
                let place = Place::Chain { first: entry.first };
                Ok(Box::new(FatFile { stream: self.stream(place), bytes: entry.bytes.into() }))
            }
            _ => invalid("a directory"),
        }
    }

    pub fn list(&self, components: &[&str]) -> Result<Vec<Name>, ReadError> {
        let place = match self.find(components)? {
            None => self.root,
            Some(entry) if entry.is_directory => Place::Chain { first: entry.first },
            Some(_) => return invalid("no directory"),
        };
        let mut names = Vec::new();
        self.each(place, |entry| {
            names.push(Name { name: entry.name, is_directory: entry.is_directory });
            names.len() < NAMES_MAX
        })?;
        Ok(names)
    }

    /// `None`: the root.
    fn find(&self, components: &[&str]) -> Result<Option<Entry>, ReadError> {
        let mut place = self.root;
        let mut found = None;
        for (depth, name) in components.iter().enumerate() {
            found = None;
            self.each(place, |entry| {
                let is_it = entry.name.eq_ignore_ascii_case(name)
                    || entry.short_name.eq_ignore_ascii_case(name)
                    || entry.name.to_lowercase() == name.to_lowercase();
                if is_it {
                    found = Some(entry);
                }
                found.is_none()
            })?;
            match &found {
                Some(entry) if entry.is_directory => place = Place::Chain { first: entry.first },
                Some(_) if depth + 1 == components.len() => {}
                _ => return Err(ReadError::NotFound),
            }
        }
        Ok(found)
    }

    /// Calls `visit` with each entry of a directory until it returns false.
    fn each(&self, place: Place, mut visit: impl FnMut(Entry) -> bool) -> Result<(), ReadError> {
        let mut stream = self.stream(place);
        let mut long = LongName::default();
        for _ in 0..DIRECTORY_BYTES_MAX / ENTRY_BYTES as u64 {
            let mut entry = [0; ENTRY_BYTES];
            if stream.read_full(&mut entry)? < ENTRY_BYTES || entry[0] == 0 {
                break;
            }
            if entry[0] == 0xe5 {
                long = LongName::default();
            } else if entry[11] & 0x3f == ATTRIBUTE_LONG_NAME {
                long.add(&entry);
            } else {
                let name = std::mem::take(&mut long);
                if entry[11] & ATTRIBUTE_LABEL != 0 || entry[0] == b'.' {
                    continue;
                }
                let short_name = short_name(&entry);
                let name = name.finish(&entry).unwrap_or_else(|| short_name.clone());
                let first = u32::from(u16_at(&entry, 20)) << 16 | u32::from(u16_at(&entry, 26));
                let wanted_on = visit(Entry {
                    name,
                    short_name,
                    is_directory: entry[11] & ATTRIBUTE_DIRECTORY != 0,
                    bytes: u32_at(&entry, 28),
                    first: if self.width == Width::Fat32 { first } else { first & 0xffff },
                });
                if !wanted_on {
                    break;
                }
            }
        }
        Ok(())
    }

    fn stream(&self, place: Place) -> Stream {
        Stream {
            volume: self.volume.clone(),
            width: self.width,
            table_start: self.table_start,
            data_start: self.data_start,
            cluster_bytes: self.cluster_bytes,
            clusters: self.clusters,
            place,
            cluster: match place {
                Place::Fixed { .. } => 0,
                Place::Chain { first } => first,
            },
            within: 0,
            followed: 0,
        }
    }
}

/// A chain of clusters as a stream of bytes.
struct Stream {
    volume: Volume,
    width: Width,
    table_start: u64,
    data_start: u64,
    cluster_bytes: u64,
    clusters: u32,
    place: Place,
    cluster: u32,
    /// The position in the cluster, or in the fixed root.
    within: u64,
    /// Links of the chain so far: a chain that bites its tail ends, too.
    followed: u32,
}

impl Stream {
    fn is_data(&self, cluster: u32) -> bool {
        cluster >= 2 && cluster - 2 < self.clusters
    }

    /// The next bytes, as many as lie together; 0 at the end.
    fn read(&mut self, data: &mut [u8]) -> Result<usize, ReadError> {
        let (start, left) = match self.place {
            Place::Fixed { start, bytes } => (start + self.within, bytes - self.within),
            Place::Chain { .. } => {
                if self.within == self.cluster_bytes && self.is_data(self.cluster) {
                    self.cluster = self.next()?;
                    self.within = 0;
                }
                if !self.is_data(self.cluster) {
                    return Ok(0);
                }
                let start = self.data_start + u64::from(self.cluster - 2) * self.cluster_bytes;
                (start + self.within, self.cluster_bytes - self.within)
            }
        };
        let len = left.min(data.len() as u64) as usize;
        self.volume.read(start, &mut data[..len])?;
        self.within += len as u64;
        Ok(len)
    }

    fn read_full(&mut self, data: &mut [u8]) -> Result<usize, ReadError> {
        let mut filled = 0;
        while filled < data.len() {
            match self.read(&mut data[filled..])? {
                0 => break,
                len => filled += len,
            }
        }
        Ok(filled)
    }

    fn next(&mut self) -> Result<u32, ReadError> {
        self.followed += 1;
        if self.followed > self.clusters {
            return invalid("a chain of clusters without an end");
        }
        let cluster = u64::from(self.cluster);
        Ok(match self.width {
            Width::Fat12 => {
                let pair = u16::from_le_bytes(self.volume.array(self.table_start + cluster * 3 / 2)?);
                u32::from(if cluster % 2 == 0 { pair & 0xfff } else { pair >> 4 })
            }
            Width::Fat16 => u16::from_le_bytes(self.volume.array(self.table_start + cluster * 2)?).into(),
            Width::Fat32 => {
                u32::from_le_bytes(self.volume.array(self.table_start + cluster * 4)?) & 0x0fff_ffff
            }
        })
    }

    fn rewind(&mut self) {
        (self.within, self.followed) = (0, 0);
        if let Place::Chain { first } = self.place {
            self.cluster = first;
        }
    }
}

struct FatFile {
    stream: Stream,
    bytes: u64,
}

impl FatFile {
    fn position(&self) -> u64 {
        u64::from(self.stream.followed) * self.stream.cluster_bytes + self.stream.within
    }
}

impl FileReader for FatFile {
    fn size_bytes(&self) -> u64 {
        self.bytes
    }

    fn read(&mut self, data: &mut [u8]) -> Result<usize, ReadError> {
        let left = self.bytes.saturating_sub(self.position());
        let len = left.min(data.len() as u64) as usize;
        self.stream.read(&mut data[..len])
    }

    fn seek(&mut self, offset: u64) -> Result<(), ReadError> {
        self.stream.rewind();
        let mut left = offset.min(self.bytes);
        while left > self.stream.cluster_bytes && self.stream.is_data(self.stream.cluster) {
            self.stream.cluster = self.stream.next()?;
            left -= self.stream.cluster_bytes;
        }
        self.stream.within = left.min(self.stream.cluster_bytes);
        Ok(())
    }
}

fn short_name(entry: &[u8; ENTRY_BYTES]) -> String {
    // Flags of Windows NT: the base and the extension, each in small letters.
    let part = |bytes: &[u8], small: bool| {
        let text: String =
            bytes.iter().map(|&byte| if byte < 0x80 { byte as char } else { '\u{fffd}' }).collect();
        let text = text.trim_end().to_owned();
        if small { text.to_ascii_lowercase() } else { text }
    };
    let base = part(&entry[..8], entry[12] & 0x08 != 0);
    let extension = part(&entry[8..11], entry[12] & 0x10 != 0);
    if extension.is_empty() { base } else { format!("{base}.{extension}") }
}

/// The entries of a long name come before its short one, the last part first.
#[derive(Default)]
struct LongName {
    /// The last part came first, so the parts are put in front of one another.
    units: Vec<u16>,
    next: u8,
    checksum: u8,
}

impl LongName {
    fn add(&mut self, entry: &[u8; ENTRY_BYTES]) {
        let number = entry[0] & 0x3f;
        if entry[0] & 0x40 != 0 && (1..=LONG_NAME_ENTRIES_MAX).contains(&number) {
            *self = Self { units: Vec::new(), next: number, checksum: entry[13] };
        }
        if self.next == 0 || number != self.next || entry[13] != self.checksum {
            *self = Self::default();
            return;
        }
        self.next -= 1;
        let places = (1..11).chain(14..26).chain(28..32).step_by(2);
        // `step_by` over the chain keeps to the pairs, for each range has an even length.
        let part = places.map(|at| u16_at(entry, at)).take_while(|&unit| unit != 0 && unit != 0xffff);
        self.units.splice(..0, part);
    }

    /// The name, if it is whole and belongs to this short entry.
    fn finish(self, entry: &[u8; ENTRY_BYTES]) -> Option<String> {
        let sum = entry[..11].iter().fold(0_u8, |sum, &byte| sum.rotate_right(1).wrapping_add(byte));
        let whole = self.next == 0 && !self.units.is_empty() && sum == self.checksum;
        whole.then(|| String::from_utf16_lossy(&self.units))
    }
}
