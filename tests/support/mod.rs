//! Starts VM processes as the host layer does, for tests and the boot example.
#![allow(dead_code, reason = "each test binary uses its own part of this")]

pub mod cpio;
pub mod guest;
pub mod script;

use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vmctl::vmm::client::{self, Console, Control, LaunchError};
use vmctl::vmm::config::{BootConfig, DiskBoot, DiskConfig, NicConfig, VmConfig, VsockConfig};
use vmctl::vmm::protocol::{ExitRecord, FdRole, Launch, VERSION};

/// Nobody, if the test runs as root.
const UNPRIVILEGED: u32 = 65534;

/// A VM to be launched.
pub struct Vm {
    pub launch: Launch,
    fds: Vec<OwnedFd>,
    dir: PathBuf,
    exit_record: File,
    console_log: File,
}

/// A VM process. Dropping it kills it.
pub struct RunningVm {
    pub pid: i32,
    pidfd: OwnedFd,
    dir: PathBuf,
    exit_record: File,
    console_log: File,
}

pub fn memfd(content: &[u8]) -> File {
    use std::io::Write as _;
    let fd = rustix::fs::memfd_create("vmctl-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(fd);
    file.write_all(content).unwrap();
    file.rewind().unwrap();
    file
}

impl Vm {
    pub fn new(kernel: File, cmdline: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("test{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = std::env::temp_dir().join(format!("vmctl-{name}"));
        std::fs::create_dir_all(&dir).unwrap();
        let control =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        rustix::net::bind(&control, &SocketAddrUnix::new(dir.join("control")).unwrap()).unwrap();
        let exit_record = memfd(b"");
        let log_path = dir.join("console.log");
        let console_log = File::options().create(true).append(true).open(&log_path).unwrap();
        let kvm = File::options().read(true).write(true).open("/dev/kvm").expect("/dev/kvm");
        let id = if rustix::process::getuid().is_root() {
            UNPRIVILEGED
        } else {
            rustix::process::getuid().as_raw()
        };
        let launch = Launch {
            version: VERSION,
            config: VmConfig::new(
                &name,
                format!("vmctl:test:VirtualMachine/{name}"),
                32 << 20,
                BootConfig::kernel("kernel", None, cmdline),
            ),
            uid: id,
            gid: id,
            fds: vec![FdRole::Kvm, FdRole::Control, FdRole::ExitRecord, FdRole::ConsoleLog, FdRole::Kernel],
            missing: Vec::new(),
        };
        let fds = vec![
            kvm.into(),
            control,
            exit_record.try_clone().unwrap().into(),
            console_log.into(),
            kernel.into(),
        ];
        Self { launch, fds, dir, exit_record, console_log: File::open(log_path).unwrap() }
    }

    /// Without a kernel of the host: it boots from a disk, which is to be added.
    pub fn from_disk(disk: &str, append: &str) -> Self {
        let mut vm = Self::new(memfd(b""), "");
        vm.withhold(&FdRole::Kernel);
        vm.launch.config.boot =
            BootConfig::Disk(DiskBoot { disk: disk.into(), entry: None, append: append.into() });
        vm
    }

    pub fn vcpus(mut self, vcpus: u8) -> Self {
        self.launch.config.vcpus = vcpus;
        self
    }

    pub fn memory_bytes(mut self, memory_bytes: u64) -> Self {
        self.launch.config.memory_bytes = memory_bytes;
        self
    }

    pub fn pass(&mut self, role: FdRole, fd: impl Into<OwnedFd>) {
        self.launch.fds.push(role);
        self.fds.push(fd.into());
    }

    /// Drops the descriptor of this role.
    pub fn withhold(&mut self, role: &FdRole) {
        let index = self.launch.fds.iter().position(|other| other == role).unwrap();
        self.launch.fds.remove(index);
        self.fds.remove(index);
    }

    pub fn initrd(mut self, initrd: File) -> Self {
        let BootConfig::Kernel(boot) = &mut self.launch.config.boot else { panic!("a kernel's initrd") };
        boot.initrd_path = Some("initrd".into());
        self.pass(FdRole::Initrd, initrd);
        self
    }

    pub fn disk(mut self, config: DiskConfig, image: File) -> Self {
        self.pass(FdRole::Disk { name: config.name.clone() }, image);
        self.launch.config.disks.push(config);
        self
    }

    pub fn nic(self, config: NicConfig, tap: File) -> Self {
        self.nic_of_pairs(config, vec![tap], Vec::new())
    }

    /// With a descriptor of the tap for each queue pair, and one of `/dev/vhost-net` for each, or none.
    pub fn nic_of_pairs(mut self, config: NicConfig, taps: Vec<File>, vhosts: Vec<File>) -> Self {
        for (pair, tap) in (0..).zip(taps) {
            self.pass(FdRole::Tap { nic: config.name.clone(), pair }, tap);
        }
        for (pair, vhost) in (0..).zip(vhosts) {
            self.pass(FdRole::Vhost { nic: config.name.clone(), pair }, vhost);
        }
        self.launch.config.nics.push(config);
        self
    }

    /// A vsock device; gives the directory of its sockets.
    pub fn vsock(&mut self, cid: u32) -> PathBuf {
        use rustix::fs::{Mode, OFlags};
        let directory = self.dir.join("vsock");
        std::fs::create_dir(&directory).unwrap();
        let listener =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
                .unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(directory.join("vsock")).unwrap()).unwrap();
        let path = rustix::fs::open(&directory, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()).unwrap();
        self.launch.config.vsock = Some(VsockConfig { cid });
        self.pass(FdRole::VsockListener, listener);
        self.pass(FdRole::Vsock, path);
        directory
    }

    pub fn launch(mut self, program: &Path) -> Result<RunningVm, LaunchError> {
        let fds = std::mem::take(&mut self.fds);
        let pid = client::launch(program, &self.launch, fds)?;
        let target = rustix::process::Pid::from_raw(pid).unwrap();
        let pidfd = rustix::process::pidfd_open(target, rustix::process::PidfdFlags::empty()).unwrap();
        let dir = std::mem::take(&mut self.dir);
        Ok(RunningVm {
            pid,
            pidfd,
            dir,
            exit_record: self.exit_record.try_clone().unwrap(),
            console_log: self.console_log.try_clone().unwrap(),
        })
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        if !self.dir.as_os_str().is_empty() {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

impl RunningVm {
    pub fn control(&self) -> Control {
        Control::connect(&self.dir.join("control")).unwrap()
    }

    pub fn control_path(&self) -> PathBuf {
        self.dir.join("control")
    }

    /// Attaches with all that was printed so far.
    pub fn console(&self) -> Session {
        Session { console: self.control().attach_console(usize::MAX).unwrap(), text: String::new() }
    }

    /// Waits for the process's end; gives its record.
    pub fn wait(&self) -> Option<ExitRecord> {
        self.wait_for(Duration::from_secs(30))
    }

    pub fn wait_for(&self, timeout: Duration) -> Option<ExitRecord> {
        assert!(poll(&self.pidfd, timeout), "the VM process has not ended");
        let mut text = String::new();
        let mut file = &self.exit_record;
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        (!text.is_empty()).then(|| serde_json::from_str(&text).unwrap())
    }

    pub fn has_ended(&self) -> bool {
        poll(&self.pidfd, Duration::ZERO)
    }

    pub fn log(&self) -> String {
        let mut bytes = Vec::new();
        let mut file = &self.console_log;
        file.rewind().unwrap();
        file.read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    pub fn kill(&self) {
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::KILL);
    }

    pub fn terminate(&self) {
        rustix::process::pidfd_send_signal(&self.pidfd, rustix::process::Signal::TERM).unwrap();
    }
}

impl Drop for RunningVm {
    fn drop(&mut self) {
        self.kill();
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

pub fn poll(fd: &OwnedFd, timeout: Duration) -> bool {
    let timeout =
        rustix::event::Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos().into() };
    let fd = fd.as_fd();
    let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
    rustix::event::poll(&mut fds, Some(&timeout)).unwrap() > 0
}

/// A console with what was read from it.
pub struct Session {
    pub console: Console,
    pub text: String,
}

impl Session {
    /// Reads until `wanted` was seen; gives all up to its end, and forgets that.
    pub fn expect(&mut self, wanted: &str) -> String {
        self.expect_within(wanted, Duration::from_secs(30))
    }

    pub fn expect_within(&mut self, wanted: &str, timeout: Duration) -> String {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(at) = self.text.find(wanted) {
                let rest = self.text.split_off(at + wanted.len());
                return std::mem::replace(&mut self.text, rest);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let mut buffer = [0; 4096];
            match self.console.read(&mut buffer, left).unwrap() {
                Some(0) => panic!("the console ended before {wanted:?}; read {:?}", self.text),
                Some(length) => self.text += &String::from_utf8_lossy(&buffer[..length]),
                None => assert!(!left.is_zero(), "no {wanted:?} within {timeout:?}; read {:?}", self.text),
            }
        }
    }

    pub fn type_in(&self, text: &str) {
        self.console.write(text.as_bytes()).unwrap();
    }
}

/// Lets the VM's user connect to a socket of ours.
pub fn let_connect(socket: &Path) {
    use std::os::unix::fs::PermissionsExt as _;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o666)).unwrap();
}

/// Opens an existing tap as the host layer does: with a vnet header, without packet information.
pub fn open_tap(name: &str) -> File {
    open_tap_queue(name, false)
}

/// One queue of a tap that may have several.
pub fn open_tap_queue(name: &str, multi_queue: bool) -> File {
    use std::os::fd::AsRawFd as _;
    const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
    let tap = File::options().read(true).write(true).open("/dev/net/tun").expect("/dev/net/tun");
    // SAFETY: an all-zero ifreq is a valid one.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(15)) {
        *to = from as libc::c_char;
    }
    let queues = if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 };
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | queues;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    // SAFETY: TUNSETIFF reads one ifreq from where we point.
    let done = unsafe { libc::ioctl(tap.as_raw_fd(), TUNSETIFF, &raw const request) };
    assert_eq!(done, 0, "open tap {name}: {}", std::io::Error::last_os_error());
    tap
}

pub fn open_vhost() -> File {
    File::options().read(true).write(true).open("/dev/vhost-net").expect("/dev/vhost-net")
}

/// Counts of what a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Holdings {
    pub fds: usize,
    /// Those that the kernel makes for io_uring come and go on their own, and are not counted.
    pub threads: usize,
}

/// `None`: there is no such process.
pub fn holdings(pid: i32) -> Option<Holdings> {
    let entries = |what: &str| std::fs::read_dir(format!("/proc/{pid}/{what}")).ok();
    let kernels = |task: &std::fs::DirEntry| {
        std::fs::read_to_string(task.path().join("comm")).is_ok_and(|name| name.starts_with("iou-"))
    };
    let threads = entries("task")?.flatten().filter(|task| !kernels(task)).count();
    Some(Holdings { fds: entries("fd")?.count(), threads })
}

/// The resident memory of a process.
pub fn resident_kib(pid: i32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}
