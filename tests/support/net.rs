//! Network namespaces of a test, joined by veth pairs, and what is done within them.

#![allow(dead_code)] // Each test binary uses a part.

use std::fs::File;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use vmctl::execute::execute;
use vmctl::host::Host as _;
use vmctl::host::linux::LinuxHost;
use vmctl::plan::{Plan, Policy, Removal, plan};
use vmctl::report::text::{self, Style};

use super::objects::{Objects, desire};
use super::support::{ip, scratch};

/// This machine in the test's network, with a state directory of its own.
pub struct Host {
    pub linux: LinuxHost,
    pub root: PathBuf,
}

impl Host {
    /// In a private network, with a state directory of its own.
    pub fn new(name: &str) -> Self {
        let root = scratch(name);
        let _ = std::fs::remove_dir_all(&root);
        std::fs::create_dir_all(&root).unwrap();
        let linux = LinuxHost::new(root.join("state"), root.join("run"), "/nonexistent/vmctl-vmm");
        Self { linux, root }
    }

    pub fn diff(&self, objects: &Objects) -> Plan {
        self.approved(objects, "")
    }

    pub fn approved(&self, objects: &Objects, hash: &str) -> Plan {
        let desired = desire(objects);
        let approve = Some(hash.to_owned());
        let policy = Policy { removal: Removal::Prune, approve, ..Policy::default() };
        plan(&desired, &self.linux.snapshot(&desired.scope()), &policy)
    }

    /// Applies in one run; the plan after it must be empty. Gives the plan's text.
    pub fn apply(&self, objects: &Objects) -> String {
        let mut plan = self.diff(objects);
        if plan.is_refused() {
            // All networks at once: a person would be asked.
            plan = self.approved(objects, &plan.hash);
        }
        let shown = text::plan(&plan, Style::default());
        let outcomes = execute(&plan, &self.linux, &mut |_| {});
        assert!(outcomes.values().all(|outcome| outcome.is_done()), "{shown}{outcomes:#?}");
        let again = self.diff(objects);
        assert!(again.is_empty(), "after {shown}the next plan is {}", text::plan(&again, Style::default()));
        shown
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // What a test that failed left running.
        for (mark, _) in self.linux.snapshot(&Default::default()).services.into_iter().flatten() {
            self.linux.run(&[&vmctl::host::Step::RemoveService { mark }]);
        }
        let _ = std::fs::remove_dir_all(&self.root);
    }
}

/// A network of its own, held by a process that sleeps.
pub struct Namespace {
    holder: Child,
}

impl Namespace {
    pub fn new() -> Self {
        let holder = Command::new("unshare")
            .args(["-n", "sleep", "3600"])
            .stdin(Stdio::null())
            .spawn()
            .expect("unshare (util-linux)");
        let namespace = Self { holder };
        let own = || std::fs::read_link(format!("/proc/{}/ns/net", namespace.holder.id())).ok();
        let ours = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let begun = std::time::Instant::now();
        while own().is_none_or(|own| own == ours) {
            assert!(begun.elapsed().as_secs() < 10, "the namespace doesn't come to be");
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
        namespace.run("ip link set lo up");
        namespace
    }

    pub fn pid(&self) -> u32 {
        self.holder.id()
    }

    /// Makes a link `inside` of it whose other end is `outside` here.
    pub fn join(&self, outside: &str, inside: &str) {
        ip(&format!("link add {outside} type veth peer name {inside} netns {}", self.pid()));
        ip(&format!("link set {outside} up"));
        self.run(&format!("ip link set {inside} up"));
    }

    /// Runs a command in it; gives what it prints.
    pub fn run(&self, command: &str) -> String {
        let output = self.command(command).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{command}: {errors}");
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn command(&self, command: &str) -> Command {
        let mut nsenter = Command::new("nsenter");
        nsenter.args(["-t", &self.pid().to_string(), "-n"]).args(command.split_whitespace());
        nsenter
    }

    /// Calls `f` in a thread that is in it.
    pub fn within<T: Send>(&self, f: impl FnOnce() -> T + Send) -> T {
        let network = File::open(format!("/proc/{}/ns/net", self.pid())).unwrap();
        std::thread::scope(|scope| {
            let inside = scope.spawn(move || {
                let kind = rustix::thread::LinkNameSpaceType::Network;
                rustix::thread::move_into_link_name_space(std::os::fd::AsFd::as_fd(&network), Some(kind))
                    .unwrap();
                f()
            });
            inside.join().unwrap()
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// Runs `nft` with this input, as a stranger would.
pub fn nft(input: &str) -> String {
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("nft (tests/setup installs it)");
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "nft {input}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
