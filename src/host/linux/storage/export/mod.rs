//! Volumes on their way out: as one file that needs nothing else, whole or not there.
//!
//! What is read is what a guest sees, backing files included. The formats are written by us, front to back:
//! raw with holes, qcow2 by imago, qcow2 with compressed clusters, and vmdk as `streamOptimized`, which is the
//! form that OVAs hold and is always compressed.

mod qcow2;
mod vmdk;

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use flate2::{Compress, FlushCompress, Status};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, SeekFrom};
use rustix::io::Errno;

use super::copy::{self, Meter};
use super::qcow2::{Sink, Source};
use super::{ProgressHook, header, image, lvm, open_disk};
use crate::host::error::StepError;
use crate::host::snapshot::ImageHeader;
use crate::vmm::config::DiskFormat;

/// The unit that everything here is compressed in.
const CLUSTER_BYTES: u64 = 64 << 10;
const FILE_MODE: Mode = Mode::from_raw_mode(0o600);

/// What a volume is written as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExportFormat {
    Raw,
    Qcow2,
    CompressedQcow2,
    Vmdk,
}

/// A volume and where it goes.
pub struct Export<'a> {
    pub volume: &'a Path,
    pub volume_format: DiskFormat,
    pub to: &'a Path,
    pub format: ExportFormat,
}

/// Writes the volume; gives the new file's length. Nobody may write to the volume meanwhile.
pub fn export(export: &Export<'_>, hook: Option<&ProgressHook>) -> Result<u64, StepError> {
    let what = format!("export {} to {}", export.volume.display(), export.to.display());
    let failed = |error: io::Error| StepError::failed(&what, error);
    let file = open_still(export.volume).map_err(|error| match error {
        StepError::Failed { why, .. } => StepError::Failed {
            what: what.clone(),
            why,
            hint: Some(
                "a disk that is being written has no content that holds still: stop its VM first, or unmount it"
                    .into(),
            ),
        },
        error => error,
    })?;
    // A device has no length of its own, but an end.
    let bytes = rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|errno| failed(errno.into()))?;
    let backing = match export.volume_format {
        DiskFormat::Raw => None,
        DiskFormat::Qcow2 => open_backing(export.volume, &file, bytes, &what)?,
    };
    let backing = backing.as_ref().map(|(file, format)| (file, *format));
    let source = Source::open_chain(&file, export.volume_format, bytes, backing).map_err(failed)?;
    let out = Output::create(export.to).map_err(failed)?;
    let mut meter = Meter::new(hook, export.to.to_owned(), source.bytes());
    match export.format {
        ExportFormat::Raw => plain(&source, &out.file, DiskFormat::Raw, &mut meter),
        ExportFormat::Qcow2 => plain(&source, &out.file, DiskFormat::Qcow2, &mut meter),
        ExportFormat::CompressedQcow2 => qcow2::compressed(&source, &out.file, &mut meter),
        ExportFormat::Vmdk => vmdk::stream_optimized(&source, &out.file, export.to, &mut meter),
    }
    .map_err(failed)?;
    let length = out.file.metadata().map_err(failed)?.len();
    out.commit(export.to).map_err(failed)?;
    Ok(length)
}

/// The volume, which nobody else writes to while this is open.
fn open_still(volume: &Path) -> Result<File, StepError> {
    if volume.starts_with("/dev") { lvm::open_still(volume) } else { open_disk(volume, true).map(File::from) }
}

/// The image that the volume is an overlay of, locked. Its own format is in its name, where we put it.
fn open_backing(
    volume: &Path,
    file: &File,
    bytes: u64,
    what: &str,
) -> Result<Option<(File, DiskFormat)>, StepError> {
    let header = header::of_file(file, bytes).map_err(|errno| StepError::failed(what, errno))?;
    let without = ImageHeader { backing: None, ..header.clone() };
    image::check_image(&without, DiskFormat::Qcow2, what)?;
    let Some(backing) = &header.backing else { return Ok(None) };
    let format = match backing.extension().and_then(|extension| extension.to_str()) {
        Some("raw") => DiskFormat::Raw,
        Some("qcow2") => DiskFormat::Qcow2,
        _ => {
            let why = format!("its backing file {} is not one of vmctl's images", backing.display());
            return Err(StepError::failed(what, why));
        }
    };
    let path = volume.parent().unwrap_or(volume).join(backing);
    let file = File::from(open_disk(&path, true)?);
    let bytes = file.metadata().map_err(|error| StepError::failed(what, error))?.len();
    let header = header::of_file(&file, bytes).map_err(|errno| StepError::failed(what, errno))?;
    if format == DiskFormat::Qcow2 {
        image::check_image(&header, format, what)?;
    }
    Ok(Some((file, format)))
}

