//! A VM's process, found and recognised: by its socket, never by a number that was written down.
//!
//! Whoever listens on the socket is the VM process; the kernel says which that is (`SO_PEERCRED`), and
//! a pidfd holds on to it. Nothing here changes a VM.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, PidfdFlags, Signal};

use super::cgroup;
use super::parallel::ask_all;
use super::vm_place::{SocketDirectory, VmPlace};
use crate::host::error::ObserveError;
use crate::host::snapshot::{Observed, Vm, VmProcess};
use crate::name::ObjectName;
use crate::vmm::client::{Control, ControlError};
use crate::vmm::packet::PacketError;
use crate::vmm::protocol::VmState;

/// How long a VM process may take to answer while we look at all of them.
pub const LOOK_TIMEOUT: Duration = Duration::from_secs(1);
/// How long a start or an end of a VM process may take: it reads a kernel, or flushes its disks.
const SETTLE_MAX: Duration = Duration::from_secs(30);
const SETTLE_POLL: Duration = Duration::from_millis(10);

/// All VMs that are defined or run.
pub fn observe(state_dir: &Path, run_dir: &Path) -> Observed<BTreeMap<ObjectName, Vm>> {
    let names =
        VmPlace::list(state_dir, run_dir).map_err(|error| ObserveError::new("list the VMs", error))?;
    let seen = ask_all(names, |name| look_at(&VmPlace::new(state_dir, run_dir, name), name))?;
    // What a VM leaves when it is killed.
    cgroup::sweep(&|name| {
        let runs = |vm: &Option<Vm>| vm.as_ref().is_some_and(|vm| vm.process.is_some());
        seen.iter().any(|(vm, found)| vm.as_str() == name && runs(found))
    });
    Ok(seen.into_iter().filter_map(|(name, vm)| Some((name, vm?))).collect())
}

/// `None`: neither defined nor running.
fn look_at(place: &VmPlace, name: &ObjectName) -> Option<Vm> {
    let failed =
        |what: &str, why: &dyn ToString| ObserveError::new(format!("{what} {name}"), why.to_string());
    let mut vm = Vm::default();
    let (mut unreadable, mut running) = (None, None);
    match place.definition() {
        Ok(definition) => vm.definition = definition,
        Err(error) => unreadable = Some(failed("read the definition of the VM", &error)),
    }
    match place.held() {
        Ok(held) => vm.held = held,
        Err(error) => unreadable = Some(failed("read the hold of the VM", &error)),
    }
    match ask(place) {
        Ok(process) => running = process,
        Err(error) => unreadable = Some(failed("ask the process of the VM", &error)),
    }
    if running.is_none() {
        match place.exit_record() {
            Ok(record) => vm.exit = record,
            Err(error) => unreadable = Some(failed("read how the VM ended", &error)),
        }
    }
    // What can't be read makes the whole VM unknown: nothing is decided on a part of it.
    vm.process = unreadable.map(Err).or(running.map(Ok));
    (vm.definition.is_some() || vm.process.is_some()).then_some(vm)
}

/// Waits while a process of the VM lives and can't be talked to: it is being started, perhaps by a run
/// that was killed, or it is ending. Nothing may be decided in between.
pub fn settle(place: &VmPlace) -> Result<(), LookError> {
    let deadline = Instant::now() + SETTLE_MAX;
    while place.has_process()? {
        if let Some(directory) = place.socket_directory()?
            && connect(&directory, LOOK_TIMEOUT)?.is_some()
        {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return Err(LookError::Unsettled { seconds: SETTLE_MAX.as_secs() });
        }
        std::thread::sleep(SETTLE_POLL);
    }
    Ok(())
}

