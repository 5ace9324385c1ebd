//! `vmctl logs`: what the guest printed on its console, from the bounded log beside its sockets.

use std::fs::File;
use std::io::{ErrorKind, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use clap::Args;

use super::error::{CliError, Result};
use super::exit::Exit;
use super::power::vm_name;
use super::session::Session;
use super::{console, interrupt};
use crate::host::{Host, Scope};

/// How often `-f` looks for more.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// So much of what was printed last is looked for in a log that was begun anew.
const OVERLAP_BYTES: usize = 4096;
/// More than any log holds: a file that is larger is not one.
const LOG_BYTES_MAX: u64 = 64 << 20;

/// Print what a VM printed on its console
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  vmctl logs web
  vmctl logs web --tail 20 -f

The log keeps the last megabyte or so; it outlives the VM's process.")]
pub struct Command {
    /// The VM's name: `web` or `vm/web`
    vm: String,
    /// Go on as more is printed; Ctrl-C ends
    #[arg(short = 'f', long)]
    follow: bool,
    /// Only the last N lines
    #[arg(long, value_name = "N")]
    tail: Option<usize>,
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        let name = vm_name(&self.vm)?;
        let host = session.host();
        let path = host.console_log(&name);
        let Some(bytes) = read(&path)? else {
            let vms = host.snapshot(&Scope::default()).vms;
            let vms = vms.map_err(|error| CliError::failed(format!("could not look: {error}")))?;
            if !vms.contains_key(&name) {
                return Err(console::no_such_vm(&name));
            }
            return Err(CliError::failed(format!("VM {name} has printed nothing yet: it has no log")));
        };
        session.out.print_bytes(last_lines(&bytes, self.tail));
        if !self.follow {
            return Ok(Exit::Ok);
        }
        let end = interrupt::flag();
        let mut follower = Follower::new(&bytes);
        while !end.load(Ordering::Relaxed) && !session.out.is_closed() && !reader_left() {
            session.out.print_bytes(&follower.more(&path)?);
        }
        Ok(Exit::Ok)
    }
}

/// Waits a while; ends at once when nobody reads our output any more (`vmctl logs -f web | head -1`), even
/// if the guest never prints again.
fn reader_left() -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let stdout = std::io::stdout();
    let mut fds = [PollFd::new(&stdout, PollFlags::empty())];
    let wait = Timespec { tv_sec: 0, tv_nsec: i64::from(POLL_INTERVAL.subsec_nanos()) };
    match poll(&mut fds, Some(&wait)) {
        Ok(_) => fds[0].revents().intersects(PollFlags::ERR | PollFlags::HUP),
        // A signal: the caller looks at its flag.
        Err(_) => false,
    }
}

/// All of the log; `None`: there is none.
fn read(path: &Path) -> Result<Option<Vec<u8>>> {
    let mut bytes = Vec::new();
    match File::open(path).and_then(|file| file.take(LOG_BYTES_MAX).read_to_end(&mut bytes)) {
        Ok(_) => Ok(Some(bytes)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(CliError::failed(format!("read {}: {error}", path.display()))),
    }
}

fn last_lines(bytes: &[u8], lines: Option<usize>) -> &[u8] {
    let Some(lines) = lines else { return bytes };
    if lines == 0 {
        return &[];
    }
    // The newline that ends the last line begins no other.
    let body = bytes.strip_suffix(b"\n").unwrap_or(bytes);
    let starts =
        body.iter().enumerate().rev().filter(|(_, byte)| **byte == b'\n').map(|(index, _)| index + 1);
    let start = starts.take(lines).nth(lines - 1).unwrap_or(0);
    &bytes[start..]
}

/// Reads on in a log that the VM process empties now and then, and begins anew with its last output.
struct Follower {
    position: u64,
    shown: Vec<u8>,
}

impl Follower {
    fn new(shown: &[u8]) -> Self {
        let mut follower = Self { position: shown.len() as u64, shown: Vec::new() };
        follower.remember(shown);
        follower
    }

    fn remember(&mut self, bytes: &[u8]) {
        self.shown.extend_from_slice(&bytes[bytes.len().saturating_sub(OVERLAP_BYTES)..]);
        let surplus = self.shown.len().saturating_sub(OVERLAP_BYTES);
        self.shown.drain(..surplus);
    }

    fn more(&mut self, path: &Path) -> Result<Vec<u8>> {
        let failed = |error: std::io::Error| CliError::failed(format!("read {}: {error}", path.display()));
        let mut file = match File::open(path) {
            Ok(file) => file,
            // Between two lives of the VM.
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(failed(error)),
        };
        let length = file.metadata().map_err(failed)?.len();
        let anew = length < self.position;
        let from = if anew { 0 } else { self.position };
        file.seek(SeekFrom::Start(from)).map_err(failed)?;
        let mut bytes = Vec::new();
        file.take(LOG_BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?;
        self.position = from + bytes.len() as u64;
        if anew {
            let known = self.overlap(&bytes);
            bytes.drain(..known);
        }
        self.remember(&bytes);
        Ok(bytes)
    }

    /// How much of a new log was printed from the old one.
    fn overlap(&self, bytes: &[u8]) -> usize {
        if self.shown.is_empty() {
            return 0;
        }
        let found = bytes.windows(self.shown.len()).rposition(|window| window == self.shown);
        found.map_or(0, |index| index + self.shown.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_lines_are_whole() {
        for (text, lines, expected) in [
            ("a\nb\nc\n", 2, "b\nc\n"),
            ("a\nb\nc", 2, "b\nc"),
            ("a\nb\n", 5, "a\nb\n"),
            ("a\n\n", 1, "\n"),
            ("", 3, ""),
            ("a\n", 0, ""),
        ] {
            assert_eq!(last_lines(text.as_bytes(), Some(lines)), expected.as_bytes(), "{text:?} {lines}");
        }
    }

    #[test]
    fn a_log_that_begins_anew_is_not_printed_twice() {
        let path = std::env::temp_dir().join(format!("vmctl-logs-test-{}", std::process::id()));
        std::fs::write(&path, "one\ntwo\nthree\n").unwrap();
        let mut follower = Follower::new(&read(&path).unwrap().unwrap());
        assert_eq!(follower.more(&path).unwrap(), b"");
        std::fs::write(&path, "one\ntwo\nthree\nfour\n").unwrap();
        assert_eq!(follower.more(&path).unwrap(), b"four\n");
        follower.shown = b"three\nfour\n".to_vec();
        std::fs::write(&path, "three\nfour\nfive\n").unwrap();
        assert_eq!(follower.more(&path).unwrap(), b"five\n");
        std::fs::write(&path, "new\n").unwrap();
        assert_eq!(follower.more(&path).unwrap(), b"new\n");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(follower.more(&path).unwrap(), b"");
    }
}
