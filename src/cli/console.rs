//! `vmctl console`: the guest's serial console on this terminal, or on a pipe.
//!
//! The terminal is put back as it was however this ends, short of SIGKILL: by the guard's drop, by the signals'
//! flag, and by the panic hook (a release build aborts on a panic, without drops).

use std::io::{IsTerminal, Write};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use clap::Args;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use super::args::parse_duration;
use super::error::{CliError, Result};
use super::exit::Exit;
use super::interrupt;
use super::power::vm_name;
use super::session::Session;
use crate::host::linux::LinuxHost;
use crate::host::{Host, Scope};
use crate::name::ObjectName;
use crate::vmm::client::Console;

/// Ctrl-]
const DETACH: u8 = 0x1d;
/// How long the VM process has at the end to take what was typed.
const HAND_OVER: Duration = Duration::from_secs(2);
/// How long one wait lasts at most: signals are noticed after it.
const WAIT: Timespec = Timespec { tv_sec: 0, tv_nsec: 250_000_000 };

/// Attach to a VM's serial console
///
/// On a terminal, Ctrl-] detaches; the VM runs on. Otherwise stdin is typed to its end, and the command ends when
/// the guest has then been silent for --timeout.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  vmctl console web
  echo 'uname -r' | vmctl console web --timeout 2s
  vmctl console web --replay 0                    without what was printed before")]
pub struct Command {
    /// The VM's name: `web` or `vm/web`
    vm: String,
    /// How much of the last output is shown first, in bytes
    #[arg(long, value_name = "BYTES", default_value_t = 16 * 1024)]
    replay: usize,
    /// With piped stdin: how long the guest may be silent after its end
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_duration)]
    timeout: Duration,
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        let name = vm_name(&self.vm)?;
        let console = attach(&session.host(), &name, self.replay)?;
        let interactive = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
        let end = interrupt::flag();
        let raw = if interactive {
            session.out.note(&format!("Attached to {name}; Ctrl-] detaches."));
            Some(Raw::enter().map_err(|error| CliError::failed(format!("set up the terminal: {error}")))?)
        } else {
            None
        };
        let mut attached = Attached {
            session,
            console,
            interactive,
            silence: self.timeout,
            typing: true,
            last_output: Instant::now(),
        };
        let ended = loop {
            if end.load(Ordering::Relaxed) || session.out.is_closed() {
                break Ok(Ended::Signal);
            }
            match attached.turn() {
                Ok(None) => {}
                Ok(Some(ended)) => break Ok(ended),
                Err(error) => break Err(error),
            }
        };
        if matches!(ended, Ok(Ended::Detached)) {
            attached.hand_over();
        }
        drop(raw);
        if interactive {
            session.out.note("");
        }
        match ended.map_err(|error| CliError::failed(format!("the console of {name}: {error}")))? {
            Ended::Guest => session.out.note(&format!("The VM {name} has ended.")),
            Ended::Detached if interactive => session.out.note("Detached; the VM runs on."),
            Ended::Detached | Ended::Signal => {}
        }
        Ok(Exit::Ok)
    }
}

fn attach(host: &LinuxHost, name: &ObjectName, replay_bytes: usize) -> Result<Console> {
    let failed = |error: &dyn std::fmt::Display| CliError::failed(error.to_string());
    match host.vm_control(name).map_err(|error| failed(&error))? {
        Some(control) => control.attach_console(replay_bytes).map_err(|error| failed(&error)),
        None => {
            let vms = host.snapshot(&Scope::default()).vms.map_err(|error| failed(&error))?;
            Err(if vms.contains_key(name) {
                CliError::failed(format!("VM {name} does not run")).hint(format!(
                    "`vmctl start {name}` starts it; `vmctl logs {name}` shows what it printed"
                ))
            } else {
                no_such_vm(name)
            })
        }
    }
}

pub fn no_such_vm(name: &ObjectName) -> CliError {
    CliError::failed(format!("there is no VM {name} on this host"))
        .hint("`vmctl get vm` lists those that are")
}