fn ask(place: &VmPlace) -> Result<Option<VmProcess>, LookError> {
    let Some(directory) = place.socket_directory()? else { return Ok(None) };
    settle(place)?;
    // It may end between the connection and the answer; then the next connection says so.
    for _ in 0..2 {
        let Some(control) = connect(&directory, LOOK_TIMEOUT)? else { return Ok(None) };
        let pid = control.peer_pid()?;
        match control.state() {
            Ok(state) => return Ok(Some(process_facts(pid, state))),
            Err(ControlError::Packet(PacketError::Closed)) => {}
            Err(ControlError::Packet(PacketError::WouldBlock)) => {
                return Err(LookError::Silent { pid, seconds: LOOK_TIMEOUT.as_secs() });
            }
            Err(error) => return Err(error.into()),
        }
    }
    Err(ControlError::Packet(PacketError::Closed).into())
}

fn process_facts(pid: i32, state: VmState) -> VmProcess {
    let disks = state.config.disks.iter().map(|disk| Path::new(&disk.path));
    let files_in_memory = cgroup::files_in_memory(pid, disks);
    VmProcess {
        pid,
        phase: state.phase,
        uptime_ms: state.uptime_ms,
        reboots: state.reboots,
        config: state.config,
        disk_capacity_bytes: state.disk_capacity_bytes,
        conditions: state.conditions,
        // One that ends meanwhile has none any more.
        cpu_share: cgroup::share(pid).unwrap_or_default(),
        limits: cgroup::limits(pid).unwrap_or_default(),
        files_in_memory,
    }
}

/// Why a VM process could not be asked or held on to.
#[derive(Debug, thiserror::Error)]
pub enum LookError {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{}", chain(.0))]
    Control(#[from] ControlError),
    #[error("a process of it has been starting or ending for {seconds} s")]
    Unsettled { seconds: u64 },
    #[error("the process {pid} holds its socket and gave no answer within {seconds} s")]
    Silent { pid: i32, seconds: u64 },
}

/// An error with what caused it, each said once.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

/// `None`: nobody listens.
pub fn connect(directory: &SocketDirectory, timeout: Duration) -> Result<Option<Control>, ControlError> {
    match Control::connect_within(&directory.socket(), timeout) {
        Ok(control) => Ok(Some(control)),
        Err(ControlError::Absent { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A VM process, held on to: its pid can't come to mean another process while this is there.
#[derive(Debug)]
pub struct HeldProcess {
    pub pid: i32,
    pidfd: OwnedFd,
}

impl HeldProcess {
    /// Finds who listens on the VM's socket. `None`: nobody.
    pub fn find(directory: &SocketDirectory, timeout: Duration) -> Result<Option<Self>, LookError> {
        // Between the kernel's word on who listens and the pidfd, the process may end and its number be
        // given away. A second connection to the same listener shows that it hadn't.
        for _ in 0..3 {
            let Some(before) = connect(directory, timeout)? else { return Ok(None) };
            let pid = before.peer_pid()?;
            let Some(number) = Pid::from_raw(pid) else {
                return Err(io::Error::other("the process that listens is in another pid namespace").into());
            };
            let pidfd = match rustix::process::pidfd_open(number, PidfdFlags::empty()) {
                Ok(pidfd) => pidfd,
                Err(rustix::io::Errno::SRCH) => continue,
                Err(errno) => return Err(io::Error::from(errno).into()),
            };
            let Some(after) = connect(directory, timeout)? else { return Ok(None) };
            if after.peer_pid()? == pid {
                return Ok(Some(Self { pid, pidfd }));
            }
        }
        Err(io::Error::other("the process that listens changed again and again").into())
    }

    /// Waits for its end; `false` if it still runs after that time.
    pub fn wait(&self, timeout: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + timeout;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let left = Timespec {
                tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            match rustix::event::poll(&mut [PollFd::new(&self.pidfd, PollFlags::IN)], Some(&left)) {
                Ok(ready) => return Ok(ready > 0),
                Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    pub fn kill(&self) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl AsFd for HeldProcess {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl From<HeldProcess> for OwnedFd {
    fn from(process: HeldProcess) -> OwnedFd {
        process.pidfd
    }
}
