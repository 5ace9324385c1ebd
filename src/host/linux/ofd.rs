//! Locks on open files: who writes a disk, and whose temporary file is still being made.
//!
//! They are OFD locks (`F_OFD_SETLK`): they belong to the open file description, so they travel
//! with a descriptor into a VM process, and end when its last copy is closed, even by SIGKILL.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags};
use rustix::io::Errno;

/// Linux's, which the libc crate doesn't have for every C library.
const F_SETSIG: libc::c_int = 10;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lock {
    /// For readers: many may hold it.
    Shared,
    /// For a writer: no other lock beside it.
    Exclusive,
}

impl Lock {
    /// The record for `fcntl`: the whole file, whatever its length becomes.
    fn record(self) -> libc::flock {
        // SAFETY: `flock` is a plain C structure of integers, for which all zeroes is a value.
        let mut record: libc::flock = unsafe { std::mem::zeroed() };
        record.l_type = match self {
            Lock::Shared => libc::F_RDLCK as libc::c_short,
            Lock::Exclusive => libc::F_WRLCK as libc::c_short,
        };
        record.l_whence = libc::SEEK_SET as libc::c_short;
        record
    }
}

fn fcntl(fd: BorrowedFd<'_>, command: libc::c_int, record: &mut libc::flock) -> Result<(), Errno> {
    loop {
        // SAFETY: the descriptor is open for the length of the borrow, and `record` is a valid
        // `flock` that the kernel reads and may write for the length of the call.
        let result = unsafe { libc::fcntl(fd.as_raw_fd(), command, std::ptr::from_mut(record)) };
        if result == 0 {
            return Ok(());
        }
        match Errno::from_io_error(&std::io::Error::last_os_error()) {
            Some(Errno::INTR) => {}
            Some(errno) => return Err(errno),
            None => return Err(Errno::IO),
        }
    }
}

/// Takes the lock if nobody else has one in its way. `Ok(false)`: somebody has.
///
/// A shared lock needs a descriptor that can read, an exclusive one a descriptor that can write.
pub fn try_lock(fd: impl AsFd, lock: Lock) -> Result<bool, Errno> {
    match fcntl(fd.as_fd(), libc::F_OFD_SETLK, &mut lock.record()) {
        Ok(()) => Ok(true),
        Err(Errno::AGAIN | Errno::ACCESS) => Ok(false),
        Err(errno) => Err(errno),
    }
}

/// Whether somebody else holds a lock that keeps others from writing.
pub fn is_locked(fd: impl AsFd) -> Result<bool, Errno> {
    let mut record = Lock::Exclusive.record();
    fcntl(fd.as_fd(), libc::F_OFD_GETLK, &mut record)?;
    Ok(record.l_type != libc::F_UNLCK as libc::c_short)
}

/// Takes the lock, waiting for it.
pub fn lock(fd: impl AsFd, lock: Lock) -> Result<(), Errno> {
    fcntl(fd.as_fd(), libc::F_OFD_SETLKW, &mut lock.record())
}

/// Gives the lock back. Closing the descriptor isn't enough where other threads start processes: a
/// child holds a copy of every descriptor between its fork and its exec.
pub fn unlock(fd: impl AsFd) {
    let mut record = Lock::Shared.record();
    record.l_type = libc::F_UNLCK as libc::c_short;
    // It can only fail for a bad descriptor or for want of memory; then closing must do.
    let _ = fcntl(fd.as_fd(), libc::F_OFD_SETLK, &mut record);
}

