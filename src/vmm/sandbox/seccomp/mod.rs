//! Which system calls each thread may make. A thread that makes another one ends the process at once, for
//! then it is no longer ours. The call is not made; the process's last words name SIGSYS, the thread, the
//! call and its arguments (see [`report`]).
//!
//! ```text
//!   main ── building ──┬─ vCPU threads:    building + vCPU
//!                      ├─ device threads:  building + their role
//!                      ├─ the spawner:     building            (makes hot-plugged devices' threads)
//!                      └─ then, itself:    building + event loop
//! ```
//!
//! Filters only ever add up, so the first is the widest: it may make threads, which install filters of
//! their own, and has what makes a machine; but from it on no thread opens a file by path, runs a program
//! or makes a process. Hostile images are read under it.
//!
//! So the filters trap rather than kill: of a process that the kernel kills nobody hears why, for it is
//! nobody's child. What traps is as dead. A thread can't have another handler of SIGSYS once its own filter
//! is in place, and where it blocks the signal or takes the handler's stack away the kernel kills it.
//!
//! The lists hold what release and debug builds on glibc need. `VMCTL_SECCOMP=kill` in the launcher's
//! environment has the kernel kill without last words, `log` lets it log violations and go on.

mod arguments;
mod calls;
mod report;

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, SeccompRule, TargetArch, sock_filter};

use self::calls::Profile;
use super::SandboxError;
use crate::vmm::device::{ThreadRole, ThreadStart};

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
            Ok("kill") => Self::Kill,
            _ => Self::Trap,
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

/// The filters of one VM process.
pub struct Filters {
    mode: Mode,
    vcpu: Arc<BpfProgram>,
}

impl Filters {
    /// Closes the process: the calling thread and all that it makes are left with what building a machine
    /// takes. Before the first thread.
    pub fn enter_building(mode: Mode) -> Result<Self, SandboxError> {
        if mode == Mode::Trap {
            report::install().map_err(|source| SandboxError::System {
                what: "install the handler that reports refused calls",
                source,
            })?;
        }
        let mut building = compile(&Profile::building(), mode)?;
        building.splice(0..0, without_clone3());
        install(&building)
            .map_err(|source| SandboxError::System { what: "install the first seccomp filter", source })?;
        Ok(Self { mode, vcpu: Arc::new(compile(&Profile::vcpu(), mode)?) })
    }

    /// The hook for device threads.
    pub fn for_devices(&self) -> ThreadStart {
        let mode = self.mode;
        // Compiled when the first of its kind is made: most machines have few kinds.
        let compiled = Mutex::new(BTreeMap::<ThreadRole, Arc<BpfProgram>>::new());
        Arc::new(move |role| {
            let filter = {
                // Nothing panics while it holds the lock.
                let mut compiled = compiled.lock().unwrap_or_else(PoisonError::into_inner);
                match compiled.get(&role) {
                    Some(filter) => filter.clone(),
                    None => {
                        let filter = compile(&Profile::device(role), mode).map_err(io::Error::other)?;
                        compiled.entry(role).or_insert(Arc::new(filter)).clone()
                    }
                }
            };
            install(&filter)
        })
    }

    /// The hook for vCPU threads.
    pub fn for_vcpus(&self) -> impl Fn() -> io::Result<()> + Clone + Send + 'static {
        let filter = self.vcpu.clone();
        move || install(&filter)
    }

    /// For the calling thread; after this it can make no thread.
    pub fn enter_event_loop(&self) -> io::Result<()> {
        install(&compile(&Profile::event_loop(), self.mode).map_err(io::Error::other)?)
    }
}

fn install(filter: &BpfProgram) -> io::Result<()> {
    seccompiler::apply_filter(filter).map_err(io::Error::other)
}

fn compile(profile: &Profile, mode: Mode) -> Result<BpfProgram, SandboxError> {
    let failed = |error: seccompiler::BackendError| SandboxError::Filter(error.to_string());
    let rules = profile
        .calls
        .iter()
        .map(|&call| Ok((call, arguments::rules(call, profile)?)))
        .collect::<Result<BTreeMap<i64, Vec<SeccompRule>>, _>>()
        .map_err(failed)?;
    SeccompFilter::new(rules, mode.action(), SeccompAction::Allow, TargetArch::x86_64)
        .and_then(BpfProgram::try_from)
        .map_err(failed)
}

