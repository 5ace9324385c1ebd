//! Which system calls each thread may make. A thread that makes another one ends the process at once
//! (which shows as a VM without an exit record), for then it is no longer ours.
//!
//! The lists hold what release and debug builds on glibc need; `VMCTL_SECCOMP=log` in the launcher's
//! environment lets the kernel log violations instead, `trap` raises SIGSYS for a debugger.

use std::collections::BTreeMap;
use std::io;
use std::mem::size_of;
use std::sync::Arc;

use kvm_bindings::{
    kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msrs, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use super::SandboxError;
use crate::vmm::device::{ThreadRole, ThreadStart};
use crate::vmm::supervisor::TUNGETIFF;

/// What happens at a system call that isn't listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    Kill,
    Log,
    Trap,
}

impl Mode {
    pub fn from_environment() -> Self {
        match std::env::var("VMCTL_SECCOMP").as_deref() {
            Ok("log") => Self::Log,
            Ok("trap") => Self::Trap,
            _ => Self::Kill,
        }
    }

    fn action(self) -> SeccompAction {
        match self {
            Self::Kill => SeccompAction::KillProcess,
            Self::Log => SeccompAction::Log,
            Self::Trap => SeccompAction::Trap,
        }
    }
}

/// Every thread: the allocator, locks, clocks, event descriptors, its own end, and the exit record
/// after a panic.
const COMMON: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_pwrite64,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_tgkill,
    libc::SYS_write,
];

const EVENT_LOOP: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_wait,
    // The kernel and the initrd are loaded again at a reset.
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_ftruncate,
    libc::SYS_lseek,
    libc::SYS_newfstatat,
    libc::SYS_pread64,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_statx,
];

const KVM_TYPE: u32 = 0xae;
const KVM_RUN: u32 = ioctl(0, 0x80, 0);
const KVM_SET_REGS: u32 = ioctl(WRITE, 0x82, size_of::<kvm_regs>());
const KVM_GET_SREGS: u32 = ioctl(READ, 0x83, size_of::<kvm_sregs>());
const KVM_SET_SREGS: u32 = ioctl(WRITE, 0x84, size_of::<kvm_sregs>());
const KVM_SET_MSRS: u32 = ioctl(WRITE, 0x89, size_of::<kvm_msrs>());
const KVM_SET_LAPIC: u32 = ioctl(WRITE, 0x8f, size_of::<kvm_lapic_state>());
const KVM_SET_MP_STATE: u32 = ioctl(WRITE, 0x99, size_of::<kvm_mp_state>());
const KVM_SET_VCPU_EVENTS: u32 = ioctl(WRITE, 0xa0, size_of::<kvm_vcpu_events>());
const KVM_SET_DEBUGREGS: u32 = ioctl(WRITE, 0xa2, size_of::<kvm_debugregs>());
const KVM_SET_XSAVE: u32 = ioctl(WRITE, 0xa5, size_of::<kvm_xsave>());
const KVM_SET_XCRS: u32 = ioctl(WRITE, 0xa7, size_of::<kvm_xcrs>());
const KVM_KVMCLOCK_CTRL: u32 = ioctl(0, 0xad, 0);
/// Declared as a read in the kernel's header, though it writes.
const KVM_SET_IRQCHIP: u32 = ioctl(READ, 0x63, size_of::<kvm_irqchip>());

const WRITE: u32 = 1;
const READ: u32 = 2;

/// `_IOC` of the kernel's headers.
const fn ioctl(direction: u32, number: u32, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | KVM_TYPE << 8 | number
}

const VCPU_IOCTLS: &[u32] = &[
    KVM_RUN,
    KVM_SET_REGS,
    KVM_GET_SREGS,
    KVM_SET_SREGS,
    KVM_SET_MSRS,
    KVM_SET_LAPIC,
    KVM_SET_MP_STATE,
    KVM_SET_VCPU_EVENTS,
    KVM_SET_DEBUGREGS,
    KVM_SET_XSAVE,
    KVM_SET_XCRS,
    KVM_KVMCLOCK_CTRL,
];

/// The filters, ready to be installed.
pub struct Filters {
    event_loop: BpfProgram,
    vcpu: Arc<BpfProgram>,
    devices: Arc<BTreeMap<ThreadRole, BpfProgram>>,
}

