//! The birth of the process: it leaves its launcher and all that it could have inherited, and comes to
//! life in its own cgroup, as the first process of its own PID namespace. All before the first thread.

use std::io::{self, Read as _, Write as _};
use std::mem::size_of;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::ptr;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::UnshareFlags;

use super::{SandboxError, check, failed, unshare};
use crate::vmm::device::worker::share_one_heap;

/// Which process returned from [`daemonise`].
pub enum Side {
    /// The launcher's child, or the one between: to exit at once.
    Parent,
    /// In a session of its own, re-parented.
    Daemon(Born),
}

/// What the new process knows of itself.
pub struct Born {
    /// As the launcher sees it; in its own PID namespace it is 1.
    pub pid: i32,
    pub rights: Rights,
    /// What of its birth went another way than it should, for a person.
    pub missing: Vec<String>,
}

/// By which right the process can shut itself in.
#[derive(Debug)]
pub enum Rights {
    /// Root, with CAP_SYS_ADMIN.
    Root,
    /// A user, who is privileged in a user namespace made for it, and nowhere else.
    UserNamespace,
    /// Neither: no namespaces, no root of its own. Why.
    None(String),
}

/// The cgroup that the launcher made, if it could.
#[derive(Default)]
pub struct Cgroup {
    /// Its directory (version 2): the process is born in it.
    pub directory: Option<OwnedFd>,
    /// Its `cgroup.procs` in each hierarchy (version 1): the process moves there.
    pub procs: Vec<OwnedFd>,
}

/// Closes what was inherited beside standard I/O and `keep`, forgets the environment, and resets signals.
pub fn detach(keep: RawFd) -> Result<(), SandboxError> {
    // SAFETY: no thread runs beside this one: the environment and the process's descriptors are ours
    // alone, and nothing but `keep` and standard I/O is in use.
    unsafe {
        check("change to /", libc::chdir(c"/".as_ptr()))?;
        libc::umask(0o077);
        libc::clearenv();
        let from = (keep + 1) as libc::c_uint;
        check("close inherited descriptors", libc::close_range(from, libc::c_uint::MAX, 0))?;
        reset_signals();
    }
    share_one_heap();
    Ok(())
}

/// Leaves the launcher: its session, its terminal, its cgroup, its PID namespace.
pub fn daemonise(cgroup: &Cgroup) -> Result<Side, SandboxError> {
    let mut missing = Vec::new();
    if fork_into(cgroup, &mut missing)? {
        return Ok(Side::Parent);
    }
    // SAFETY: setsid has no preconditions; it can't fail in a process that leads no group.
    check("start a session", unsafe { libc::setsid() })?;
    let rights = leave_pid_namespace()?;
    let (mut told, mut tell) = io::pipe().map_err(failed("make a pipe"))?;
    // The second fork gives up being the session's leader, who could get a terminal again, and is the
    // first of the new PID namespace.
    let child = fork()?;
    if child > 0 {
        // The child that doesn't hear its number fails, and says so.
        let _ = tell.write_all(&child.to_ne_bytes());
        return Ok(Side::Parent);
    }
    drop(tell);
    let mut pid = [0; size_of::<libc::pid_t>()];
    told.read_exact(&mut pid).map_err(failed("learn the process's number"))?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(|errno| failed("open /dev/null")(errno.into()))?;
    for standard in 0..=2 {
        // SAFETY: standard I/O is nobody's but ours to replace.
        check("detach standard I/O", unsafe { libc::dup2(null.as_raw_fd(), standard) })?;
    }
    Ok(Side::Daemon(Born { pid: libc::pid_t::from_ne_bytes(pid), rights, missing }))
}

/// 0 in the child.
fn fork() -> Result<libc::pid_t, SandboxError> {
    // SAFETY: called while there is one thread, so the child is a complete copy.
    let pid = unsafe { libc::fork() };
    check("fork", pid)?;
    Ok(pid)
}

