//! What a disk's first sectors say of booting from it: signatures at fixed places, and nothing behind them,
//! for all of it is hostile. See `vmm/boot/disk/` for who really looks, in the sandbox.

use std::os::fd::AsFd;

use rustix::io::Errno;

use crate::host::snapshot::{BootFacts, BootSignature, ImageHeader};
use crate::vmm::config::DiskFormat;

/// As far as a partition table's header on a disk of 4 KiB sectors.
const FIRST_BYTES: usize = 4096 + 8;
const MBR: (usize, &[u8]) = (510, &[0x55, 0xaa]);
/// On disks of small and of large sectors.
const GPT: [(usize, &[u8]); 2] = [(512, b"EFI PART"), (4096, b"EFI PART")];
const EXT: (usize, &[u8]) = (1024 + 56, &[0x53, 0xef]);

const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
const COMPRESSED: u64 = 1 << 62;
const READS_AS_ZEROES: u64 = 1;
const EXTENDED_L2: u64 = 1 << 4;

pub fn of_image(file: impl AsFd, header: &ImageHeader) -> Result<Option<BootFacts>, Errno> {
    match header.format {
        DiskFormat::Raw => of_raw(file).map(Some),
        DiskFormat::Qcow2 if header.encrypted || header.unusable.is_some() => Ok(None),
        DiskFormat::Qcow2 => of_qcow2(file, header.backing.is_some()),
    }
}

pub fn of_raw(file: impl AsFd) -> Result<BootFacts, Errno> {
    let mut first = [0; FIRST_BYTES];
    read(file, &mut first, 0)?;
    Ok(facts(&first))
}

/// Follows the tables to the first cluster, two entries in all. What isn't there is zeroes, or its backing
/// file's, which is not followed.
fn of_qcow2(file: impl AsFd, has_backing: bool) -> Result<Option<BootFacts>, Errno> {
    let mut header = [0; 104];
    read(&file, &mut header, 0)?;
    let number = |bytes: &[u8]| bytes.iter().fold(0_u64, |sum, byte| sum << 8 | u64::from(*byte));
    let (version, cluster_bits) = (number(&header[4..8]), number(&header[20..24]));
    let extended = version >= 3 && number(&header[72..80]) & EXTENDED_L2 != 0;
    if extended || !(13..=21).contains(&cluster_bits) {
        return Ok(None);
    }
    let nothing = (!has_backing).then_some(BootFacts::BLANK);
    let mut entry = [0; 8];
    read(&file, &mut entry, number(&header[40..48]))?;
    let table = number(&entry) & OFFSET_MASK;
    if table == 0 {
        return Ok(nothing);
    }
    entry = [0; 8];
    read(&file, &mut entry, table)?;
    let found = number(&entry);
    match found & OFFSET_MASK {
        _ if found & COMPRESSED != 0 => Ok(None),
        _ if version >= 3 && found & READS_AS_ZEROES != 0 => Ok(Some(BootFacts::BLANK)),
        0 => Ok(nothing),
        cluster => {
            let mut first = [0; FIRST_BYTES];
            read(&file, &mut first, cluster)?;
            Ok(Some(facts(&first)))
        }
    }
}

/// What lies beyond the end of the file stays zero.
fn read(file: impl AsFd, buffer: &mut [u8], at: u64) -> Result<(), Errno> {
    let mut done = 0;
    while done < buffer.len() {
        match rustix::io::pread(&file, &mut buffer[done..], at.saturating_add(done as u64)) {
            Ok(0) | Err(Errno::INVAL) => break,
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

fn facts(first: &[u8; FIRST_BYTES]) -> BootFacts {
    let has = |(at, bytes): (usize, &[u8])| first[at..].starts_with(bytes);
    let signature = if GPT.into_iter().any(has) {
        BootSignature::Gpt
    } else if has(MBR) {
        BootSignature::Mbr
    } else {
        BootSignature::None
    };
    BootFacts { signature, file_system: has(EXT) }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::super::header;
    use super::*;

    fn scratch() -> std::fs::File {
        let path = std::env::temp_dir().join(format!(
            "vmctl-boot-{}-{:?}",
            std::process::id(),
            std::thread::current().id()
        ));
        let file = std::fs::File::options().read(true).write(true).create(true).truncate(true).open(&path);
        std::fs::remove_file(&path).unwrap();
        file.unwrap()
    }

    #[test]
    fn signatures_are_told_apart() {
        let with = |parts: &[(usize, &[u8])]| {
            let file = scratch();
            file.set_len(1 << 20).unwrap();
            parts.iter().for_each(|(at, bytes)| file.write_all_at(bytes, *at as u64).unwrap());
            of_raw(&file).unwrap()
        };
        assert_eq!(with(&[]), BootFacts::BLANK);
        assert!(!with(&[(100, b"noise")]).is_bootable());
        assert_eq!(with(&[MBR]).signature, BootSignature::Mbr);
        assert_eq!(with(&[MBR, GPT[0]]).signature, BootSignature::Gpt);
        assert_eq!(with(&[MBR, GPT[1]]).signature, BootSignature::Gpt);
        let ext = with(&[EXT]);
        assert!(ext.signature == BootSignature::None && ext.is_bootable());
        assert_eq!(of_raw(scratch()).unwrap(), BootFacts::BLANK);
    }

    #[test]
    fn a_qcow2_images_first_cluster_is_found_and_hostile_tables_lead_nowhere() {
        let file = scratch();
        super::super::qcow2::create(&file, 1 << 20, false).unwrap();
        let look = |file: &std::fs::File| {
            let bytes = file.metadata().unwrap().len();
            of_image(file, &header::of_file(file, bytes).unwrap()).unwrap()
        };
        assert_eq!(look(&file), Some(BootFacts::BLANK));
        let mut l1 = [0; 8];
        file.read_exact_at(&mut l1, 40).unwrap();
        let l1 = u64::from_be_bytes(l1);
        // A table at 1 MiB, whose first cluster is at 2 MiB.
        file.write_all_at(&(1_u64 << 63 | 1 << 20).to_be_bytes(), l1).unwrap();
        file.write_all_at(&(1_u64 << 63 | 2 << 20).to_be_bytes(), 1 << 20).unwrap();
        file.write_all_at(&[0x55, 0xaa], (2 << 20) + 510).unwrap();
        assert_eq!(look(&file).map(|facts| facts.signature), Some(BootSignature::Mbr));
        file.write_all_at(&(1_u64 << 62).to_be_bytes(), 1 << 20).unwrap();
        assert_eq!(look(&file), None, "compressed");
        file.write_all_at(&OFFSET_MASK.to_be_bytes(), 1 << 20).unwrap();
        assert_eq!(look(&file), Some(BootFacts::BLANK), "beyond the end of everything");
        file.write_all_at(&OFFSET_MASK.to_be_bytes(), l1).unwrap();
        assert_eq!(look(&file), Some(BootFacts::BLANK));
    }
}
