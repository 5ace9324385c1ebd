//! The VM process boots a small guest of our own from the guest's own disk, on this host's KVM.

mod support;

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use support::{RunningVm, Vm, guest, memfd};
use vmctl::vmm::client::LaunchError;
use vmctl::vmm::config::{BackingConfig, DiskConfig, DiskFormat};
use vmctl::vmm::protocol::{ExitReason, FdRole, Verb};

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_vmctl-vmm"))
}

/// A directory for one test's images.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("vmctl-disk-boot-{}-{name}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }

    /// A disk without partitions that boots this kernel by extlinux's configuration.
    fn disk(&self, name: &str, kernel: &[u8]) -> String {
        let tree = self.0.join(format!("{name}-tree"));
        fs::create_dir_all(tree.join("boot")).unwrap();
        fs::write(tree.join("boot/extlinux.conf"), "LABEL guest\nLINUX kernel\nINITRD initrd\n").unwrap();
        fs::write(tree.join("boot/kernel"), kernel).unwrap();
        fs::write(tree.join("boot/initrd"), "initrd").unwrap();
        let image = self.path(name);
        tool("mke2fs", &["-q", "-F", "-t", "ext4", "-d", tree.to_str().unwrap(), &image, "4M"]);
        image
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn tool(program: &str, arguments: &[&str]) {
    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let output = Command::new(program).args(arguments).env("PATH", path).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

fn open(path: &str) -> File {
    File::options().read(true).write(true).open(path).unwrap()
}

fn raw(path: &str) -> Vm {
    Vm::from_disk("root", "").disk(DiskConfig::new("root", path, DiskFormat::Raw), open(path))
}

fn start(vm: Vm) -> RunningVm {
    vm.launch(program()).unwrap()
}

fn refused(vm: Vm) -> String {
    match vm.launch(program()) {
        Err(LaunchError::Refused { error, .. }) => error,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("launched"),
    }
}

#[test]
fn a_guest_boots_from_its_disk_and_reboots() {
    let scratch = Scratch::new("raw");
    let vm = start(raw(&scratch.disk("disk", &guest::kernel())).vcpus(2));
    let mut console = vm.console();
    console.expect("boot1\n");
    console.type_in("r");
    console.expect("boot1\n");
    vm.control().command(&Verb::Reboot).unwrap();
    console.expect("boot1\n");
    assert_eq!(vm.control().state().unwrap().reboots, 2);
    console.type_in("q");
    assert_eq!(vm.wait().unwrap().reason, ExitReason::GuestPowerOff);
}

#[test]
fn a_qcow2_image_and_its_backing_chain_are_read_as_the_guest_sees_them() {
    let scratch = Scratch::new("qcow2");
    let (base, top) = (scratch.disk("base", &guest::kernel()), scratch.path("top"));
    tool("qemu-img", &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "raw", &top]);
    let mut config = DiskConfig::new("root", &top, DiskFormat::Qcow2);
    config.backing = vec![BackingConfig { path: base.clone(), format: DiskFormat::Raw }];
    let mut vm = Vm::from_disk("root", "").disk(config, open(&top));
    vm.pass(FdRole::Backing { disk: "root".into(), depth: 0 }, File::open(&base).unwrap());
    let vm = start(vm);
    let mut console = vm.console();
    console.expect("boot1\n");
    console.type_in("r");
    console.expect("boot1\n");
}

#[test]
fn a_reset_searches_the_disk_anew() {
    let scratch = Scratch::new("anew");
    let image = scratch.disk("disk", &guest::kernel());
    // As if the guest had installed another kernel, and then had wiped its disk.
    let other = fs::read(scratch.disk("other", &guest::crashing_kernel())).unwrap();
    let vm = start(raw(&image));
    vm.console().expect("boot1\n");
    open(&image).write_all_at(&other, 0).unwrap();
    vm.control().command(&Verb::Reboot).unwrap();
    let record = vm.wait().unwrap();
    assert_eq!(record.reason, ExitReason::GuestFault, "{}", record.message);

    let image = scratch.disk("wiped", &guest::kernel());
    let vm = start(raw(&image));
    vm.console().expect("boot1\n");
    open(&image).write_all_at(&vec![0; 4 << 20], 0).unwrap();
    // The connection ends with the process.
    let _ = vm.control().command(&Verb::Reboot);
    let record = vm.wait().unwrap();
    assert_eq!(record.reason, ExitReason::Internal);
    assert!(record.message.contains("nothing bootable was found"), "{}", record.message);
}

#[test]
fn what_does_not_boot_is_refused_with_the_reason() {
    let scratch = Scratch::new("refused");
    let blank = scratch.path("blank");
    File::create(&blank).unwrap().set_len(1 << 20).unwrap();
    let error = refused(raw(&blank));
    assert!(error.starts_with("boot from disk root: nothing bootable was found."), "{error}");
    assert!(error.contains("boot.kernel"), "the remedy: {error}");

    let error = refused(raw(&scratch.disk("text", b"no kernel")));
    assert!(error.contains("/boot/kernel on the disk without partitions (ext4)"), "{error}");
    assert!(error.contains("neither a bzImage nor"), "{error}");

    let error = refused(
        Vm::from_disk("other", "").disk(DiskConfig::new("root", &blank, DiskFormat::Raw), open(&blank)),
    );
    assert!(error.contains("disk other"), "{error}");
    let mut vm = raw(&blank);
    vm.pass(FdRole::Kernel, memfd(b""));
    assert!(refused(vm).contains("Kernel"));
}

#[test]
fn the_search_has_a_thread_with_a_filter_of_its_own() {
    let scratch = Scratch::new("thread");
    let vm = start(raw(&scratch.disk("disk", &guest::kernel())));
    vm.console().expect("boot1\n");
    let tasks = fs::read_dir(format!("/proc/{}/task", vm.pid)).unwrap();
    let boot = tasks
        .map(|task| task.unwrap().path())
        .find(|task| fs::read_to_string(task.join("comm")).unwrap().trim() == "boot");
    let status = fs::read_to_string(boot.expect("a thread").join("status")).unwrap();
    assert!(status.contains("Seccomp:\t2"), "{status}");
}
