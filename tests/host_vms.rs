//! VMs on the Linux host: their records, their processes, their ends. With the real VM process and a
//! small guest of our own, on this host's KVM.

#[path = "support/guest.rs"]
#[allow(dead_code, reason = "other tests use the rest of it")]
mod guest;
#[path = "support/inject.rs"]
mod inject;
#[path = "support/host.rs"]
mod support;

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::process::{Pid, Signal};
use support::*;
use vmctl::host::error::StepError;
use vmctl::host::limits::ProcessLimits;
use vmctl::host::linux::{LinuxHost, cgroup, vm_uid};
use vmctl::host::snapshot::{CpuShare, LinkKind, RunStrategy, Vm, VmDefinition, VmProcess};
use vmctl::host::step::{NewLink, NewLinkKind, Step, StopHow};
use vmctl::host::{Host as _, Scope};
use vmctl::name::{Kind, Mark, ObjectName};
use vmctl::vmm::config::{
    BootConfig, Bucket, DiskConfig, DiskFormat, Limits, NicConfig, VmConfig, VsockConfig,
};
use vmctl::vmm::protocol::{ConditionKind, ExitReason, Phase, Verb};

const PROGRAM: &str = env!("CARGO_BIN_EXE_vmctl-vmm");

/// A host with directories of its own; what runs in it ends with it.
struct Ground {
    host: LinuxHost,
    directory: PathBuf,
}

impl Ground {
    fn new() -> Self {
        Self::at(scratch("ground"), PROGRAM)
    }

    fn at(directory: PathBuf, program: &str) -> Self {
        let _ = std::fs::remove_dir_all(&directory);
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(directory.join("kernel"), guest::kernel()).unwrap();
        let host = LinuxHost::new(directory.join("state"), directory.join("run"), program);
        Self { host, directory }
    }

    fn path(&self, file: &str) -> String {
        self.directory.join(file).to_str().unwrap().to_owned()
    }

    fn run(&self, step: Step) -> Result<(), StepError> {
        self.host.run(&[&step]).remove(0)
    }

    fn definition(&self, vm: &str) -> VmDefinition {
        let mark = mark(Kind::VirtualMachine, vm);
        VmDefinition {
            config: VmConfig::new(
                vm,
                mark.to_string(),
                32 << 20,
                BootConfig::kernel(self.path("kernel"), None, ""),
            ),
            mark,
            bridges: Vec::new(),
            vlans: Vec::new(),
            cpu_share: CpuShare::default(),
            run_strategy: RunStrategy::Always,
            seed: None,
        }
    }

    fn define(&self, definition: &VmDefinition) -> Result<(), StepError> {
        self.run(Step::DefineVm { vm: vm_name(definition), definition: Box::new(definition.clone()) })
    }

    fn start(&self, definition: &VmDefinition) -> Result<(), StepError> {
        self.run(Step::StartVm { vm: vm_name(definition), definition: Box::new(definition.clone()) })
    }

    fn stop(&self, definition: &VmDefinition, how: StopHow) -> Result<(), StepError> {
        self.run(Step::StopVm { vm: vm_name(definition), mark: definition.mark.clone(), how })
    }

    fn undefine(&self, definition: &VmDefinition) -> Result<(), StepError> {
        self.run(Step::UndefineVm { vm: vm_name(definition), mark: definition.mark.clone() })
    }

    fn vms(&self) -> Vec<(String, Vm)> {
        let snapshot = self.host.snapshot(&Scope::default());
        snapshot.vms.unwrap().into_iter().map(|(name, vm)| (name.to_string(), vm)).collect()
    }

    fn vm(&self, name: &str) -> Vm {
        self.vms().into_iter().find(|(found, _)| found == name).unwrap_or_else(|| panic!("no {name}")).1
    }

    fn process(&self, name: &str) -> VmProcess {
        self.vm(name).process.expect("it runs").expect("it answers")
    }

    /// Types into the guest.
    fn type_in(&self, definition: &VmDefinition, text: &str) {
        let control = self.host.vm_control(&vm_name(definition)).unwrap().expect("it runs");
        let console = control.attach_console(0).unwrap();
        console.write(text.as_bytes()).unwrap();
    }
}

