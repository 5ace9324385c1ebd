//! vmdk as `streamOptimized`: grains with their markers, a table after each 512 that there are any of, then the
//! directory and the footer.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;

use flate2::{Compress, Compression};

use super::{CLUSTER_BYTES, Tail, each_cluster, pack};
use crate::host::linux::storage::copy::Meter;
use crate::host::linux::storage::qcow2::Source;

const SECTOR_BYTES: u64 = 512;
const GRAIN_SECTORS: u64 = CLUSTER_BYTES / SECTOR_BYTES;
const TABLE_ENTRIES: u64 = 512;
const DESCRIPTOR_SECTORS: u64 = 20;
const OVERHEAD_SECTORS: u64 = 128;
const DIRECTORY_AT_END: u64 = u64::MAX;
/// Newline test, compressed, with markers.
const FLAGS: u32 = 1 | 1 << 16 | 1 << 17;
const MARKER_TABLE: u32 = 1;
const MARKER_DIRECTORY: u32 = 2;
const MARKER_FOOTER: u32 = 3;

pub fn stream_optimized(
    source: &Source<'_>,
    to: &File,
    name: &Path,
    meter: &mut Meter<'_>,
) -> io::Result<()> {
    let capacity = source.bytes().div_ceil(SECTOR_BYTES);
    let tables = capacity.div_ceil(GRAIN_SECTORS * TABLE_ENTRIES);
    let mut image = VmdkWriter {
        tail: Tail::new(to),
        directory: vec![0; tables as usize],
        table: vec![0; TABLE_ENTRIES as usize],
        index: None,
    };
    image.tail.write(&vmdk_header(capacity, DIRECTORY_AT_END))?;
    image.tail.write(descriptor(capacity, name).as_bytes())?;
    image.tail.align(OVERHEAD_SECTORS * SECTOR_BYTES)?;
    let mut packer = Compress::new(Compression::default(), true);
    let mut packed = Vec::new();
    each_cluster(source, meter, |grain, number| {
        // A grain is always compressed, and then may be a little longer.
        if !pack(&mut packer, grain, &mut packed, grain.len() + 1024)? {
            return Err(io::Error::other("a grain can't be compressed"));
        }
        image.add(number, &packed)
    })?;
    image.finish(capacity)
}

struct VmdkWriter<'a> {
    tail: Tail<'a>,
    directory: Vec<u32>,
    table: Vec<u32>,
    index: Option<u64>,
}

impl VmdkWriter<'_> {
    fn sector(&self) -> io::Result<u32> {
        let sector = u32::try_from(self.tail.at / SECTOR_BYTES);
        sector
            .map_err(|_| io::Error::other("it grows beyond 2 TiB, the most that a vmdk's tables can address"))
    }

    fn add(&mut self, number: u64, packed: &[u8]) -> io::Result<()> {
        let index = number / TABLE_ENTRIES;
        if self.index != Some(index) {
            self.flush_table()?;
            self.index = Some(index);
        }
        self.table[(number % TABLE_ENTRIES) as usize] = self.sector()?;
        self.tail.write(&(number * GRAIN_SECTORS).to_le_bytes())?;
        self.tail.write(&(packed.len() as u32).to_le_bytes())?;
        self.tail.write(packed)?;
        self.tail.align(SECTOR_BYTES)
    }

    fn marker(&mut self, sectors: u64, kind: u32) -> io::Result<()> {
        self.tail.write(&sectors.to_le_bytes())?;
        self.tail.write(&0u32.to_le_bytes())?;
        self.tail.write(&kind.to_le_bytes())?;
        self.tail.align(SECTOR_BYTES)
    }

    fn entries(&mut self, entries: &[u32]) -> io::Result<()> {
        entries.iter().try_for_each(|entry| self.tail.write(&entry.to_le_bytes()))?;
        self.tail.align(SECTOR_BYTES)
    }

    fn flush_table(&mut self) -> io::Result<()> {
        let Some(index) = self.index.take() else { return Ok(()) };
        self.marker(TABLE_ENTRIES * 4 / SECTOR_BYTES, MARKER_TABLE)?;
        self.directory[index as usize] = self.sector()?;
        let table = std::mem::replace(&mut self.table, vec![0; TABLE_ENTRIES as usize]);
        self.entries(&table)
    }

    fn finish(mut self, capacity: u64) -> io::Result<()> {
        self.flush_table()?;
        let sectors = (self.directory.len() as u64 * 4).div_ceil(SECTOR_BYTES);
        self.marker(sectors, MARKER_DIRECTORY)?;
        let directory_at = u64::from(self.sector()?);
        let directory = std::mem::take(&mut self.directory);
        self.entries(&directory)?;
        self.marker(1, MARKER_FOOTER)?;
        self.tail.write(&vmdk_header(capacity, directory_at))?;
        self.marker(0, 0)?;
        self.tail.file.flush()
    }
}

fn vmdk_header(capacity: u64, directory: u64) -> [u8; 512] {
    let mut header = Vec::with_capacity(512);
    header.extend(b"KDMV");
    header.extend(3u32.to_le_bytes());
    header.extend(FLAGS.to_le_bytes());
    for field in [capacity, GRAIN_SECTORS, 1, DESCRIPTOR_SECTORS] {
        header.extend(field.to_le_bytes());
    }
    header.extend((TABLE_ENTRIES as u32).to_le_bytes());
    for field in [0, directory, OVERHEAD_SECTORS] {
        header.extend(field.to_le_bytes());
    }
    header.push(0); // Closed cleanly.
    header.extend(b"\n \r\n");
    header.extend(1u16.to_le_bytes());
    let mut sector = [0; 512];
    sector[..header.len()].copy_from_slice(&header);
    sector
}

/// The geometry is made up, as everybody makes it up: 16 heads, 63 sectors.
fn descriptor(capacity: u64, name: &Path) -> String {
    let name: String = name
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .chars()
        .filter(|c| !c.is_control() && *c != '"')
        .take(200)
        .collect();
    let cylinders = (capacity / (16 * 63)).clamp(1, 16383);
    format!(
        "# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType=\"streamOptimized\"\n\n\
         # Extent description\nRW {capacity} SPARSE \"{name}\"\n\n\
         # The Disk Data Base\n#DDB\n\nddb.virtualHWVersion = \"4\"\nddb.geometry.cylinders = \"{cylinders}\"\n\
         ddb.geometry.heads = \"16\"\nddb.geometry.sectors = \"63\"\nddb.adapterType = \"lsilogic\"\n"
    )
}
