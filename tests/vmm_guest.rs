//! The VM process with a small guest of our own, on this host's KVM: no lab, milliseconds each.

mod support;

use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use support::script::{self, Op};
use support::{RunningVm, Vm, guest, memfd};
use vmctl::vmm::client::{Control, ControlError, LaunchError};
use vmctl::vmm::config::{BalloonConfig, DiskConfig, DiskFormat, MachineKind};
use vmctl::vmm::protocol::{
    ConditionKind, Event, ExitReason, ExitRecord, FdRole, PACKET_BYTES_MAX, Phase, Response, Verb,
};

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_vmctl-vmm"))
}

fn start(vm: Vm) -> RunningVm {
    vm.launch(program()).unwrap()
}

fn small() -> Vm {
    Vm::new(memfd(&guest::kernel()), "")
}

fn reason(record: Option<ExitRecord>) -> ExitReason {
    record.expect("an exit record").reason
}

fn refused(vm: Vm) -> String {
    match vm.launch(program()) {
        Err(LaunchError::Refused { error, .. }) => error,
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("launched"),
    }
}

#[test]
fn a_guest_prints_and_powers_off() {
    let vm = start(small());
    let mut console = vm.console();
    console.expect("boot1\n");
    console.type_in("q");
    assert_eq!(reason(vm.wait()), ExitReason::GuestPowerOff);
    assert_eq!(vm.log(), "boot1\n");
    assert!(matches!(Control::connect(&vm.control_path()), Err(ControlError::Absent { .. })));
}

#[test]
fn a_guest_that_panics_ends_and_one_that_dumps_goes_on() {
    let vm = start(small());
    let watch = vm.control().watch().unwrap();
    let mut console = vm.console();
    console.expect("boot1\n");
    console.type_in("D");
    console.expect("+");
    let event = watch.next(Duration::from_secs(5)).unwrap();
    assert!(
        matches!(&event, Some(Event::Condition(condition)) if condition.kind == ConditionKind::GuestPanicked),
        "{event:?}"
    );
    assert_eq!(vm.control().state().unwrap().conditions.len(), 1);
    // The kernel that crashed goes with a reset, and what is said of it.
    console.type_in("r");
    console.expect("boot1\n");
    assert_eq!(vm.control().state().unwrap().conditions, []);
    console.type_in("P");
    assert_eq!(reason(vm.wait()), ExitReason::GuestPanicked);
}

#[test]
fn balloon_vsock_and_generation_id_are_there_when_configured() {
    for machine in [MachineKind::Micro, MachineKind::Pci] {
        let mut vm = small();
        let id = "00112233-4455-6677-8899-aabbccddeeff".to_owned();
        let config = &mut vm.launch.config;
        config.machine = machine;
        config.balloon =
            Some(BalloonConfig { target_bytes: 1 << 20, free_page_reporting: true, deflate_on_oom: true });
        config.generation_id = Some(id);
        let directory = vm.vsock(3);
        let vm = start(vm);
        vm.console().expect("boot1\n");
        let control = vm.control();
        control.command(&Verb::SetBalloon { target_bytes: 8 << 20 }).unwrap();
        let metrics = control.metrics().unwrap();
        let balloon = metrics.balloon.unwrap();
        // This guest has no driver.
        assert_eq!((balloon.target_bytes, balloon.actual_bytes), (8 << 20, 0));
        assert_eq!(metrics.vsock.unwrap().connections, 0);
        let mut host = std::os::unix::net::UnixStream::connect(directory.join("vsock")).unwrap();
        assert_eq!(host.read(&mut [0]).unwrap(), 0, "nobody serves the guest's side");
        for refused in [
            Verb::SetBalloon { target_bytes: 33 << 20 },
            Verb::SetBalloon { target_bytes: 1 },
            Verb::SetGenerationId { id: "none".into() },
        ] {
            assert!(matches!(control.command(&refused), Err(ControlError::Refused(_))), "{refused:?}");
        }
        let other = "ffffffff-4455-6677-8899-aabbccddeeff".to_owned();
        control.command(&Verb::SetGenerationId { id: other.clone() }).unwrap();
        let config = control.state().unwrap().config;
        assert_eq!((config.balloon.unwrap().target_bytes, config.generation_id), (8 << 20, Some(other)));
        control.command(&Verb::Stop).unwrap();
        assert_eq!(reason(vm.wait()), ExitReason::Stopped);
    }
}

