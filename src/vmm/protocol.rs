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

use super::config::VmConfig;

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
    Tap {
        nic: String,
    },
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
    /// One descriptor comes with the packet: the NIC's new tap.
    ReplaceTap {
        nic: String,
    },
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
    /// The VM process failed.
    Internal,
}