impl Drop for Ground {
    fn drop(&mut self) {
        // A test that failed leaves processes behind.
        if let Ok(vms) = self.host.snapshot(&Scope::default()).vms {
            for vm in vms.into_values() {
                if let Some(definition) = &vm.definition {
                    let _ = self.stop(definition, StopHow::Forced);
                }
            }
        }
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn vm_name(definition: &VmDefinition) -> ObjectName {
    definition.mark.owner.name.clone()
}

fn readable(fd: impl AsFd, timeout: Duration) -> bool {
    let timeout = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: timeout.subsec_nanos().into() };
    rustix::event::poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)).unwrap() > 0
}

fn kill(pid: i32, signal: Signal) {
    rustix::process::kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

/// Nothing of it runs; its number may wait for init to be read.
fn has_ended(pid: i32) -> bool {
    match std::fs::read_to_string(format!("/proc/{pid}/status")) {
        Ok(status) => status.contains("State:\tZ"),
        Err(_) => true,
    }
}

/// Waits until the VM is gone from view.
fn wait_gone(ground: &Ground, name: &str) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while ground.vm(name).process.is_some() {
        assert!(Instant::now() < deadline, "{name} still runs");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_vm_lives_from_its_definition_to_its_removal() {
    let ground = Ground::new();
    let definition = ground.definition("web");
    assert!(ground.vms().is_empty());
    ground.define(&definition).unwrap();
    ground.define(&definition).unwrap();
    let seen = ground.vm("web");
    assert_eq!(seen.definition.as_ref(), Some(&definition));
    assert_eq!((seen.process, seen.exit, seen.held), (None, None, false));

    ground.start(&definition).unwrap();
    let process = ground.process("web");
    assert_eq!(process.config, definition.config);
    let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid)).unwrap();
    let uid = vm_uid(&vm_name(&definition));
    assert!(status.contains(&format!("Uid:\t{uid}\t{uid}\t{uid}\t{uid}")), "{status}");
    // Again: the same process.
    ground.start(&definition).unwrap();
    assert_eq!(ground.process("web").pid, process.pid);
    // Not while it runs another configuration.
    let mut other = definition.clone();
    other.config.memory_bytes = 64 << 20;
    assert!(matches!(ground.start(&other), Err(StepError::Failed { .. })));
    assert!(matches!(ground.undefine(&definition), Err(StepError::Failed { .. })));

    // The guest has come to print before it is stopped.
    let log = ground.host.console_log(&vm_name(&definition));
    let deadline = Instant::now() + Duration::from_secs(20);
    while std::fs::read_to_string(&log).unwrap() != "boot1\n" {
        assert!(Instant::now() < deadline, "the guest printed nothing");
        std::thread::sleep(Duration::from_millis(5));
    }
    ground.stop(&definition, StopHow::Forced).unwrap();
    ground.stop(&definition, StopHow::Forced).unwrap();
    let seen = ground.vm("web");
    assert_eq!(seen.process, None);
    assert_eq!(seen.exit, None, "an end that we asked for is nothing that a strategy must hear of");
    assert!(has_ended(process.pid));
    assert!(!Path::new(&ground.path("run/vms/web/control.sock")).exists());
    assert_eq!(std::fs::read_to_string(&log).unwrap(), "boot1\n");

    ground.undefine(&definition).unwrap();
    ground.undefine(&definition).unwrap();
    assert!(ground.vms().is_empty());
    for left in ["state/vms/web", "run/vms/web"] {
        assert!(!Path::new(&ground.path(left)).exists(), "{left}");
    }
}

#[test]
fn a_stop_waits_for_the_guest_and_then_does_not() {
    let ground = Ground::new();
    let definition = ground.definition("slow");
    ground.define(&definition).unwrap();
    // This guest doesn't know its power button; somebody else powers it off meanwhile.
    ground.start(&definition).unwrap();
    let begin = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(300));
            ground.type_in(&definition, "q");
        });
        ground.stop(&definition, StopHow::Graceful { timeout_ms: 30_000 }).unwrap();
    });
    assert!(begin.elapsed() < Duration::from_secs(30), "by force, when the time was over");
    assert_eq!(ground.vm("slow").exit, None);
    // It stays deaf.
    ground.start(&definition).unwrap();
    let begin = Instant::now();
    ground.stop(&definition, StopHow::Graceful { timeout_ms: 400 }).unwrap();
    assert!(begin.elapsed() >= Duration::from_millis(400));
    assert!(ground.vm("slow").process.is_none());
}