#[test]
fn what_is_not_configured_cannot_be_commanded() {
    let vm = start(small());
    let control = vm.control();
    for verb in [
        Verb::SetBalloon { target_bytes: 0 },
        Verb::SetGenerationId { id: "00112233-4455-6677-8899-aabbccddeeff".into() },
    ] {
        assert!(matches!(control.command(&verb), Err(ControlError::Refused(_))), "{verb:?}");
    }
    let metrics = control.metrics().unwrap();
    assert_eq!((metrics.balloon, metrics.vsock), (None, None));
    let mut vm = small();
    vm.vsock(2);
    assert!(refused(vm).contains("context id"));
    let mut vm = small();
    vm.launch.config.generation_id = Some("1".into());
    assert!(refused(vm).contains("UUID"));
    let mut vm = small();
    vm.launch.config.balloon =
        Some(BalloonConfig { target_bytes: 64 << 20, free_page_reporting: false, deflate_on_oom: false });
    assert!(refused(vm).contains("balloon"));
}

#[test]
fn a_guest_resets_itself_in_every_way_and_finds_fresh_memory() {
    for vcpus in [1, 4] {
        let vm = start(small().vcpus(vcpus));
        let mut console = vm.console();
        console.expect("boot1\n");
        for (reboots, way) in ["r", "c", "k", "r"].into_iter().enumerate() {
            console.type_in(way);
            let before = console.expect("boot1\n");
            assert!(!before.contains('!'), "the guest ran on after its reset");
            let state = vm.control().state().unwrap();
            assert_eq!((state.reboots, state.pid), (reboots as u64 + 1, vm.pid));
        }
        console.type_in("q");
        assert_eq!(reason(vm.wait()), ExitReason::GuestPowerOff);
    }
}

#[test]
fn a_triple_fault_resets_and_a_loop_of_them_ends() {
    let vm = start(small());
    let mut console = vm.console();
    console.expect("boot1\n");
    console.type_in("t");
    console.expect("boot1\n");
    console.type_in("q");
    assert_eq!(reason(vm.wait()), ExitReason::GuestPowerOff);

    let vm = start(Vm::new(memfd(&guest::crashing_kernel()), ""));
    assert_eq!(reason(vm.wait()), ExitReason::GuestFault);
}

#[test]
fn verbs_pause_resume_reboot_and_stop() {
    let vm = start(small().vcpus(2));
    let mut console = vm.console();
    console.expect("boot1\n");
    let control = vm.control();
    for _ in 0..3 {
        control.command(&Verb::Pause).unwrap();
        control.command(&Verb::Pause).unwrap();
        assert_eq!(control.state().unwrap().phase, Phase::Paused);
        console.type_in("x");
        let mut buffer = [0; 4096];
        let output = console.console.read(&mut buffer, Duration::from_millis(50)).unwrap();
        assert_eq!(output, None, "a paused guest prints nothing");
        control.command(&Verb::Resume).unwrap();
        control.command(&Verb::Resume).unwrap();
        console.expect("x");
    }
    control.command(&Verb::Reboot).unwrap();
    console.expect("boot1\n");
    control.command(&Verb::Pause).unwrap();
    control.command(&Verb::Reboot).unwrap();
    let state = control.state().unwrap();
    assert_eq!((state.phase, state.reboots), (Phase::Paused, 2));
    control.command(&Verb::Resume).unwrap();
    console.expect("boot1\n");
    control.command(&Verb::Stop).unwrap();
    assert_eq!(reason(vm.wait()), ExitReason::Stopped);
}

