//! The other side of the two conversations: starting a VM process and talking to one. Everything that
//! has to do with a VM process from outside goes through here, and nothing here knows a manifest.
//!
//! All calls block, none for longer than its time-out.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};

use super::packet::{self, PacketError};
use super::protocol::{
    Event, LAUNCH_FD, Launch, LaunchReply, Metrics, Request, Response, VERSION, Verb, VmState,
};

/// How long a VM process may take from its start to running vCPUs. Reading a kernel from a cold disk
/// belongs to it.
pub const LAUNCH_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a VM process may take to answer a request. Its event loop never waits for the guest, but
/// a reboot or a stop waits for disks.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    #[error("make the launch socket")]
    Socket(#[source] io::Error),
    #[error("start {program}")]
    Spawn {
        program: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("send the launch of {name}: {source}")]
    Send {
        name: String,
        #[source]
        source: PacketError,
    },
    /// The process ended, or didn't answer in time.
    #[error("the VM process of {name} gave no answer ({status}): {source}")]
    NoReply {
        name: String,
        status: ExitStatus,
        #[source]
        source: PacketError,
    },
    /// The process said why it can't run this VM.
    #[error("the VM process of {name} refused: {error}")]
    Refused { name: String, error: String },
}

/// Starts a VM process and waits until its vCPUs run; gives its pid. `fds` go with `launch.fds`, one
/// for one. The new process is nobody's child: it outlives the caller, and needs no waiting for.
pub fn launch(program: &Path, launch: &Launch, fds: Vec<OwnedFd>) -> Result<i32, LaunchError> {
    let name = || launch.config.name.clone();
    let (near, far) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .map_err(|errno| LaunchError::Socket(errno.into()))?;
    for timeout in [Timeout::Recv, Timeout::Send] {
        sockopt::set_socket_timeout(&near, timeout, Some(LAUNCH_TIMEOUT))
            .map_err(|errno| LaunchError::Socket(errno.into()))?;
    }
    // The packet waits in the socket's queue for the process to be there: its descriptors are open
    // twice for no longer than the send.
    let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    packet::send(&near, launch, &borrowed).map_err(|source| LaunchError::Send { name: name(), source })?;
    drop(borrowed);
    drop(fds);

    let spawned = |source| LaunchError::Spawn { program: program.to_owned(), source };
    let mut child = command(program, &launch.config.name, far.as_raw_fd()).spawn().map_err(spawned)?;
    drop(far);
    // The direct child forks the VM process and ends at once.
    let status = child.wait().map_err(spawned)?;
    match packet::receive::<LaunchReply>(&near) {
        Ok((LaunchReply::Launched { pid }, _)) => Ok(pid),
        Ok((LaunchReply::Failed { error }, _)) => Err(LaunchError::Refused { name: name(), error }),
        Err(source) => Err(LaunchError::NoReply { name: name(), status, source }),
    }
}