#[test]
fn a_vsock_has_a_directory_that_outlives_the_process() {
    use std::os::unix::fs::MetadataExt as _;
    let ground = Ground::new();
    let mut definition = ground.definition("talker");
    definition.config.vsock = Some(VsockConfig { cid: 1000 });
    ground.define(&definition).unwrap();
    let directory = ground.directory.join("run/vms/talker/vsock");
    for _ in 0..2 {
        ground.start(&definition).unwrap();
        let metadata = std::fs::metadata(&directory).unwrap();
        let group = vm_uid(&vm_name(&definition));
        assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o7777), (0, group, 0o2710));
        // This guest has no driver: the process accepts, and hangs up.
        let mut stream = std::os::unix::net::UnixStream::connect(directory.join("vsock")).unwrap();
        assert_eq!(std::io::Read::read(&mut stream, &mut [0]).unwrap(), 0);
        ground.stop(&definition, StopHow::Forced).unwrap();
        let refused = std::os::unix::net::UnixStream::connect(directory.join("vsock")).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::ConnectionRefused);
    }
    ground.undefine(&definition).unwrap();
    assert!(!directory.exists());
}

#[test]
fn a_killed_vm_is_seen_at_once_and_starts_again() {
    let ground = Ground::new();
    let definition = ground.definition("web");
    assert!(ground.host.vm_watch(&vm_name(&definition)).unwrap().is_none());
    ground.define(&definition).unwrap();
    ground.start(&definition).unwrap();
    let watch = ground.host.vm_watch(&vm_name(&definition)).unwrap().expect("it runs");
    assert!(!readable(&watch, Duration::from_millis(50)));
    let pid = ground.process("web").pid;
    kill(pid, Signal::KILL);
    assert!(readable(&watch, Duration::from_secs(20)));
    wait_gone(&ground, "web");
    let seen = ground.vm("web");
    assert_eq!((seen.process, seen.exit), (None, None));
    // Over the dead socket.
    ground.start(&definition).unwrap();
    assert_ne!(ground.process("web").pid, pid);
    ground.stop(&definition, StopHow::Forced).unwrap();
}

#[test]
fn a_hung_vm_is_unknown_and_can_be_stopped() {
    let ground = Ground::new();
    let (hung, well) = (ground.definition("hung"), ground.definition("well"));
    for definition in [&hung, &well] {
        ground.define(definition).unwrap();
        ground.start(definition).unwrap();
    }
    let pid = ground.process("hung").pid;
    kill(pid, Signal::STOP);
    let begin = Instant::now();
    let seen = ground.vms();
    assert!(begin.elapsed() < Duration::from_secs(20), "{:?}", begin.elapsed());
    assert!(matches!(&seen[0].1.process, Some(Err(error)) if error.why.contains("no answer")), "{seen:?}");
    assert!(matches!(&seen[1].1.process, Some(Ok(_))), "{seen:?}");
    ground.stop(&hung, StopHow::Graceful { timeout_ms: 100 }).unwrap();
    assert!(has_ended(pid));
    assert_eq!(ground.vm("hung").process, None);
    assert!(ground.vm("well").process.is_some());
    ground.stop(&well, StopHow::Forced).unwrap();
}

#[test]
fn what_another_owns_is_left_alone() {
    let ground = Ground::new();
    let definition = ground.definition("web");
    ground.define(&definition).unwrap();
    ground.start(&definition).unwrap();
    let mut theirs = definition.clone();
    theirs.mark.set = "other".parse().unwrap();
    theirs.config.mark = theirs.mark.to_string();
    let (vm, mark) = (vm_name(&theirs), theirs.mark.clone());
    refused_as_not_ours(ground.define(&theirs));
    refused_as_not_ours(ground.start(&theirs));
    refused_as_not_ours(ground.stop(&theirs, StopHow::Forced));
    refused_as_not_ours(ground.undefine(&theirs));
    refused_as_not_ours(ground.run(Step::HoldVm { vm: vm.clone(), mark: mark.clone(), held: true }));
    let grow =
        Step::ResizeDisk { vm: vm.clone(), mark: mark.clone(), disk: "root".into(), capacity_bytes: 1 };
    refused_as_not_ours(ground.run(grow));
    let replace = Step::ReplaceTap { vm, mark, nic: "net0".into(), tap: name("tap0") };
    refused_as_not_ours(ground.run(replace));
    // Without its definition, too.
    std::fs::remove_file(ground.path("state/vms/web/definition.json")).unwrap();
    refused_as_not_ours(ground.stop(&theirs, StopHow::Forced));
    assert_eq!(ground.process("web").config, definition.config);
    ground.stop(&definition, StopHow::Forced).unwrap();
}

