//! Block devices: what is on one before a group is made of it, and opening a logical volume's.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use serde::Deserialize;

use super::super::directory;
use super::command;
use crate::host::error::{ObserveError, StepError};
use crate::host::linux::ofd::Lock;
use crate::host::snapshot::{DeviceFacts, Observed};

const FIRST_BYTES: usize = 1 << 20;
const OPEN_PATIENCE: Duration = Duration::from_secs(2);
const OPEN_RETRY: Duration = Duration::from_millis(5);

/// What is on a device, without a write to it. `None`: there is no such device.
pub fn look(path: &Path) -> Option<Observed<DeviceFacts>> {
    let what = || format!("look at {}", path.display());
    match examine(path) {
        Ok(facts) => Some(Ok(facts)),
        Err(Trouble::Absent) => None,
        Err(Trouble::Why(why)) => Some(Err(ObserveError::new(what(), why))),
    }
}

enum Trouble {
    Absent,
    Why(String),
}

impl From<Errno> for Trouble {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::NOENT | Errno::NXIO | Errno::NODEV => Self::Absent,
            errno => Self::Why(errno.to_string()),
        }
    }
}

fn examine(path: &Path) -> Result<DeviceFacts, Trouble> {
    let stat = rustix::fs::stat(path)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::BlockDevice {
        return Err(Trouble::Why("it is not a block device".to_owned()));
    }
    let sysfs = sysfs_of(stat.st_rdev);
    // Opening it for nobody else fails where it is mounted, swapped to, or part of another device.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let (file, busy) = match rustix::fs::openat(CWD, path, flags | OFlags::EXCL, Mode::empty()) {
        Ok(file) => (file, false),
        Err(Errno::BUSY) => (rustix::fs::openat(CWD, path, flags, Mode::empty())?, true),
        Err(errno) => return Err(errno.into()),
    };
    let mut file = File::from(file);
    let size_bytes = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))?;
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0))?;
    let mut first = Vec::with_capacity(FIRST_BYTES);
    file.by_ref()
        .take(FIRST_BYTES as u64)
        .read_to_end(&mut first)
        .map_err(|error| Trouble::Why(error.to_string()))?;
    drop(file);
    Ok(DeviceFacts {
        size_bytes,
        in_use: in_use(&sysfs, busy),
        signatures: signatures(path)?,
        starts_empty: first.iter().all(|byte| *byte == 0),
    })
}

fn sysfs_of(device: u64) -> PathBuf {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    PathBuf::from(format!("/sys/dev/block/{major}:{minor}"))
}

fn in_use(sysfs: &Path, busy: bool) -> Option<String> {
    let names = |directory: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
    };
    let partitions: Vec<String> =
        names(sysfs).into_iter().filter(|name| sysfs.join(name).join("partition").exists()).collect();
    if !partitions.is_empty() {
        return Some(format!("it has the partitions {}", partitions.join(", ")));
    }
    let holders = names(&sysfs.join("holders"));
    if !holders.is_empty() {
        return Some(format!("{} is on it", holders.join(", ")));
    }
    let read_only = std::fs::read_to_string(sysfs.join("ro")).is_ok_and(|text| text.trim() == "1");
    if read_only {
        return Some("it is read-only".to_owned());
    }
    busy.then(|| "it is mounted, or another program has it for itself".to_owned())
}

#[derive(Deserialize)]
struct Signatures {
    #[serde(default)]
    signatures: Vec<Signature>,
}

#[derive(Deserialize)]
struct Signature {
    r#type: String,
}