#[test]
fn a_halted_guest_can_be_paused_reset_and_stopped() {
    let vm = start(small());
    let mut console = vm.console();
    console.expect("boot1\n");
    console.type_in("h");
    let control = vm.control();
    control.command(&Verb::Pause).unwrap();
    control.command(&Verb::Resume).unwrap();
    control.command(&Verb::Reboot).unwrap();
    console.expect("boot1\n");
    console.type_in("h");
    vm.terminate();
    assert_eq!(vm.wait(), Some(ExitRecord { reason: ExitReason::Stopped, message: "SIGTERM".into() }));
}

#[test]
fn kicks_are_never_lost() {
    let vm = start(small().vcpus(2));
    vm.console().expect("boot1\n");
    let control = vm.control();
    for _ in 0..200 {
        control.command(&Verb::Pause).unwrap();
        control.command(&Verb::Resume).unwrap();
    }
    for _ in 0..20 {
        control.command(&Verb::Reboot).unwrap();
    }
    assert_eq!(control.state().unwrap().reboots, 20);
}

#[test]
fn accesses_to_nothing_and_string_output() {
    let vm = start(small());
    let mut console = vm.console();
    console.expect("boot1\n");
    console.type_in("ns");
    console.expect("Nstring\n");
}

#[test]
fn the_console_replays_and_a_client_that_does_not_read_holds_nobody_up() {
    let vm = start(small());
    let mut first = vm.console();
    first.expect("boot1\n");
    let lazy = vm.console();
    // More than all socket buffers and the ring together.
    for _ in 0..100 {
        first.type_in("o");
        first.expect(".\n");
    }
    let mut replay = vm
        .control()
        .attach_console(6)
        .map(|console| support::Session { console, text: String::new() })
        .unwrap();
    assert_eq!(replay.expect("\n"), ".....\n");
    drop(lazy);
    assert!(vm.log().len() <= 1024 * 1024);
    assert!(vm.log().ends_with(".....\n"));
}

#[test]
fn more_input_than_the_port_holds_arrives_in_order() {
    let vm = start(small());
    let mut console = vm.console();
    console.expect("boot1\n");
    let text: String = (0..300).map(|number| format!("{number:04}-")).collect();
    console.type_in(&text);
    console.type_in("Z");
    assert_eq!(console.expect("Z"), text + "Z");
}

#[test]
fn watchers_hear_of_everything() {
    let vm = start(small());
    let watch = vm.control().watch().unwrap();
    let next = || watch.next(Duration::from_secs(10)).unwrap().expect("an event");
    let control = vm.control();
    control.command(&Verb::Pause).unwrap();
    assert_eq!(next(), Event::Phase(Phase::Paused));
    control.command(&Verb::Resume).unwrap();
    assert_eq!(next(), Event::Phase(Phase::Running));
    control.command(&Verb::Reboot).unwrap();
    assert_eq!(next(), Event::Rebooted);
    control.command(&Verb::Stop).unwrap();
    assert_eq!(next(), Event::Phase(Phase::Stopping));
    assert!(matches!(next(), Event::Exit(ExitRecord { reason: ExitReason::Stopped, .. })));
    assert!(watch.next(Duration::from_secs(10)).is_err(), "then the connection ends");
}