/// Whether somebody has this regular file open to write. `false`, too, where the file can't be opened or its
/// file system can't tell.
pub fn has_writer(path: &Path) -> bool {
    if !is_regular(path).unwrap_or(false) {
        return false;
    }
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC | rustix::fs::OFlags::NONBLOCK;
    let Ok(file) = rustix::fs::open(path, flags, rustix::fs::Mode::empty()) else { return false };
    let set = |command: libc::c_int, value: libc::c_int| {
        // SAFETY: the descriptor is open for the length of the call, and both commands take an integer.
        match unsafe { libc::fcntl(file.as_raw_fd(), command, value) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // A read lease is given only if nobody has the file open to write. It is given back at once; whoever opens
    // the file meanwhile waits for that alone, and the signal of it is one that does nothing (SIGIO would kill).
    if set(F_SETSIG, libc::SIGURG).is_err() {
        return false;
    }
    match set(libc::F_SETLEASE, libc::F_RDLCK) {
        Ok(()) => {
            let _ = set(libc::F_SETLEASE, libc::F_UNLCK);
            false
        }
        Err(error) => error.raw_os_error() == Some(libc::EAGAIN),
    }
}

/// Who is in the way of an exclusive lock on this file, as far as it can be found out: the kernel
/// names the process of a classic lock only, so for an OFD lock the descriptors of all processes
/// are searched.
pub fn holder(fd: impl AsFd) -> String {
    let mut record = Lock::Exclusive.record();
    if fcntl(fd.as_fd(), libc::F_OFD_GETLK, &mut record).is_ok() && record.l_pid > 0 {
        return describe(record.l_pid);
    }
    let Ok(stat) = rustix::fs::fstat(&fd) else { return "another process".to_owned() };
    let mut holders: Vec<i32> =
        processes().filter(|&pid| holds_lock(pid, stat.st_dev, stat.st_ino)).collect();
    holders.sort_unstable();
    match holders.as_slice() {
        [] => "another process".to_owned(),
        [pid] => describe(*pid),
        [first, rest @ ..] => format!("{} and {} more", describe(*first), rest.len()),
    }
}

fn describe(pid: i32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    let name: String = name.trim().chars().filter(|c| !c.is_control()).collect();
    match name.as_str() {
        "" => format!("process {pid}"),
        _ if pid == std::process::id() as i32 => format!("this process, {pid} ({name})"),
        _ => format!("process {pid} ({name})"),
    }
}

fn processes() -> impl Iterator<Item = i32> {
    std::fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

/// Whether the process has a descriptor of this file that carries a lock.
fn holds_lock(pid: i32, device: u64, inode: u64) -> bool {
    let descriptors = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten();
    descriptors.filter_map(Result::ok).any(|entry| {
        let same =
            rustix::fs::stat(entry.path()).is_ok_and(|stat| stat.st_dev == device && stat.st_ino == inode);
        same && std::fs::read_to_string(Path::new(&format!("/proc/{pid}/fdinfo")).join(entry.file_name()))
            .is_ok_and(|info| info.lines().any(|line| line.starts_with("lock:")))
    })
}

/// Whether `path` (followed) is a regular file; asked before an open that could wait or act on a
/// device.
pub fn is_regular(path: &Path) -> Result<bool, Errno> {
    let stat = rustix::fs::statx(CWD, path, AtFlags::empty(), StatxFlags::TYPE)?;
    Ok(FileType::from_raw_mode(stat.stx_mode.into()) == FileType::RegularFile)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn a_writer_is_seen_until_it_closes_the_file() {
        let path = std::env::temp_dir().join(format!("vmctl-writer-{}", std::process::id()));
        let file = File::create(&path).unwrap();
        assert!(has_writer(&path));
        drop(file);
        let _reader = File::open(&path).unwrap();
        assert!(!has_writer(&path));
        std::fs::remove_file(&path).unwrap();
        assert!(!has_writer(&path));
    }

    #[test]
    fn locks_exclude_across_descriptions_and_name_their_holder() {
        let directory = std::env::temp_dir().join(format!("vmctl-lock-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let path = directory.join("disk");
        let open =
            || File::options().read(true).write(true).create(true).truncate(false).open(&path).unwrap();
        let (first, second) = (open(), open());
        assert_eq!(try_lock(&first, Lock::Shared), Ok(true));
        assert_eq!(try_lock(&second, Lock::Shared), Ok(true));
        assert_eq!(try_lock(&second, Lock::Exclusive), Ok(false));
        drop(first);
        assert_eq!(try_lock(&second, Lock::Exclusive), Ok(true));
        let copy = second.try_clone().unwrap();
        drop(second);
        let third = open();
        assert_eq!(try_lock(&third, Lock::Shared), Ok(false), "a copy of the descriptor keeps the lock");
        let holder = holder(&third);
        assert!(holder.contains(&std::process::id().to_string()), "{holder}");
        drop(copy);
        assert_eq!(try_lock(&third, Lock::Shared), Ok(true));
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
