//! The worker thread of a device: one owner of the device's state, a mailbox and one loop.
//!
//! ```text
//!   vCPU thread ── Start(activation) / Stop ──▶ ┌─────────┐ ◀── kick eventfds (ioeventfd)
//!   control thread ── commands ───────────────▶ │ worker  │ ◀── backend (tap)
//!                                               └─────────┘ ──▶ used rings, irqfd
//! ```
//!
//! The thread is made with the device and not at activation: activation runs on a vCPU thread, whose
//! seccomp filter forbids `clone` and would be inherited. Before anything else the thread calls the
//! [`ThreadStart`] hook, in which the machine installs the thread's own filter; when the hook fails,
//! so does making the device. Credentials, capabilities and Landlock are inherited from the thread
//! that makes the device, so make devices after those are dropped.
//!
//! What a thread needs of the kernel once its hook has returned is data: [`ThreadRole::system_calls`]
//! and [`ThreadRole::ioctls`]. The tests run every device under filters made of exactly these.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, mpsc};
use std::thread::{Builder, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::vmm::transport::{ActivateError, Activation};

/// What a device thread is for: the key to its seccomp filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ThreadRole {
    Block,
    Net,
    Entropy,
    Balloon,
    Vsock,
    /// No device's: it looks for the kernel on a disk (see [`crate::vmm::boot`]).
    Boot,
}

/// What any of our threads needs: event descriptors, waiting, the allocator, a panic's message, its end.
pub const COMMON_SYSTEM_CALLS: &[libc::c_long] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_close,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // With debug assertions the standard library checks descriptors before it closes them.
    libc::SYS_fcntl,
    libc::SYS_futex,
    // Seeds of the standard library's hash maps, too.
    libc::SYS_getrandom,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_yield,
    libc::SYS_sigaltstack,
    libc::SYS_write,
];

/// To be called once, before the process makes threads. Otherwise glibc's allocator counts the CPUs
/// when the ninth thread allocates, by opening a file below `/sys`, which no filter of ours allows;
/// and every thread would keep a heap of its own.
pub fn share_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a number in the allocator. It can't fail with a valid parameter.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

impl ThreadRole {
    pub const ALL: [Self; 6] =
        [Self::Block, Self::Net, Self::Entropy, Self::Balloon, Self::Vsock, Self::Boot];

    /// Every system call that a thread of this role makes after its hook; `ioctl` only with the
    /// requests of [`Self::ioctls`].
    pub fn system_calls(self) -> impl Iterator<Item = libc::c_long> {
        let own: &[libc::c_long] = match self {
            Self::Block => super::block::SYSTEM_CALLS,
            Self::Net => super::net::SYSTEM_CALLS,
            Self::Vsock => super::vsock::SYSTEM_CALLS,
            Self::Entropy | Self::Balloon | Self::Boot => &[],
        };
        COMMON_SYSTEM_CALLS.iter().chain(own).copied()
    }

    /// The requests (second argument of `ioctl`) that a thread of this role makes.
    pub fn ioctls(self) -> &'static [u64] {
        match self {
            Self::Net => super::net::IOCTLS,
            Self::Block | Self::Entropy | Self::Balloon | Self::Vsock | Self::Boot => &[],
        }
    }
}

/// Called first of all on each new worker thread. An error makes the device's constructor fail.
pub type ThreadStart = Arc<dyn Fn(ThreadRole) -> io::Result<()> + Send + Sync>;

const STACK_BYTES: usize = 256 * 1024;
const REPLY_TIMEOUT: Duration = Duration::from_secs(10);
/// Most descriptors that a service can wait on beside its mailbox.
pub(super) const SOURCES_MAX: usize = 4;

/// What a service waits for.
#[derive(Default)]
pub(super) struct Sources<'a> {
    pub fds: [Option<(BorrowedFd<'a>, PollFlags)>; SOURCES_MAX],
    /// Serve again after this time even if nothing happened.
    pub timeout: Option<Duration>,
}

/// The part of a device that runs on the worker thread and owns the backend.
pub(super) trait Service: Send + 'static {
    type Command: Send + 'static;

    fn start(&mut self, activation: Activation) -> Result<(), ActivateError>;
    /// Finish what is in flight, forget the activation. Called when there is none, too.
    fn stop(&mut self);
    fn command(&mut self, command: Self::Command);
    fn sources(&self) -> Sources<'_>;
    /// Some sources are ready (by their index in [`Sources::fds`]), or the time-out has passed. Must
    /// return after a bounded amount of work, so that the mailbox is read between.
    fn serve(&mut self, ready: [bool; SOURCES_MAX]);
}

enum Message<C> {
    Start(Box<Activation>, mpsc::SyncSender<Result<(), ActivateError>>),
    Stop(mpsc::SyncSender<()>),
    Command(C),
    End,
}

/// The sending side of a worker's mailbox, for handles.
pub(super) struct Mailbox<C> {
    sender: mpsc::Sender<Message<C>>,
    wake: Arc<EventFd>,
}

impl<C> Clone for Mailbox<C> {
    fn clone(&self) -> Self {
        Self { sender: self.sender.clone(), wake: self.wake.clone() }
    }
}

impl<C> Mailbox<C> {
    fn send(&self, message: Message<C>) -> io::Result<()> {
        self.sender.send(message).map_err(|_| ended())?;
        self.wake.write(1)
    }

    /// Sends a command that has no reply.
    pub fn tell(&self, command: C) -> io::Result<()> {
        self.send(Message::Command(command))
    }