fn signatures(path: &Path) -> Result<Vec<String>, Trouble> {
    let path = path.to_str().ok_or_else(|| Trouble::Why("its path is not UTF-8".to_owned()))?;
    let text = command::run("wipefs", &["--no-act", "--json", path])
        .map_err(|error| Trouble::Why(error.why("wipefs")))?;
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let found: Signatures =
        serde_json::from_str(&text).map_err(|error| Trouble::Why(format!("`wipefs`: {error}")))?;
    let mut names: Vec<String> = found.signatures.into_iter().map(|signature| signature.r#type).collect();
    names.dedup();
    Ok(names)
}

/// Opens the device of a logical volume, `/dev/<group>/<volume>`: what else may be behind that path is
/// refused. A writer gets it for itself alone, which keeps out mounts as well.
pub fn open(path: &Path, write: bool, alone: bool) -> Result<File, StepError> {
    let what = || format!("open the logical volume {}", path.display());
    let failed = |why: &dyn ToString| StepError::failed(what(), why.to_string());
    let mut flags = if write { OFlags::RDWR } else { OFlags::RDONLY };
    flags |= OFlags::NONBLOCK | OFlags::CLOEXEC;
    if alone {
        flags |= OFlags::EXCL;
    }
    let deadline = Instant::now() + OPEN_PATIENCE;
    let file = loop {
        match rustix::fs::openat(CWD, path, flags, Mode::empty()) {
            Ok(file) => break File::from(file),
            // A process that ends gives up its descriptors one after the other.
            Err(Errno::BUSY) if Instant::now() < deadline => std::thread::sleep(OPEN_RETRY),
            Err(Errno::BUSY) => {
                return Err(StepError::Failed {
                    what: what(),
                    why: "it is mounted, or another program has it for itself".to_owned(),
                    hint: Some("unmount it or stop what uses it, then apply again".to_owned()),
                });
            }
            Err(errno) => return Err(failed(&errno)),
        }
    };
    let stat = rustix::fs::fstat(&file).map_err(|errno| failed(&errno))?;
    let is_device = FileType::from_raw_mode(stat.st_mode) == FileType::BlockDevice;
    let name = std::fs::read_to_string(sysfs_of(stat.st_rdev).join("dm/name")).unwrap_or_default();
    if !is_device || mapped_name(path).as_deref() != Some(name.trim()) {
        return Err(failed(&"it is not that logical volume's device"));
    }
    rustix::fs::fcntl_setfl(&file, flags & OFlags::RDWR).map_err(|errno| failed(&errno))?;
    Ok(file)
}

/// For a VM: as [`open`], and locked.
pub fn open_disk(path: &Path, read_only: bool) -> Result<OwnedFd, StepError> {
    let file = open(path, !read_only, !read_only)?;
    let kind = if read_only { Lock::Shared } else { Lock::Exclusive };
    directory::take_lock(&file, kind, &format!("open the disk {}", path.display()))?;
    Ok(file.into())
}

/// To read what nobody writes meanwhile: no VM, and no file system that is mounted.
pub fn open_still(path: &Path) -> Result<File, StepError> {
    let lock =
        |file: &File| directory::take_lock(file, Lock::Shared, &format!("open the disk {}", path.display()));
    // A lock says who has it, and a device that is taken doesn't: so that comes first.
    lock(&open(path, false, false)?)?;
    let file = open(path, false, true)?;
    lock(&file)?;
    Ok(file)
}

/// What the device mapper calls `/dev/<group>/<volume>`: hyphens within a name are doubled.
fn mapped_name(path: &Path) -> Option<String> {
    let parts: Vec<&str> = path.strip_prefix("/dev").ok()?.to_str()?.split('/').collect();
    match parts.as_slice() {
        [group, volume] => Some(format!("{}-{}", group.replace('-', "--"), volume.replace('-', "--"))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mapped_names_double_hyphens() {
        assert_eq!(mapped_name(Path::new("/dev/vg-0/web-root")).as_deref(), Some("vg--0-web--root"));
        assert_eq!(mapped_name(Path::new("/dev/sda")), None);
        assert_eq!(mapped_name(Path::new("/dev/a/b/c")), None);
        assert_eq!(mapped_name(Path::new("/tmp/a/b")), None);
    }

    #[test]
    fn what_is_no_device_is_told_from_what_is_not_there() {
        assert!(look(Path::new("/dev/vmctl-no-such-device")).is_none());
        assert!(look(Path::new("/dev/null")).is_some_and(|facts| facts.is_err()));
    }
}