#[test]
fn the_state_is_the_configuration_and_the_peer_is_the_process() {
    let image = memfd(b"");
    image.set_len(1 << 20).unwrap();
    let vm = small().vcpus(2).disk(disk("root"), image);
    let config = serde_json::to_value(&vm.launch.config).unwrap();
    let vm = start(vm);
    let control = vm.control();
    assert_eq!(control.peer_pid().unwrap(), vm.pid);
    let state = control.state().unwrap();
    assert_eq!(serde_json::to_value(&state.config).unwrap(), config);
    assert_eq!((state.pid, state.reboots, state.phase), (vm.pid, 0, Phase::Running));
    assert_eq!(state.disk_capacity_bytes, [1 << 20]);

    let resize = |disk: &str, capacity_bytes| Verb::ResizeDisk { disk: disk.into(), capacity_bytes };
    control.command(&resize("root", 2 << 20)).unwrap();
    control.command(&resize("root", 2 << 20)).unwrap();
    assert_eq!(control.state().unwrap().disk_capacity_bytes, [2 << 20]);
    assert!(matches!(control.request(&resize("root", 1 << 20)).unwrap(), Response::Error { .. }));
    assert!(matches!(control.request(&resize("nope", 4 << 20)).unwrap(), Response::Error { .. }));
    let no_tap = Verb::ReplaceTap { nic: "lan".into() };
    assert!(matches!(control.request(&no_tap).unwrap(), Response::Error { .. }));
    assert!(matches!(control.request_with_fd(&no_tap, control.as_fd()).unwrap(), Response::Error { .. }));
    assert!(matches!(control.request_with_fd(&Verb::Get, control.as_fd()).unwrap(), Response::Error { .. }));
    assert_eq!(control.state().unwrap().pid, vm.pid);
}

fn disk(name: &str) -> DiskConfig {
    DiskConfig::new(name, "image", DiskFormat::Raw)
}

fn raw_client(vm: &RunningVm) -> OwnedFd {
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .unwrap();
    rustix::net::connect(&socket, &SocketAddrUnix::new(vm.control_path()).unwrap()).unwrap();
    socket
}

fn answer(socket: &OwnedFd) -> Response {
    assert!(support::poll(socket, Duration::from_secs(10)), "an answer");
    vmctl::vmm::packet::receive(socket).unwrap().0
}

#[test]
fn packets_that_make_no_sense_are_answered_with_an_error() {
    let vm = start(small());
    let socket = raw_client(&vm);
    let send = |bytes: &[u8]| rustix::net::send(&socket, bytes, SendFlags::NOSIGNAL).unwrap();
    let oversized = vec![b' '; PACKET_BYTES_MAX + 1];
    let deep = "[".repeat(100_000);
    for packet in [
        &b"hello"[..],
        b"{}",
        b"null",
        b"{\"version\":1}",
        b"{\"version\":1,\"verb\":\"explode\"}",
        b"{\"version\":1,\"verb\":{\"resizeDisk\":{\"disk\":\"a\",\"capacity_bytes\":-1}}}",
        b"{\"version\":1,\"verb\":\"get\",\"more\":1}",
        b"\xff\xfe\x00",
        &oversized,
        deep.as_bytes(),
    ] {
        send(packet);
        assert!(matches!(answer(&socket), Response::Error { .. }));
    }
    send(b"{\"version\":99,\"verb\":{\"new\":1}}");
    let Response::Error { message } = answer(&socket) else { panic!() };
    assert!(message.contains("version 99"), "{message}");
    send(b"{\"version\":1,\"verb\":\"get\"}");
    assert!(matches!(answer(&socket), Response::State(_)));
}

#[test]
fn random_packets_and_clients_that_vanish_do_no_harm() {
    let vm = start(small());
    // A fixed seed: a failure can be repeated.
    let mut seed = 0x2545_f491_4f6c_dd1d_u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let valid = [
        &b"{\"version\":1,\"verb\":\"get\"}"[..],
        b"{\"version\":1,\"verb\":\"pause\"}",
        b"{\"version\":1,\"verb\":\"resume\"}",
        b"{\"version\":1,\"verb\":\"powerButton\"}",
        b"{\"version\":1,\"verb\":{\"consoleAttach\":{\"replay_bytes\":100}}}",
        b"{\"version\":1,\"verb\":\"watch\"}",
    ];
    for _ in 0..50 {
        let socket = raw_client(&vm);
        for _ in 0..10 {
            let mut packet = valid[random() as usize % valid.len()].to_vec();
            for _ in 0..random() % 4 {
                let at = random() as usize % packet.len();
                packet[at] = random() as u8;
            }
            packet.truncate(1 + random() as usize % packet.len().max(2));
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            let _ = rustix::net::send(&socket, &packet, flags);
        }
    }
    let control = vm.control();
    control.command(&Verb::Resume).unwrap();
    assert_eq!(control.state().unwrap().pid, vm.pid);
}

