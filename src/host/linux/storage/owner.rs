//! Whose a file is: marks as extended attributes, or beside the file where there are none.
//!
//! A sidecar (`.vmctl/marks/…/<file>.json`) names the inode that it speaks of, and says nothing
//! about another: so it may be written before its file gets its name, and a crash between the two,
//! or a foreign file that takes the name later, never makes a foreign file ours.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, XattrFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::directory::{self, PoolLock};
use crate::name::Mark;

const OWNER: &str = "user.vmctl.owner";
const RETAINED: &str = "user.vmctl.retained";
const RECLAIM: &str = "user.vmctl.reclaim";
const SHA256: &str = "user.vmctl.sha256";
const TRASHED: &str = "user.vmctl.trashed";
const RECLAIM_DELETE: &str = "Delete";

/// Longer than any value that we write; a longer one is not ours.
const VALUE_BYTES_MAX: usize = 512;
const SIDECAR_BYTES_MAX: usize = 16 << 10;

/// What we know of a file beyond its content.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Marks {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub owner: Option<Mark>,
    /// The mark that it carried before its data was kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retained: Option<Mark>,
    #[serde(default)]
    pub reclaim_delete: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// When it was moved to the trash.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub trashed_unix_seconds: Option<u64>,
}

/// Where a pool keeps its marks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MarkStore {
    Xattr,
    Sidecar,
}

impl MarkStore {
    /// What the file system of this directory can do.
    pub fn of(directory: impl AsFd) -> Result<Self, Errno> {
        match get(&directory, OWNER) {
            Err(Errno::OPNOTSUPP) => Ok(Self::Sidecar),
            Err(errno) => Err(errno),
            Ok(_) => Ok(Self::Xattr),
        }
    }
}

/// The value of an attribute; `None` if it is missing, longer than ours are, or not UTF-8.
fn get(file: impl AsFd, name: &str) -> Result<Option<String>, Errno> {
    let mut value = [0u8; VALUE_BYTES_MAX];
    match rustix::fs::fgetxattr(file, name, &mut value[..]) {
        Ok(length) => Ok(std::str::from_utf8(&value[..length]).ok().map(str::to_owned)),
        Err(Errno::NODATA | Errno::RANGE) => Ok(None),
        Err(errno) => Err(errno),
    }
}

fn set(file: impl AsFd, name: &str, value: Option<&str>) -> Result<(), Errno> {
    match value {
        Some(value) => rustix::fs::fsetxattr(file, name, value.as_bytes(), XattrFlags::empty()),
        None => match rustix::fs::fremovexattr(file, name) {
            Err(Errno::NODATA) => Ok(()),
            result => result,
        },
    }
}

/// The marks that a file carries as extended attributes.
pub fn read_xattrs(file: impl AsFd) -> Result<Marks, Errno> {
    let mut marks = Marks::default();
    let mut list = [0u8; 2048];
    let names = match rustix::fs::flistxattr(&file, &mut list[..]) {
        Ok(length) => &list[..length],
        // More attributes than fit: ask for ours by name.
        Err(Errno::RANGE) => {
            b"user.vmctl.owner\0user.vmctl.retained\0user.vmctl.reclaim\0user.vmctl.sha256\0user.vmctl.trashed"
        }
        Err(errno) => return Err(errno),
    };
    for name in names.split(|&byte| byte == 0).filter_map(|name| std::str::from_utf8(name).ok()) {
        match name {
            OWNER => marks.owner = get(&file, OWNER)?.and_then(|text| text.parse().ok()),
            RETAINED => marks.retained = get(&file, RETAINED)?.and_then(|text| text.parse().ok()),
            RECLAIM => marks.reclaim_delete = get(&file, RECLAIM)?.as_deref() == Some(RECLAIM_DELETE),
            SHA256 => marks.sha256 = get(&file, SHA256)?,
            TRASHED => marks.trashed_unix_seconds = get(&file, TRASHED)?.and_then(|text| text.parse().ok()),
            _ => {}
        }
    }
    Ok(marks)
}

