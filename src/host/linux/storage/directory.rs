//! A pool's directory: its places, its lock, and the temporary files that things are made in.
//!
//! ```text
//! <pool>/<volume>.qcow2            volumes
//! <pool>/.vmctl/images/<digest>…   cached images
//! <pool>/.vmctl/trash/<file>.<t>   deleted volumes, with the time in Unix seconds
//! <pool>/.vmctl/tmp/<file>.<hex>   what is being made; locked by its maker
//! <pool>/.vmctl/downloads/…        images on their way here, see [`super::download`]
//! <pool>/.vmctl/marks/…            marks, where the file system has no user xattrs
//! <pool>/.vmctl/lock               held for the moments in which names change
//! ```

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use super::owner::{self, MarkStore, Marks};
use crate::host::error::StepError;
use crate::host::linux::ofd::{self, Lock};
use crate::name::Mark;

pub const PRIVATE: &str = ".vmctl";
/// Leaves room for what temporary files and the trash add.
const FILE_NAME_BYTES_MAX: usize = 200;
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
const LOCK_RETRY: Duration = Duration::from_millis(2);
/// Pools can be entered by those who know a name in them and are listed by root alone.
const POOL_MODE: Mode = Mode::from_raw_mode(0o711);
const PRIVATE_MODE: Mode = Mode::from_raw_mode(0o700);
pub const FILE_MODE: Mode = Mode::from_raw_mode(0o600);
const DIRECTORY_FLAGS: OFlags =
    OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Where in a pool a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    Volumes,
    Images,
    Trash,
}

impl Place {
    pub const ALL: [Place; 3] = [Place::Volumes, Place::Images, Place::Trash];

    /// The directory's name in `.vmctl/`, and that of its sidecars in `.vmctl/marks/`.
    fn name(self) -> &'static str {
        match self {
            Place::Volumes => "volumes",
            Place::Images => "images",
            Place::Trash => "trash",
        }
    }
}

/// One path component that is no trick: what a step may name in a pool.
pub fn check_file_name(name: &str) -> Result<(), StepError> {
    match is_plain(name) && name.len() <= FILE_NAME_BYTES_MAX {
        true => Ok(()),
        false => Err(StepError::failed(
            format!("use the file name {name:?}"),
            "it must be a plain name: at most 200 bytes, no `/`, no leading `.`, no control character",
        )),
    }
}

pub fn is_plain(name: &str) -> bool {
    !name.is_empty() && !name.starts_with('.') && !name.chars().any(|c| c == '/' || c.is_control())
}

/// Absolute, and without `.` and `..`.
pub fn check_pool_path(path: &Path) -> Result<(), StepError> {
    use std::path::Component::{Normal, RootDir};
    let mut components = path.components();
    let absolute = components.next() == Some(RootDir);
    let normal = components.clone().all(|component| matches!(component, Normal(_)));
    if absolute && normal && components.next().is_some() {
        return Ok(());
    }
    Err(StepError::failed(
        format!("use {} as a pool", path.display()),
        "it must be an absolute path other than `/`, without `..`",
    ))
}

/// A pool's directory, open. All that happens in the pool goes through these descriptors.
pub struct PoolDirectory {
    pub path: PathBuf,
    pub root: OwnedFd,
    /// `.vmctl/`
    private: OwnedFd,
    pub store: MarkStore,
}

/// Opens a pool's directory itself, which may not be a symbolic link.
pub fn open_root(path: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(CWD, path, DIRECTORY_FLAGS, Mode::empty())
}

/// Opens a directory below another one, without following a link.
pub fn open_below(parent: impl AsFd, name: &str) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(parent, name, DIRECTORY_FLAGS, Mode::empty())
}

fn open_or_make_below(parent: &OwnedFd, name: &str) -> Result<OwnedFd, Errno> {
    match open_below(parent, name) {
        Err(Errno::NOENT) => {}
        result => return result,
    }
    match rustix::fs::mkdirat(parent, name, PRIVATE_MODE) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno),
    }
    rustix::fs::fsync(parent)?;
    open_below(parent, name)
}

