//! What a VM process takes from itself before it runs a guest, in this order. Nothing here gives anything
//! back.
//!
//! 1. Inherited descriptors and the environment ([`detach`]).
//! 2. Its launcher's session, cgroup and PID namespace ([`daemonise`]).
//! 3. All other namespaces, and every file: its root is empty and read-only.
//! 4. Limits, its user, every capability, new privileges, tracers.
//! 5. Landlock (3 to 5: [`confine`]).
//! 6. Most system calls, by thread ([`Filters`]).
//!
//! What a host or an unprivileged launcher doesn't allow is left out and said; 1, 4 and 6 never are.

mod birth;
mod landlock;
mod namespaces;
mod privileges;
mod seccomp;
mod spawner;

pub use birth::{Born, Cgroup, Rights, Side, block_signals, daemonise, detach};
pub use seccomp::{Filters, Mode};
pub use spawner::Spawner;

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::thread::UnshareFlags;

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
    #[error("restrict the process by Landlock: {0}")]
    Landlock(String),
}

/// Steps 3 to 5. `vsock`: the directory that stays visible, for a VM with a vsock device; it becomes its
/// place in the new root. Gives what could not be done here, for a person.
pub fn confine(
    rights: &Rights,
    uid: u32,
    gid: u32,
    vsock: &mut Option<OwnedFd>,
) -> Result<Vec<String>, SandboxError> {
    let mut missing = Vec::new();
    match rights {
        Rights::Root => *vsock = namespaces::enter(vsock.as_ref().map(AsFd::as_fd))?,
        // Some distributions let a user make the namespace, and then give no rights in it.
        Rights::UserNamespace => match namespaces::enter(vsock.as_ref().map(AsFd::as_fd)) {
            Ok(inside) => *vsock = inside,
            Err(error) => missing.push(format!("namespaces and an empty root: {error}")),
        },
        Rights::None(why) => missing.push(format!("namespaces and an empty root: {why}")),
    }
    // SAFETY: geteuid has no preconditions.
    let root = unsafe { libc::geteuid() } == 0;
    privileges::set_limits(root)?;
    privileges::become_user(uid, gid, rights)?;
    // A kernel without it leaves a second lock off a door that isn't there; `vmctl check` says so.
    landlock::restrict(vsock.is_some())?;
    Ok(missing)
}

fn unshare(flags: UnshareFlags) -> rustix::io::Result<()> {
    // SAFETY: there is one thread, and its descriptor table is not among what is unshared here.
    unsafe { rustix::thread::unshare_unsafe(flags) }
}

/// Says what a system call was for.
fn failed(what: &'static str) -> impl FnOnce(io::Error) -> SandboxError + Copy {
    move |source| SandboxError::System { what, source }
}

/// Turns a system call's result into an error that says what it was for.
fn check(what: &'static str, result: libc::c_int) -> Result<(), SandboxError> {
    if result < 0 { Err(failed(what)(io::Error::last_os_error())) } else { Ok(()) }
}