/// To be put before a filter: `clone3` has its flags in memory, where no filter sees them, so there is
/// none; glibc then makes threads by `clone`, whose flags are an argument.
fn without_clone3() -> [sock_filter; 3] {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const JUMP_IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    /// Of the call's number in `struct seccomp_data`.
    const NUMBER: u32 = 0;
    let absent = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
    [
        sock_filter { code: LOAD, jt: 0, jf: 0, k: NUMBER },
        sock_filter { code: JUMP_IF_EQUAL, jt: 0, jf: 1, k: libc::SYS_clone3 as u32 },
        sock_filter { code: RETURN, jt: 0, jf: 0, k: absent },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_filters_compile_and_fit() {
        const PROGRAM_MAX: usize = 4096;
        let devices = ThreadRole::ALL.into_iter().map(Profile::device);
        for profile in
            [Profile::building(), Profile::vcpu(), Profile::event_loop()].into_iter().chain(devices)
        {
            for mode in [Mode::Kill, Mode::Log, Mode::Trap] {
                assert!(compile(&profile, mode).unwrap().len() + 3 < PROGRAM_MAX);
            }
        }
    }

    #[test]
    fn the_first_filter_allows_what_the_later_ones_do() {
        let building = Profile::building();
        let devices = ThreadRole::ALL.into_iter().map(Profile::device);
        for profile in [Profile::vcpu(), Profile::event_loop()].into_iter().chain(devices) {
            assert!(profile.calls.is_subset(&building.calls), "{:?}", &profile.calls - &building.calls);
            assert!(profile.ioctls.is_subset(&building.ioctls), "{:x?}", &profile.ioctls - &building.ioctls);
        }
    }

    /// Runs `attempt` on a thread under a filter that refuses with EPERM instead of killing.
    fn refused(profile: Profile, attempt: impl FnOnce() -> libc::c_long + Send + 'static) -> bool {
        let rules =
            profile.calls.iter().map(|&call| (call, arguments::rules(call, &profile).unwrap())).collect();
        let action = SeccompAction::Errno(libc::EPERM as u32);
        let filter = SeccompFilter::new(rules, action, SeccompAction::Allow, TargetArch::x86_64).unwrap();
        let filter: BpfProgram = filter.try_into().unwrap();
        std::thread::spawn(move || {
            install(&filter).unwrap();
            let result = attempt();
            result == -1 && io::Error::last_os_error().raw_os_error() == Some(libc::EPERM)
        })
        .join()
        .unwrap()
    }

    /// A system call whose arguments, if it were let through, would do no harm.
    macro_rules! call {
        ($number:expr $(, $argument:expr)*) => {
            // SAFETY: with these arguments the call neither reads nor writes memory of ours.
            move || unsafe { libc::syscall($number $(, $argument)*) }
        };
    }

    #[test]
    fn arguments_are_looked_at() {
        const NOWHERE: i32 = -1;
        // Not listed, or listed with other arguments.
        assert!(refused(Profile::vcpu(), call!(libc::SYS_getppid)));
        assert!(refused(Profile::vcpu(), call!(libc::SYS_ioctl, NOWHERE, libc::TIOCSTI, 0)));
        assert!(refused(Profile::building(), call!(libc::SYS_ioctl, NOWHERE, libc::TIOCSTI, 0)));
        assert!(refused(Profile::building(), call!(libc::SYS_fcntl, NOWHERE, libc::F_SETOWN, 1)));
        assert!(refused(Profile::building(), call!(libc::SYS_madvise, 0, 0, libc::MADV_HWPOISON)));
        assert!(refused(Profile::building(), call!(libc::SYS_prctl, libc::PR_SET_DUMPABLE, 0)));
        assert!(refused(Profile::building(), call!(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0)));
        assert!(refused(Profile::event_loop(), call!(libc::SYS_tgkill, 1, 1, 0)));
        assert!(refused(Profile::building(), call!(libc::SYS_unshare, libc::CLONE_NEWUSER)));
        let vsock = || Profile::device(ThreadRole::Vsock);
        assert!(refused(vsock(), call!(libc::SYS_socket, libc::AF_INET, libc::SOCK_STREAM, 0)));
        assert!(refused(vsock(), call!(libc::SYS_fchdir, NOWHERE)));
        let executable = libc::PROT_READ | libc::PROT_EXEC;
        let private = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        assert!(refused(
            Profile::building(),
            call!(libc::SYS_mmap, 0, 4096, executable, private, NOWHERE, 0)
        ));
        assert!(refused(Profile::building(), call!(libc::SYS_mprotect, 0, 0, executable)));
        // The kernel's own refusals, not the filter's: these pass.
        let kvm_run = 0xae80;
        assert!(!refused(Profile::vcpu(), call!(libc::SYS_ioctl, NOWHERE, kvm_run, 0)));
        assert!(!refused(Profile::building(), call!(libc::SYS_fcntl, NOWHERE, libc::F_GETFD)));
        assert!(!refused(Profile::building(), call!(libc::SYS_madvise, 0, 0, libc::MADV_DONTNEED)));
        assert!(!refused(Profile::building(), call!(libc::SYS_mprotect, 0, 0, libc::PROT_READ)));
    }

    #[test]
    fn threads_can_be_made_without_clone3() {
        let made = std::thread::spawn(|| {
            let mut building = compile(&Profile::building(), Mode::Kill).unwrap();
            building.splice(0..0, without_clone3());
            install(&building).unwrap();
            // SAFETY: a null structure of no size makes nothing.
            let clone3 = unsafe { libc::syscall(libc::SYS_clone3, 0, 0) };
            assert_eq!((clone3, io::Error::last_os_error().raw_os_error()), (-1, Some(libc::ENOSYS)));
            std::thread::Builder::new().name("made".into()).spawn(|| 7).unwrap().join().unwrap()
        });
        assert_eq!(made.join().unwrap(), 7);
    }
}