#[test]
fn a_client_that_never_reads_its_answers_is_dropped() {
    let vm = start(small());
    let socket = raw_client(&vm);
    let mut sent = 0;
    while rustix::net::send(&socket, b"{\"version\":1,\"verb\":\"get\"}", SendFlags::NOSIGNAL).is_ok() {
        sent += 1;
        assert!(sent < 100_000, "still served");
    }
    assert_eq!(vm.control().state().unwrap().pid, vm.pid);
}

#[test]
fn what_cannot_be_launched_is_refused_with_the_reason() {
    assert!(refused(small().vcpus(0)).contains("vCPUs"));
    assert!(refused(small().vcpus(17)).contains("vCPUs"));
    assert!(refused(small().memory_bytes(1 << 20)).contains("memory"));
    assert!(refused(small().memory_bytes((32 << 20) + 1)).contains("memory"));
    assert!(refused(Vm::new(memfd(&guest::kernel_without_note()), "")).contains("PVH note"));
    assert!(refused(Vm::new(memfd(b"no kernel at all"), "")).contains("neither a bzImage nor"));
    assert!(refused(Vm::new(memfd(b""), "")).contains("neither a bzImage nor"));
    let mut cut = guest::kernel();
    cut.truncate(0x1010);
    assert!(refused(Vm::new(memfd(&cut), "")).contains("cut off"));
    let large = memfd(b"");
    large.set_len(64 << 20).unwrap();
    assert!(refused(small().initrd(large)).contains("initrd"));
    assert!(refused(Vm::new(memfd(&guest::kernel()), &"x".repeat(65536))).contains("command line"));

    for role in [FdRole::Kvm, FdRole::Control, FdRole::ExitRecord, FdRole::Kernel] {
        let mut vm = small();
        vm.withhold(&role);
        assert!(refused(vm).contains(&format!("{role:?}")));
    }
    let mut vm = small();
    vm.pass(FdRole::Tap { nic: "lan".into(), pair: 0 }, memfd(b""));
    assert!(refused(vm).contains("lan"));
    let mut vm = small();
    vm.pass(FdRole::Kernel, memfd(b""));
    assert!(refused(vm).contains("twice"));
    let mut vm = small();
    vm.launch.version = 7;
    assert!(refused(vm).contains("version 7"));
    let vm = small().nic(vmctl::vmm::config::NicConfig::new("lan", "tap0", "52:54:00:00:00:01"), memfd(b""));
    assert!(refused(vm).contains("lan"));
}

#[test]
fn a_launcher_that_dies_first_leaves_nothing_behind() {
    let (near, far) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
            .unwrap();
    // A pipe that every process of the launch inherits as standard output, until it detaches; the VM
    // process's own end is seen by the launch socket.
    let mut command = Command::new(program());
    let far_fd = std::os::fd::AsRawFd::as_raw_fd(&far);
    // SAFETY: between fork and exec only dup2 is called, which is async-signal-safe.
    unsafe {
        std::os::unix::process::CommandExt::pre_exec(&mut command, move || {
            if libc::dup2(far_fd, 3) < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
        });
    }
    let mut child = command.spawn().unwrap();
    drop(far);
    rustix::net::shutdown(&near, rustix::net::Shutdown::Write).unwrap();
    assert!(child.wait().unwrap().success());
    // It closes its end without a word when it ends.
    assert!(support::poll(&near, Duration::from_secs(10)));
    let mut buffer = [0; 16];
    assert_eq!(rustix::net::recv(&near, &mut buffer, rustix::net::RecvFlags::empty()).unwrap().1, 0);
}

