//! Growing a qcow2 image in place by one write of its header.
//!
//! An L1 table fills whole clusters, of which a small image uses a few bytes. Taking the rest into
//! use needs no allocation: the new entries are zeroed and synced, then one write of the header's
//! first sector changes size and table length together. So a kill at any instant leaves the old
//! image or the new one. (imago writes a new table's place into the header before the table's
//! refcount reaches the file: killed in between, it leaves an image whose L1 table counts as free.)
//! One cluster of 64 KiB holds the table of 4 TiB.

use std::fs::File;
use std::io;

use super::copy::{read_exact, write_all};

const SIZE: usize = 24;
const L1_ENTRIES: usize = 36;
const L1_OFFSET: usize = 40;
const SNAPSHOTS: usize = 60;
const AUTOCLEAR: usize = 88;
const HEADER_BYTES: usize = 104;

/// Why an image can't be grown in place.
#[derive(Debug, thiserror::Error)]
pub enum ResizeError {
    #[error("its L1 table has room for {room_bytes} bytes, and a larger one can't be made in place")]
    NoRoom { room_bytes: u64 },
    #[error("it is an image of version 2 with internal snapshots, whose size can't change")]
    Snapshots,
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Grows to `capacity_bytes`, or keeps the size if it is larger, and takes all of the L1 table's
/// clusters into use, so that a later growth changes nothing but the size. The header was checked.
pub fn grow_in_place(file: &File, capacity_bytes: u64) -> Result<(), ResizeError> {
    let mut header = [0; HEADER_BYTES];
    // A version 2 header is shorter, but no file with tables is.
    read_exact(file, &mut header, 0).map_err(io::Error::from)?;
    let u32_at = |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    let u64_at = |at: usize| u64::from(u32_at(at)) << 32 | u64::from(u32_at(at + 4));

    let version = u32_at(4);
    let cluster_bytes = 1u64 << u32_at(20).min(21);
    let (size_bytes, l1_entries, l1_offset) =
        (u64_at(SIZE), u64::from(u32_at(L1_ENTRIES)), u64_at(L1_OFFSET));
    let covered_bytes = cluster_bytes * (cluster_bytes / 8);
    let room_entries = (l1_entries * 8).next_multiple_of(cluster_bytes) / 8;
    let room_bytes = room_entries.saturating_mul(covered_bytes);
    if capacity_bytes > room_bytes || l1_offset == 0 {
        return Err(ResizeError::NoRoom { room_bytes });
    }
    if version < 3 && u32_at(SNAPSHOTS) != 0 {
        return Err(ResizeError::Snapshots);
    }
    if room_entries > l1_entries {
        let zeroes = vec![0; ((room_entries - l1_entries) * 8) as usize];
        write_all(file, &zeroes, l1_offset + l1_entries * 8).map_err(io::Error::from)?;
        file.sync_all()?;
    }
    header[SIZE..SIZE + 8].copy_from_slice(&size_bytes.max(capacity_bytes).to_be_bytes());
    header[L1_ENTRIES..L1_ENTRIES + 4].copy_from_slice(&(room_entries as u32).to_be_bytes());
    let end = match version {
        2 => L1_OFFSET,
        // What the image holds beyond its disk (bitmaps) doesn't know of the change.
        _ => {
            header[AUTOCLEAR..AUTOCLEAR + 8].fill(0);
            AUTOCLEAR + 8
        }
    };
    write_all(file, &header[SIZE..end], SIZE as u64).map_err(io::Error::from)?;
    Ok(file.sync_all()?)
}
