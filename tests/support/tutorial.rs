//! The tutorial's host for tests in the lab: an uplink with a switch behind it, `vmctl`, and guests to
//! talk to over their consoles.

#![allow(dead_code)] // Each test binary uses its own part.

#[path = "cpio.rs"]
mod cpio;
#[path = "lost.rs"]
mod lost;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use vmctl::vmm::client::{Console, Control};

/// A guest under nested emulation takes seconds to boot, and minutes when the machine is busy.
const GUEST_PATIENCE: Duration = Duration::from_secs(90);

/// Runs a command and panics with all that it said if it fails.
#[track_caller]
pub fn run(command: &str) -> String {
    let output = shell(command);
    assert!(output.status.success(), "`{command}`: {}", said(&output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

pub fn shell(command: &str) -> Output {
    Command::new("sh").args(["-c", command]).output().expect("sh is there")
}

pub fn said(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}\n{}{}", output.status, text(&output.stdout), text(&output.stderr))
}

/// A guest's initial ram disk at `path`, with modules of the kernel in `/extra` beside its own. Gives those that there
/// are: what the kernel has built in has no file.
pub fn initrd_with<'a>(modules: &[&'a str], path: &str) -> Vec<&'a str> {
    let mut archive = cpio::Archive::default();
    archive.directory("extra");
    let mut there = Vec::new();
    for &module in modules {
        let file = run(&format!("find /lib/modules -name {module}.ko"));
        if !file.trim().is_empty() {
            archive.file(&format!("extra/{module}.ko"), 0o644, &std::fs::read(file.trim()).unwrap());
            there.push(module);
        }
    }
    std::fs::write(path, [std::fs::read("/guest/initrd").unwrap(), archive.finish()].concat()).unwrap();
    there
}

