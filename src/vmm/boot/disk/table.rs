//! Partition tables: GPT (with its backup) and MBR (with logical partitions).

use std::rc::Rc;

use crc::{CRC_32_ISO_HDLC, Crc};

use super::read::{Disk, ReadError, Volume, invalid, u16_at, u32_at, u64_at};

const SECTOR_BYTES: u64 = 512;
const PARTITIONS_MAX: usize = 128;
/// Sixteen times what every tool writes.
const GPT_TABLE_BYTES_MAX: u64 = 256 << 10;
/// C12A7328-F81F-11D2-BA4B-00A0C93EC93B as it lies on the disk.
const ESP_GUID: [u8; 16] =
    [0x28, 0x73, 0x2a, 0xc1, 0x1f, 0xf8, 0xd2, 0x11, 0xba, 0x4b, 0x00, 0xa0, 0xc9, 0x3e, 0xc9, 0x3b];

/// A partition, or the whole disk where there are none.
pub(super) struct Partition {
    /// As Linux counts: 1 and up, logical ones of an MBR 5 and up. `None`: the whole disk.
    pub number: Option<u32>,
    /// What GRUB calls its place on the disk: `gpt1`, `msdos5`, or nothing.
    pub grub_name: String,
    pub is_esp: bool,
    pub volume: Volume,
}

impl Partition {
    pub fn name(&self) -> String {
        match self.number {
            Some(number) => format!("partition {number}"),
            None => "the disk without partitions".to_owned(),
        }
    }
}

/// The partitions in the order of their numbers.
pub(super) fn partitions(disk: &Rc<Disk>) -> Result<Vec<Partition>, ReadError> {
    let whole = Volume::whole(disk);
    let sector: [u8; 512] = whole.array(0)?;
    let entries: Vec<MbrEntry> = (0..4).map(|index| MbrEntry::of(&sector, index)).collect();
    let plausible = sector[510..] == [0x55, 0xaa]
        && entries.iter().all(|entry| entry.flag & 0x7f == 0)
        && entries.iter().any(|entry| entry.is_used());
    if !plausible {
        // A file system straight on the disk; whoever looks into it says if there is none.
        let volume = whole;
        return Ok(vec![Partition { number: None, grub_name: String::new(), is_esp: false, volume }]);
    }
    // Without its protective entry a GPT is a leftover, as the kernel, too, has it.
    if entries.iter().any(|entry| entry.kind == 0xee) {
        gpt(disk, &whole)
    } else {
        mbr(disk, &whole, &entries)
    }
}

fn gpt(disk: &Rc<Disk>, whole: &Volume) -> Result<Vec<Partition>, ReadError> {
    let last = (disk.size_bytes() / SECTOR_BYTES).saturating_sub(1);
    let table = gpt_table(whole, 1).or_else(|primary| match primary {
        ReadError::Invalid(primary) => gpt_table(whole, last)
            .map_err(|backup| ReadError::Invalid(format!("{primary}; and its backup: {backup}"))),
        other => Err(other),
    })?;
    let mut found = Vec::new();
    for (index, entry) in table.bytes.chunks_exact(table.entry_bytes).enumerate() {
        let (kind, first, last) = (&entry[..16], u64_at(entry, 32), u64_at(entry, 40));
        if kind == [0; 16] || last < first {
            continue;
        }
        if found.len() == PARTITIONS_MAX {
            break;
        }
        let number = index as u32 + 1;
        found.push(Partition {
            number: Some(number),
            grub_name: format!("gpt{number}"),
            is_esp: kind == ESP_GUID,
            volume: Volume::part(
                disk,
                first.saturating_mul(SECTOR_BYTES),
                (last - first).saturating_add(1).saturating_mul(SECTOR_BYTES),
            ),
        });
    }
    Ok(found)
}

struct GptTable {
    entry_bytes: usize,
    bytes: Vec<u8>,
}

/// The table whose header lies in this sector, checked.
fn gpt_table(whole: &Volume, sector: u64) -> Result<GptTable, ReadError> {
    let crc = Crc::<u32>::new(&CRC_32_ISO_HDLC);
    let mut header: [u8; 512] = whole.array(sector * SECTOR_BYTES)?;
    let header_bytes = u32_at(&header, 12) as usize;
    if header[..8] != *b"EFI PART" || !(92..=512).contains(&header_bytes) {
        return invalid("its GPT has no header");
    }
    let (checksum, table_checksum) = (u32_at(&header, 16), u32_at(&header, 88));
    header[16..20].fill(0);
    if crc.checksum(&header[..header_bytes]) != checksum {
        return invalid("the GPT's header has a wrong checksum");
    }
    let (start, count, entry_bytes) = (u64_at(&header, 72), u32_at(&header, 80), u32_at(&header, 84));
    let bytes = u64::from(count) * u64::from(entry_bytes);
    if !(128..=4096).contains(&entry_bytes) || entry_bytes % 8 != 0 || bytes > GPT_TABLE_BYTES_MAX {
        return invalid("the GPT's table has an absurd size");
    }
    let mut table = vec![0; bytes as usize];
    whole.read(start.saturating_mul(SECTOR_BYTES), &mut table)?;
    if crc.checksum(&table) != table_checksum {
        return invalid("the GPT's table has a wrong checksum");
    }
    Ok(GptTable { entry_bytes: entry_bytes as usize, bytes: table })
}

#[derive(Clone, Copy)]
struct MbrEntry {
    flag: u8,
    kind: u8,
    start: u64,
    bytes: u64,
}

impl MbrEntry {
    fn of(sector: &[u8; 512], index: usize) -> Self {
        let entry = &sector[446 + index * 16..][..16];
        Self {
            flag: entry[0],
            kind: entry[4],
            start: u64::from(u32_at(entry, 8)) * SECTOR_BYTES,
            bytes: u64::from(u32_at(entry, 12)) * SECTOR_BYTES,
        }
    }

    fn is_used(self) -> bool {
        self.kind != 0 && self.bytes > 0
    }

    fn is_extended(self) -> bool {
        matches!(self.kind, 0x05 | 0x0f | 0x85)
    }
}

fn mbr(disk: &Rc<Disk>, whole: &Volume, entries: &[MbrEntry]) -> Result<Vec<Partition>, ReadError> {
    let partition = |number: u32, entry: MbrEntry, start: u64| Partition {
        number: Some(number),
        grub_name: format!("msdos{number}"),
        is_esp: entry.kind == 0xef,
        volume: Volume::part(disk, start, entry.bytes),
    };
    let mut found = Vec::new();
    for (number, &entry) in (1..).zip(entries) {
        if entry.is_used() && !entry.is_extended() {
            found.push(partition(number, entry, entry.start));
        }
    }
    let Some(extended) = entries.iter().find(|entry| entry.is_used() && entry.is_extended()) else {
        return Ok(found);
    };
    // A chain of boot records, each with one logical partition and the way to the next. Number by
    // number, so a chain that bites its tail ends, too.
    let mut record = extended.start;
    for number in 5..5 + PARTITIONS_MAX as u32 {
        let sector: [u8; 512] = whole.array(record)?;
        if u16_at(&sector, 510) != 0xaa55 {
            break;
        }
        let (logical, next) = (MbrEntry::of(&sector, 0), MbrEntry::of(&sector, 1));
        if logical.is_used() {
            found.push(partition(number, logical, record + logical.start));
        }
        if !next.is_used() || !next.is_extended() || next.start == 0 {
            break;
        }
        record = extended.start + next.start;
    }
    Ok(found)
}