#[test]
fn a_hold_lasts() {
    let ground = Ground::new();
    let definition = ground.definition("web");
    ground.define(&definition).unwrap();
    for held in [true, true, false, false] {
        let (vm, mark) = (vm_name(&definition), definition.mark.clone());
        ground.run(Step::HoldVm { vm, mark, held }).unwrap();
        assert_eq!(ground.vm("web").held, held);
    }
}

#[test]
fn a_definition_that_cannot_be_read_is_unknown_and_is_kept() {
    let ground = Ground::new();
    let definition = ground.definition("web");
    ground.define(&definition).unwrap();
    let path = ground.path("state/vms/web/definition.json");
    std::fs::write(&path, "{\"version\":1,").unwrap();
    let seen = ground.vm("web");
    assert!(matches!(&seen.process, Some(Err(error)) if error.why.contains("definition.json")), "{seen:?}");
    assert!(ground.define(&definition).is_err());
    assert!(ground.start(&definition).is_err());
    assert!(ground.undefine(&definition).is_err());
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\"version\":1,");
}

#[test]
fn a_start_that_fails_leaves_no_process_and_says_why() {
    let ground = Ground::new();
    let definition = ground.definition("web");
    refused_as_not_ours(ground.start(&definition));
    let mut broken = definition.clone();
    broken.config.boot = BootConfig::kernel(ground.path("none"), None, "");
    ground.define(&broken).unwrap();
    let error = ground.start(&broken).unwrap_err().to_string();
    assert!(error.starts_with("start the VM web: open its kernel ") && error.contains("/none: "), "{error}");
    // A FIFO doesn't hold us up, a directory is no kernel.
    assert!(std::process::Command::new("mkfifo").arg(ground.path("fifo")).status().unwrap().success());
    for file in ["fifo", "state"] {
        broken.config.boot = BootConfig::kernel(ground.path(file), None, "");
        let error = ground.start(&broken).unwrap_err().to_string();
        assert!(error.contains("not a regular file"), "{error}");
    }
    // The VM process itself refuses.
    std::fs::write(ground.path("text"), "no kernel at all").unwrap();
    broken.config.boot = BootConfig::kernel(ground.path("text"), None, "");
    let error = ground.start(&broken).unwrap_err().to_string();
    assert!(error.contains("refused"), "{error}");
    assert!(!Path::new(&ground.path("run/vms/web/control.sock")).exists());
    assert_eq!(ground.vm("web").process, None);
    ground.define(&definition).unwrap();
    ground.start(&definition).unwrap();
    ground.stop(&definition, StopHow::Forced).unwrap();
}

#[test]
fn a_directory_of_any_length_will_do() {
    let ground = Ground::at(scratch(&"long".repeat(30)), PROGRAM);
    let definition = ground.definition("web");
    ground.define(&definition).unwrap();
    ground.start(&definition).unwrap();
    assert!(ground.process("web").pid > 0);
    ground.stop(&definition, StopHow::Forced).unwrap();
}

#[test]
fn a_disk_has_one_writer_and_grows_while_it_is_used() {
    let ground = Ground::new();
    let image = ground.path("disk.raw");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    let with_disk = |vm: &str, read_only| {
        let mut definition = ground.definition(vm);
        definition
            .config
            .disks
            .push(DiskConfig { read_only, ..DiskConfig::new("root", &image, DiskFormat::Raw) });
        ground.define(&definition).unwrap();
        definition
    };
    let (first, second) = (with_disk("first", false), with_disk("second", false));
    ground.start(&first).unwrap();
    assert_eq!(ground.process("first").disk_capacity_bytes, [1 << 20]);
    let error = ground.start(&second).unwrap_err();
    assert!(error.to_string().contains("disk.raw"), "{error}");
    assert!(ground.start(&with_disk("reader", true)).is_err());

    let grow = |definition: &VmDefinition, capacity_bytes| {
        let (vm, mark) = (vm_name(definition), definition.mark.clone());
        ground.run(Step::ResizeDisk { vm, mark, disk: "root".to_owned(), capacity_bytes })
    };
    for _ in 0..2 {
        grow(&first, 2 << 20).unwrap();
        assert_eq!(ground.process("first").disk_capacity_bytes, [2 << 20]);
    }
    assert!(grow(&first, 1 << 20).is_err());
    assert!(grow(&second, 2 << 20).unwrap_err().to_string().contains("does not run"));
    // The lock ends with the process, even when it is killed.
    kill(ground.process("first").pid, Signal::KILL);
    wait_gone(&ground, "first");
    ground.start(&second).unwrap();
    ground.stop(&second, StopHow::Forced).unwrap();
}

