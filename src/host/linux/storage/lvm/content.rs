//! Filling a logical volume. Its extents may hold what another volume left there: a guest must never read it.

use std::fs::File;
use std::io;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use super::super::copy::{self, Meter};

/// So much is zeroed at once: a kill or a report need not wait for more.
const PIECE_BYTES: u64 = 256 << 20;

/// Makes a range read as zeroes: by the device itself where it can, else in the kernel, else by writing.
pub fn zero(file: &File, from: u64, to: u64, meter: &mut Meter<'_>) -> io::Result<()> {
    let keep = FallocateFlags::KEEP_SIZE;
    let mut ways =
        [FallocateFlags::PUNCH_HOLE | keep, FallocateFlags::ZERO_RANGE | keep].into_iter().peekable();
    let mut at = from;
    while at < to {
        let length = (to - at).min(PIECE_BYTES);
        let done = match ways.peek() {
            Some(&way) => match fallocate(file, way, at, length) {
                Ok(()) => true,
                Err(Errno::INTR) => false,
                Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                    ways.next();
                    false
                }
                Err(errno) => return Err(errno.into()),
            },
            None => {
                let zeroes = vec![0; copy::BUFFER_BYTES];
                let mut written = 0;
                while written < length {
                    let piece = (length - written).min(zeroes.len() as u64) as usize;
                    copy::write_all(file, &zeroes[..piece], at + written)?;
                    written += piece as u64;
                }
                true
            }
        };
        if done {
            at += length;
            meter.at(at);
        }
    }
    Ok(())
}