#[test]
fn the_process_is_sandboxed() {
    let vm = start(small().vcpus(2));
    vm.console().expect("boot1\n");
    let read = |name: &str| std::fs::read_to_string(format!("/proc/{}/{name}", vm.pid)).unwrap();
    let status = read("status");
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(&format!("{name}:"))).unwrap();
        line.split_whitespace().skip(1).map(str::to_owned).collect::<Vec<_>>()
    };
    for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
        if set == "CapBnd" && !rustix::process::getuid().is_root() {
            continue;
        }
        assert_eq!(field(set), ["0000000000000000"], "{set}");
    }
    assert_eq!(field("NoNewPrivs"), ["1"]);
    assert_eq!(field("PPid"), ["1"]);
    assert_ne!(field("Uid")[0], "0");
    assert!(field("Groups").is_empty());
    assert_eq!(
        read("cmdline"),
        format!("{}\0{}\0", program().display(), vm.control().state().unwrap().config.name)
    );
    // The one variable is the switch by which tests have a violation reported.
    let environment = read("environ");
    assert!(environment.is_empty() || environment.starts_with("VMCTL_SECCOMP="), "{environment}");

    let mut names = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{}/task", vm.pid)).unwrap() {
        let path = task.unwrap().path();
        let name = std::fs::read_to_string(path.join("comm")).unwrap().trim().to_owned();
        // KVM's own threads run no code of ours.
        if name.starts_with("kvm-") {
            continue;
        }
        let status = std::fs::read_to_string(path.join("status")).unwrap();
        assert!(status.contains("Seccomp:\t2"), "{}: {status}", path.display());
        names.push(name);
    }
    names.sort();
    assert_eq!(names, ["entropy", "spawner", "vcpu0", "vcpu1", "vmctl-vmm"]);
    for fd in std::fs::read_dir(format!("/proc/{}/fd", vm.pid)).unwrap() {
        let target = std::fs::read_link(fd.unwrap().path()).unwrap();
        let target = target.to_string_lossy().into_owned();
        let known = ["/dev/null", "anon_inode:", "socket:", "/memfd:vmctl-test", "console.log"];
        assert!(known.iter().any(|known| target.contains(known)), "an open {target}");
    }
}