/// Changes the attributes from `old` to `new`.
///
/// In an order in which a crash at any point leaves the file owned or retained, never nobody's, and
/// never owned with a reclaim policy that its owner didn't ask for.
pub fn write_xattrs(file: impl AsFd, old: &Marks, new: &Marks) -> Result<(), Errno> {
    if old.reclaim_delete != new.reclaim_delete {
        set(&file, RECLAIM, new.reclaim_delete.then_some(RECLAIM_DELETE))?;
    }
    let text = |mark: &Option<Mark>| mark.as_ref().map(Mark::to_string);
    let seconds = |marks: &Marks| marks.trashed_unix_seconds.map(|seconds| seconds.to_string());
    let attributes = [
        (SHA256, old.sha256.clone(), new.sha256.clone()),
        (TRASHED, seconds(old), seconds(new)),
        (RETAINED, text(&old.retained), text(&new.retained)),
        (OWNER, text(&old.owner), text(&new.owner)),
    ];
    let changed = attributes.iter().filter(|(_, old, new)| old != new);
    let (given, taken): (Vec<_>, Vec<_>) = changed.partition(|(_, _, new)| new.is_some());
    for (name, _, value) in given.into_iter().chain(taken) {
        set(&file, name, value.as_deref())?;
    }
    Ok(())
}

/// Which file a sidecar speaks of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Identity {
    inode: u64,
    /// Where the file system keeps it: tells a later file with a reused inode number apart.
    #[serde(skip_serializing_if = "Option::is_none")]
    born_unix_ns: Option<i64>,
}

impl Identity {
    fn of(file: impl AsFd) -> Result<Self, Errno> {
        let wanted = StatxFlags::INO | StatxFlags::BTIME;
        let stat = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, wanted)?;
        let born_unix_ns = (stat.stx_mask & StatxFlags::BTIME.bits() != 0).then(|| {
            stat.stx_btime.tv_sec.saturating_mul(1_000_000_000).saturating_add(stat.stx_btime.tv_nsec.into())
        });
        Ok(Self { inode: stat.stx_ino, born_unix_ns })
    }
}

#[derive(Serialize, Deserialize)]
struct Sidecar {
    #[serde(flatten)]
    identity: Identity,
    #[serde(flatten)]
    marks: Marks,
}

fn sidecar_name(name: &str) -> String {
    format!("{name}.json")
}

/// The marks of an open file whose name in `marks_directory` is `name`. A sidecar that can't be
/// understood or that speaks of another file counts as none.
pub fn read_sidecar(marks_directory: impl AsFd, name: &str, file: impl AsFd) -> Result<Marks, Errno> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let sidecar = match rustix::fs::openat(marks_directory, sidecar_name(name), flags, Mode::empty()) {
        Ok(sidecar) => sidecar,
        Err(Errno::NOENT | Errno::LOOP) => return Ok(Marks::default()),
        Err(errno) => return Err(errno),
    };
    let text = directory::read_bounded(&sidecar, SIDECAR_BYTES_MAX)?;
    let identity = Identity::of(file)?;
    match serde_json::from_slice::<Sidecar>(&text) {
        Ok(sidecar) if sidecar.identity == identity => Ok(sidecar.marks),
        _ => Ok(Marks::default()),
    }
}

/// Replaces the sidecar atomically.
pub fn write_sidecar(
    lock: &PoolLock<'_>,
    marks_directory: &OwnedFd,
    name: &str,
    file: impl AsFd,
    marks: &Marks,
) -> Result<(), Errno> {
    let sidecar = Sidecar { identity: Identity::of(file)?, marks: marks.clone() };
    let text = serde_json::to_vec(&sidecar).map_err(|_| Errno::INVAL)?;
    lock.replace_file(marks_directory, &sidecar_name(name), &text)
}

pub fn remove_sidecar(marks_directory: impl AsFd, name: &str) -> Result<(), Errno> {
    match rustix::fs::unlinkat(marks_directory, sidecar_name(name), AtFlags::empty()) {
        Err(Errno::NOENT) => Ok(()),
        result => result,
    }
}

/// Removes the sidecars whose file is gone or another: `files` is where the files are.
pub fn remove_orphans(_lock: &PoolLock<'_>, marks_directory: &OwnedFd, files: &OwnedFd) -> Result<(), Errno> {
    for name in directory::regular_names(marks_directory)? {
        let Some(file_name) = name.strip_suffix(".json") else { continue };
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let orphan = match rustix::fs::openat(files, file_name, flags, Mode::empty()) {
            Ok(file) => read_sidecar(marks_directory, file_name, file)? == Marks::default(),
            Err(Errno::NOENT) => true,
            Err(errno) => return Err(errno),
        };
        if orphan {
            remove_sidecar(marks_directory, file_name)?;
        }
    }
    Ok(())
}