/// Why a console session is over.
enum Ended {
    Detached,
    Guest,
    Signal,
}

struct Attached<'a> {
    session: &'a Session,
    console: Console,
    interactive: bool,
    silence: Duration,
    /// stdin has not ended.
    typing: bool,
    last_output: Instant,
}

impl Attached<'_> {
    /// Waits for either side once, and passes on what came.
    fn turn(&mut self) -> std::io::Result<Option<Ended>> {
        let stdin = std::io::stdin();
        let (from_guest, from_stdin) = {
            let mut fds = vec![PollFd::new(&self.console, PollFlags::IN)];
            if self.typing {
                fds.push(PollFd::new(&stdin, PollFlags::IN));
            }
            match poll(&mut fds, Some(&WAIT)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            (!fds[0].revents().is_empty(), fds.get(1).is_some_and(|fd| !fd.revents().is_empty()))
        };
        if from_guest && let Some(ended) = self.print()? {
            return Ok(Some(ended));
        }
        if from_stdin && let Some(ended) = self.type_in(&stdin)? {
            return Ok(Some(ended));
        }
        let silent = !self.typing && !self.interactive && self.last_output.elapsed() >= self.silence;
        Ok(silent.then_some(Ended::Detached))
    }

    /// Ends our half, and waits until the VM process has read it to the end and closes its own: what is in
    /// flight when both halves are closed at once can be lost.
    fn hand_over(&mut self) {
        let deadline = Instant::now() + HAND_OVER;
        if rustix::net::shutdown(&self.console, rustix::net::Shutdown::Write).is_err() {
            return;
        }
        let mut buffer = [0; 4096];
        while Instant::now() < deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.console.read(&mut buffer, left) {
                // What is still printed belongs to a pipe's reader, and to nobody on a terminal that detached.
                Ok(Some(length)) if length > 0 => {
                    if !self.interactive {
                        self.session.out.print_bytes(&buffer[..length]);
                    }
                }
                _ => return,
            }
        }
    }

    fn print(&mut self) -> std::io::Result<Option<Ended>> {
        let mut buffer = [0; 4096];
        match self.console.read(&mut buffer, Duration::ZERO)? {
            None => Ok(None),
            Some(0) => Ok(Some(Ended::Guest)),
            Some(length) => {
                self.last_output = Instant::now();
                self.session.out.print_bytes(&buffer[..length]);
                Ok(None)
            }
        }
    }

    fn type_in(&mut self, stdin: &std::io::Stdin) -> std::io::Result<Option<Ended>> {
        let mut buffer = [0; 1024];
        // Past the buffer of `Stdin`, which poll knows nothing of.
        let length = match rustix::io::read(stdin, &mut buffer) {
            Ok(length) => length,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => return Ok(None),
            // The terminal went away.
            Err(rustix::io::Errno::IO) => 0,
            Err(errno) => return Err(errno.into()),
        };
        if length == 0 {
            self.typing = false;
            self.last_output = Instant::now();
            return Ok(self.interactive.then_some(Ended::Detached));
        }
        let typed = &buffer[..length];
        let detach = if self.interactive { typed.iter().position(|byte| *byte == DETACH) } else { None };
        match self.console.write(&typed[..detach.unwrap_or(length)]) {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(Some(Ended::Guest)),
            Err(error) => Err(error),
            Ok(()) => Ok(detach.map(|_| Ended::Detached)),
        }
    }
}

/// How the terminal was; here and not in the guard, so that a panic finds it.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// The terminal passes on every key as it is, for as long as this lives.
struct Raw;

impl Raw {
    fn enter() -> std::io::Result<Self> {
        let before = tcgetattr(std::io::stdin())?;
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before.clone());
        let next = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            restore();
            next(panic);
        }));
        let mut raw = before;
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self)
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

fn restore() {
    if let Some(before) = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // There is nothing better to do about a terminal that can't be set.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Flush, &before);
        let _ = std::io::stdout().flush();
    }
}
