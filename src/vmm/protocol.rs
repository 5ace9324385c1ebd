//! How one talks to a VM process: `AF_UNIX` `SOCK_SEQPACKET`, one JSON message per packet,
//! versioned and length-bounded. Every verb may be repeated.
//!
//! There are two conversations:
//!
//! - **Launch**: the launcher holds one end of a socket pair, the new process the other as
//!   descriptor [`LAUNCH_FD`]. One [`Launch`] goes in, with the open files as `SCM_RIGHTS` in the
//!   order of [`Launch::fds`]; one [`LaunchReply`] comes out. If the pair closes before the launch
//!   has arrived, the process ends without a trace.
//! - **Control**: anyone who may open the VM's socket sends a [`Request`] and reads a [`Response`].
//!   Once [`Verb::ConsoleAttach`] is answered with [`Response::Done`], the connection carries raw
//!   console bytes in both directions; once [`Verb::Watch`] is, it carries [`Event`]s.

use serde::{Deserialize, Serialize};

pub use super::metrics::Metrics;

use super::config::{DiskConfig, Limits, NicConfig, VmConfig};

/// The protocol's version. A request of another version is answered with [`Response::Error`].
pub const VERSION: u32 = 1;
/// The longest packet, in bytes, in either direction.
pub const PACKET_BYTES_MAX: usize = 128 * 1024;
/// The longest packet of console output, in bytes. Who reads with less room loses the rest.
pub const CONSOLE_PACKET_BYTES_MAX: usize = 4096;
/// The descriptor on which a new VM process finds its launch socket.
pub const LAUNCH_FD: i32 = 3;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Launch {
    pub version: u32,
    pub config: VmConfig,
    /// The unprivileged user and group that the process becomes.
    pub uid: u32,
    pub gid: u32,
    /// What each passed descriptor is, in their order.
    pub fds: Vec<FdRole>,
    /// What of the sandbox the launcher could not prepare, for a person.
    #[serde(default)]
    pub missing: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum FdRole {
    /// `/dev/kvm`.
    Kvm,
    /// A bound, not yet listening, `SOCK_SEQPACKET` socket. The VM process calls `listen` itself, so
    /// that `SO_PEERCRED` of whoever connects names the VM process.
    Control,
    /// An empty file: the process writes its [`ExitRecord`] there, last of all.
    ExitRecord,
    /// A file opened for append: console output, bounded by the VM process.
    ConsoleLog,
    Kernel,
    Initrd,
    Disk {
        name: String,
    },
    /// `depth` counts from 0, the nearest backing file.
    Backing {
        disk: String,
        depth: usize,
    },
    /// One for each queue pair, counted from 0.
    Tap {
        nic: String,
        pair: u16,
    },
    /// `/dev/vhost-net`, opened once for each queue pair: the kernel moves the frames. Where it isn't
    /// passed, the VM process does.
    Vhost {
        nic: String,
        pair: u16,
    },
    /// The directory in which a guest's connection to port P of the host finds `vsock_<P>`: a path alone
    /// (O_PATH). The process binds it into its root, which holds nothing else.
    Vsock,
    /// A bound, not yet listening, `SOCK_STREAM` socket for the host's connections to the guest.
    VsockListener,
    /// The directory of the VM's cgroup (version 2): the process is born in it.
    Cgroup,
    /// `cgroup.procs` of the VM's cgroup in one hierarchy (version 1): the process moves there.
    CgroupProcs {
        hierarchy: String,
    },
    /// What keeps the process's user its own while it lives; nothing is done with it.
    User,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum LaunchReply {
    /// The sandbox is closed and the vCPUs run.
    Launched {
        pid: i32,
    },
    Failed {
        error: String,
    },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Request {
    pub version: u32,
    pub verb: Verb,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Verb {
    /// Answered with [`Response::State`].
    Get,
    /// Presses the ACPI power button. The guest decides.
    PowerButton,
    /// Ends the VM at once: vCPUs stop, disks are flushed, the process exits. Answered before that is
    /// done; the end of the connection is the end of the process.
    Stop,
    Pause,
    Resume,
    /// Resets the machine without a new process. A paused one stays paused.
    Reboot,
    /// The disk grows to this size, and the guest is told (config-change interrupt).
    ResizeDisk {
        disk: String,
        capacity_bytes: u64,
    },
    /// One descriptor for each queue pair comes with the packet: the NIC's new tap.
    ReplaceTap {
        nic: String,
    },
    /// Hot-plug. The image's descriptor comes with the packet, then those of its backing chain.
    AddDisk {
        disk: DiskConfig,
    },
    /// Hot-plug. One descriptor of the tap for each queue pair comes with the packet, then one of
    /// `/dev/vhost-net` for each, or none.
    AddNic {
        nic: NicConfig,
    },
    /// Asks the guest to let go of a disk or a NIC. Answered at once; the device is gone when it is no
    /// longer in [`VmState::config`]. Asked again, the guest is asked again.
    RemoveDevice {
        device: String,
    },
    SetDiskLimits {
        disk: String,
        limits: Limits,
    },
    SetNicLimits {
        nic: String,
        receive: Limits,
        transmit: Limits,
    },
    /// The guest sees the carrier come or go.
    SetLink {
        nic: String,
        up: bool,
    },
    SetBalloon {
        target_bytes: u64,
    },
    /// The guest's state was cloned or taken back: it gets another VMGenID, in the form of a UUID, and is
    /// told. Needs a machine that was started with one.
    SetGenerationId {
        id: String,
    },
    /// Answered with [`Response::Metrics`].
    Metrics,
    /// First the last `replay_bytes` of the ring, then everything that follows.
    ConsoleAttach {
        replay_bytes: usize,
    },
    Watch,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Response {
    Done,
    State(Box<VmState>),
    Metrics(Box<Metrics>),
    Error { message: String },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmState {
    /// The protocol that this process speaks.
    pub version: u32,
    /// The version of the program, to be shown.
    pub program: String,
    pub pid: i32,
    pub phase: Phase,
    /// Since the process started its vCPUs.
    pub uptime_ms: u64,
    /// How often the guest was reset or reset itself.
    pub reboots: u64,
    /// What the process runs now.
    pub config: VmConfig,
    /// Of each disk, in the order of `config.disks`.
    pub disk_capacity_bytes: Vec<u64>,
    /// What somebody should know of, the oldest first.
    #[serde(default)]
    pub conditions: Vec<Condition>,
}

/// Something that is not as it should be and lasts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Condition {
    pub kind: ConditionKind,
    /// The disk or NIC that it is about.
    pub device: Option<String>,
    /// For a person.
    pub message: String,
    /// For how long.
    pub age_ms: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ConditionKind {
    /// The storage below a disk is full: the VM is paused, and resumes when there is room.
    DiskFull,
    /// The guest was asked to let go of a device and has not done so.
    UnplugPending,
    /// The guest's kernel said that it crashed (pvpanic) and goes on, perhaps to write its dump.
    GuestPanicked,
    /// This host, or an unprivileged start, left the process without a part of its sandbox.
    SandboxIncomplete,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Phase {
    Running,
    Paused,
    Stopping,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Event {
    Phase(Phase),
    Rebooted,
    Condition(Condition),
    /// A condition of this kind and device is over.
    Cleared {
        kind: ConditionKind,
        device: Option<String>,
    },
    DeviceAdded {
        device: String,
    },
    DeviceRemoved {
        device: String,
    },
    Exit(ExitRecord),
}

/// Why the process ended. Absent or unreadable means: killed, or crashed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExitRecord {
    pub reason: ExitReason,
    /// For a person.
    pub message: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum ExitReason {
    /// The guest powered itself off (ACPI S5), with or without the power button.
    GuestPowerOff,
    /// [`Verb::Stop`].
    Stopped,
    /// The guest did something that the machine can't go on from (triple fault, bad entry).
    GuestFault,
    /// The guest's kernel said that it crashed (pvpanic).
    GuestPanicked,
    /// The VM process failed.
    Internal,
}