#[test]
fn the_process_sees_nothing_of_the_host() {
    let vm = start(small());
    vm.console().expect("boot1\n");
    let proc = |name: &str| format!("/proc/{}/{name}", vm.pid);
    assert_eq!(std::fs::read_dir(proc("root")).unwrap().count(), 0, "its root is empty");
    let mounts = std::fs::read_to_string(proc("mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    let options = mounts.split_whitespace().nth(5).unwrap();
    for option in ["ro", "nosuid", "nodev", "noexec"] {
        assert!(options.split(',').any(|found| found == option), "{mounts}");
    }
    assert_eq!(std::fs::read_link(proc("cwd")).unwrap(), Path::new("/"));
    for namespace in ["mnt", "ipc", "uts", "cgroup", "pid"] {
        let (its, ours) = (proc(&format!("ns/{namespace}")), format!("/proc/self/ns/{namespace}"));
        assert_ne!(std::fs::read_link(its).unwrap(), std::fs::read_link(ours).unwrap(), "{namespace}");
    }
    let status = std::fs::read_to_string(proc("status")).unwrap();
    assert!(status.contains(&format!("NSpid:\t{}\t1\n", vm.pid)), "{status}");
    let limits = std::fs::read_to_string(proc("limits")).unwrap();
    for (limit, value) in [
        ("Max core file size", "0"),
        ("Max open files", "1024"),
        ("Max processes", "512"),
        ("Max msgqueue size", "0"),
    ] {
        let line = limits.lines().find(|line| line.starts_with(limit)).unwrap();
        let columns: Vec<_> = line[limit.len()..].split_whitespace().collect();
        assert_eq!(columns[..2], [value, value], "{limit}");
    }
    // Nothing of it is missing, and so nothing is said.
    assert_eq!(vm.control().state().unwrap().conditions, []);
}

#[test]
fn the_process_needs_little_memory_beside_the_guests() {
    let vm = start(small());
    vm.console().expect("boot1\n");
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", vm.pid)).unwrap();
    let (mut beside_kib, mut size_kib) = (0, 0);
    for line in smaps.lines() {
        let kib = |line: &str| line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap();
        if line.starts_with("Size:") {
            size_kib = kib(line);
        } else if line.starts_with("Pss:") && size_kib < 32 << 10 {
            beside_kib += kib(line);
        }
    }
    // A debug build has several times the code of a release build.
    let bound_kib = if cfg!(debug_assertions) { 16 << 10 } else { 5 << 10 };
    assert!(beside_kib < bound_kib, "{beside_kib} KiB");
}

#[test]
fn a_full_log_is_no_trouble() {
    let mut vm = small();
    vm.withhold(&FdRole::ConsoleLog);
    let full = File::options().append(true).open("/dev/full").unwrap();
    vm.pass(FdRole::ConsoleLog, full);
    let vm = start(vm);
    let mut console = vm.console();
    console.expect("boot1\n");
    console.type_in("oq");
    console.expect(".\n");
    assert_eq!(reason(vm.wait()), ExitReason::GuestPowerOff);
}

#[test]
fn an_old_log_is_continued() {
    let vm = small();
    let mut log = memfd(b"before\n");
    let flags = rustix::fs::fcntl_getfl(&log).unwrap();
    rustix::fs::fcntl_setfl(&log, flags | rustix::fs::OFlags::APPEND).unwrap();
    let mut vm = vm;
    vm.withhold(&FdRole::ConsoleLog);
    vm.pass(FdRole::ConsoleLog, log.try_clone().unwrap());
    let vm = start(vm);
    let mut console = vm.console();
    console.expect("boot1\n");
    console.type_in("q");
    vm.wait();
    let mut text = String::new();
    log.seek(SeekFrom::Start(0)).unwrap();
    log.read_to_string(&mut text).unwrap();
    assert_eq!(text, "before\nboot1\n");
    log.flush().unwrap();
}

/// ACPI says that there are no 8259s, so a guest that boots has not masked them: what they were given then
/// must not come as an exception.
#[test]
fn interrupts_wait_until_the_guest_has_its_interrupt_controller() {
    const ROUND: usize = 2;
    let script = [
        Op::Put(b'B'),
        // As at the end of a kernel's early start. This guest has no handlers below vector 32.
        Op::Interrupts(true),
        Op::Typed,
        Op::Branch { mask: 0xff, value: 0, target: ROUND },
        Op::Put(b'Z'),
        Op::Branch { mask: 0, value: 0, target: ROUND },
    ];
    let mut vm = Vm::new(memfd(&script::kernel(&script, &[])), "");
    vm.launch.config.machine = MachineKind::Pci;
    let vm = vm.launch(program()).unwrap();
    let mut console = vm.console();
    console.expect("B");
    let control = vm.control();
    control.command(&Verb::PowerButton).unwrap();
    let image = memfd(b"");
    image.set_len(1 << 20).unwrap();
    let verb = Verb::AddDisk { disk: DiskConfig::new("data", "image", DiskFormat::Raw) };
    assert_eq!(control.request_with_fd(&verb, image.as_fd()).unwrap(), Response::Done);
    control.command(&Verb::RemoveDevice { device: "data".into() }).unwrap();
    console.type_in("x");
    console.expect("Z");
    assert_eq!(control.state().unwrap().reboots, 0, "the guest faulted");
}
