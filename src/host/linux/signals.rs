//! Signals as a descriptor, for one loop that waits for everything.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// What a service manager or a person asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// `SIGTERM` or `SIGINT`: end.
    End,
    /// `SIGHUP`: look at everything again.
    Reload,
}

/// Readable when a signal is pending. The signals stay blocked for the whole process from here on.
pub struct Signals {
    fd: OwnedFd,
}

impl Signals {
    /// Must be called before the process has other threads: they inherit what is blocked.
    pub fn open() -> io::Result<Self> {
        // SAFETY: `set` is a plain value that sigemptyset initialises before anything reads it, and it
        // outlives the calls; signalfd gives a new descriptor that nobody else owns.
        unsafe {
            let mut set = std::mem::zeroed::<libc::sigset_t>();
            libc::sigemptyset(&mut set);
            for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
                libc::sigaddset(&mut set, signal);
            }
            let error = libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
            if error != 0 {
                return Err(io::Error::from_raw_os_error(error));
            }
            let fd = libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            Ok(Self { fd: OwnedFd::from_raw_fd(fd) })
        }
    }

    /// The next pending signal, without waiting.
    pub fn next(&self) -> io::Result<Option<Signal>> {
        // SAFETY: an all-zero signalfd_siginfo is a valid value of that plain structure.
        let mut info = unsafe { std::mem::zeroed::<libc::signalfd_siginfo>() };
        let size = size_of::<libc::signalfd_siginfo>();
        // SAFETY: the pointer and length are those of `info`, which is plain data and lives on.
        let read = unsafe { libc::read(self.fd.as_raw_fd(), (&raw mut info).cast(), size) };
        if read < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::WouldBlock { Ok(None) } else { Err(error) };
        }
        Ok(Some(if info.ssi_signo == libc::SIGHUP as u32 { Signal::Reload } else { Signal::End }))
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