/// True in the parent. The child is born in the cgroup (version 2), for to move there later would make
/// the kernel wait for every processor; where it can't be, and in version 1, it moves.
fn fork_into(cgroup: &Cgroup, missing: &mut Vec<String>) -> Result<bool, SandboxError> {
    let mut moves: Vec<OwnedFd> = Vec::new();
    let born = match &cgroup.directory {
        Some(directory) => match fork_into_directory(directory) {
            Ok(parent) => Some(parent),
            // A kernel before 5.7, or one that has its reasons.
            Err(_) => {
                let flags = OFlags::WRONLY | OFlags::CLOEXEC;
                match rustix::fs::openat(directory, "cgroup.procs", flags, Mode::empty()) {
                    Ok(procs) => moves.push(procs),
                    Err(errno) => missing.push(format!("the VM's cgroup: {}", io::Error::from(errno))),
                }
                None
            }
        },
        None => None,
    };
    let parent = match born {
        Some(parent) => parent,
        None => fork()? > 0,
    };
    if !parent {
        for procs in moves.iter().chain(&cgroup.procs) {
            // 0 is whoever writes it.
            if let Err(errno) = rustix::io::write(procs, b"0") {
                missing.push(format!("join the VM's cgroup: {}", io::Error::from(errno)));
            }
        }
    }
    Ok(parent)
}

fn fork_into_directory(directory: &OwnedFd) -> io::Result<bool> {
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    // SAFETY: an all-zero clone_args is a valid one.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = CLONE_INTO_CGROUP;
    arguments.exit_signal = libc::SIGCHLD as u64;
    arguments.cgroup = directory.as_raw_fd() as u64;
    // SAFETY: without CLONE_VM this is a fork: the child has a copy of the one thread's memory and goes
    // on here. glibc doesn't know of it; the child makes no threads, and forks by glibc, which sets right
    // what glibc keeps of a thread.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) };
    if pid < 0 { Err(io::Error::last_os_error()) } else { Ok(pid > 0) }
}

/// The next child is the first in a PID namespace. There it sees no other process, whatever it is allowed.
fn leave_pid_namespace() -> Result<Rights, SandboxError> {
    // SAFETY: getuid and its kin have no preconditions.
    let (uid, gid, root) = unsafe { (libc::getuid(), libc::getgid(), libc::geteuid() == 0) };
    if root {
        return match unshare(UnshareFlags::NEWPID) {
            Ok(()) => Ok(Rights::Root),
            Err(Errno::PERM) => Ok(Rights::None("root without CAP_SYS_ADMIN may not make namespaces".into())),
            Err(errno) => Err(failed("make a PID namespace")(errno.into())),
        };
    }
    if let Err(errno) = unshare(UnshareFlags::NEWUSER | UnshareFlags::NEWPID) {
        let why = io::Error::from(errno);
        return Ok(Rights::None(format!("a user may not make user namespaces here ({why})")));
    }
    // The user stays who it is; nobody else exists here.
    for (file, text) in [
        ("/proc/self/setgroups", "deny".to_owned()),
        ("/proc/self/uid_map", format!("{uid} {uid} 1")),
        ("/proc/self/gid_map", format!("{gid} {gid} 1")),
    ] {
        std::fs::write(file, text).map_err(failed("set up the user namespace"))?;
    }
    Ok(Rights::UserNamespace)
}

/// Default actions for all signals, none blocked; but writing to a closed socket or pipe is an error to
/// be handled, not a signal.
fn reset_signals() {
    // SAFETY: only default and ignore actions are set, and a zeroed signal set is filled before use.
    // Signals that can't be changed answer EINVAL, which is as well.
    unsafe {
        for signal in 1..=libc::SIGRTMAX() {
            libc::signal(signal, libc::SIG_DFL);
        }
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &none, ptr::null_mut());
    }
}

/// SIGTERM becomes readable on the returned descriptor; it, SIGINT and SIGHUP do nothing else. Before
/// the first thread, for threads inherit the mask.
pub fn block_signals() -> io::Result<OwnedFd> {
    // SAFETY: the sets are initialised by sigemptyset before use, and a fresh signalfd is ours to own.
    unsafe {
        let mut blocked: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut blocked);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            libc::sigaddset(&mut blocked, signal);
        }
        if libc::sigprocmask(libc::SIG_BLOCK, &blocked, ptr::null_mut()) < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut termination: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut termination);
        libc::sigaddset(&mut termination, libc::SIGTERM);
        let fd = libc::signalfd(-1, &termination, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        let fd = OwnedFd::from_raw_fd(fd);
        debug_assert!(fd.as_raw_fd() > 2);
        Ok(fd)
    }
}
