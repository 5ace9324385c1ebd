//! Process-wide steps of the sandbox, all before the first thread.

use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::ptr;

use super::{SandboxError, check};
use crate::vmm::device::worker::share_one_heap;

/// More than the devices of a full machine with long backing chains need.
const OPEN_FILES_MAX: u64 = 1024;

/// Which process returned from [`daemonise`].
pub enum Side {
    /// The launcher's child, or the one between: to exit at once.
    Parent,
    /// In a session of its own, re-parented, with nothing open but the launch socket and `/dev/null`.
    Daemon,
}

/// Leaves the launcher: its session, its directory, its terminal, its environment, its descriptors.
/// Must be called before there is a second thread.
pub fn daemonise(keep: RawFd) -> Result<Side, SandboxError> {
    if fork()? {
        return Ok(Side::Parent);
    }
    // SAFETY: setsid has no preconditions; it can't fail in a process that leads no group.
    check("start a session", unsafe { libc::setsid() })?;
    // The second fork gives up being the session's leader, who could get a terminal again.
    if fork()? {
        return Ok(Side::Parent);
    }
    // SAFETY: no thread runs beside this one: the environment and the process's descriptors
    // are ours alone, and nothing but `keep` and standard I/O is in use.
    unsafe {
        check("change to /", libc::chdir(c"/".as_ptr()))?;
        libc::umask(0o077);
        libc::clearenv();
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
        check("open /dev/null", null)?;
        for standard in 0..=2 {
            check("detach standard I/O", libc::dup2(null, standard))?;
        }
        let from = (keep + 1) as libc::c_uint;
        check("close inherited descriptors", libc::close_range(from, libc::c_uint::MAX, 0))?;
        reset_signals();
    }
    share_one_heap();
    Ok(Side::Daemon)
}

/// True in the parent.
fn fork() -> Result<bool, SandboxError> {
    // SAFETY: called while there is one thread, so the child is a complete copy.
    let pid = unsafe { libc::fork() };
    check("fork", pid)?;
    Ok(pid > 0)
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

/// Becomes the given user with no capability and no way to get one.
pub fn drop_privileges(uid: u32, gid: u32) -> Result<(), SandboxError> {
    limit(libc::RLIMIT_NOFILE, OPEN_FILES_MAX)?;
    limit(libc::RLIMIT_CORE, 0)?;
    // SAFETY: getuid and its kin have no preconditions.
    let (have, privileged) = unsafe { (libc::getuid(), libc::geteuid() == 0) };
    if privileged {
        drop_bounding_set()?;
        // SAFETY: plain numbers; an empty list of groups needs no pointer.
        unsafe {
            check("drop supplementary groups", libc::setgroups(0, ptr::null()))?;
            check("become the group", libc::setresgid(gid, gid, gid))?;
            check("become the user", libc::setresuid(uid, uid, uid))?;
        }
    } else if have != uid {
        return Err(SandboxError::User { have, wanted: uid });
    }
    // SAFETY: prctl with plain numbers.
    unsafe {
        check(
            "clear ambient capabilities",
            libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0),
        )?;
        drop_capabilities()?;
        check("forbid new privileges", libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))?;
        // Nobody of the same user may trace this process or read its memory.
        check("forbid tracing", libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0))
    }
}

fn limit(resource: libc::__rlimit_resource_t, value: u64) -> Result<(), SandboxError> {
    let mut present = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls get a pointer to a valid rlimit.
    unsafe {
        check("read a resource limit", libc::getrlimit(resource, &mut present))?;
        // Never raised: an unprivileged process couldn't.
        let value = value.min(present.rlim_max);
        let wanted = libc::rlimit { rlim_cur: value, rlim_max: value };
        check("set a resource limit", libc::setrlimit(resource, &wanted))
    }
}

fn drop_bounding_set() -> Result<(), SandboxError> {
    for capability in 0..64 {
        // SAFETY: prctl with plain numbers.
        let present = unsafe { libc::prctl(libc::PR_CAPBSET_READ, capability, 0, 0, 0) };
        // The kernel knows no more.
        if present < 0 {
            break;
        }
        if present == 1 {
            // SAFETY: as above.
            let dropped = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, capability, 0, 0, 0) };
            check("drop a capability from the bounding set", dropped)?;
        }
    }
    Ok(())
}

/// `struct __user_cap_header_struct` and two of `__user_cap_data_struct`: effective, permitted,
/// inheritable, all empty.
fn drop_capabilities() -> Result<(), SandboxError> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    const VERSION_3: u32 = 0x2008_0522;
    let header = Header { version: VERSION_3, pid: 0 };
    let none = [0u32; 6];
    // SAFETY: both structures have the layout that version 3 of the call reads.
    let result = unsafe { libc::syscall(libc::SYS_capset, &raw const header, none.as_ptr()) };
    check("drop all capabilities", result as libc::c_int)
}