/// The directory with the sidecars of a place, for those who only look. `None`: there is none.
pub fn sidecars_of(root: impl AsFd, place: Place) -> Result<Option<OwnedFd>, Errno> {
    let mut directory = open_below(root, PRIVATE);
    for name in ["marks", place.name()] {
        directory = directory.and_then(|parent| open_below(parent, name));
    }
    match directory {
        Ok(directory) => Ok(Some(directory)),
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

impl PoolDirectory {
    /// Opens a pool that `CreatePool` has prepared.
    pub fn open(path: &Path) -> Result<Self, StepError> {
        check_pool_path(path)?;
        let what = || format!("open the pool {}", path.display());
        let root = open_root(path).map_err(|errno| StepError::failed(what(), pool_errno(errno)))?;
        let private = open_below(&root, PRIVATE).map_err(|errno| StepError::Failed {
            what: what(),
            why: match errno {
                Errno::NOENT => "it has no `.vmctl` directory".to_owned(),
                errno => format!("{PRIVATE}: {}", pool_errno(errno)),
            },
            hint: Some("is its file system mounted? Otherwise apply its StoragePool again".to_owned()),
        })?;
        let store = MarkStore::of(&root).map_err(|errno| StepError::failed(what(), errno))?;
        Ok(Self { path: path.to_owned(), root, private, store })
    }

    /// Makes the directory and its places as far as they are missing.
    pub fn prepare(path: &Path) -> Result<Self, StepError> {
        check_pool_path(path)?;
        let what = || format!("make the pool's directory {}", path.display());
        let root = make_all(path).map_err(|errno| StepError::failed(what(), pool_errno(errno)))?;
        let failed = |errno| StepError::failed(what(), errno);
        let private = open_or_make_below(&root, PRIVATE).map_err(failed)?;
        let store = MarkStore::of(&root).map_err(failed)?;
        let pool = Self { path: path.to_owned(), root, private, store };
        for name in ["images", "trash", "tmp"] {
            open_or_make_below(&pool.private, name).map_err(failed)?;
        }
        Ok(pool)
    }

    /// The directory of a place; made if it has gone.
    pub fn place(&self, place: Place) -> Result<OwnedFd, Errno> {
        match place {
            Place::Volumes => rustix::io::fcntl_dupfd_cloexec(&self.root, 0),
            _ => open_or_make_below(&self.private, place.name()),
        }
    }

    fn temporaries(&self) -> Result<OwnedFd, Errno> {
        open_or_make_below(&self.private, "tmp")
    }

    /// What is fetched from elsewhere, in parts.
    pub fn downloads(&self) -> Result<OwnedFd, Errno> {
        open_or_make_below(&self.private, "downloads")
    }

    fn sidecars(&self, place: Place) -> Result<OwnedFd, Errno> {
        open_or_make_below(&open_or_make_below(&self.private, "marks")?, place.name())
    }

    /// A file's path, for messages and for backing file names.
    pub fn file_path(&self, place: Place, name: &str) -> PathBuf {
        match place {
            Place::Volumes => self.path.join(name),
            _ => self.path.join(PRIVATE).join(place.name()).join(name),
        }
    }

    /// Waits for the pool's lock.
    pub fn lock(&self) -> Result<PoolLock<'_>, Errno> {
        let file = self.open_lock()?;
        ofd::lock(&file, Lock::Exclusive)?;
        Ok(PoolLock { pool: self, file })
    }

    fn open_lock(&self) -> Result<OwnedFd, Errno> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&self.private, "lock", flags, FILE_MODE)
    }

    /// Removes what dead processes left half-made. Does nothing while another process holds the
    /// pool's lock: the next run comes soon enough.
    pub fn clean_leftovers(&self) -> Result<(), Errno> {
        let temporaries = self.temporaries()?;
        let names = regular_names(&temporaries)?;
        if names.is_empty() {
            return Ok(());
        }
        let file = self.open_lock()?;
        if !ofd::try_lock(&file, Lock::Exclusive)? {
            return Ok(());
        }
        let _lock = PoolLock { pool: self, file };
        for name in names {
            let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            match rustix::fs::openat(&temporaries, &name, flags, Mode::empty()) {
                Ok(file) if ofd::try_lock(&file, Lock::Exclusive)? => {
                    // Nobody's: its maker is dead.
                    match rustix::fs::unlinkat(&temporaries, &name, AtFlags::empty()) {
                        Ok(()) | Err(Errno::NOENT) => {}
                        Err(errno) => return Err(errno),
                    }
                }
                Ok(_) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }

    /// Removes sidecars whose files are gone.
    pub fn clean_sidecars(&self) -> Result<(), Errno> {
        if self.store == MarkStore::Xattr {
            return Ok(());
        }
        let lock = self.lock()?;
        Place::ALL
            .into_iter()
            .try_for_each(|place| owner::remove_orphans(&lock, &self.sidecars(place)?, &self.place(place)?))
    }

    /// A new empty file in `tmp/`, locked, readable and writable.
    pub fn temporary(&self, for_name: &str) -> Result<Temporary<'_>, Errno> {
        let directory = self.temporaries()?;
        let mut random = [0u8; 8];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let name = format!("{for_name}.{:016x}", u64::from_ne_bytes(random));
        // Under the pool's lock, so that nobody finds it between its making and its lock.
        let _lock = self.lock()?;
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::openat(&directory, &name, flags, FILE_MODE)?);
        let temporary = Temporary { pool: self, directory, name, file, in_place: false };
        match ofd::try_lock(&temporary.file, Lock::Exclusive)? {
            true => Ok(temporary),
            false => Err(Errno::AGAIN),
        }
    }

    /// Opens a file of the pool with its marks. `None`: it is not there.
    pub fn entry(&self, place: Place, name: &str, write: bool) -> Result<Option<Entry<'_>>, StepError> {
        if !is_plain(name) {
            check_file_name(name)?;
        }
        let path = self.file_path(place, name);
        let what = || format!("open {}", path.display());
        let not_ours = |why: &str| Err(StepError::NotOurs { what: what(), why: why.to_owned() });
        let directory = self.place(place).map_err(|errno| StepError::failed(what(), errno))?;
        let access = if write { OFlags::RDWR } else { OFlags::RDONLY };
        let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = match rustix::fs::openat(&directory, name, flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP) => return not_ours("it is a symbolic link"),
            Err(Errno::ISDIR) => return not_ours("it is a directory"),
            Err(Errno::NXIO | Errno::NODEV) => return not_ours("it is not a regular file"),
            Err(errno) => return Err(StepError::failed(what(), errno)),
        };
        let read = || -> Result<Option<Marks>, Errno> {
            let mode = rustix::fs::fstat(&file)?.st_mode;
            if FileType::from_raw_mode(mode) != FileType::RegularFile {
                return Ok(None);
            }
            match self.store {
                MarkStore::Xattr => owner::read_xattrs(&file).map(Some),
                MarkStore::Sidecar => owner::read_sidecar(&self.sidecars(place)?, name, &file).map(Some),
            }
        };
        match read() {
            Ok(Some(marks)) => {
                Ok(Some(Entry { pool: self, place, name: name.to_owned(), directory, file, marks }))
            }
            Ok(None) => not_ours("it is not a regular file"),
            Err(errno) => Err(StepError::failed(format!("read the marks of {}", path.display()), errno)),
        }
    }

    /// The mark of the pool itself.
    pub fn mark(&self) -> Result<Option<Mark>, Errno> {
        pool_mark(&self.root, self.store)
    }

    pub fn set_mark(&self, mark: Option<&Mark>) -> Result<(), Errno> {
        let old = Marks { owner: self.mark()?, ..Marks::default() };
        let new = Marks { owner: mark.cloned(), ..Marks::default() };
        match self.store {
            MarkStore::Xattr => owner::write_xattrs(&self.root, &old, &new)?,
            MarkStore::Sidecar => {
                let marks = open_or_make_below(&self.private, "marks")?;
                owner::write_sidecar(&self.lock()?, &marks, "pool", &self.root, &new)?;
            }
        }
        rustix::fs::fsync(&self.root)
    }
}