#[test]
fn a_tap_is_held_and_replaced() {
    private_network();
    let ground = Ground::new();
    let mut definition = ground.definition("web");
    definition.config.nics.push(NicConfig::new("net0", "tap0", "52:54:00:00:00:01"));
    ground.define(&definition).unwrap();
    let new = tap("tap0", None);
    let carrier = || ip("link show tap0").contains("LOWER_UP");
    // Not there: it isn't made by the way.
    let error = ground.start(&definition).unwrap_err().to_string();
    assert!(error.contains("tap0"), "{error}");
    assert!(!observe().contains_key("tap0"));
    // Somebody else's.
    ip("tuntap add tap0 mode tap");
    refused_as_not_ours(ground.start(&definition));
    ip("link del tap0");

    create(&new).unwrap();
    ground.start(&definition).unwrap();
    assert!(carrier());
    let held = Mark::part(definition.mark.set.clone(), definition.mark.owner.clone(), "net0");
    assert_eq!(link("tap0").mark(), Some(held));
    // The tap is deleted under the VM; a new one takes its place.
    delete(&new).unwrap();
    create(&new).unwrap();
    assert!(!carrier());
    let (vm, mark) = (vm_name(&definition), definition.mark.clone());
    let replace = Step::ReplaceTap { vm, mark, nic: "net0".to_owned(), tap: name("tap0") };
    ground.run(replace.clone()).unwrap();
    assert!(carrier());
    ground.stop(&definition, StopHow::Forced).unwrap();
    assert!(!carrier());
    assert!(observe().contains_key("tap0"));
}

#[test]
fn control_connections_serve_more_than_steps() {
    let ground = Ground::new();
    let definition = ground.definition("web");
    assert!(ground.host.vm_control(&vm_name(&definition)).unwrap().is_none());
    ground.define(&definition).unwrap();
    ground.start(&definition).unwrap();
    let control = ground.host.vm_control(&vm_name(&definition)).unwrap().expect("it runs");
    control.command(&Verb::Pause).unwrap();
    control.command(&Verb::Resume).unwrap();
    ground.stop(&definition, StopHow::Forced).unwrap();
}

/// Stock Linux, which needs a KVM that runs more than our small guest: always in the lab.
#[test]
fn a_linux_guest_obeys_its_power_button() {
    if !support::lab::in_lab() {
        return support::lab::run_in_lab(&[PROGRAM]);
    }
    private_network();
    let ground = Ground::at(scratch("ground"), "/usr/local/bin/vmctl-vmm");
    create(&bridge("br0")).unwrap();
    create(&tap("tap0", Some("br0"))).unwrap();
    let mut definition = ground.definition("web");
    definition.config.memory_bytes = 256 << 20;
    definition.config.boot = BootConfig::kernel(
        "/guest/vmlinux",
        Some("/guest/initrd".to_owned()),
        "console=ttyS0 quiet panic=-1 mitigations=off",
    );
    definition.config.nics.push(NicConfig::new("net0", "tap0", "52:54:00:00:00:01"));
    ground.define(&definition).unwrap();
    ground.start(&definition).unwrap();
    // At once, while it still boots: it hears a later press.
    let begin = Instant::now();
    ground.stop(&definition, StopHow::Graceful { timeout_ms: 120_000 }).unwrap();
    let took = begin.elapsed();
    let log = std::fs::read_to_string(ground.host.console_log(&vm_name(&definition))).unwrap();
    // By force it would have been when the time was over.
    assert!(took < Duration::from_secs(120), "after {took:?}: {log}");
    assert_eq!(ground.vm("web").exit, None);
    assert!(link("tap0").up && link("tap0").master == Some(name("br0")));
}

