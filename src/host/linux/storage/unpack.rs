//! Sources on their way in: hashed as they are, decompressed if they are declared to be compressed, and
//! written without their zeroes. Memory is bounded by the decompressors' windows.

use std::fs::File;
use std::io::{self, BufReader, Read};

use sha2::Digest as _;

use super::copy::{self, BUFFER_BYTES, Meter};
use crate::host::step::Compression;
use crate::name::Sha256;

/// Windows of decompressors: what `xz -9` and `zstd --long` (27) need.
const WINDOW_BYTES_MAX: u32 = 128 << 20;
/// More than any disk.
const UNPACKED_BYTES_MAX: u64 = 64 << 40;

/// Reads a file and hashes what it reads.
struct Tee<'a, 'm> {
    file: &'a File,
    at: u64,
    digest: sha2::Sha256,
    meter: &'a mut Meter<'m>,
}

impl Read for Tee<'_, '_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = rustix::io::pread(self.file, &mut *buffer, self.at)?;
        self.digest.update(&buffer[..count]);
        self.at += count as u64;
        self.meter.at(self.at);
        Ok(count)
    }
}

/// Decompresses `from` into an empty file; gives the digest of what was read, all of `from`.
pub fn unpack(
    from: &File,
    compression: Compression,
    to: &File,
    meter: &mut Meter<'_>,
) -> io::Result<(Sha256, u64)> {
    let mut tee = Tee { file: from, at: 0, digest: sha2::Sha256::new(), meter };
    let written = decompress(BufReader::with_capacity(BUFFER_BYTES, &mut tee), compression, to)?;
    // What a decompressor left is part of the file.
    io::copy(&mut tee, &mut io::sink())?;
    Ok((Sha256(tee.digest.finalize().into()), written))
}

fn decompress(mut packed: impl io::BufRead, compression: Compression, to: &File) -> io::Result<u64> {
    let mut sparse = Sparse { to, at: 0, buffer: Vec::with_capacity(BUFFER_BYTES) };
    match compression {
        Compression::Gzip => sparse.take(flate2::bufread::MultiGzDecoder::new(packed))?,
        Compression::Xz => {
            sparse.take(lzma_rust2::XzReader::new_mem_limit(packed, true, WINDOW_BYTES_MAX >> 10))?;
        }
        // Parallel compressors write one frame after the other.
        Compression::Zstd => {
            while !packed.fill_buf()?.is_empty() {
                let frame = ruzstd::decoding::StreamingDecoder::new_with_max_window_size(
                    &mut packed,
                    WINDOW_BYTES_MAX.into(),
                );
                match frame {
                    Ok(frame) => sparse.take(frame)?,
                    Err(error) => return Err(io::Error::new(io::ErrorKind::InvalidData, error.to_string())),
                }
            }
        }
    }
    sparse.finish()
}

/// A file whose zeroes are holes.
struct Sparse<'a> {
    to: &'a File,
    at: u64,
    buffer: Vec<u8>,
}

impl Sparse<'_> {
    fn take(&mut self, mut from: impl Read) -> io::Result<()> {
        loop {
            let room = (BUFFER_BYTES - self.buffer.len()) as u64;
            let count = from.by_ref().take(room).read_to_end(&mut self.buffer)?;
            if self.buffer.len() == BUFFER_BYTES {
                self.write()?;
            } else if count as u64 != room {
                return Ok(());
            }
        }
    }

    fn write(&mut self) -> io::Result<()> {
        copy::each_non_zero(&self.buffer, self.at, |run, at| copy::write_all(self.to, run, at))?;
        self.at += self.buffer.len() as u64;
        self.buffer.clear();
        match self.at > UNPACKED_BYTES_MAX {
            true => Err(io::Error::new(io::ErrorKind::InvalidData, "it decompresses to more than 64 TiB")),
            false => Ok(()),
        }
    }

    fn finish(mut self) -> io::Result<u64> {
        self.write()?;
        self.to.set_len(self.at)?;
        Ok(self.at)
    }
}
