//! Breaking out of a VM process, from each of its threads. System calls are made in the real process, by
//! its threads, as if a guest had taken them over; each is refused, by each thread's filter and, where
//! that is off, by what lies behind it.
//!
//! As root, for only root may do this to a VM process.

#[path = "support/inject.rs"]
mod inject;
mod support;

use std::path::Path;
use std::time::Duration;

use inject::{Outcome, Thread};
use support::{RunningVm, Vm, guest, memfd};
use vmctl::vmm::client::ControlError;
use vmctl::vmm::config::{BalloonConfig, DiskConfig, DiskFormat};
use vmctl::vmm::protocol::{ExitReason, Verb};

/// A program that runs the VM program with this mode of seccomp: the mode is the process's environment,
/// and a test must not change its own.
fn program(mode: &str) -> std::path::PathBuf {
    use std::os::unix::fs::PermissionsExt as _;
    let path = std::env::temp_dir().join(format!("vmctl-vmm-{mode}-{}", std::process::id()));
    let script = format!("#!/bin/sh\nVMCTL_SECCOMP={mode} exec {} \"$@\"\n", env!("CARGO_BIN_EXE_vmctl-vmm"));
    // In place at once: several tests make the same one.
    let new = path.with_extension(format!("{:?}", std::thread::current().id()));
    std::fs::write(&new, script).unwrap();
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::rename(&new, &path).unwrap();
    path
}

fn start(program: &Path) -> RunningVm {
    let image = memfd(b"");
    image.set_len(1 << 20).unwrap();
    let mut vm = Vm::new(memfd(&guest::kernel()), "")
        .vcpus(2)
        .disk(DiskConfig::new("root", "image", DiskFormat::Raw), image);
    vm.launch.config.balloon =
        Some(BalloonConfig { target_bytes: 0, free_page_reporting: true, deflate_on_oom: true });
    let vm = vm.launch(program).unwrap();
    vm.console().expect("boot1\n");
    vm
}

/// The process's own threads by name; KVM's run no code of ours.
fn threads(vm: &RunningVm) -> Vec<(String, i32)> {
    let mut threads: Vec<(String, i32)> = std::fs::read_dir(format!("/proc/{}/task", vm.pid))
        .unwrap()
        .map(|task| {
            let task = task.unwrap();
            let name = std::fs::read_to_string(task.path().join("comm")).unwrap().trim().to_owned();
            (name, task.file_name().to_str().unwrap().parse().unwrap())
        })
        .filter(|(name, _)| !name.starts_with("kvm"))
        .collect();
    threads.sort();
    threads
}

/// What a thread could be made to try.
struct Attempt {
    what: &'static str,
    number: i64,
    arguments: [u64; 6],
    /// What stands behind the filter: these errors, or nothing but the filter.
    behind: &'static [i32],
}

/// Stands for the address of a path, or of zeroes, in the process.
const PATH: u64 = u64::MAX - 1;
/// Stands for the pid of another process of the host.
const NEIGHBOUR: u64 = u64::MAX - 2;
const CURRENT_DIRECTORY: u64 = libc::AT_FDCWD as u64;

const NO_FILE: &[i32] = &[libc::ENOENT, libc::EACCES];
const NO_MOUNT: &[i32] = &[libc::ENOENT, libc::EACCES, libc::EPERM];
const NO_PROCESS: &[i32] = &[libc::ESRCH, libc::EPERM];
const NO_RIGHT: &[i32] = &[libc::EPERM, libc::EACCES, libc::ENOSYS];

const fn attempt(what: &'static str, number: i64, arguments: [u64; 6], behind: &'static [i32]) -> Attempt {
    Attempt { what, number, arguments, behind }
}

const KVM_CREATE_VM: u64 = 0xae01;
const KVM_SET_MEMORY_REGION: u64 = 0x4020_ae46;
const EXECUTABLE: u64 = (libc::PROT_READ | libc::PROT_EXEC) as u64;
const PRIVATE: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
const NONE: u64 = u64::MAX;