/// The mark that a pool's directory carries.
pub fn pool_mark(root: &OwnedFd, store: MarkStore) -> Result<Option<Mark>, Errno> {
    match store {
        MarkStore::Xattr => Ok(owner::read_xattrs(root)?.owner),
        MarkStore::Sidecar => {
            match open_below(root, PRIVATE).and_then(|private| open_below(private, "marks")) {
                Ok(marks) => Ok(owner::read_sidecar(marks, "pool", root)?.owner),
                Err(Errno::NOENT) => Ok(None),
                Err(errno) => Err(errno),
            }
        }
    }
}

/// Takes a pool's mark away, even where its private directory is lost.
pub fn unmark(path: &Path, root: &OwnedFd, store: MarkStore) -> Result<(), StepError> {
    let failed = |errno: Errno| StepError::failed(format!("unmark {}", path.display()), errno);
    if store == MarkStore::Sidecar {
        return PoolDirectory::open(path)?.set_mark(None).map_err(failed);
    }
    let old = owner::read_xattrs(root).map_err(failed)?;
    owner::write_xattrs(root, &old, &Marks { owner: None, ..old.clone() })
        .and_then(|()| rustix::fs::fsync(root))
        .map_err(failed)
}

/// Says what an error means for a directory that was opened without following links.
pub fn pool_errno(errno: Errno) -> String {
    match errno {
        Errno::NOTDIR | Errno::LOOP => "it is a symbolic link, or not a directory".to_owned(),
        errno => errno.to_string(),
    }
}