/// A file without a name until it is whole, or where that can't be, under a name that says what it is.
struct Output {
    file: File,
    name: Option<PathBuf>,
}

impl Output {
    fn create(to: &Path) -> io::Result<Self> {
        if to.symlink_metadata().is_ok() {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                format!("{} is there already", to.display()),
            ));
        }
        let directory = match to.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        match rustix::fs::openat(CWD, directory, flags | OFlags::TMPFILE, FILE_MODE) {
            Ok(file) => return Ok(Self { file: file.into(), name: None }),
            Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => {}
            Err(errno) => return Err(errno.into()),
        }
        let name = directory.join(format!(
            ".{}.vmctl-{}",
            to.file_name().unwrap_or_default().to_string_lossy(),
            std::process::id()
        ));
        let file = rustix::fs::openat(CWD, &name, flags | OFlags::CREATE | OFlags::EXCL, FILE_MODE)?;
        Ok(Self { file: file.into(), name: Some(name) })
    }

    /// Never replaces a file that came meanwhile.
    fn commit(mut self, to: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        match self.name.take() {
            None => {
                let fd = format!("/proc/self/fd/{}", self.file.as_raw_fd());
                rustix::fs::linkat(CWD, fd, CWD, to, AtFlags::SYMLINK_FOLLOW)?;
            }
            Some(name) => {
                let linked = rustix::fs::linkat(CWD, &name, CWD, to, AtFlags::empty());
                rustix::fs::unlinkat(CWD, &name, AtFlags::empty())?;
                linked?;
            }
        }
        let directory = to.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(directory.unwrap_or(Path::new(".")))?.sync_all()
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            let _ = std::fs::remove_file(name);
        }
    }
}

fn plain(source: &Source<'_>, to: &File, format: DiskFormat, meter: &mut Meter<'_>) -> io::Result<()> {
    let sink = Sink::create(to, format, source.bytes(), false)?;
    super::qcow2::convert(source, &sink, meter)
}

/// Calls `write` with each cluster that isn't zero, padded at the disk's end, and its number.
fn each_cluster(
    source: &Source<'_>,
    meter: &mut Meter<'_>,
    mut write: impl FnMut(&[u8], u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = vec![0; CLUSTER_BYTES as usize];
    let (total, mut at) = (source.bytes(), 0);
    while let Some((start, end)) = source.next_data(at)? {
        at = start / CLUSTER_BYTES * CLUSTER_BYTES;
        while at < end {
            let wanted = (total - at).min(CLUSTER_BYTES) as usize;
            source.read(&mut buffer[..wanted], at)?;
            buffer[wanted..].fill(0);
            if !copy::is_zero(&buffer) {
                write(&buffer, at / CLUSTER_BYTES)?;
            }
            at += CLUSTER_BYTES;
            meter.at(at.min(total));
        }
    }
    meter.at(total);
    Ok(())
}

/// Compresses `from` whole into `to`, which is emptied first. `false`: it doesn't get smaller than `room`.
fn pack(packer: &mut Compress, from: &[u8], to: &mut Vec<u8>, room: usize) -> io::Result<bool> {
    packer.reset();
    to.clear();
    to.resize(room, 0);
    let status = packer.compress(from, to, FlushCompress::Finish).map_err(io::Error::other)?;
    to.truncate(packer.total_out() as usize);
    Ok(status == Status::StreamEnd)
}

/// Appends to a file.
struct Tail<'a> {
    file: io::BufWriter<&'a File>,
    at: u64,
}

impl<'a> Tail<'a> {
    fn new(file: &'a File) -> Self {
        Self { file: io::BufWriter::with_capacity(1 << 20, file), at: 0 }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all(bytes)?;
        self.at += bytes.len() as u64;
        Ok(())
    }

    fn align(&mut self, to: u64) -> io::Result<()> {
        static ZEROES: [u8; CLUSTER_BYTES as usize] = [0; CLUSTER_BYTES as usize];
        let padding = self.at.next_multiple_of(to) - self.at;
        self.write(&ZEROES[..padding as usize])
    }
}