/// What a step about a running VM needs: its name and its mark.
fn of(definition: &VmDefinition) -> (ObjectName, Mark) {
    (vm_name(definition), definition.mark.clone())
}

/// The small guest knows nothing of hot-plug: what is plugged is there for it to find, what is to be unplugged
/// stays, and everybody is told.
#[test]
fn a_guest_that_does_not_let_go_is_asked_again() {
    private_network();
    let ground = Ground::new();
    let definition = ground.definition("web");
    ground.define(&definition).unwrap();
    let disk = DiskConfig::new("data", ground.path("data.raw"), DiskFormat::Raw);
    let add = || {
        let (vm, mark) = of(&definition);
        ground.run(Step::AddDisk { vm, mark, disk: Box::new(disk.clone()) })
    };
    assert!(add().unwrap_err().to_string().contains("does not run"));
    ground.start(&definition).unwrap();
    assert!(add().unwrap_err().to_string().contains("data.raw"), "the file isn't there");
    std::fs::File::create(ground.path("data.raw")).unwrap().set_len(1 << 20).unwrap();
    add().unwrap();
    add().unwrap();
    let process = ground.process("web");
    assert_eq!(process.config.disks, std::slice::from_ref(&disk));
    assert_eq!(process.disk_capacity_bytes, [1 << 20]);
    // It is locked as if the VM had been started with it.
    let mut other = ground.definition("other");
    other.config.disks.push(disk.clone());
    ground.define(&other).unwrap();
    assert!(ground.start(&other).unwrap_err().to_string().contains("data.raw"));
    // Another disk of the same name is another matter.
    let (vm, mark) = of(&definition);
    let read_only = DiskConfig { read_only: true, ..disk.clone() };
    assert!(ground.run(Step::AddDisk { vm, mark, disk: Box::new(read_only) }).is_err());

    let remove = |device: &str| {
        let (vm, mark) = of(&definition);
        let begin = Instant::now();
        (ground.run(Step::RemoveDevice { vm, mark, device: device.to_owned() }), begin.elapsed())
    };
    remove("nothing").0.unwrap();
    let (refused, took) = remove("data");
    let refused = refused.unwrap_err();
    assert!(refused.to_string().contains("has not let go of data within 10 s"), "{refused}");
    assert!(refused.hint().unwrap().contains("asked again at the next apply"));
    assert!((Duration::from_secs(9)..Duration::from_secs(20)).contains(&took), "{took:?}");
    let process = ground.process("web");
    let pending =
        process.condition(ConditionKind::UnplugPending, Some("data")).expect("it is still asked for");
    assert!(pending.age_ms >= 9000, "{pending:?}");
    // It has had its time: from now on a look is enough.
    let (again, took) = remove("data");
    assert!(again.is_err() && took < Duration::from_secs(5), "{took:?}");

    // A paused guest can't let go of anything.
    let (vm, mark) = of(&definition);
    ground.run(Step::PauseVm { vm, mark, paused: true }).unwrap();
    assert_eq!(ground.process("web").phase, Phase::Paused);
    assert!(remove("data").0.unwrap_err().to_string().contains("is paused"));
    let (vm, mark) = of(&definition);
    ground.run(Step::PauseVm { vm, mark, paused: false }).unwrap();
    assert_eq!(ground.process("web").phase, Phase::Running);
    ground.stop(&definition, StopHow::Forced).unwrap();
    ground.start(&other).unwrap();
}