/// `mkdir -p`, and the directory opened.
fn make_all(path: &Path) -> Result<OwnedFd, Errno> {
    match open_root(path) {
        Err(Errno::NOENT) => {}
        result => return result,
    }
    let parent = path.parent().ok_or(Errno::NOENT)?;
    std::fs::create_dir_all(parent).map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    match rustix::fs::mkdirat(CWD, path, POOL_MODE) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno),
    }
    rustix::fs::fsync(rustix::fs::openat(CWD, parent, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)?;
    open_root(path)
}

/// Held while names and sidecars of a pool change.
pub struct PoolLock<'p> {
    pool: &'p PoolDirectory,
    file: OwnedFd,
}

impl Drop for PoolLock<'_> {
    fn drop(&mut self) {
        ofd::unlock(&self.file);
    }
}

impl PoolLock<'_> {
    /// Writes a small file whole or not at all. Its temporary name is fixed: the lock keeps others
    /// from it, and what a crash leaves is overwritten or cleaned.
    pub fn replace_file(&self, directory: &OwnedFd, name: &str, content: &[u8]) -> Result<(), Errno> {
        replace_file(&self.pool.temporaries()?, "sidecar", directory, name, content)
    }
}

/// Writes `content` under `temporary_name`, syncs it and renames it. The caller holds a lock.
pub fn replace_file(
    temporaries: &OwnedFd,
    temporary_name: &str,
    directory: &OwnedFd,
    name: &str,
    content: &[u8],
) -> Result<(), Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(rustix::fs::openat(temporaries, temporary_name, flags, FILE_MODE)?);
    let written = file.write_all(content).and_then(|()| file.sync_all());
    if let Err(error) = written {
        // Best effort: what stays is overwritten by the next call.
        let _ = rustix::fs::unlinkat(temporaries, temporary_name, AtFlags::empty());
        return Err(Errno::from_io_error(&error).unwrap_or(Errno::IO));
    }
    rustix::fs::renameat(temporaries, temporary_name, directory, name)?;
    rustix::fs::fsync(directory)
}

/// A file that is being made. Dropped, it is gone.
pub struct Temporary<'p> {
    pool: &'p PoolDirectory,
    directory: OwnedFd,
    name: String,
    pub file: File,
    in_place: bool,
}

impl Temporary<'_> {
    /// Marks the file, brings it to the disk and gives it its name. `Ok(false)`: the name is taken,
    /// and by whom is for the caller to find out.
    pub fn commit(mut self, place: Place, name: &str, marks: &Marks) -> Result<bool, Errno> {
        let directory = self.pool.place(place)?;
        if self.pool.store == MarkStore::Xattr {
            owner::write_xattrs(&self.file, &Marks::default(), marks)?;
        }
        rustix::fs::fsync(&self.file)?;
        let lock = self.pool.lock()?;
        if exists(&directory, name)? {
            return Ok(false);
        }
        if self.pool.store == MarkStore::Sidecar {
            owner::write_sidecar(&lock, &self.pool.sidecars(place)?, name, &self.file, marks)?;
        }
        match rename_new(&self.directory, &self.name, &directory, name) {
            Ok(()) => self.in_place = true,
            Err(Errno::EXIST) => return Ok(false),
            Err(errno) => return Err(errno),
        }
        rustix::fs::fsync(&directory)?;
        Ok(true)
    }
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        if !self.in_place {
            // What can't be removed now is unlocked by our end and removed by a later run.
            let _ = rustix::fs::unlinkat(&self.directory, &self.name, AtFlags::empty());
        }
        ofd::unlock(&self.file);
    }
}

