//! Copies of whole files: by reference where the file system can, else extent by extent, and
//! hashed on the way where a digest is to be verified. Memory is bounded by one buffer.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::PathBuf;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;
use sha2::Digest;

use super::{Progress, ProgressHook};
use crate::name::Sha256;

pub const BUFFER_BYTES: usize = 1 << 20;
/// Zeroes are left out in units of this size: the cluster size that we create qcow2 images with.
const ZERO_UNIT_BYTES: usize = 64 << 10;
const REPORT_BYTES: u64 = 16 << 20;

/// Counts what is done and tells the hook now and then.
pub struct Meter<'a> {
    hook: Option<&'a ProgressHook>,
    path: PathBuf,
    total_bytes: u64,
    reported_bytes: u64,
}

impl<'a> Meter<'a> {
    pub fn new(hook: Option<&'a ProgressHook>, path: PathBuf, total_bytes: u64) -> Self {
        Self { hook, path, total_bytes, reported_bytes: 0 }
    }

    /// How much there is, once that is known.
    pub fn expect(&mut self, total_bytes: u64) {
        self.total_bytes = total_bytes;
    }

    pub fn at(&mut self, done_bytes: u64) {
        let Some(hook) = self.hook else { return };
        if done_bytes >= self.reported_bytes + REPORT_BYTES || done_bytes == self.total_bytes {
            self.reported_bytes = done_bytes;
            hook(Progress { path: self.path.clone(), done_bytes, total_bytes: self.total_bytes });
        }
    }
}

