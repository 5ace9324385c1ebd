//! qcow2 with compressed clusters: one behind the other, an L2 table whenever it is full. What the tables of the
//! head need is known only at the end, so the head is written last.

use std::fs::File;
use std::io::{self, Write as _};

use flate2::{Compress, Compression};

use super::{CLUSTER_BYTES, Tail, each_cluster, pack};
use crate::host::linux::storage::copy::{self, Meter};
use crate::host::linux::storage::qcow2::Source;

const QCOW2_HEADER_BYTES: u32 = 104;
const COMPRESSED: u64 = 1 << 62;
/// The reference count is one.
const COPIED: u64 = 1 << 63;
/// Of a 64 KiB cluster: 8 bits of the descriptor count sectors.
const SECTORS_SHIFT: u32 = 62 - 8;
const L2_ENTRIES: u64 = CLUSTER_BYTES / 8;
const REFCOUNTS_A_BLOCK: u64 = CLUSTER_BYTES / 2;

/// Memory: a word for each L2 table, two bytes for each cluster of the file.
pub fn compressed(source: &Source<'_>, to: &File, meter: &mut Meter<'_>) -> io::Result<()> {
    let l1_entries = source.bytes().div_ceil(CLUSTER_BYTES * L2_ENTRIES);
    let l1_clusters = (l1_entries * 8).div_ceil(CLUSTER_BYTES).max(1);
    let mut image = Qcow2Writer {
        tail: Tail::new(to),
        counts: Vec::new(),
        l1: vec![0; l1_entries as usize],
        l2: vec![0; L2_ENTRIES as usize],
        l2_index: None,
    };
    // The header and the L1 table, still empty.
    for _ in 0..=l1_clusters {
        image.tail.write(&[0; CLUSTER_BYTES as usize])?;
    }
    image.count(0, image.tail.at);
    // QEMU unpacks with a window of 4 KiB.
    let mut packer = Compress::new_with_window_bits(Compression::default(), false, 12);
    let mut packed = Vec::new();
    each_cluster(source, meter, |cluster, number| {
        let smaller = pack(&mut packer, cluster, &mut packed, CLUSTER_BYTES as usize - 1)?;
        image.add(number, if smaller { Ok(&packed) } else { Err(cluster) })
    })?;
    image.finish(source.bytes(), l1_clusters, to)
}

struct Qcow2Writer<'a> {
    tail: Tail<'a>,
    /// Of each cluster of the file.
    counts: Vec<u16>,
    l1: Vec<u64>,
    l2: Vec<u64>,
    l2_index: Option<u64>,
}

impl Qcow2Writer<'_> {
    /// One more reference to each cluster between these places.
    fn count(&mut self, from: u64, to: u64) {
        let clusters = from / CLUSTER_BYTES..to.div_ceil(CLUSTER_BYTES);
        if self.counts.len() < clusters.end as usize {
            self.counts.resize(clusters.end as usize, 0);
        }
        clusters.for_each(|cluster| self.counts[cluster as usize] += 1);
    }

    fn add(&mut self, number: u64, content: Result<&Vec<u8>, &[u8]>) -> io::Result<()> {
        let index = number / L2_ENTRIES;
        if self.l2_index != Some(index) {
            self.flush_l2()?;
            self.l2_index = Some(index);
        }
        let entry = match content {
            Ok(packed) => {
                let at = self.tail.at;
                self.tail.write(packed)?;
                self.count(at, self.tail.at);
                let sectors = (self.tail.at - 1) / 512 - at / 512;
                COMPRESSED | sectors << SECTORS_SHIFT | at
            }
            Err(cluster) => {
                self.tail.align(CLUSTER_BYTES)?;
                let at = self.tail.at;
                self.tail.write(cluster)?;
                self.count(at, self.tail.at);
                COPIED | at
            }
        };
        self.l2[(number % L2_ENTRIES) as usize] = entry;
        Ok(())
    }

    fn flush_l2(&mut self) -> io::Result<()> {
        let Some(index) = self.l2_index.take() else { return Ok(()) };
        self.tail.align(CLUSTER_BYTES)?;
        let at = self.tail.at;
        for entry in std::mem::replace(&mut self.l2, vec![0; L2_ENTRIES as usize]) {
            self.tail.write(&entry.to_be_bytes())?;
        }
        self.count(at, self.tail.at);
        self.l1[index as usize] = COPIED | at;
        Ok(())
    }

    fn finish(mut self, capacity_bytes: u64, l1_clusters: u64, to: &File) -> io::Result<()> {
        self.flush_l2()?;
        self.tail.align(CLUSTER_BYTES)?;
        // The blocks count themselves and their table.
        let used = self.tail.at / CLUSTER_BYTES;
        let (mut blocks, mut table_clusters) = (0, 0);
        loop {
            let clusters = used + blocks + table_clusters;
            let needed = clusters.div_ceil(REFCOUNTS_A_BLOCK);
            let table = (needed * 8).div_ceil(CLUSTER_BYTES).max(1);
            if (needed, table) == (blocks, table_clusters) {
                break;
            }
            (blocks, table_clusters) = (needed, table);
        }
        let table_at = self.tail.at;
        let blocks_at = table_at + table_clusters * CLUSTER_BYTES;
        self.count(table_at, blocks_at + blocks * CLUSTER_BYTES);
        for block in 0..blocks {
            self.tail.write(&(blocks_at + block * CLUSTER_BYTES).to_be_bytes())?;
        }
        self.tail.align(CLUSTER_BYTES)?;
        let mut counts = std::mem::take(&mut self.counts);
        counts.resize((blocks * REFCOUNTS_A_BLOCK) as usize, 0);
        for count in counts {
            self.tail.write(&count.to_be_bytes())?;
        }
        self.tail.file.flush()?;
        let mut header = Vec::new();
        header.extend(b"QFI\xfb");
        header.extend(3u32.to_be_bytes());
        header.extend([0; 12]); // No backing file.
        header.extend(CLUSTER_BYTES.ilog2().to_be_bytes());
        header.extend(capacity_bytes.to_be_bytes());
        header.extend(0u32.to_be_bytes()); // Not encrypted.
        header.extend((self.l1.len() as u32).to_be_bytes());
        header.extend(CLUSTER_BYTES.to_be_bytes()); // The L1 table follows the header's cluster.
        header.extend(table_at.to_be_bytes());
        header.extend((table_clusters as u32).to_be_bytes());
        header.extend([0; 12]); // No snapshots.
        header.extend([0; 24]); // No features.
        header.extend(4u32.to_be_bytes()); // 16 bits a reference count.
        header.extend(QCOW2_HEADER_BYTES.to_be_bytes());
        header.extend([0; 8]); // No extensions.
        debug_assert!(self.l1.len() as u64 * 8 <= l1_clusters * CLUSTER_BYTES);
        copy::write_all(to, &header, 0)?;
        let l1: Vec<u8> = self.l1.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        Ok(copy::write_all(to, &l1, CLUSTER_BYTES)?)
    }
}
