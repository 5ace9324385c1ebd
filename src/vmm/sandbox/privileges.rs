//! Who the process is and what it may do at all: limits, user, capabilities.

use std::ptr;

use super::birth::Rights;
use super::{SandboxError, check};

/// More than the devices of a full machine with long backing chains need.
const OPEN_FILES_MAX: u64 = 1024;
/// More threads than a full machine has, of one user whom no other process shares.
const THREADS_MAX: u64 = 512;

/// Before [`become_user`]: what the process can't get more of.
pub fn set_limits(unique_user: bool) -> Result<(), SandboxError> {
    limit(libc::RLIMIT_NOFILE, OPEN_FILES_MAX)?;
    // A core would hold the guest's memory.
    limit(libc::RLIMIT_CORE, 0)?;
    limit(libc::RLIMIT_MSGQUEUE, 0)?;
    limit(libc::RLIMIT_RTPRIO, 0)?;
    limit(libc::RLIMIT_NICE, 0)?;
    if unique_user { limit(libc::RLIMIT_NPROC, THREADS_MAX) } else { Ok(()) }
}

/// Becomes the given user with no capability and no way to get one.
pub fn become_user(uid: u32, gid: u32, rights: &Rights) -> Result<(), SandboxError> {
    // SAFETY: getuid and its kin have no preconditions.
    let (have, root) = unsafe { (libc::getuid(), libc::geteuid() == 0) };
    if root || matches!(rights, Rights::UserNamespace) {
        drop_bounding_set()?;
    }
    if root {
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
