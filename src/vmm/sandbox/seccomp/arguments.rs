//! What arguments a listed call may have. Where a call is not named here, all it does is to descriptors
//! and memory that the process has anyway.

use seccompiler::{BackendError, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};

use super::calls::Profile;

/// Given back, or given to the guest in another form; none that poisons pages or asks for privilege.
const ADVICE: &[u64] = &[
    libc::MADV_DONTNEED as u64,
    libc::MADV_FREE as u64,
    libc::MADV_REMOVE as u64,
    libc::MADV_WILLNEED as u64,
    libc::MADV_HUGEPAGE as u64,
    libc::MADV_NOHUGEPAGE as u64,
    libc::MADV_MERGEABLE as u64,
    libc::MADV_UNMERGEABLE as u64,
    libc::MADV_DONTDUMP as u64,
    libc::MADV_DONTFORK as u64,
    libc::MADV_POPULATE_WRITE as u64,
];

/// Flags of descriptors, and locks on open files; no signals to their owner, no leases, no notices.
const FILE_CONTROLS: &[u64] = &[
    libc::F_DUPFD_CLOEXEC as u64,
    libc::F_GETFD as u64,
    libc::F_SETFD as u64,
    libc::F_GETFL as u64,
    libc::F_SETFL as u64,
    libc::F_OFD_GETLK as u64,
    libc::F_OFD_SETLK as u64,
    libc::F_ADD_SEALS as u64,
    libc::F_GET_SEALS as u64,
];

const PROCESS_CONTROLS: &[u64] = &[libc::PR_GET_NAME as u64];
/// A new thread's name, and what its filter wants first.
const THREAD_CONTROLS: &[u64] =
    &[libc::PR_GET_NAME as u64, libc::PR_SET_NAME as u64, libc::PR_SET_NO_NEW_PRIVS as u64];

/// A thread of this process shares all of this.
const THREAD: u64 =
    (libc::CLONE_VM | libc::CLONE_FS | libc::CLONE_FILES | libc::CLONE_SIGHAND | libc::CLONE_THREAD) as u64;
/// And may or may not have these. Any other flag (a namespace, a tracer, another parent) is refused.
const THREAD_OPTIONS: u64 = (libc::CLONE_SYSVSEM
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u64;

const SECCOMP_SET_MODE_FILTER: u64 = libc::SECCOMP_SET_MODE_FILTER as u64;

/// Empty: any.
pub fn rules(call: i64, profile: &Profile) -> Result<Vec<SeccompRule>, BackendError> {
    match call {
        libc::SYS_ioctl => {
            let requests = profile.ioctls.iter().map(|&request| equals(1, request.into()));
            let types = profile.ioctl_types.iter().map(|&kind| masked(1, 0xff00, u64::from(kind) << 8));
            // The types first: KVM_RUN, of all calls, is to find its rule at once.
            types.chain(requests).collect()
        }
        // Memory may be mapped and protected, but never be made executable.
        libc::SYS_mmap | libc::SYS_mprotect => Ok(vec![masked(2, libc::PROT_EXEC as u64, 0)?]),
        libc::SYS_madvise => one_of(2, ADVICE),
        libc::SYS_fcntl => one_of(1, FILE_CONTROLS),
        libc::SYS_prctl if profile.makes_threads => one_of(0, THREAD_CONTROLS),
        libc::SYS_prctl => one_of(0, PROCESS_CONTROLS),
        // Only to ourselves. The filters are made in the process that they are for.
        libc::SYS_tgkill => one_of(0, &[std::process::id().into()]),
        libc::SYS_clone => Ok(vec![SeccompRule::new(vec![SeccompCondition::new(
            0,
            SeccompCmpArgLen::Qword,
            SeccompCmpOp::MaskedEq(!THREAD_OPTIONS),
            THREAD,
        )?])?]),
        libc::SYS_seccomp => one_of(0, &[SECCOMP_SET_MODE_FILTER]),
        libc::SYS_socket => one_of(0, &[libc::AF_UNIX as u64]),
        // A working directory for one thread; no namespace.
        libc::SYS_unshare => one_of(0, &[libc::CLONE_FS as u64]),
        // Limits are read, never set.
        libc::SYS_prlimit64 => {
            let read_only = SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, 0)?;
            Ok(vec![SeccompRule::new(vec![read_only])?])
        }
        _ => Ok(Vec::new()),
    }
}

/// The kernel reads 32 bits of each of these arguments.
fn one_of(argument: u8, values: &[u64]) -> Result<Vec<SeccompRule>, BackendError> {
    values.iter().map(|&value| equals(argument, value)).collect()
}

fn equals(argument: u8, value: u64) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)?])
}

fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompRule, BackendError> {
    let operator = SeccompCmpOp::MaskedEq(mask);
    SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?])
}
