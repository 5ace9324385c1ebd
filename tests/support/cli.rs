//! Runs the built `vmctl` on a host of the test's own: a network namespace, state and run folders.

#![allow(dead_code)] // Each test binary uses a part.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

pub const PROGRAM: &str = env!("CARGO_BIN_EXE_vmctl");

/// A host for one test; what it started ends with it.
pub struct Ground {
    pub directory: PathBuf,
}

impl Ground {
    /// Moves this test's thread into a network namespace of its own: what it starts lives there, too.
    pub fn new() -> Self {
        // SAFETY: only this test's thread changes its network namespace; nothing else is unshared.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
            .expect("tests of the host need root");
        let links = shell("ip -o link");
        assert_eq!(links.lines().count(), 1, "a namespace of one's own has a loopback alone: {links}");
        let thread = std::thread::current();
        let test = thread.name().unwrap_or("test").replace("::", "-");
        let directory = std::env::temp_dir().join(format!("vmctl-cli-{}-{test}", std::process::id()));
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::create_dir_all(&directory).unwrap();
        // Everything that a VM's unprivileged process is handed is opened by us; only the way there must be open.
        Self { directory }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Writes a file, `@` in it standing for this host's directory.
    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, text.replace('@', self.directory.to_str().unwrap())).unwrap();
        path
    }

    pub fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(arguments.split_whitespace()).current_dir(&self.directory);
        command.env("VMCTL_STATE_DIR", self.path("state")).env("VMCTL_RUN_DIR", self.path("run"));
        command.env("VMCTL_VMM", env!("CARGO_BIN_EXE_vmctl-vmm"));
        for name in ["VMCTL_SET", "NO_COLOR", "VMCTL_CRASH_BEFORE_STEP"] {
            command.env_remove(name);
        }
        command.stdin(Stdio::null());
        command
    }

    /// Runs a command line (without spaces in its words), from the host's directory.
    pub fn vmctl(&self, arguments: &str) -> Said {
        Said::new(arguments, self.command(arguments).output().unwrap())
    }

    pub fn with_stdin(&self, arguments: &str, input: &str) -> Said {
        let mut child = self.spawn(arguments);
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        Said::new(arguments, child.wait_with_output().unwrap())
    }

    pub fn spawn(&self, arguments: &str) -> Child {
        let mut command = self.command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    /// Runs and wants this exit code.
    #[track_caller]
    pub fn expect(&self, code: i32, arguments: &str) -> Said {
        self.vmctl(arguments).code(code)
    }

    #[track_caller]
    pub fn json(&self, code: i32, arguments: &str) -> Value {
        self.expect(code, arguments).json()
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        let vms = self.vmctl("get vm -o json");
        let list: Value = serde_json::from_str(&vms.out).unwrap_or_default();
        for vm in list["items"].as_array().into_iter().flatten() {
            if let Some(pid) = vm["status"]["pid"].as_i64() {
                shell(&format!("kill -9 {pid} || true"));
            }
        }
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// What a command said, and how it ended.
#[derive(Debug)]
pub struct Said {
    pub command: String,
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

impl Said {
    pub fn new(command: &str, output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("vmctl prints UTF-8");
        Self {
            command: command.to_owned(),
            code: output.status.code(),
            out: text(output.stdout),
            err: text(output.stderr),
        }
    }

    #[track_caller]
    pub fn code(self, code: i32) -> Self {
        assert_eq!(self.code, Some(code), "vmctl {}\n{}\n{}", self.command, self.out, self.err);
        self
    }

    #[track_caller]
    pub fn says(self, text: &str) -> Self {
        assert!(self.out.contains(text), "no `{text}` in:\n{}\n{}", self.out, self.err);
        self
    }

    #[track_caller]
    pub fn complains(self, text: &str) -> Self {
        assert!(self.err.contains(text), "no `{text}` in:\n{}", self.err);
        self
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {}\n{}", self.out, self.err))
    }
}

/// Runs a shell command that must succeed.
#[track_caller]
pub fn shell(command: &str) -> String {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{command}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Waits for something that comes soon.
#[track_caller]
pub fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "timed out: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Everything below a directory with its inode, size and times: equal, if nobody wrote.
pub fn fingerprint(directory: &Path) -> String {
    shell(&format!("find {} -printf '%p %i %s %T@ %C@\\n' | sort", directory.display()))
}