fn exists(directory: impl AsFd, name: &str) -> Result<bool, Errno> {
    match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(_) => Ok(true),
        Err(Errno::NOENT) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Renames, and fails with `EXIST` rather than replace. Where the file system can't promise that in
/// one call (NFS), a hard link can: making one never replaces.
fn rename_new(from: &OwnedFd, old: &str, to: &OwnedFd, new: &str) -> Result<(), Errno> {
    match rustix::fs::renameat_with(from, old, to, new, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            rustix::fs::linkat(from, old, to, new, AtFlags::empty())?;
            rustix::fs::unlinkat(from, old, AtFlags::empty())
        }
        result => result,
    }
}

/// An existing file of a pool, open, with its marks as they were when it was opened.
pub struct Entry<'p> {
    pool: &'p PoolDirectory,
    place: Place,
    name: String,
    directory: OwnedFd,
    pub file: File,
    pub marks: Marks,
}

impl Drop for Entry<'_> {
    fn drop(&mut self) {
        ofd::unlock(&self.file);
    }
}

impl Entry<'_> {
    pub fn path(&self) -> PathBuf {
        self.pool.file_path(self.place, &self.name)
    }

    pub fn bytes(&self) -> Result<u64, StepError> {
        let stat = rustix::fs::fstat(&self.file);
        stat.map(|stat| stat.st_size as u64)
            .map_err(|errno| StepError::failed(format!("look at {}", self.path().display()), errno))
    }

    /// Fails unless the file carries this mark.
    pub fn must_be(&self, mark: &Mark, doing: &str) -> Result<(), StepError> {
        match &self.marks.owner {
            Some(owner) if owner == mark => Ok(()),
            other => Err(not_ours(format!("{doing} {}", self.path().display()), other.as_ref(), mark)),
        }
    }

    /// Takes the exclusive lock, kept while the entry lives: no process has the disk open.
    pub fn must_be_unused(&self, doing: &str) -> Result<(), StepError> {
        take_lock(&self.file, Lock::Exclusive, &format!("{doing} {}", self.path().display()))
    }

    pub fn write_marks(&mut self, new: Marks) -> Result<(), StepError> {
        let result = match self.pool.store {
            MarkStore::Xattr => owner::write_xattrs(&self.file, &self.marks, &new),
            MarkStore::Sidecar => self.pool.lock().and_then(|lock| {
                let sidecars = self.pool.sidecars(self.place)?;
                owner::write_sidecar(&lock, &sidecars, &self.name, &self.file, &new)
            }),
        };
        let result = result.and_then(|()| rustix::fs::fsync(&self.file));
        result.map_err(|errno| StepError::failed(format!("mark {}", self.path().display()), errno))?;
        self.marks = new;
        Ok(())
    }

    /// Fails unless the name still leads to the file that is open.
    fn must_be_in_place(&self) -> Result<(), Errno> {
        let named = rustix::fs::statat(&self.directory, &self.name, AtFlags::SYMLINK_NOFOLLOW)?;
        let open = rustix::fs::fstat(&self.file)?;
        match (named.st_dev, named.st_ino) == (open.st_dev, open.st_ino) {
            true => Ok(()),
            false => Err(Errno::STALE),
        }
    }

    /// Removes the file for good.
    pub fn remove(self) -> Result<(), StepError> {
        let path = self.path();
        let remove = || -> Result<(), Errno> {
            let _lock = self.pool.lock()?;
            self.must_be_in_place()?;
            rustix::fs::unlinkat(&self.directory, &self.name, AtFlags::empty())?;
            if self.pool.store == MarkStore::Sidecar {
                owner::remove_sidecar(self.pool.sidecars(self.place)?, &self.name)?;
            }
            rustix::fs::fsync(&self.directory)
        };
        remove().map_err(|errno| StepError::failed(format!("remove {}", path.display()), errno))
    }

    /// Moves the file to another place with new marks; they are there before the name changes.
    /// `Ok(None)`: that name is taken.
    pub fn move_to(&mut self, place: Place, name: &str, marks: Marks) -> Result<Option<()>, StepError> {
        let mut moved = || -> Result<Option<()>, Errno> {
            let directory = self.pool.place(place)?;
            let lock = self.pool.lock()?;
            self.must_be_in_place()?;
            if exists(&directory, name)? {
                return Ok(None);
            }
            match self.pool.store {
                MarkStore::Xattr => owner::write_xattrs(&self.file, &self.marks, &marks)?,
                MarkStore::Sidecar => {
                    owner::write_sidecar(&lock, &self.pool.sidecars(place)?, name, &self.file, &marks)?;
                }
            }
            rustix::fs::fsync(&self.file)?;
            rename_new(&self.directory, &self.name, &directory, name)?;
            rustix::fs::fsync(&self.directory)?;
            rustix::fs::fsync(&directory)?;
            if self.pool.store == MarkStore::Sidecar {
                owner::remove_sidecar(self.pool.sidecars(self.place)?, &self.name)?;
            }
            self.directory = directory;
            self.marks = marks.clone();
            Ok(Some(()))
        };
        let result = moved();
        let what =
            format!("move {} to {}", self.path().display(), self.pool.file_path(place, name).display());
        let result = result.map_err(|errno| StepError::failed(what, errno))?;
        if result.is_some() {
            (self.place, self.name) = (place, name.to_owned());
        }
        Ok(result)
    }
}

