//! Running LVM's own commands: the only code that may write its metadata.
//!
//! One at a time for each volume group, in the C locale, with nothing on standard input (a question that LVM
//! asks is thereby answered with no), and for a bounded time.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::name::LvmName;

/// LVM waits for its own locks; a device that doesn't answer would hold it for ever.
const PATIENCE: Duration = Duration::from_secs(120);
const OUTPUT_BYTES_MAX: u64 = 64 << 20;
/// Where there is no udev, LVM makes its nodes itself and must not wait for anybody.
const WITHOUT_UDEV: &str = "activation{udev_sync=0 udev_rules=0 verify_udev_operations=0 monitoring=0} \
     devices{obtain_device_list_from_udev=0 external_device_info_source=\"none\"}";

#[derive(Debug)]
pub enum CommandError {
    /// The program is not installed.
    Missing,
    Failed(String),
}

impl CommandError {
    pub fn why(&self, program: &str) -> String {
        match self {
            Self::Missing => format!("`{program}` is not installed"),
            Self::Failed(why) => why.clone(),
        }
    }

    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Missing => Some("install the packages lvm2 and util-linux".to_owned()),
            Self::Failed(_) => None,
        }
    }
}

/// Held while commands change this group, so that two of ours never wait for one another inside LVM.
pub struct GroupLocks(Mutex<BTreeMap<LvmName, Arc<Mutex<()>>>>);

pub static GROUP_LOCKS: GroupLocks = GroupLocks(Mutex::new(BTreeMap::new()));

impl GroupLocks {
    pub fn with<T>(&self, group: &LvmName, act: impl FnOnce() -> T) -> T {
        // A poisoned lock guards no data that could be half-changed.
        let mutex = {
            let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            locks.entry(group.clone()).or_default().clone()
        };
        let _held = mutex.lock().unwrap_or_else(PoisonError::into_inner);
        act()
    }
}

/// Runs a command of LVM's and gives what it printed.
pub fn lvm(arguments: &[&str]) -> Result<String, CommandError> {
    let (name, rest) = arguments.split_first().unwrap_or((&"version", &[]));
    let mut all = vec![*name];
    if !Path::new("/run/udev/control").exists() {
        all.extend(["--config", WITHOUT_UDEV]);
    }
    all.extend(rest);
    run("lvm", &all)
}

pub fn run(program: &str, arguments: &[&str]) -> Result<String, CommandError> {
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C")
        .env("LVM_SUPPRESS_FD_WARNINGS", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| match error.kind() {
            std::io::ErrorKind::NotFound => CommandError::Missing,
            _ => CommandError::Failed(format!("start `{program}`: {error}")),
        })?;
    let read = |pipe: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(pipe) = pipe {
                // What was read until an error is all there is to tell.
                let _ = pipe.take(OUTPUT_BYTES_MAX).read_to_end(&mut bytes);
            }
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let stdout = read(child.stdout.take().map(|pipe| Box::new(pipe) as Box<dyn Read + Send>));
    let stderr = read(child.stderr.take().map(|pipe| Box::new(pipe) as Box<dyn Read + Send>));
    let deadline = Instant::now() + PATIENCE;
    let mut pause = Duration::from_micros(500);
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < deadline => {
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(20));
            }
            Ok(None) => {
                let _ = child.kill();
                let _ = child.wait();
                let why = format!("`{program} {}` didn't end within {PATIENCE:?}", arguments.join(" "));
                return Err(CommandError::Failed(why));
            }
            Err(error) => return Err(CommandError::Failed(format!("wait for `{program}`: {error}"))),
        }
    };
    let [stdout, stderr] = [stdout, stderr].map(|reader| reader.join().unwrap_or_default());
    if status.success() {
        return Ok(stdout);
    }
    let said: Vec<&str> = stderr
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with("WARNING"))
        .collect();
    let said = if said.is_empty() { status.to_string() } else { said.join("; ") };
    Err(CommandError::Failed(format!("`{program} {}`: {said}", arguments.first().unwrap_or(&""))))
}
