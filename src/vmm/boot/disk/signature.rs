//! What lies on a volume, told by its signature. Most of it we can't read and say so by name.

use super::read::{Volume, u16_at};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    Ext,
    Fat,
    /// Something known that holds files but that is not read here.
    Foreign(&'static str),
    /// Something known that never holds a kernel.
    Irrelevant(&'static str),
    Unknown,
}

/// Offset, bytes, name. Containers first: what they hold may show its own signature further in.
const FOREIGN: &[(u64, &[u8], &str)] = &[
    (0, b"LUKS\xba\xbe", "LUKS"),
    (0, b"XFSB", "XFS"),
    (0x1_0040, b"_BHRfS_M", "btrfs"),
    (4096, b"\xfc\x4e\x2b\xa9", "Linux RAID"),
    (0, b"\xfc\x4e\x2b\xa9", "Linux RAID"),
    (1024, b"\x10\x20\xf5\xf2", "F2FS"),
    (4096 + 24, b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca", "bcachefs"),
    (3, b"NTFS    ", "NTFS"),
    (3, b"EXFAT   ", "exFAT"),
    (0, b"hsqs", "SquashFS"),
    (32769, b"CD001", "ISO 9660"),
    (1024, b"\xe2\xe1\xf5\xe0", "EROFS"),
];
const SWAP: [(u64, &[u8]); 2] = [(4086, b"SWAPSPACE2"), (65526, b"SWAPSPACE2")];
/// Labels may lie in any of the first four sectors.
const LVM_SECTORS: u64 = 4;
/// ZFS keeps uberblocks from here on; any of the first says what it is.
const ZFS_UBERBLOCKS: u64 = 128 << 10;
const ZFS_UBERBLOCKS_LOOKED_AT: u64 = 128;
const ZFS_MAGIC: [u8; 8] = 0x00ba_b10c_u64.to_le_bytes();

pub(super) fn content(volume: &Volume) -> Content {
    if (0..LVM_SECTORS).any(|sector| volume.has(sector * 512, b"LABELONE")) {
        return Content::Foreign("LVM");
    }
    if let Some((_, _, name)) = FOREIGN.iter().find(|(offset, bytes, _)| volume.has(*offset, bytes)) {
        return Content::Foreign(name);
    }
    if SWAP.iter().any(|(offset, bytes)| volume.has(*offset, bytes)) {
        return Content::Irrelevant("swap");
    }
    if volume.has(1024 + 56, &[0x53, 0xef]) {
        return Content::Ext;
    }
    if is_fat(volume) {
        return Content::Fat;
    }
    let zfs = (0..ZFS_UBERBLOCKS_LOOKED_AT).any(|at| volume.has(ZFS_UBERBLOCKS + at * 1024, &ZFS_MAGIC));
    if zfs { Content::Foreign("ZFS") } else { Content::Unknown }
}

/// A boot sector that makes sense; the reader looks closer.
fn is_fat(volume: &Volume) -> bool {
    let Ok(sector) = volume.array::<512>(0) else { return false };
    let (sector_bytes, cluster_sectors) = (u16_at(&sector, 11), sector[13]);
    matches!(sector[0], 0xeb | 0xe9)
        && matches!(sector_bytes, 512 | 1024 | 2048 | 4096)
        && cluster_sectors.is_power_of_two()
        && u16_at(&sector, 14) > 0
        && matches!(sector[16], 1 | 2)
        && sector[21] >= 0xf0
}
