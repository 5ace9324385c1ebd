//! What a VM process takes from itself before it runs a guest: its launcher, its descriptors, its
//! environment, its user, its capabilities, and most system calls. Nothing here gives anything back.

mod process;
mod seccomp;
mod spawner;

pub use process::{Side, block_signals, daemonise, drop_privileges};
pub use seccomp::{Filters, Mode};
pub use spawner::Spawner;

use std::io;

#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("{what}: {source}")]
    System {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error(
        "the process runs as user {have} and can't become user {wanted}: start it as root, or as that user"
    )]
    User { have: u32, wanted: u32 },
    #[error("build the seccomp filters: {0}")]
    Filter(String),
}

/// Turns a system call's result into an error that says what it was for.
fn check(what: &'static str, result: libc::c_int) -> Result<(), SandboxError> {
    if result < 0 { Err(SandboxError::System { what, source: io::Error::last_os_error() }) } else { Ok(()) }
}