impl Filters {
    pub fn compile(mode: Mode) -> Result<Self, SandboxError> {
        let build = |calls, ioctls| compile(calls, ioctls, mode);
        Ok(Self {
            event_loop: build(EVENT_LOOP, &[KVM_SET_IRQCHIP, TUNGETIFF])?,
            vcpu: Arc::new(build(&[], VCPU_IOCTLS)?),
            devices: Arc::new(
                ThreadRole::ALL
                    .into_iter()
                    .map(|role| Ok((role, for_device(role, mode)?)))
                    .collect::<Result<_, SandboxError>>()?,
            ),
        })
    }

    /// The hook for device threads.
    pub fn for_devices(&self) -> ThreadStart {
        let filters = self.devices.clone();
        Arc::new(move |role| match filters.get(&role) {
            Some(filter) => install(filter),
            None => Err(io::Error::other(format!("no seccomp filter for {role:?}"))),
        })
    }

    /// The hook for vCPU threads.
    pub fn for_vcpus(&self) -> impl Fn() -> io::Result<()> + Clone + Send + 'static {
        let filter = self.vcpu.clone();
        move || install(&filter)
    }

    /// For the calling thread; after this no thread can be made.
    pub fn enter_event_loop(&self) -> io::Result<()> {
        install(&self.event_loop)
    }
}

/// Devices say themselves what their threads need.
fn for_device(role: ThreadRole, mode: Mode) -> Result<BpfProgram, SandboxError> {
    let calls: Vec<i64> = role.system_calls().collect();
    // Requests are 32 bits wide.
    let ioctls: Vec<u32> = role.ioctls().iter().map(|&request| request as u32).collect();
    compile(&calls, &ioctls, mode)
}

fn install(filter: &BpfProgram) -> io::Result<()> {
    seccompiler::apply_filter(filter).map_err(io::Error::other)
}

fn compile(calls: &[i64], ioctls: &[u32], mode: Mode) -> Result<BpfProgram, SandboxError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        COMMON.iter().chain(calls).map(|&call| (call, Vec::new())).collect();
    // Memory may be mapped and protected, but never be made executable.
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let executable = SeccompCmpOp::MaskedEq(libc::PROT_EXEC as u64);
        rules.insert(call, vec![rule(2, executable, 0)?]);
    }
    if !ioctls.is_empty() {
        let requests = ioctls
            .iter()
            .map(|&request| rule(1, SeccompCmpOp::Eq, request.into()))
            .collect::<Result<_, _>>()?;
        rules.insert(libc::SYS_ioctl, requests);
    }
    let filter = SeccompFilter::new(rules, mode.action(), SeccompAction::Allow, TargetArch::x86_64)
        .map_err(|error| SandboxError::Filter(error.to_string()))?;
    filter.try_into().map_err(|error: seccompiler::BackendError| SandboxError::Filter(error.to_string()))
}

fn rule(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule, SandboxError> {
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
        .and_then(|condition| SeccompRule::new(vec![condition]))
        .map_err(|error| SandboxError::Filter(error.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ioctl_numbers_are_the_kernels() {
        assert_eq!(KVM_RUN, 0xae80);
        assert_eq!(KVM_SET_REGS, 0x4090_ae82);
        assert_eq!(KVM_SET_SREGS, 0x4138_ae84);
        assert_eq!(KVM_SET_MSRS, 0x4008_ae89);
        assert_eq!(KVM_SET_LAPIC, 0x4400_ae8f);
        assert_eq!(KVM_SET_XSAVE, 0x5000_aea5);
        assert_eq!(KVM_SET_IRQCHIP, 0x8208_ae63);
        assert_eq!(KVM_KVMCLOCK_CTRL, 0xaead);
    }

    #[test]
    fn a_call_that_is_not_listed_is_refused() {
        // Trap and kill can't be shown in the test's own process: an error number can.
        let mut rules = BTreeMap::new();
        for call in COMMON {
            rules.insert(*call, Vec::new());
        }
        let filter = SeccompFilter::new(
            rules,
            SeccompAction::Errno(libc::EPERM as u32),
            SeccompAction::Allow,
            TargetArch::x86_64,
        )
        .unwrap();
        let filter: BpfProgram = filter.try_into().unwrap();
        let result = std::thread::spawn(move || {
            install(&filter).unwrap();
            // SAFETY: getppid has no preconditions.
            let refused = unsafe { libc::syscall(libc::SYS_getppid) };
            (refused, io::Error::last_os_error().raw_os_error())
        })
        .join()
        .unwrap();
        assert_eq!(result, (-1, Some(libc::EPERM)));
    }

    #[test]
    fn all_filters_compile() {
        for mode in [Mode::Kill, Mode::Log, Mode::Trap] {
            Filters::compile(mode).unwrap();
        }
    }
}