/// Waits until something is so.
#[track_caller]
pub fn until<T>(what: &str, patience: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: not within {patience:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A host in the lab: `eth0` with a namespace behind it that stands for the switch, and the manifests.
pub struct Tutorial {
    pub source: PathBuf,
    pub state: PathBuf,
    pub run: PathBuf,
}

impl Tutorial {
    /// Makes the uplink and copies the example's manifests.
    pub fn new() -> Self {
        for command in [
            "ip netns add switch",
            "ip link add eth0 type veth peer name trunk netns switch",
            "ip link set eth0 up",
            "ip -n switch link set trunk up",
            "ip -n switch link add link trunk name trunk.10 type vlan id 10",
            "ip -n switch link add link trunk name trunk.20 type vlan id 20",
            "ip -n switch addr add 192.168.10.1/24 dev trunk.10",
            "ip -n switch addr add 192.168.20.1/24 dev trunk.20",
            "ip -n switch link set trunk.10 up",
            "ip -n switch link set trunk.20 up",
            "mkdir -p /tmp/t && cp -r /repo/examples/tutorial /tmp/t/manifests",
        ] {
            run(command);
        }
        let base = Path::new("/tmp/t");
        Self { source: base.join("manifests"), state: "/var/lib/vmctl".into(), run: "/run/vmctl".into() }
    }

    /// Replaces a text in a manifest; it must be there.
    pub fn edit(&self, file: &str, from: &str, to: &str) {
        let path = self.source.join(file);
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(text.contains(from), "{file} has no `{from}`");
        std::fs::write(&path, text.replace(from, to)).unwrap();
    }

    pub fn apply_output(&self) -> Output {
        shell(&format!("vmctl apply --prune -f {}", self.source.display()))
    }

    #[track_caller]
    pub fn apply(&self) -> String {
        let output = self.apply_output();
        assert!(output.status.success(), "{}", said(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The plan's text; its exit status must be `code`.
    #[track_caller]
    pub fn diff(&self, code: i32) -> String {
        let output = shell(&format!("vmctl diff --prune -f {}", self.source.display()));
        assert_eq!(output.status.code(), Some(code), "{}", said(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// The objects that `diff` names, without those that are as declared.
    #[track_caller]
    pub fn differing(&self) -> Vec<String> {
        let output = shell(&format!("vmctl diff --prune -o json -f {}", self.source.display()));
        let report: serde_json::Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("{error}: {}", said(&output)));
        let actions = report["plan"]["actions"].as_array().expect("a plan has actions").iter();
        let mut names: Vec<String> = actions
            .filter(|action| action["verb"] != "noOp")
            .map(|action| action["object"].as_str().expect("an action has an object").to_owned())
            .collect();
        names.sort();
        names
    }

    fn control_path(&self, vm: &str) -> PathBuf {
        self.run.join("vms").join(vm).join("control.sock")
    }

    pub fn control(&self, vm: &str) -> Option<Control> {
        Control::connect(&self.control_path(vm)).ok()
    }

    pub fn pid(&self, vm: &str) -> Option<i32> {
        self.control(vm)?.state().ok().map(|state| state.pid)
    }

    /// The guest's shell, once it is up.
    #[track_caller]
    pub fn guest(&self, vm: &str) -> Guest {
        let mut guest = self.console(vm);
        guest.wait_for("GUEST-READY");
        guest
    }

    /// The guest's console, from the beginning.
    #[track_caller]
    pub fn console(&self, vm: &str) -> Guest {
        let control = self.control(vm).unwrap_or_else(|| panic!("{vm} runs"));
        let console = control.attach_console(1 << 20).unwrap();
        Guest { name: vm.to_owned(), control: self.control_path(vm), console, seen: String::new(), count: 0 }
    }
}

/// A guest's shell on its serial console.
pub struct Guest {
    name: String,
    control: PathBuf,
    console: Console,
    seen: String,
    count: u32,
}

impl Guest {
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) {
        self.wait_for_within(text, GUEST_PATIENCE);
    }

    #[track_caller]
    pub fn wait_for_within(&mut self, text: &str, patience: Duration) {
        let deadline = Instant::now() + patience;
        while !self.seen.contains(text) {
            assert!(Instant::now() < deadline, "{} never said `{text}`:\n{}", self.name, self.seen);
            self.read(Duration::from_millis(200));
        }
    }

    fn read(&mut self, timeout: Duration) {
        let mut buffer = [0; 4096];
        match self.console.read(&mut buffer, timeout) {
            Ok(Some(0)) => panic!("{}'s console closed:\n{}", self.name, self.seen),
            Ok(Some(count)) => self.seen.push_str(&String::from_utf8_lossy(&buffer[..count])),
            Ok(None) => {}
            Err(error) => panic!("{}'s console: {error}\n{}", self.name, self.seen),
        }
    }

    /// Types a line, as a person would.
    pub fn type_in(&mut self, line: &str) {
        self.seen.clear();
        self.console.write(format!("{line}\n").as_bytes()).unwrap();
    }

    /// Runs a command in the guest: its exit status and what it printed.
    #[track_caller]
    pub fn run(&mut self, command: &str) -> (i32, String) {
        self.count += 1;
        let count = self.count;
        self.seen.clear();
        // The marks are computed by the shell, so that the echo of what is typed isn't taken for them.
        let line = format!("echo B{count}EG$((0))IN; {command}; echo E{count}ND$((0))=$?=\n");
        self.console.write(line.as_bytes()).unwrap();
        let (begin, end) = (format!("B{count}EG0IN"), format!("E{count}ND0="));
        let deadline = Instant::now() + GUEST_PATIENCE;
        loop {
            if let Some((_, rest)) = self.seen.split_once(&begin)
                && let Some((output, status)) = rest.split_once(&end)
                && let Some((status, _)) = status.split_once('=')
            {
                return (status.parse().unwrap(), output.replace('\r', "").trim().to_owned());
            }
            if Instant::now() >= deadline {
                let before = self.seen.clone();
                // Whether the guest is dead or just its serial line: what is typed wakes the line.
                self.console.write(b"\n").unwrap();
                (0..10).for_each(|_| self.read(Duration::from_millis(500)));
                let woken = &self.seen[before.len()..];
                panic!(
                    "{}: `{command}` didn't end:\n{before}\nand after a key: `{woken}`; {}",
                    self.name,
                    lost::judge(&self.control, &before, 0).evidence
                );
            }
            self.read(Duration::from_millis(200));
        }
    }

    #[track_caller]
    pub fn succeeds(&mut self, command: &str) -> String {
        let (status, output) = self.run(command);
        assert_eq!(status, 0, "{}: `{command}`: {output}", self.name);
        output
    }

    pub fn uptime_s(&mut self) -> f64 {
        let text = self.succeeds("cut -d' ' -f1 /proc/uptime");
        text.parse().unwrap_or_else(|_| panic!("uptime `{text}`"))
    }
}
