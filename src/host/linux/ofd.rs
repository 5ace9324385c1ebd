//! Locks that belong to an open file description: they go with the descriptor, across fork and
//! `SCM_RIGHTS`, and end with its last copy. Nothing here waits.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    Read,
    Write,
}

/// Locks the whole file; `false` if another description holds a lock against it.
pub fn try_lock(file: impl AsFd, access: Access) -> io::Result<bool> {
    let kind = match access {
        Access::Read => libc::F_RDLCK,
        Access::Write => libc::F_WRLCK,
    };
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        // Must be zero for OFD locks.
        l_pid: 0,
    };
    // SAFETY: the descriptor is borrowed for the call, and the kernel only reads `lock`, which lives
    // until the call returns.
    let done = unsafe { libc::fcntl(file.as_fd().as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) };
    if done == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN) | Some(libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}