const ATTEMPTS: &[Attempt] = &[
    attempt("open", libc::SYS_open, [PATH, 0, 0, 0, 0, 0], NO_FILE),
    attempt("openat", libc::SYS_openat, [CURRENT_DIRECTORY, PATH, 0, 0, 0, 0], NO_FILE),
    attempt("openat2", libc::SYS_openat2, [CURRENT_DIRECTORY, PATH, PATH, 24, 0, 0], &[]),
    attempt("creat", libc::SYS_creat, [PATH, 0o600, 0, 0, 0, 0], &[libc::ENOENT, libc::EACCES, libc::EROFS]),
    attempt("execve", libc::SYS_execve, [PATH, 0, 0, 0, 0, 0], NO_FILE),
    attempt("execveat", libc::SYS_execveat, [CURRENT_DIRECTORY, PATH, 0, 0, 0, 0], NO_FILE),
    attempt("fork", libc::SYS_fork, [0; 6], &[]),
    attempt("vfork", libc::SYS_vfork, [0; 6], &[]),
    attempt("clone a process", libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0, 0, 0, 0], &[]),
    attempt("socket", libc::SYS_socket, [libc::AF_INET as u64, libc::SOCK_STREAM as u64, 0, 0, 0, 0], &[]),
    attempt(
        "packet socket",
        libc::SYS_socket,
        [libc::AF_PACKET as u64, libc::SOCK_RAW as u64, 0, 0, 0, 0],
        NO_RIGHT,
    ),
    attempt("ptrace", libc::SYS_ptrace, [libc::PTRACE_ATTACH as u64, NEIGHBOUR, 0, 0, 0, 0], NO_PROCESS),
    attempt("process_vm_readv", libc::SYS_process_vm_readv, [NEIGHBOUR, 0, 0, 0, 0, 0], &[]),
    attempt("pidfd_open", libc::SYS_pidfd_open, [NEIGHBOUR, 0, 0, 0, 0, 0], NO_PROCESS),
    attempt("kill a neighbour", libc::SYS_kill, [NEIGHBOUR, libc::SIGKILL as u64, 0, 0, 0, 0], NO_PROCESS),
    attempt("kill everybody", libc::SYS_kill, [NONE, 0, 0, 0, 0, 0], NO_PROCESS),
    attempt(
        "tgkill a neighbour",
        libc::SYS_tgkill,
        [NEIGHBOUR, NEIGHBOUR, libc::SIGKILL as u64, 0, 0, 0],
        NO_PROCESS,
    ),
    attempt("mount", libc::SYS_mount, [PATH, PATH, 0, libc::MS_BIND, 0, 0], NO_MOUNT),
    attempt("umount2", libc::SYS_umount2, [PATH, 0, 0, 0, 0, 0], NO_MOUNT),
    attempt("fsopen", libc::SYS_fsopen, [PATH, 0, 0, 0, 0, 0], NO_RIGHT),
    attempt("pivot_root", libc::SYS_pivot_root, [PATH, PATH, 0, 0, 0, 0], NO_RIGHT),
    attempt("chroot", libc::SYS_chroot, [PATH, 0, 0, 0, 0, 0], NO_MOUNT),
    attempt("setns", libc::SYS_setns, [0, 0, 0, 0, 0, 0], &[libc::EINVAL, libc::EPERM]),
    attempt("unshare", libc::SYS_unshare, [libc::CLONE_NEWNS as u64, 0, 0, 0, 0, 0], NO_RIGHT),
    attempt("setuid", libc::SYS_setuid, [0; 6], NO_RIGHT),
    attempt("setgroups", libc::SYS_setgroups, [1, PATH, 0, 0, 0, 0], NO_RIGHT),
    attempt("bpf", libc::SYS_bpf, [0, PATH, 48, 0, 0, 0], &[]),
    attempt("perf_event_open", libc::SYS_perf_event_open, [PATH, NEIGHBOUR, 0, NONE, 0, 0], &[]),
    attempt("io_uring_setup", libc::SYS_io_uring_setup, [4, PATH, 0, 0, 0, 0], &[]),
    attempt("userfaultfd", libc::SYS_userfaultfd, [0; 6], &[]),
    attempt("keyctl", libc::SYS_keyctl, [0, -3i64 as u64, 0, 0, 0, 0], &[]),
    attempt("add_key", libc::SYS_add_key, [PATH, PATH, 0, 0, -3i64 as u64, 0], &[]),
    attempt("memfd_create", libc::SYS_memfd_create, [PATH, 0, 0, 0, 0, 0], &[]),
    attempt("init_module", libc::SYS_init_module, [PATH, 8, PATH, 0, 0, 0], NO_RIGHT),
    attempt("reboot", libc::SYS_reboot, [0; 6], NO_RIGHT),
    attempt("TIOCSTI", libc::SYS_ioctl, [0, libc::TIOCSTI, PATH, 0, 0, 0], &[libc::ENOTTY]),
    attempt(
        "TIOCSTI in 64 bits",
        libc::SYS_ioctl,
        [0, libc::TIOCSTI | 1 << 32, PATH, 0, 0, 0],
        &[libc::ENOTTY],
    ),
    attempt("another's ioctl of KVM", libc::SYS_ioctl, [0, KVM_CREATE_VM, 0, 0, 0, 0], &[libc::ENOTTY]),
    attempt(
        "guest memory elsewhere",
        libc::SYS_ioctl,
        [0, KVM_SET_MEMORY_REGION, PATH, 0, 0, 0],
        &[libc::ENOTTY],
    ),
    attempt("executable memory", libc::SYS_mmap, [0, 4096, EXECUTABLE, PRIVATE, NONE, 0], &[]),
    attempt("make memory executable", libc::SYS_mprotect, [0, 0, EXECUTABLE, 0, 0, 0], &[]),
    attempt("pkey_mprotect", libc::SYS_pkey_mprotect, [0, 0, EXECUTABLE, NONE, 0, 0], &[]),
    attempt(
        "poison a page",
        libc::SYS_madvise,
        [0, 4096, libc::MADV_HWPOISON as u64, 0, 0, 0],
        &[libc::EPERM, libc::EINVAL],
    ),
    attempt("become traceable", libc::SYS_prctl, [libc::PR_SET_DUMPABLE as u64, 1, 0, 0, 0, 0], &[]),
    attempt("signals of a descriptor", libc::SYS_fcntl, [0, libc::F_SETOWN as u64, NEIGHBOUR, 0, 0, 0], &[]),
    attempt("raise a limit", libc::SYS_prlimit64, [0, libc::RLIMIT_NOFILE as u64, PATH, 0, 0, 0], &[]),
    attempt("shmget", libc::SYS_shmget, [1, 4096, 0o666 | libc::IPC_CREAT as u64, 0, 0, 0], &[]),
    // The other way to say `getpid`: the numbers of the x32 interface.
    attempt("x32", 0x4000_0000 | libc::SYS_getpid, [0; 6], &[]),
];

