//! The lists: what each kind of thread may call. What arguments a call may have is in
//! [`super::arguments`], the same for all kinds but for `ioctl`, `prctl` and `socket`.

use std::collections::BTreeSet;
use std::mem::size_of;

use kvm_bindings::{
    kvm_debugregs, kvm_ioeventfd, kvm_irq_routing, kvm_irqchip, kvm_irqfd, kvm_lapic_state, kvm_mp_state,
    kvm_msrs, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};

use crate::vmm::device::ThreadRole;
use crate::vmm::device::worker::COMMON_SYSTEM_CALLS;
use crate::vmm::supervisor::TUNGETIFF;

/// What one kind of thread may call.
#[derive(Debug)]
pub struct Profile {
    pub calls: BTreeSet<i64>,
    /// Requests of `ioctl`, 32 bits wide.
    pub ioctls: BTreeSet<u32>,
    /// Types of `ioctl` requests (their bits 8 to 15) of which each is allowed.
    pub ioctl_types: &'static [u8],
    /// It makes threads, and their filters.
    pub makes_threads: bool,
}

/// Beside what the devices' threads have in common.
const EVERYWHERE: &[i64] = &[
    // The thread's name, for a report of what it wasn't allowed.
    libc::SYS_prctl,
    // The exit record after a panic.
    libc::SYS_pwrite64,
];

const EVENT_LOOP: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_wait,
    // The notifications and vectors of a device that is plugged in.
    libc::SYS_eventfd2,
    // The kernel and the initrd are loaded again at a reset, and the console's log is bounded.
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
    // Kicks vCPUs.
    libc::SYS_tgkill,
];

/// What makes a machine: its descriptors, its threads, their filters.
const BUILDING: &[i64] = &[
    libc::SYS_clone,
    // Answered with ENOSYS before the list is asked.
    libc::SYS_clone3,
    libc::SYS_dup,
    libc::SYS_epoll_create1,
    libc::SYS_eventfd2,
    libc::SYS_fadvise64,
    // The thread of virtio-vsock has a directory of its own.
    libc::SYS_fchdir,
    libc::SYS_fstatfs,
    libc::SYS_getsockopt,
    libc::SYS_getuid,
    // A ring is made before its thread's own filter, which only allows to enter it.
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_listen,
    // Guest memory of huge pages.
    libc::SYS_memfd_create,
    libc::SYS_prlimit64,
    libc::SYS_readv,
    libc::SYS_rseq,
    // glibc's own handlers, with the first thread.
    libc::SYS_rt_sigaction,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_seccomp,
    libc::SYS_set_robust_list,
    libc::SYS_setsockopt,
    libc::SYS_signalfd4,
    libc::SYS_unshare,
    libc::SYS_writev,
];

/// Asked of a disk's or a log's file, and set on the control socket.
const BUILDING_IOCTLS: &[u32] =
    &[BLKSSZGET, BLKPBSZGET, BLKIOMIN, BLKIOOPT, BLKALIGNOFF, BLKROGET, BLKGETSIZE64, FIONBIO];
const BLKROGET: u32 = 0x125e;
const BLKSSZGET: u32 = 0x1268;
const BLKIOMIN: u32 = 0x1278;
const BLKIOOPT: u32 = 0x1279;
const BLKALIGNOFF: u32 = 0x127a;
const BLKPBSZGET: u32 = 0x127b;
const BLKGETSIZE64: u32 = 0x8008_1272;
const FIONBIO: u32 = 0x5421;

const KVM_TYPE: u8 = 0xae;
const VHOST_TYPE: u8 = 0xaf;