fn command(program: &Path, name: &str, launch_fd: RawFd) -> Command {
    let mut command = Command::new(program);
    command.arg(name).env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::inherit());
    // A debugging aid of the VM process, see its sandbox.
    if let Some(value) = std::env::var_os("VMCTL_SECCOMP") {
        command.env("VMCTL_SECCOMP", value);
    }
    // SAFETY: the closure runs between fork and exec, and calls only dup2 and fcntl, which are
    // async-signal-safe and allocate nothing.
    unsafe {
        command.pre_exec(move || {
            // dup2 to itself would leave close-on-exec set.
            let done = if launch_fd == LAUNCH_FD {
                libc::fcntl(launch_fd, libc::F_SETFD, 0)
            } else {
                libc::dup2(launch_fd, LAUNCH_FD)
            };
            if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    command
}

#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// Nobody listens there: the VM process is gone, or was never there.
    #[error("no VM process listens on {path}")]
    Absent { path: PathBuf },
    #[error("connect to {path}")]
    Connect {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("talk to the VM process: {0}")]
    Packet(#[from] PacketError),
    /// The VM process refused the request.
    #[error("{0}")]
    Refused(String),
    #[error("the VM process answered {verb} with {answer}")]
    Unexpected { verb: &'static str, answer: &'static str },
}

/// A connection to a VM process.
#[derive(Debug)]
pub struct Control {
    socket: OwnedFd,
}

impl Control {
    /// Connects to the control socket of a VM process.
    pub fn connect(path: &Path) -> Result<Self, ControlError> {
        Self::connect_within(path, REQUEST_TIMEOUT)
    }

    /// The same, with a bound on each wait: for the connection, and for every packet on it.
    pub fn connect_within(path: &Path, timeout: Duration) -> Result<Self, ControlError> {
        let failed = |source: io::Error| ControlError::Connect { path: path.to_owned(), source };
        let address = SocketAddrUnix::new(path).map_err(|errno| failed(errno.into()))?;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .map_err(|errno| failed(errno.into()))?;
        // A full backlog makes connect wait; the send time-out bounds that too.
        for which in [Timeout::Recv, Timeout::Send] {
            sockopt::set_socket_timeout(&socket, which, Some(timeout))
                .map_err(|errno| failed(errno.into()))?;
        }
        match rustix::io::retry_on_intr(|| rustix::net::connect(&socket, &address)) {
            Ok(()) => Ok(Self { socket }),
            Err(rustix::io::Errno::NOENT | rustix::io::Errno::CONNREFUSED) => {
                Err(ControlError::Absent { path: path.to_owned() })
            }
            Err(errno) => Err(failed(errno.into())),
        }
    }

    /// The process that listens at the other end, as the kernel knows it.
    pub fn peer_pid(&self) -> io::Result<i32> {
        Ok(sockopt::socket_peercred(&self.socket)?.pid.as_raw_nonzero().get())
    }

    /// Sends a verb and reads the answer. A refusal is an answer, not an error.
    pub fn request(&self, verb: &Verb) -> Result<Response, ControlError> {
        self.exchange(verb, &[])
    }

    /// The same for a verb that takes a descriptor.
    pub fn request_with_fd(&self, verb: &Verb, fd: BorrowedFd<'_>) -> Result<Response, ControlError> {
        self.exchange(verb, &[fd])
    }

    /// The same for a verb that takes several descriptors.
    pub fn request_with_fds(&self, verb: &Verb, fds: &[BorrowedFd<'_>]) -> Result<Response, ControlError> {
        self.exchange(verb, fds)
    }

    /// [`Verb::Get`].
    pub fn state(&self) -> Result<VmState, ControlError> {
        match self.request(&Verb::Get)? {
            Response::State(state) => Ok(*state),
            Response::Error { message } => Err(ControlError::Refused(message)),
            Response::Done | Response::Metrics(_) => {
                Err(ControlError::Unexpected { verb: "get", answer: "no state" })
            }
        }
    }

    /// [`Verb::Metrics`].
    pub fn metrics(&self) -> Result<Metrics, ControlError> {
        match self.request(&Verb::Metrics)? {
            Response::Metrics(metrics) => Ok(*metrics),
            Response::Error { message } => Err(ControlError::Refused(message)),
            Response::Done | Response::State(_) => {
                Err(ControlError::Unexpected { verb: "metrics", answer: "no metrics" })
            }
        }
    }

    /// A verb that is answered with [`Response::Done`].
    pub fn command(&self, verb: &Verb) -> Result<(), ControlError> {
        done(self.request(verb)?)
    }

    /// Turns the connection into the guest's serial console.
    pub fn attach_console(self, replay_bytes: usize) -> Result<Console, ControlError> {
        self.command(&Verb::ConsoleAttach { replay_bytes })?;
        Ok(Console { socket: self.socket })
    }

    /// Turns the connection into a stream of events.
    pub fn watch(self) -> Result<Watch, ControlError> {
        self.command(&Verb::Watch)?;
        Ok(Watch { socket: self.socket })
    }

    fn exchange(&self, verb: &Verb, fds: &[BorrowedFd<'_>]) -> Result<Response, ControlError> {
        let request = Request { version: VERSION, verb: verb.clone() };
        packet::send(&self.socket, &request, fds)?;
        Ok(packet::receive(&self.socket)?.0)
    }
}

fn done(response: Response) -> Result<(), ControlError> {
    match response {
        Response::Done => Ok(()),
        Response::Error { message } => Err(ControlError::Refused(message)),
        Response::State(_) | Response::Metrics(_) => {
            Err(ControlError::Unexpected { verb: "a command", answer: "more than that it is done" })
        }
    }
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The guest's serial console. Its descriptor can be polled; what is read and written are raw bytes.
#[derive(Debug)]
pub struct Console {
    socket: OwnedFd,
}

impl Console {
    /// Waits up to `timeout` for output; `Ok(None)` when none came. `Ok(Some(0))` is the end. The buffer
    /// should hold [`CONSOLE_PACKET_BYTES_MAX`](super::protocol::CONSOLE_PACKET_BYTES_MAX).
    pub fn read(&self, buffer: &mut [u8], timeout: Duration) -> io::Result<Option<usize>> {
        if !wait_readable(&self.socket, timeout)? {
            return Ok(None);
        }
        match rustix::net::recv(&self.socket, buffer, rustix::net::RecvFlags::DONTWAIT) {
            Ok((_, received)) => Ok(Some(received)),
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Ok(None),
            Err(rustix::io::Errno::CONNRESET) => Ok(Some(0)),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Types `bytes` into the guest. Waits while the guest doesn't read, up to [`REQUEST_TIMEOUT`].
    pub fn write(&self, bytes: &[u8]) -> io::Result<()> {
        for chunk in bytes.chunks(1024) {
            rustix::io::retry_on_intr(|| rustix::net::send(&self.socket, chunk, SendFlags::NOSIGNAL))?;
        }
        Ok(())
    }
}

impl AsFd for Console {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The events of a VM process.
#[derive(Debug)]
pub struct Watch {
    socket: OwnedFd,
}

impl Watch {
    /// Waits up to `timeout` for an event; `Ok(None)` when none came. [`PacketError::Closed`] is the end
    /// of the VM process (or it dropped us, for we didn't read): look again.
    pub fn next(&self, timeout: Duration) -> Result<Option<Event>, PacketError> {
        if !wait_readable(&self.socket, timeout).map_err(PacketError::Io)? {
            return Ok(None);
        }
        Ok(Some(packet::receive(&self.socket)?.0))
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn wait_readable(socket: &OwnedFd, timeout: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + timeout;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timespec = rustix::event::Timespec {
            tv_sec: left.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut poll = [rustix::event::PollFd::new(socket, rustix::event::PollFlags::IN)];
        match rustix::event::poll(&mut poll, Some(&timespec)) {
            Ok(ready) => return Ok(ready > 0),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}