/// The spawner has the filter under which a machine is built: these are that work, huge pages of guest
/// memory included.
const SPAWNERS: [&str; 4] =
    ["io_uring_setup", "another's ioctl of KVM", "guest memory elsewhere", "memfd_create"];

/// A process of the host that is not the VM.
struct Neighbour(std::process::Child);

impl Neighbour {
    fn new() -> Self {
        Self(std::process::Command::new("sleep").arg("600").spawn().unwrap())
    }

    fn is_well(&mut self) -> bool {
        self.0.try_wait().unwrap().is_none()
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn make(thread: &mut Thread, attempt: &Attempt, neighbour: &Neighbour) -> Outcome {
    let mut path = [0; 64];
    let host_file = b"/etc/passwd";
    path[..host_file.len()].copy_from_slice(host_file);
    let path = thread.put(&path);
    let arguments = attempt.arguments.map(|argument| match argument {
        PATH => path,
        NEIGHBOUR => neighbour.0.id().into(),
        other => other,
    });
    thread.call(attempt.number, arguments)
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn no_thread_may_try() {
    assert!(is_root(), "only root may take over a thread of a VM process");
    let vm = start(&program("trap"));
    let mut neighbour = Neighbour::new();
    let threads = threads(&vm);
    let names: Vec<&str> = threads.iter().map(|(name, _)| name.as_str()).collect();
    for expected in ["entropy", "root", "spawner", "vcpu0", "vcpu1", "vmctl-vmm"] {
        assert!(names.iter().any(|name| name.contains(expected)), "no {expected} in {names:?}");
    }
    for (name, tid) in &threads {
        let mut thread = Thread::stop(vm.pid, *tid);
        for attempt in ATTEMPTS {
            if name == "spawner" && SPAWNERS.contains(&attempt.what) {
                continue;
            }
            let outcome = make(&mut thread, attempt, &neighbour);
            assert_eq!(outcome, Outcome::Trapped(attempt.number), "{name}: {}", attempt.what);
        }
        // Threads are made in the older way, by whoever makes any.
        let clone3 = thread.call(libc::SYS_clone3, [0, 0, 0, 0, 0, 0]);
        let expected = match name.as_str() {
            "spawner" => Outcome::Returned(-i64::from(libc::ENOSYS)),
            _ => Outcome::Trapped(libc::SYS_clone3),
        };
        assert_eq!(clone3, expected, "{name}: clone3");
    }
    // None of it happened, and the VM goes on.
    assert!(neighbour.is_well());
    let mut console = vm.console();
    console.expect("boot1\n");
    console.type_in("x");
    console.expect("x");
    vm.control().command(&Verb::Reboot).unwrap();
    console.expect("boot1\n");
}

#[test]
fn behind_the_filters_there_is_nothing_to_reach() {
    assert!(is_root(), "only root may take over a thread of a VM process");
    // Violations are only logged, so every call comes to the kernel.
    let vm = start(&program("log"));
    let mut neighbour = Neighbour::new();
    for (name, tid) in threads(&vm) {
        let mut thread = Thread::stop(vm.pid, tid);
        for attempt in ATTEMPTS.iter().filter(|attempt| !attempt.behind.is_empty()) {
            let outcome = make(&mut thread, attempt, &neighbour);
            let refused = attempt.behind.iter().any(|&error| outcome == Outcome::Returned(-i64::from(error)));
            assert!(refused, "{name}: {}: {outcome:?}", attempt.what);
        }
    }
    assert!(neighbour.is_well());
    let mut console = vm.console();
    console.expect("boot1\n");
    console.type_in("x");
    console.expect("x");
}

#[test]
fn whoever_tries_ends_the_process() {
    assert!(is_root(), "only root may take over a thread of a VM process");
    // Without last words, if somebody wants that.
    let program = program("kill");
    let mut neighbour = Neighbour::new();
    let names: Vec<String> = threads(&start(&program)).into_iter().map(|(name, _)| name).collect();
    for (index, name) in names.iter().enumerate() {
        let vm = start(&program);
        let (_, tid) = *threads(&vm).iter().find(|(other, _)| other == name).unwrap();
        let attempt = &ATTEMPTS[index * 7 % ATTEMPTS.len()];
        let attempt = if SPAWNERS.contains(&attempt.what) { &ATTEMPTS[0] } else { attempt };
        let mut thread = Thread::stop(vm.pid, tid);
        let outcome = make(&mut thread, attempt, &neighbour);
        assert_eq!(outcome, Outcome::Killed(libc::SIGSYS), "{name}: {}", attempt.what);
        drop(thread);
        reap(&vm);
        assert_eq!(vm.wait_for(Duration::from_secs(10)), None, "{name}: it left no record");
        let control = vmctl::vmm::client::Control::connect(&vm.control_path());
        assert!(matches!(control, Err(ControlError::Absent { .. })), "{name}");
    }
    assert!(neighbour.is_well());
}

#[test]
fn the_last_words_name_the_thread_and_the_call() {
    assert!(is_root(), "only root may take over a thread of a VM process");
    // What a user gets, whatever mode the tests run in.
    let program = program("default");
    let names: Vec<String> = threads(&start(&program)).into_iter().map(|(name, _)| name).collect();
    for name in &names {
        let vm = start(&program);
        let (_, tid) = *threads(&vm).iter().find(|(other, _)| other == name).unwrap();
        let mut thread = Thread::stop(vm.pid, tid);
        let outcome = thread.call(libc::SYS_execve, [1, 2, 3, 4, 5, 6]);
        assert_eq!(outcome, Outcome::Trapped(libc::SYS_execve), "{name}");
        thread.deliver();
        reap(&vm);
        let record = vm.wait_for(Duration::from_secs(10)).expect("it says how it ended");
        assert_eq!(record.reason, ExitReason::Internal);
        let words = format!(
            "seccomp (SIGSYS): the thread {name} may not make system call {} (architecture 0xc000003e) with \
             0x1 0x2 0x3 0x4 0x5 0x6",
            libc::SYS_execve
        );
        assert_eq!(record.message, words);
    }
}

/// A traced leader's end is its tracer's to take note of.
fn reap(vm: &RunningVm) {
    let mut status = 0;
    // SAFETY: the status is written where we point.
    unsafe { libc::waitpid(vm.pid, &mut status, libc::__WALL | libc::WNOHANG) };
}
