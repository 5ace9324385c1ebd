//! Manifests and loop devices for the tests of LVM in the lab.

#![allow(dead_code)] // Each test binary uses its own part.

use std::path::PathBuf;
use std::process::Output;

use crate::tutorial::{Guest, Tutorial, run, said, shell};

pub struct Lab {
    pub source: PathBuf,
}

impl Lab {
    pub fn new() -> Self {
        run("mkdir -p /tmp/l/manifests");
        Self { source: "/tmp/l/manifests".into() }
    }

    /// A new loop device of so many MiB.
    pub fn loop_device(&self, mib: u64) -> String {
        let file = run("mktemp /tmp/l/device.XXXXXX").trim().to_owned();
        run(&format!("truncate -s {mib}M {file}"));
        run(&format!("losetup --find --show {file}")).trim().to_owned()
    }

    pub fn write(&self, file: &str, text: &str) {
        std::fs::write(self.source.join(file), text).unwrap();
    }

    pub fn remove(&self, file: &str) {
        std::fs::remove_file(self.source.join(file)).unwrap();
    }

    #[track_caller]
    pub fn diff(&self) -> serde_json::Value {
        self.diff_with("")
    }

    #[track_caller]
    pub fn diff_with(&self, flags: &str) -> serde_json::Value {
        let output = shell(&format!("vmctl diff {flags} -o json -f {}", self.source.display()));
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", said(&output)))
    }

    pub fn apply_output(&self, flags: &str) -> Output {
        shell(&format!("vmctl apply {flags} -f {}", self.source.display()))
    }

    #[track_caller]
    pub fn apply(&self, flags: &str) -> String {
        let output = self.apply_output(flags);
        assert!(output.status.success(), "{}", said(&output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// A second plan is empty.
    #[track_caller]
    pub fn in_sync(&self) {
        let output = shell(&format!("vmctl diff -f {}", self.source.display()));
        assert_eq!(output.status.code(), Some(0), "{}", said(&output));
    }

    #[track_caller]
    pub fn guest(&self, vm: &str) -> Guest {
        Tutorial { source: self.source.clone(), state: "/var/lib/vmctl".into(), run: "/run/vmctl".into() }
            .guest(vm)
    }
}

pub fn manifest(kind: &str, name: &str, spec: &str) -> String {
    format!("apiVersion: vmctl.dev/v1alpha1\nkind: {kind}\nmetadata:\n  name: {name}\nspec:\n{spec}")
}

pub fn volume(name: &str, pool: &str, capacity: &str, more: &str) -> String {
    let spec = format!("  pool: {pool}\n  format: raw\n  capacity: {capacity}\n{more}");
    manifest("Volume", name, &spec)
}

/// A guest with one disk.
pub fn vm(name: &str, disk: &str) -> String {
    let boot = format!(
        "  boot:\n    kernel: /guest/vmlinux\n    initrd: /guest/initrd\n    cmdline: console=ttyS0 quiet host={name}\n"
    );
    let spec = format!(
        "  cpus: 1\n  memory: 512Mi\n  shutdownTimeoutSeconds: 0\n{boot}  disks:\n    - volume: {disk}\n"
    );
    manifest("VirtualMachine", name, &spec)
}

pub fn digest(device: &str) -> String {
    run(&format!("blockdev --flushbufs {device}; sha256sum < {device}"))
}

pub fn bytes_of(device: &str) -> u64 {
    run(&format!("blockdev --getsize64 {device}")).trim().parse().unwrap()
}

pub trait Said {
    fn stdout_has(&self, word: &str) -> bool;
}

impl Said for Output {
    fn stdout_has(&self, word: &str) -> bool {
        String::from_utf8_lossy(&self.stdout).contains(word)
    }
}