#[test]
fn nics_of_several_queues_are_plugged_and_changed() {
    private_network();
    let ground = Ground::new();
    let definition = ground.definition("web");
    ground.define(&definition).unwrap();
    ground.start(&definition).unwrap();
    let mut nic = NicConfig::new("net0", "tap0", "52:54:00:00:00:01");
    nic.queue_pairs = 2;
    let add = || {
        let (vm, mark) = of(&definition);
        ground.run(Step::AddNic { vm, mark, nic: Box::new(nic.clone()) })
    };
    assert!(add().unwrap_err().to_string().contains("tap0"), "there is no tap");
    // One that was made for another number of queues.
    let single = tap("tap0", None);
    create(&single).unwrap();
    assert!(add().unwrap_err().to_string().contains("another number of queues"));
    delete(&single).unwrap();
    let multi = NewLink { kind: NewLinkKind::Tap { multi_queue: true }, ..tap("tap0", None) };
    create(&multi).unwrap();
    assert_eq!(link("tap0").kind, LinkKind::Tap { multi_queue: true });
    add().unwrap();
    add().unwrap();
    assert_eq!(ground.process("web").config.nics, std::slice::from_ref(&nic));

    let limits = Limits { bandwidth: Some(Bucket { per_second: 1 << 20, burst: 1 << 20 }), operations: None };
    let (vm, mark) = of(&definition);
    let transmit = Limits::default();
    ground.run(Step::SetNicLimits { vm, mark, nic: "net0".to_owned(), receive: limits, transmit }).unwrap();
    let (vm, mark) = of(&definition);
    ground.run(Step::SetCarrier { vm, mark, nic: "net0".to_owned(), up: false }).unwrap();
    let nic = &ground.process("web").config.nics[0];
    assert_eq!((nic.receive_limits, nic.link_up), (limits, false));
    // Another's VM is left alone.
    let (vm, _) = of(&definition);
    let mark = mark_of_another();
    refused_as_not_ours(ground.run(Step::SetCarrier { vm, mark, nic: "net0".to_owned(), up: true }));
    ground.stop(&definition, StopHow::Forced).unwrap();
}

fn mark_of_another() -> Mark {
    mark(Kind::VirtualMachine, "other")
}

/// The cgroup of a process by controller, as the kernel shows it in `/proc`.
fn cgroup_of(pid: i32, controller: &str) -> String {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let one = |line: &str| {
        let fields: Vec<_> = line.splitn(3, ':').map(str::to_owned).collect();
        fields[1].split(',').any(|found| found == controller).then(|| fields[2].clone())
    };
    let two = || text.lines().find_map(|line| line.strip_prefix("0::")).unwrap().to_owned();
    text.lines().find_map(one).unwrap_or_else(two)
}

/// The directory of that cgroup, in whichever way this host has them mounted.
fn cgroup_directory(pid: i32, controller: &str) -> PathBuf {
    let path = cgroup_of(pid, controller);
    let roots = [controller, "cpu,cpuacct", ""].map(|name| format!("/sys/fs/cgroup/{name}{path}"));
    let found = roots.iter().map(PathBuf::from).find(|path| path.is_dir());
    found.unwrap_or_else(|| panic!("{path} of {controller} is nowhere"))
}

/// What the first of these files says that is there.
fn cgroup_value(pid: i32, controller: &str, files: &[&str]) -> String {
    let directory = cgroup_directory(pid, controller);
    let text = files.iter().find_map(|file| std::fs::read_to_string(directory.join(file)).ok());
    text.unwrap_or_else(|| panic!("none of {files:?} in {}", directory.display())).trim().to_owned()
}

