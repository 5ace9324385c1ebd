//! The birth of a VM process: from the launcher's child to a daemon that runs a guest in its sandbox.
//!
//! ```text
//!   exec ─▶ receive ─▶ fork, setsid, fork ─▶ shut in ─▶ first filter ─▶ build the machine
//!        ─▶ threads, each with its filter ─▶ listen ─▶ own filter ─▶ vCPUs run ─▶ "launched"
//! ```

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::process::ExitCode;

use rustix::net::sockopt::{self, Timeout};

use super::boot::BootFiles;
use super::client::LAUNCH_TIMEOUT;
use super::config::{BootConfig, MEMORY_BYTES_MAX, MEMORY_BYTES_MIN, QUEUES_MAX, VCPUS_MAX, VmConfig};
use super::console::{LOG_BYTES_MAX, Log};
use super::device::net::NicFiles;
use super::device::vsock::VsockFiles;
use super::exit;
use super::machine::{Built, MachineError, MachineFiles, source_of};
use super::packet::{self, PacketError};
use super::protocol::{FdRole, LAUNCH_FD, Launch, LaunchReply, VERSION};
use super::sandbox::{self, Born, Cgroup, Filters, SandboxError, Side, Spawner};
use super::supervisor::{Outside, Supervisor};
use super::vcpu;

