//! One run at a time per state directory: an OFD lock, which a crash releases, on a file that names
//! its holder.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::ofd::{self, Lock};

const POLL_INTERVAL: Duration = Duration::from_millis(20);
/// The longest holder's record, in bytes.
const HOLDER_BYTES_MAX: u64 = 4096;

/// Who holds the lock, as it wrote itself down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub pid: u32,
    /// What it is doing, for a person.
    pub command: String,
    pub since_unix_ms: u64,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let seconds = now.saturating_sub(Duration::from_millis(self.since_unix_ms)).as_secs();
        write!(f, "`{}` (pid {}, for {seconds} s)", self.command, self.pid)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum LockError {
    #[error("another run holds the lock {path}: {}", holder_text(holder))]
    Locked { path: PathBuf, holder: Option<Holder> },
    #[error("lock {path}: {source}")]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

fn holder_text(holder: &Option<Holder>) -> String {
    holder.as_ref().map_or_else(|| "it left no name".to_owned(), Holder::to_string)
}

/// Held for as long as this value lives, and no longer than its process.
#[derive(Debug)]
pub struct HostLock {
    file: File,
}

impl HostLock {
    /// Takes the lock of a state directory, waiting for it up to `wait` (zero: not at all). `command` is
    /// what others are told while it is held.
    pub fn acquire(state_dir: &Path, command: &str, wait: Duration) -> Result<Self, LockError> {
        let path = state_dir.join("lock");
        let failed = |source| LockError::Io { path: path.clone(), source };
        std::fs::create_dir_all(state_dir).map_err(failed)?;
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(failed)?;
        let deadline = Instant::now() + wait;
        while !ofd::try_lock(&file, Lock::Exclusive).map_err(|errno| failed(errno.into()))? {
            if Instant::now() >= deadline {
                let holder = read_holder(&mut file);
                return Err(LockError::Locked { path, holder });
            }
            std::thread::sleep(POLL_INTERVAL.min(deadline.saturating_duration_since(Instant::now())));
        }
        let mut lock = Self { file };
        lock.write_holder(command).map_err(failed)?;
        Ok(lock)
    }

    fn write_holder(&mut self, command: &str) -> io::Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let holder = Holder {
            pid: std::process::id(),
            command: command.chars().take(1000).collect(),
            since_unix_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
        };
        self.file.set_len(0)?;
        self.file.rewind()?;
        self.file.write_all(serde_json::to_string(&holder)?.as_bytes())
    }
}

impl Drop for HostLock {
    fn drop(&mut self) {
        // The name goes first: nobody is told of a holder that is gone. Failure leaves a stale name in
        // an unlocked file, which nobody reads.
        let _ = self.file.set_len(0);
    }
}

fn read_holder(file: &mut File) -> Option<Holder> {
    file.rewind().ok()?;
    let mut text = String::new();
    file.take(HOLDER_BYTES_MAX).read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_is_told_of_the_first_and_gets_the_lock_after_it() {
        let directory = tempfile_directory();
        let first = HostLock::acquire(&directory, "apply one", Duration::ZERO).unwrap();
        match HostLock::acquire(&directory, "apply two", Duration::from_millis(50)) {
            Err(LockError::Locked { holder: Some(holder), .. }) => {
                assert_eq!((holder.pid, holder.command.as_str()), (std::process::id(), "apply one"));
            }
            other => panic!("{other:?}"),
        }
        let waiting = std::thread::spawn({
            let directory = directory.clone();
            move || HostLock::acquire(&directory, "apply three", Duration::from_secs(20)).map(drop)
        });
        std::thread::sleep(Duration::from_millis(50));
        drop(first);
        waiting.join().unwrap().unwrap();
        std::fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn a_state_directory_that_cannot_be_made_is_an_error() {
        assert!(matches!(
            HostLock::acquire(Path::new("/proc/none"), "apply", Duration::ZERO),
            Err(LockError::Io { .. })
        ));
    }

    fn tempfile_directory() -> PathBuf {
        let path = std::env::temp_dir().join(format!("vmctl-lock-test-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        path
    }
}
