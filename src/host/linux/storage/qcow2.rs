//! Making, growing and converting qcow2 images in process.
//!
//! No image that is opened here ever opens another: backing files are closed off, for a conversion
//! takes images without one, and the others touch nothing but metadata.

use std::fs::File;
use std::io;

use imago::format::PreallocateMode;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder, Mapping};

use super::copy::{self, Meter};
use crate::vmm::config::DiskFormat;

type Storage = imago::file::File;
type Image = FormatAccess<Storage>;

/// A multiple of the cluster size that we create with, so that no cluster is written in two parts.
const CHUNK_BYTES: u64 = 2 << 20;

/// The copy of the descriptor shares its open file description, and so its locks.
fn storage(file: &File) -> io::Result<Storage> {
    Storage::try_from(file.try_clone()?)
}

fn open(file: &File, write: bool) -> io::Result<Image> {
    let image = Qcow2::<Storage>::builder(storage(file)?).write(write).backing(None).data_file(None);
    Ok(FormatAccess::new(image.open(DenyImplicitOpenGate::default())?))
}

/// A blank image in an empty file.
pub fn create(file: &File, capacity_bytes: u64, preallocate: bool) -> io::Result<()> {
    let modes: &[PreallocateMode] = match preallocate {
        false => &[PreallocateMode::None],
        // Where blocks can't be reserved, they are written.
        true => &[PreallocateMode::FullAllocate, PreallocateMode::WriteData],
    };
    let mut result = Ok(());
    for mode in modes {
        file.set_len(0)?;
        let builder = Qcow2::<Storage>::create_builder(storage(file)?);
        result = builder.size(capacity_bytes).preallocate(*mode).create();
        match &result {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
            _ => break,
        }
    }
    result
}

/// An overlay in an empty file. `backing` is written as it is.
pub fn create_overlay(file: &File, capacity_bytes: u64, backing: &str, format: DiskFormat) -> io::Result<()> {
    let format = match format {
        DiskFormat::Raw => "raw",
        DiskFormat::Qcow2 => "qcow2",
    };
    let builder = Qcow2::<Storage>::create_builder(storage(file)?);
    builder.size(capacity_bytes).backing(backing.to_owned(), format.to_owned()).create()
}

/// Grows an image that nobody else sees yet: a kill in the middle of it may leave it damaged. See
/// [`super::resize`] for one that is in use.
pub fn grow_unseen(file: &File, capacity_bytes: u64) -> io::Result<()> {
    let image = open(file, true)?;
    image.resize_grow(capacity_bytes, PreallocateMode::None)?;
    image.flush()
}

/// What a conversion reads from.
pub enum Source<'a> {
    Raw { file: &'a File, bytes: u64 },
    Qcow2(Box<Image>),
}

impl<'a> Source<'a> {
    pub fn open(file: &'a File, format: DiskFormat, file_bytes: u64) -> io::Result<Self> {
        match format {
            DiskFormat::Raw => Ok(Self::Raw { file, bytes: file_bytes }),
            DiskFormat::Qcow2 => Ok(Self::Qcow2(Box::new(open(file, false)?))),
        }
    }

    /// With the one image that it is an overlay of, which is opened too.
    pub fn open_chain(
        file: &'a File,
        format: DiskFormat,
        file_bytes: u64,
        backing: Option<(&File, DiskFormat)>,
    ) -> io::Result<Self> {
        let Some((below, below_format)) = backing.filter(|_| format == DiskFormat::Qcow2) else {
            return Self::open(file, format, file_bytes);
        };
        let below = match below_format {
            DiskFormat::Raw => FormatAccess::new(Raw::open_image(storage(below)?, false)?),
            DiskFormat::Qcow2 => open(below, false)?,
        };
        let image = Qcow2::<Storage>::builder(storage(file)?).backing(Some(below)).data_file(None);
        Ok(Self::Qcow2(Box::new(FormatAccess::new(image.open(DenyImplicitOpenGate::default())?))))
    }

    pub fn bytes(&self) -> u64 {
        match self {
            Self::Raw { bytes, .. } => *bytes,
            Self::Qcow2(image) => image.size(),
        }
    }

    /// The next range at or after `at` that may hold something else than zeroes.
    pub fn next_data(&self, mut at: u64) -> io::Result<Option<(u64, u64)>> {
        match self {
            Self::Raw { file, bytes } => Ok(copy::next_data(file, at, *bytes)?),
            Self::Qcow2(image) => loop {
                let left = image.size().saturating_sub(at);
                let (mapping, length) = image.get_mapping(at, left)?;
                match mapping {
                    _ if length == 0 => return Ok(None),
                    Mapping::Zero { .. } => at += length,
                    Mapping::Eof { .. } => return Ok(None),
                    _ => return Ok(Some((at, at + length))),
                }
            },
        }
    }

    pub fn read(&self, buffer: &mut [u8], at: u64) -> io::Result<()> {
        match self {
            Self::Raw { file, .. } => Ok(copy::read_exact(file, buffer, at)?),
            Self::Qcow2(image) => image.read(buffer, at),
        }
    }
}

/// What a conversion writes to: something that reads as zeroes.
pub enum Sink<'a> {
    Raw(&'a File),
    Qcow2(Box<Image>),
}

impl<'a> Sink<'a> {
    pub fn create(
        file: &'a File,
        format: DiskFormat,
        capacity_bytes: u64,
        preallocate: bool,
    ) -> io::Result<Self> {
        match format {
            DiskFormat::Raw => {
                file.set_len(capacity_bytes)?;
                if preallocate {
                    copy::allocate(file, 0, capacity_bytes)?;
                }
                Ok(Self::Raw(file))
            }
            DiskFormat::Qcow2 => {
                create(file, capacity_bytes, preallocate)?;
                Ok(Self::Qcow2(Box::new(open(file, true)?)))
            }
        }
    }

    pub fn write(&self, bytes: &[u8], at: u64) -> io::Result<()> {
        match self {
            Self::Raw(file) => Ok(copy::write_all(file, bytes, at)?),
            Self::Qcow2(image) => image.write(bytes, at),
        }
    }
}

impl Sink<'_> {
    /// Brings what is still in memory to the file.
    pub fn finish(&self) -> io::Result<()> {
        match self {
            Self::Raw(_) => Ok(()),
            Self::Qcow2(image) => image.flush(),
        }
    }
}

/// Copies what a guest sees of `source`, leaving zeroes out, with one buffer of memory.
pub fn convert(source: &Source<'_>, sink: &Sink<'_>, meter: &mut Meter<'_>) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES as usize];
    let mut at = 0;
    while let Some((start, end)) = source.next_data(at)? {
        at = start;
        while at < end {
            let chunk_end = (at / CHUNK_BYTES + 1) * CHUNK_BYTES;
            let bytes = &mut buffer[..(chunk_end.min(end) - at) as usize];
            source.read(bytes, at)?;
            copy::each_non_zero(bytes, at, |run, at| sink.write(run, at))?;
            at += bytes.len() as u64;
            meter.at(at);
        }
    }
    meter.at(source.bytes());
    sink.finish()
}