#[derive(Debug, thiserror::Error)]
pub enum LaunchFailure {
    #[error("receive the launch: {0}")]
    Receive(#[source] PacketError),
    #[error("the launch is of version {0}, this program speaks version {VERSION}")]
    Version(u32),
    #[error("the launch names {named} descriptors and came with {passed}")]
    FdCount { named: usize, passed: usize },
    #[error("the launch passes {0:?} twice")]
    FdTwice(FdRole),
    #[error("the launch passes no {0:?}")]
    FdMissing(FdRole),
    #[error("the launch passes {0:?}, which the configuration doesn't have")]
    FdUnexpected(FdRole),
    #[error("the configuration is invalid: {0}")]
    Config(String),
    #[error("{0}")]
    Sandbox(#[from] SandboxError),
    #[error("{error}{causes}", error = .0, causes = causes(.0))]
    Machine(#[from] MachineError),
    #[error("{what}: {source}")]
    Io {
        what: &'static str,
        #[source]
        source: io::Error,
    },
}

fn causes(error: &MachineError) -> String {
    match error {
        // Their text has the cause already.
        MachineError::Cpu(_)
        | MachineError::Kvm { .. }
        | MachineError::Io { .. }
        | MachineError::Disk(_)
        | MachineError::Nic(_) => String::new(),
        _ if std::error::Error::source(error).is_none() => String::new(),
        _ => format!(": {}", source_of(error)),
    }
}

fn io(what: &'static str) -> impl FnOnce(io::Error) -> LaunchFailure {
    move |source| LaunchFailure::Io { what, source }
}

/// The whole life of a VM process. Returns only what went wrong before there was one.
pub fn run() -> ExitCode {
    // SAFETY: nothing else in this process knows the descriptor; that it is one is checked next.
    let socket = unsafe { OwnedFd::from_raw_fd(LAUNCH_FD) };
    if let Err(errno) = sockopt::socket_type(&socket) {
        eprintln!(
            "vmctl-vmm: descriptor {LAUNCH_FD} is no launch socket ({errno}): vmctl starts this program"
        );
        // It may not even be open: closing it is not ours.
        std::mem::forget(socket);
        return ExitCode::from(2);
    }
    let mode = sandbox::Mode::from_environment();
    let launched = receive(&socket).and_then(|mut launch| match sandbox::daemonise(&launch.files.cgroup)? {
        Side::Parent => Ok(None),
        Side::Daemon(mut born) => {
            // The process is in; it must not be able to reach into its cgroup later.
            launch.files.cgroup = Cgroup::default();
            shut_in(&mut launch, &mut born)?;
            build(launch, &born, mode).map(|supervisor| Some((supervisor, born.pid)))
        }
    });
    match launched {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some((supervisor, pid))) => {
            // The launcher may have given up or died meanwhile: then nobody knows of this VM.
            if packet::send(&socket, &LaunchReply::Launched { pid }, &[]).is_err() {
                return ExitCode::FAILURE;
            }
            drop(socket);
            exit::end(&supervisor.run())
        }
        // The launcher is gone before it has said what to run.
        Err(LaunchFailure::Receive(PacketError::Closed)) => ExitCode::SUCCESS,
        Err(failure) => {
            let reply = LaunchReply::Failed { error: failure.to_string() };
            // If nobody listens any more there is nobody to tell.
            let _ = packet::send(&socket, &reply, &[]);
            ExitCode::FAILURE
        }
    }
}

/// What is to be run, of what, as whom.
struct Received {
    config: VmConfig,
    files: Files,
    user: (u32, u32),
    missing: Vec<String>,
}

/// Leaves what was inherited, and takes what is to be had instead.
fn receive(socket: &OwnedFd) -> Result<Received, LaunchFailure> {
    sandbox::detach(LAUNCH_FD)?;
    for timeout in [Timeout::Recv, Timeout::Send] {
        sockopt::set_socket_timeout(socket, timeout, Some(LAUNCH_TIMEOUT))
            .map_err(|errno| io("prepare the launch socket")(errno.into()))?;
    }
    let (launch, fds) = packet::receive::<Launch>(socket).map_err(LaunchFailure::Receive)?;
    let Launch { version, config, uid, gid, fds: roles, missing } = launch;
    if version != VERSION {
        return Err(LaunchFailure::Version(version));
    }
    check(&config)?;
    let files = Files::sort(&config, roles, fds)?;
    Ok(Received { config, files, user: (uid, gid), missing })
}

/// Everything of the sandbox that is the whole process's: while there is one thread, before anything that
/// a guest could have written is read.
fn shut_in(launch: &mut Received, born: &mut Born) -> Result<(), LaunchFailure> {
    let (uid, gid) = launch.user;
    launch.missing.append(&mut born.missing);
    launch.missing.append(&mut sandbox::confine(&born.rights, uid, gid, &mut launch.files.vsock)?);
    Ok(())
}

/// The machine, its threads, each with its own filter, and the guest's first instruction.
fn build(launch: Received, born: &Born, mode: sandbox::Mode) -> Result<Supervisor, LaunchFailure> {
    let Received { config, mut files, missing, .. } = launch;
    let vsock = files.vsock_listener.take().zip(files.vsock.take());
    files.machine.vsock = vsock.map(|(listener, directory)| VsockFiles { listener, directory });
    let termination = sandbox::block_signals().map_err(io("block signals"))?;
    vcpu::install_kick_handler().map_err(io("install the kick's signal handler"))?;
    let filters = Filters::enter_building(mode)?;
    let devices = filters.for_devices();
    let spawner = Spawner::start(devices.clone()).map_err(io("start the spawner's thread"))?;
    let (built, signals) = Built::new(&config, files.machine, &devices)?;
    let machine = built.start(filters.for_vcpus())?;
    let console_log = match files.console_log {
        Some(fd) => Some(Log::new(fd, LOG_BYTES_MAX).map_err(io("use the console's log"))?),
        None => None,
    };
    let outside =
        Outside { pid: born.pid, control: files.control, console_log, termination, spawner, missing };
    let mut supervisor =
        Supervisor::new(config, machine, signals, outside).map_err(io("listen on the control socket"))?;
    filters.enter_event_loop().map_err(io("install the event loop's seccomp filter"))?;
    // Only now: until here a failure is the launcher's to hear, not a record's.
    exit::install(File::from(files.exit_record));
    // Held to the end.
    std::mem::forget(files.user);
    supervisor.start()?;
    Ok(supervisor)
}

/// Those below are taken: the hypervisor, loopback, the host.
const VSOCK_CID_MIN: u32 = 3;

/// Trust in the launcher goes only so far: this is what the rest of the program takes for granted.
fn check(config: &VmConfig) -> Result<(), LaunchFailure> {
    let fail = |message: String| Err(LaunchFailure::Config(message));
    if config.vcpus == 0 || config.vcpus > VCPUS_MAX {
        return fail(format!("{} vCPUs, not 1 to {VCPUS_MAX}", config.vcpus));
    }
    let memory = config.memory_bytes;
    if !(MEMORY_BYTES_MIN..=MEMORY_BYTES_MAX).contains(&memory) || !memory.is_multiple_of(1 << 20) {
        return fail(format!(
            "{memory} bytes of memory: not a multiple of 1 MiB between {MEMORY_BYTES_MIN} and {MEMORY_BYTES_MAX}"
        ));
    }
    if let Some(vsock) = config.vsock
        && vsock.cid < VSOCK_CID_MIN
    {
        return fail(format!("the vsock context id {}: it starts at {VSOCK_CID_MIN}", vsock.cid));
    }
    let devices = config.disks.len() + config.nics.len();
    let devices_max = config.machine.devices_max();
    if devices > devices_max {
        return fail(format!("{devices} disks and NICs, more than {devices_max}"));
    }
    if let Some(nic) = config.nics.iter().find(|nic| !(1..=QUEUES_MAX).contains(&nic.queue_pairs)) {
        let (name, pairs) = (&nic.name, nic.queue_pairs);
        return fail(format!("{pairs} queue pairs of the NIC {name:?}, not 1 to {QUEUES_MAX}"));
    }
    let disks = config.disks.iter().map(|disk| disk.name.as_str());
    let mut names: Vec<&str> = disks.chain(config.nics.iter().map(|nic| nic.name.as_str())).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return fail(format!("two devices are named {:?}", pair[0]));
    }
    Ok(())
}

/// The passed descriptors, each in its place.
struct Files {
    machine: MachineFiles,
    control: OwnedFd,
    exit_record: OwnedFd,
    console_log: Option<OwnedFd>,
    /// Replaced by its place in the new root.
    vsock: Option<OwnedFd>,
    vsock_listener: Option<OwnedFd>,
    cgroup: Cgroup,
    user: Option<OwnedFd>,
}

impl Files {
    fn sort(config: &VmConfig, roles: Vec<FdRole>, fds: Vec<OwnedFd>) -> Result<Self, LaunchFailure> {
        if roles.len() != fds.len() {
            return Err(LaunchFailure::FdCount { named: roles.len(), passed: fds.len() });
        }
        let mut by_role = HashMap::new();
        for (role, fd) in roles.into_iter().zip(fds) {
            if by_role.insert(role.clone(), fd).is_some() {
                return Err(LaunchFailure::FdTwice(role));
            }
        }
        let cgroup = take_cgroup(&mut by_role);
        let mut take = |role: FdRole| by_role.remove(&role).ok_or(LaunchFailure::FdMissing(role));
        let mut disks = Vec::with_capacity(config.disks.len());
        for disk in &config.disks {
            let image = take(FdRole::Disk { name: disk.name.clone() })?;
            let backing = (0..disk.backing.len())
                .map(|depth| take(FdRole::Backing { disk: disk.name.clone(), depth }))
                .collect::<Result<_, _>>()?;
            disks.push((image, backing));
        }
        let mut nics = Vec::with_capacity(config.nics.len());
        for nic in &config.nics {
            let pairs = 0..nic.queue_pairs;
            let taps = pairs.clone().map(|pair| take(FdRole::Tap { nic: nic.name.clone(), pair }));
            let taps = taps.collect::<Result<_, _>>()?;
            // Where there is one for the first pair, there is one for each.
            let has_vhost = take(FdRole::Vhost { nic: nic.name.clone(), pair: 0 });
            let vhosts = match has_vhost {
                Ok(first) => std::iter::once(Ok(first))
                    .chain(pairs.skip(1).map(|pair| take(FdRole::Vhost { nic: nic.name.clone(), pair })))
                    .collect::<Result<_, _>>()?,
                Err(_) => Vec::new(),
            };
            nics.push(NicFiles { taps, vhosts });
        }
        let vsock = match config.vsock {
            Some(_) => Some((take(FdRole::VsockListener)?, take(FdRole::Vsock)?)),
            None => None,
        };
        let (vsock_listener, vsock) = vsock.unzip();
        let boot = match &config.boot {
            BootConfig::Kernel(boot) => Some(BootFiles {
                kernel: File::from(take(FdRole::Kernel)?),
                initrd: boot.initrd_path.as_ref().map(|_| take(FdRole::Initrd)).transpose()?.map(File::from),
                cmdline: boot.cmdline.clone(),
            }),
            BootConfig::Disk(_) => None,
        };
        let files = Self {
            machine: MachineFiles { kvm: take(FdRole::Kvm)?, boot, disks, nics, vsock: None },
            control: take(FdRole::Control)?,
            exit_record: take(FdRole::ExitRecord)?,
            console_log: take(FdRole::ConsoleLog).ok(),
            vsock,
            vsock_listener,
            user: take(FdRole::User).ok(),
            cgroup,
        };
        match by_role.into_keys().next() {
            Some(role) => Err(LaunchFailure::FdUnexpected(role)),
            None => Ok(files),
        }
    }
}

fn take_cgroup(by_role: &mut HashMap<FdRole, OwnedFd>) -> Cgroup {
    let procs = by_role.extract_if(|role, _| matches!(role, FdRole::CgroupProcs { .. }));
    let procs = procs.map(|(_, fd)| fd).collect();
    Cgroup { directory: by_role.remove(&FdRole::Cgroup), procs }
}