    /// Sends the command that `make` builds around a reply channel and waits for the reply, as long
    /// as it takes.
    pub fn call<R>(&self, make: impl FnOnce(mpsc::SyncSender<R>) -> C) -> io::Result<R> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(Message::Command(make(reply)))?;
        answer.recv().map_err(|_| ended())
    }

    /// As [`Self::call`], but gives up waiting after [`REPLY_TIMEOUT`]: the caller must stay
    /// responsive when a disk hangs. The command is carried out all the same, as soon as it can.
    pub fn call_briefly<R>(&self, make: impl FnOnce(mpsc::SyncSender<R>) -> C) -> io::Result<R> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.send(Message::Command(make(reply)))?;
        answer.recv_timeout(REPLY_TIMEOUT).map_err(|error| match error {
            mpsc::RecvTimeoutError::Disconnected => ended(),
            mpsc::RecvTimeoutError::Timeout => {
                let text = format!("still waiting for the device after {} s", REPLY_TIMEOUT.as_secs());
                io::Error::new(io::ErrorKind::TimedOut, text)
            }
        })
    }
}

fn ended() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the device's worker thread has ended")
}

/// A worker thread, held by its device. Dropping it stops the service and joins the thread.
pub(super) struct Worker<C> {
    mailbox: Mailbox<C>,
    thread: Option<JoinHandle<()>>,
}

impl<C: Send + 'static> Worker<C> {
    pub fn spawn<S: Service<Command = C>>(
        name: String,
        role: ThreadRole,
        hook: &ThreadStart,
        mut service: S,
    ) -> io::Result<Self> {
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK)?);
        let (sender, receiver) = mpsc::channel();
        let (report, started) = mpsc::sync_channel(1);
        let (hook, thread_wake) = (hook.clone(), wake.clone());
        let thread = Builder::new().name(name).stack_size(STACK_BYTES).spawn(move || {
            let prepared = hook(role);
            let failed = prepared.is_err();
            // The constructor waits for this; if it is gone, so is the mailbox, and the loop ends.
            let _ = report.send(prepared);
            drop(report);
            if !failed {
                run(&mut service, &receiver, &thread_wake);
            }
        })?;
        let worker = Self { mailbox: Mailbox { sender, wake }, thread: Some(thread) };
        started.recv().map_err(|_| ended())??;
        Ok(worker)
    }

    pub fn mailbox(&self) -> Mailbox<C> {
        self.mailbox.clone()
    }

    pub fn start(&self, activation: Activation) -> Result<(), ActivateError> {
        let (reply, answer) = mpsc::sync_channel(1);
        self.mailbox
            .send(Message::Start(Box::new(activation), reply))
            .map_err(|error| ActivateError(error.to_string()))?;
        answer.recv().map_err(|_| ActivateError(ended().to_string()))?
    }

    /// When it returns the thread touches neither guest memory nor rings.
    pub fn stop(&self) {
        let (reply, answer) = mpsc::sync_channel(1);
        // A worker that has ended touches nothing either.
        if self.mailbox.send(Message::Stop(reply)).is_ok() {
            let _ = answer.recv();
        }
    }
}

impl<C> Drop for Worker<C> {
    fn drop(&mut self) {
        let _ = self.mailbox.send(Message::End);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run<S: Service>(service: &mut S, mailbox: &mpsc::Receiver<Message<S::Command>>, wake: &EventFd) {
    loop {
        loop {
            match mailbox.try_recv() {
                // The replies go to callers that wait; one that has gone needs none.
                Ok(Message::Start(activation, reply)) => {
                    service.stop();
                    let _ = reply.send(service.start(*activation));
                }
                Ok(Message::Stop(reply)) => {
                    service.stop();
                    let _ = reply.send(());
                }
                Ok(Message::Command(command)) => service.command(command),
                Ok(Message::End) | Err(mpsc::TryRecvError::Disconnected) => return service.stop(),
                Err(mpsc::TryRecvError::Empty) => break,
            }
        }
        match wait(service, wake) {
            Ok(ready) => service.serve(ready),
            Err(rustix::io::Errno::INTR) => {}
            // Nothing but a broken process makes `poll` fail on descriptors that we own.
            Err(_) => return service.stop(),
        }
    }
}

/// Sleeps until the mailbox, a source or the time-out calls; the mailbox's event is consumed.
fn wait<S: Service>(service: &S, wake: &EventFd) -> Result<[bool; SOURCES_MAX], rustix::io::Errno> {
    let sources = service.sources();
    let wake_fd = event_fd(wake);
    let mut fds: [PollFd<'_>; 1 + SOURCES_MAX] = std::array::from_fn(|slot| {
        let source = match slot.checked_sub(1) {
            None => Some((wake_fd, PollFlags::IN)),
            Some(index) => sources.fds[index],
        };
        // A slot that watches for nothing new: the mailbox's descriptor, without events.
        let (fd, flags) = source.unwrap_or((wake_fd, PollFlags::empty()));
        PollFd::from_borrowed_fd(fd, flags)
    });
    let timeout = sources.timeout.map(|timeout| Timespec {
        tv_sec: timeout.as_secs() as i64,
        tv_nsec: i64::from(timeout.subsec_nanos()) as _,
    });
    poll(&mut fds, timeout.as_ref())?;
    if !fds[0].revents().is_empty() {
        let _ = wake.read();
    }
    Ok(std::array::from_fn(|index| !fds[1 + index].revents().is_empty()))
}

/// A borrowed view of an event file descriptor for [`Sources`].
pub(in crate::vmm) fn event_fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the descriptor stays open as long as `event` is borrowed.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