/// Takes a disk's lock or says who has it.
///
/// Waits for a moment: a process that is between fork and exec still has its descriptors, and one that
/// ends gives them up one after the other (a tap's waits for the network).
pub fn take_lock(file: &File, kind: Lock, what: &str) -> Result<(), StepError> {
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match ofd::try_lock(file, kind) {
            Ok(false) if Instant::now() < deadline => std::thread::sleep(LOCK_RETRY),
            result => return take_lock_result(file, result, what),
        }
    }
}

fn take_lock_result(file: &File, result: Result<bool, Errno>, what: &str) -> Result<(), StepError> {
    match result {
        Ok(true) => Ok(()),
        Ok(false) => Err(StepError::Failed {
            what: what.to_owned(),
            why: format!("it is in use by {}", ofd::holder(file)),
            hint: Some("stop what uses it, then apply again".to_owned()),
        }),
        Err(errno) => Err(StepError::failed(format!("{what}: lock it"), errno)),
    }
}

pub fn not_ours(what: String, found: Option<&Mark>, wanted: &Mark) -> StepError {
    let why = match found {
        Some(found) => format!("it carries the mark {found}, and not {wanted}"),
        None => format!("it carries no mark of ours ({wanted} was expected)"),
    };
    StepError::NotOurs { what, why }
}

/// The regular files in a directory, by name. Names that aren't UTF-8 are nobody's business here.
pub fn regular_names(directory: &OwnedFd) -> Result<Vec<String>, Errno> {
    let mut names = Vec::new();
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().to_str() else { continue };
        let kind = match entry.file_type() {
            FileType::Unknown => match rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => FileType::from_raw_mode(stat.st_mode),
                Err(Errno::NOENT) => continue,
                Err(errno) => return Err(errno),
            },
            kind => kind,
        };
        if kind == FileType::RegularFile {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

/// Reads a small file; what is longer than `bytes_max` is an error.
pub fn read_bounded(file: impl AsFd, bytes_max: usize) -> Result<Vec<u8>, Errno> {
    let mut content = vec![0; bytes_max + 1];
    let mut length = 0;
    while length < content.len() {
        match rustix::io::pread(&file, &mut content[length..], length as u64) {
            Ok(0) => break,
            Ok(count) => length += count,
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno),
        }
    }
    if length > bytes_max {
        return Err(Errno::FBIG);
    }
    content.truncate(length);
    Ok(content)
}