const KVM_RUN: u32 = kvm_ioctl(0, 0x80, 0);
const KVM_SET_REGS: u32 = kvm_ioctl(WRITE, 0x82, size_of::<kvm_regs>());
const KVM_GET_SREGS: u32 = kvm_ioctl(READ, 0x83, size_of::<kvm_sregs>());
const KVM_SET_SREGS: u32 = kvm_ioctl(WRITE, 0x84, size_of::<kvm_sregs>());
const KVM_SET_MSRS: u32 = kvm_ioctl(WRITE, 0x89, size_of::<kvm_msrs>());
const KVM_SET_LAPIC: u32 = kvm_ioctl(WRITE, 0x8f, size_of::<kvm_lapic_state>());
const KVM_SET_MP_STATE: u32 = kvm_ioctl(WRITE, 0x99, size_of::<kvm_mp_state>());
const KVM_SET_VCPU_EVENTS: u32 = kvm_ioctl(WRITE, 0xa0, size_of::<kvm_vcpu_events>());
const KVM_SET_DEBUGREGS: u32 = kvm_ioctl(WRITE, 0xa2, size_of::<kvm_debugregs>());
const KVM_SET_XSAVE: u32 = kvm_ioctl(WRITE, 0xa5, size_of::<kvm_xsave>());
const KVM_SET_XCRS: u32 = kvm_ioctl(WRITE, 0xa7, size_of::<kvm_xcrs>());
const KVM_KVMCLOCK_CTRL: u32 = kvm_ioctl(0, 0xad, 0);
/// Declared as a read in the kernel's header, though it writes.
const KVM_SET_IRQCHIP: u32 = kvm_ioctl(READ, 0x63, size_of::<kvm_irqchip>());
const KVM_SET_GSI_ROUTING: u32 = kvm_ioctl(WRITE, 0x6a, size_of::<kvm_irq_routing>());
const KVM_IRQFD: u32 = kvm_ioctl(WRITE, 0x76, size_of::<kvm_irqfd>());
const KVM_IOEVENTFD: u32 = kvm_ioctl(WRITE, 0x79, size_of::<kvm_ioeventfd>());

const WRITE: u32 = 1;
const READ: u32 = 2;

/// `_IOC` of the kernel's headers.
const fn kvm_ioctl(direction: u32, number: u32, size: usize) -> u32 {
    direction << 30 | (size as u32) << 16 | (KVM_TYPE as u32) << 8 | number
}

/// Interrupts and notifications: what a guest's write to MSI-X tables and BARs, and hot-plug, rearrange.
const INTERRUPT_IOCTLS: &[u32] = &[KVM_SET_GSI_ROUTING, KVM_IRQFD, KVM_IOEVENTFD];

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

const EVENT_LOOP_IOCTLS: &[u32] = &[KVM_SET_IRQCHIP, TUNGETIFF];

impl Profile {
    fn new(calls: &[i64], ioctls: &[&[u32]]) -> Self {
        let mut calls: BTreeSet<i64> =
            COMMON_SYSTEM_CALLS.iter().chain(EVERYWHERE).chain(calls).copied().collect();
        let ioctls: BTreeSet<u32> = ioctls.iter().copied().flatten().copied().collect();
        if !ioctls.is_empty() {
            calls.insert(libc::SYS_ioctl);
        }
        Self { calls, ioctls, ioctl_types: &[], makes_threads: false }
    }

    pub fn vcpu() -> Self {
        Self::new(&[], &[VCPU_IOCTLS, INTERRUPT_IOCTLS])
    }

    pub fn event_loop() -> Self {
        Self::new(EVENT_LOOP, &[EVENT_LOOP_IOCTLS, INTERRUPT_IOCTLS])
    }

    /// Devices say themselves what their threads need.
    pub fn device(role: ThreadRole) -> Self {
        let calls: Vec<i64> = role.system_calls().collect();
        // Requests are 32 bits wide.
        let ioctls: Vec<u32> = role.ioctls().iter().map(|&request| request as u32).collect();
        Self::new(&calls, &[&ioctls])
    }

    /// All that any thread may do later, and what makes them.
    pub fn building() -> Self {
        let mut all = Self::new(BUILDING, &[BUILDING_IOCTLS]);
        let devices = ThreadRole::ALL.into_iter().map(Self::device);
        for mut part in [Self::vcpu(), Self::event_loop()].into_iter().chain(devices) {
            all.calls.append(&mut part.calls);
            all.ioctls.append(&mut part.ioctls);
        }
        // A VM, its vCPUs and vhost backends are set up once; to list each request would guard nothing,
        // for whoever holds the descriptors holds the machine.
        all.ioctl_types = &[KVM_TYPE, VHOST_TYPE];
        all.makes_threads = true;
        all
    }
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
        assert_eq!(KVM_SET_GSI_ROUTING, 0x4008_ae6a);
        assert_eq!(KVM_IRQFD, 0x4020_ae76);
        assert_eq!(KVM_IOEVENTFD, 0x4040_ae79);
    }
}