/// Shares the extents of `from` with `to`. `Ok(false)`: this file system, or this pair, can't.
pub fn reflink(from: impl AsFd, to: impl AsFd) -> Result<bool, Errno> {
    match rustix::fs::ioctl_ficlone(to, from) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// The next range at or after `at` that holds data, and ends by `length`. A file system that can't
/// tell holes has none.
pub fn next_data(file: impl AsFd, at: u64, length: u64) -> Result<Option<(u64, u64)>, Errno> {
    if at >= length {
        return Ok(None);
    }
    let start = match rustix::fs::seek(&file, SeekFrom::Data(at)) {
        Ok(start) => start,
        Err(Errno::NXIO) => return Ok(None),
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(Some((at, length))),
        Err(errno) => return Err(errno),
    };
    let end = rustix::fs::seek(&file, SeekFrom::Hole(start))?.min(length);
    Ok((start < length).then_some((start, end)))
}

/// Reads exactly; a file that ends early has changed under us.
pub fn read_exact(file: impl AsFd, buffer: &mut [u8], at: u64) -> Result<(), Errno> {
    let mut done = 0;
    while done < buffer.len() {
        match rustix::io::pread(&file, &mut buffer[done..], at + done as u64) {
            Ok(0) => return Err(Errno::STALE),
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

pub fn write_all(file: impl AsFd, mut bytes: &[u8], mut at: u64) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(&file, bytes, at) {
            Ok(0) => return Err(Errno::IO),
            Ok(count) => {
                bytes = &bytes[count..];
                at += count as u64;
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

/// Calls `write` with the runs of `bytes` that aren't zero, and where they are.
pub fn each_non_zero<E>(
    bytes: &[u8],
    at: u64,
    mut write: impl FnMut(&[u8], u64) -> Result<(), E>,
) -> Result<(), E> {
    let mut run_start = 0;
    let mut done = 0;
    while done < bytes.len() {
        // Units are those of the file, not of the buffer: an unaligned start shortens the first.
        let into_unit = ((at + done as u64) % ZERO_UNIT_BYTES as u64) as usize;
        let end = bytes.len().min(done + ZERO_UNIT_BYTES - into_unit);
        if is_zero(&bytes[done..end]) {
            if run_start < done {
                write(&bytes[run_start..done], at + run_start as u64)?;
            }
            run_start = end;
        }
        done = end;
    }
    match run_start < done {
        true => write(&bytes[run_start..done], at + run_start as u64),
        false => Ok(()),
    }
}

pub fn is_zero(bytes: &[u8]) -> bool {
    // SAFETY: any sixteen bytes are a valid u128, and `align_to` splits at its alignment.
    let (head, middle, tail) = unsafe { bytes.align_to::<u128>() };
    head.iter().chain(tail).all(|&byte| byte == 0)
        && middle.chunks(64).all(|words| words.iter().fold(0, |all, word| all | word) == 0)
}

/// Copies `length` bytes into an empty file that ends up `length` long, and returns their digest.
/// Holes and zeroes of the source become holes.
pub fn copy_and_hash(from: &File, to: &File, length: u64, meter: &mut Meter<'_>) -> Result<Sha256, Errno> {
    rustix::fs::ftruncate(to, length)?;
    hash_extents(from, length, meter, |bytes, at| each_non_zero(bytes, at, |run, at| write_all(to, run, at)))
}

/// The digest of the first `length` bytes.
pub fn hash(file: &File, length: u64, meter: &mut Meter<'_>) -> Result<Sha256, Errno> {
    hash_extents(file, length, meter, |_, _| Ok(()))
}

fn hash_extents(
    from: &File,
    length: u64,
    meter: &mut Meter<'_>,
    mut each: impl FnMut(&[u8], u64) -> Result<(), Errno>,
) -> Result<Sha256, Errno> {
    let mut digest = sha2::Sha256::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    let zeroes = vec![0; BUFFER_BYTES];
    let mut at = 0;
    while at < length {
        let (start, end) = next_data(from, at, length)?.unwrap_or((length, length));
        while at < start {
            let count = (start - at).min(BUFFER_BYTES as u64);
            digest.update(&zeroes[..count as usize]);
            at += count;
            meter.at(at);
        }
        while at < end {
            let count = (end - at).min(BUFFER_BYTES as u64) as usize;
            read_exact(from, &mut buffer[..count], at)?;
            digest.update(&buffer[..count]);
            each(&buffer[..count], at)?;
            at += count as u64;
            meter.at(at);
        }
    }
    Ok(Sha256(digest.finalize().into()))
}

/// Copies the data of `length` bytes into an empty file that ends up `length` long: by reference if
/// possible, else in the kernel, else through a buffer.
pub fn copy(from: &File, to: &File, length: u64, meter: &mut Meter<'_>) -> Result<(), Errno> {
    if reflink(from, to)? {
        meter.at(length);
        return Ok(());
    }
    rustix::fs::ftruncate(to, length)?;
    let mut in_kernel = true;
    let mut buffer = Vec::new();
    let mut at = 0;
    while let Some((start, end)) = next_data(from, at, length)? {
        at = start;
        while at < end {
            if in_kernel {
                match copy_in_kernel(from, to, at, end - at)? {
                    0 => in_kernel = false,
                    copied => at += copied,
                }
            } else {
                buffer.resize(BUFFER_BYTES, 0);
                let count = (end - at).min(BUFFER_BYTES as u64) as usize;
                read_exact(from, &mut buffer[..count], at)?;
                each_non_zero(&buffer[..count], at, |run, at| write_all(to, run, at))?;
                at += count as u64;
            }
            meter.at(at);
        }
    }
    meter.at(length);
    Ok(())
}

/// 0: this pair of files can't be copied in the kernel.
fn copy_in_kernel(from: &File, to: &File, at: u64, length: u64) -> Result<u64, Errno> {
    let (mut from_at, mut to_at) = (at, at);
    let count = length.min(REPORT_BYTES) as usize;
    match rustix::fs::copy_file_range(from, Some(&mut from_at), to, Some(&mut to_at), count) {
        Ok(copied) => Ok(copied as u64),
        Err(Errno::INTR) => copy_in_kernel(from, to, at, length),
        Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS | Errno::PERM) => Ok(0),
        Err(errno) => Err(errno),
    }
}

/// Reserves the blocks of `length` bytes; what the file holds (`content_bytes` of it) stays.
pub fn allocate(file: &File, content_bytes: u64, length: u64) -> Result<(), Errno> {
    loop {
        match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, length) {
            Err(Errno::INTR) => {}
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => break,
            result => return result,
        }
    }
    let zeroes = vec![0; BUFFER_BYTES];
    let mut at = content_bytes;
    while at < length {
        let count = (length - at).min(BUFFER_BYTES as u64);
        write_all(file, &zeroes[..count as usize], at)?;
        at += count;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// What isn't written is zero, what is written is what was there, and nothing overlaps.
        #[test]
        fn runs_rebuild_the_bytes(
            runs in proptest::collection::vec((any::<bool>(), 1usize..200_000), 0..8),
            at in 0u64..300_000,
        ) {
            let mut bytes = Vec::new();
            for (zero, length) in runs {
                bytes.extend((0..length).map(|i| if zero { 0 } else { i as u8 }));
            }
            let mut rebuilt = vec![0; bytes.len()];
            let mut last = at;
            each_non_zero(&bytes, at, |run, run_at| {
                prop_assert!(run_at >= last && !run.is_empty());
                last = run_at + run.len() as u64;
                let from = (run_at - at) as usize;
                rebuilt[from..from + run.len()].copy_from_slice(run);
                Ok(())
            })?;
            prop_assert!(rebuilt == bytes);
        }
    }
}