#[test]
fn each_vm_has_a_cgroup_and_a_user_of_its_own() {
    assert_eq!(cgroup::lacking(), None);
    let ground = Ground::new();
    let names = ["one", "two"];
    let definitions = names.map(|name| ground.definition(name));
    for definition in &definitions {
        ground.define(definition).unwrap();
        ground.start(definition).unwrap();
    }
    let pids = names.map(|name| ground.process(name).pid);
    let ours = std::process::id() as i32;
    let mut directories = Vec::new();
    for (name, pid) in names.iter().zip(pids) {
        for controller in ["memory", "cpu", "pids"] {
            let path = cgroup_of(pid, controller);
            assert!(path.contains(&format!("/vmctl/{name}.")), "{controller}: {path}");
            assert_ne!(path, cgroup_of(ours, controller));
        }
        // 32 MiB of the guest, an eighth for what is about it, 128 MiB for the process and its page cache.
        let memory = cgroup_value(pid, "memory", &["memory.max", "memory.limit_in_bytes"]);
        assert_eq!(memory, ((32 + 4 + 128) << 20).to_string());
        assert_eq!(cgroup_value(pid, "pids", &["pids.max"]), "512");
        assert_eq!(cgroup::share(pid).unwrap(), Some(CpuShare::default()));
        let changed = CpuShare { weight: 333, quota_percent: Some(50) };
        let (vm, mark) = (ObjectName::parse(name).unwrap(), mark(Kind::VirtualMachine, name));
        ground.run(Step::SetCpuShare { vm, mark, share: changed }).unwrap();
        assert_eq!(cgroup::share(pid).unwrap(), Some(changed));
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(
            status.contains(&format!("Uid:\t{}\t", vm_uid(&ObjectName::parse(name).unwrap()))),
            "{status}"
        );
        directories.push(cgroup_directory(pid, "cpu"));
    }
    // Somebody writes there: it is seen, and put right.
    let process = ground.process("one");
    let limits = process.limits.unwrap();
    assert!(!process.files_in_memory, "the test's directory lies in memory");
    assert_eq!(limits, ProcessLimits::of(&process.config, false));
    let write = |controller: &str, files: &[&str], value: &str| {
        let directory = cgroup_directory(process.pid, controller);
        assert!(files.iter().any(|file| {
            let path = directory.join(file);
            path.exists() && std::fs::write(path, value).is_ok()
        }));
    };
    write("memory", &["memory.max", "memory.limit_in_bytes"], &(256 << 20).to_string());
    write("pids", &["pids.max"], "max");
    let changed = ProcessLimits { memory_bytes: Some(256 << 20), threads: None };
    assert_eq!(ground.process("one").limits, Some(changed));
    let (vm, mark) = (vm_name(&definitions[0]), definitions[0].mark.clone());
    for wanted in [ProcessLimits { memory_bytes: None, ..limits }, limits] {
        let (vm, mark) = (vm.clone(), mark.clone());
        ground.run(Step::SetProcessLimits { vm, mark, limits: wanted }).unwrap();
        assert_eq!(ground.process("one").limits, Some(wanted));
    }
    assert_eq!(cgroup::limits(ours).unwrap(), None);
    assert!(cgroup::set_limits(ours, limits).is_err(), "only VMs are touched");
    assert_eq!(cgroup::share(ours).unwrap(), None);
    assert!(cgroup::set_share(ours, CpuShare::default()).is_err(), "only VMs are touched");

    // One is stopped, the other is killed, and so is whoever would have cleaned up.
    ground.stop(&definitions[0], StopHow::Forced).unwrap();
    assert!(!directories[0].exists(), "{}", directories[0].display());
    let other = Pid::from_raw(pids[1]).unwrap();
    rustix::process::kill_process(other, Signal::KILL).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while directories[1].exists() {
        assert!(Instant::now() < deadline, "a look leaves {}", directories[1].display());
        assert!(ground.vm("two").definition.is_some());
        std::thread::sleep(Duration::from_millis(10));
    }
    // What is left of one is taken over by the next.
    std::fs::create_dir(&directories[1]).ok();
    ground.start(&definitions[1]).unwrap();
    assert_eq!(cgroup::share(ground.process("two").pid).unwrap(), Some(CpuShare::default()));
}

#[test]
fn two_hosts_never_give_one_user_twice() {
    // The same name in two places: the same first choice, and both run.
    let (here, there) = (Ground::new(), Ground::at(scratch("other"), PROGRAM));
    let uids: Vec<String> = [&here, &there]
        .map(|ground| {
            let definition = ground.definition("twin");
            ground.define(&definition).unwrap();
            ground.start(&definition).unwrap();
            let status =
                std::fs::read_to_string(format!("/proc/{}/status", ground.process("twin").pid)).unwrap();
            status.lines().find(|line| line.starts_with("Uid:")).unwrap().to_owned()
        })
        .into();
    assert_ne!(uids[0], uids[1]);
}

#[test]
fn a_process_that_breaks_a_rule_dies_and_is_started_again() {
    let ground = Ground::new();
    let definition = ground.definition("caught");
    ground.define(&definition).unwrap();
    ground.start(&definition).unwrap();
    let pid = ground.process("caught").pid;
    let mut thread = inject::Thread::stop(pid, pid);
    let outcome = thread.call(libc::SYS_socket, [2, 1, 0, 0, 0, 0]);
    assert_eq!(outcome, inject::Outcome::Trapped(libc::SYS_socket));
    // The tracer kept the signal from it.
    thread.deliver();
    let seen = ground.vm("caught");
    assert_eq!(seen.process, None);
    let exit = seen.exit.expect("it says of what it died");
    assert!(exit.message.starts_with("seccomp (SIGSYS): the thread "), "{exit:?}");
    assert_eq!(exit.reason, ExitReason::Internal, "a failure, after which a VM is started again");
    ground.start(&definition).unwrap();
    assert_ne!(ground.process("caught").pid, pid);
}
