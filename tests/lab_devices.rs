//! The small devices before stock Linux: balloon, vsock, pvpanic, generation id, clock. Every test here
//! runs in the lab (`tests/lab/`).

#[path = "support/in_lab.rs"]
mod in_lab;
mod support;

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use in_lab::ran_in_lab;
use support::{RunningVm, Session, Vm, cpio, memfd};
use vmctl::vmm::config::{BalloonConfig, MachineKind};
use vmctl::vmm::metrics::BalloonMetrics;
use vmctl::vmm::protocol::{ExitReason, Verb};

const MIB: u64 = 1 << 20;
/// A guest in the emulated lab takes its time.
const PATIENCE: Duration = Duration::from_secs(60);
const BOTH: [MachineKind; 2] = [MachineKind::Micro, MachineKind::Pci];

/// The lab's guest, with these of its kernel's modules and files in `/extra`.
fn guest(machine: MachineKind, modules: &[&str], files: &[String]) -> Vm {
    let mut archive = cpio::Archive::default();
    archive.directory("extra");
    for module in modules {
        let found = output("find", &["/lib/modules", "-name", &format!("{module}.ko")]);
        archive.file(&format!("extra/{module}.ko"), 0o644, &fs::read(found.trim()).expect(module));
    }
    for path in files {
        for (at, _) in path[1..].match_indices('/') {
            archive.directory(&path[1..][..at]);
        }
        archive.file(&path[1..], 0o755, &fs::read(path).expect(path));
    }
    let initrd = [fs::read("/guest/initrd").unwrap(), archive.finish()].concat();
    let arguments = "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable";
    let mut vm = Vm::new(File::open("/guest/vmlinux").unwrap(), arguments)
        // Half of it is what a file in its root may hold.
        .memory_bytes(640 * MIB)
        .initrd(memfd(&initrd));
    vm.launch.config.machine = machine;
    vm
}

fn output(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

struct Guest {
    vm: RunningVm,
    console: Session,
}

impl Guest {
    fn boot(vm: Vm) -> Self {
        let program = output("sh", &["-c", "command -v vmctl-vmm"]);
        let vm = vm.launch(Path::new(program.trim())).unwrap();
        let mut console = vm.console();
        console.expect_within("guest# ", PATIENCE);
        Self { vm, console }
    }

    /// Runs a command in the guest's shell, and gives what it printed.
    fn run(&mut self, command: &str) -> String {
        // The terminal echoes what is typed: the end must look otherwise there.
        self.console.type_in(&format!("echo S''TART; {command}; echo E''ND $?\n"));
        self.console.expect_within("START", PATIENCE);
        let said = self.console.expect_within("END ", PATIENCE);
        let status = self.console.expect_within("guest# ", PATIENCE);
        assert!(status.starts_with('0'), "{command}: {said}");
        said.trim_end_matches("END ").replace('\r', "").trim().to_owned()
    }

    fn load(&mut self, modules: &[&str]) {
        for module in modules {
            self.run(&format!("insmod /extra/{module}.ko"));
        }
    }

    fn available_bytes(&mut self) -> u64 {
        let line = self.run("grep MemAvailable /proc/meminfo");
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    }

    /// Touches so much of the guest's memory, and frees it again.
    fn touch(&mut self, mib: u64) {
        self.run(&format!("dd if=/dev/zero of=/tmp/touched bs=1M count={mib} 2>/dev/null"));
        self.run("rm /tmp/touched");
    }

    /// Of the VM process.
    fn resident_bytes(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.vm.pid)).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
    }

    fn balloon(&self) -> BalloonMetrics {
        self.vm.control().metrics().unwrap().balloon.unwrap()
    }

    fn set_balloon(&self, mib: u64) {
        self.vm.control().command(&Verb::SetBalloon { target_bytes: mib * MIB }).unwrap();
        wait("the balloon reaches its target", || self.balloon().actual_bytes == mib * MIB);
    }
}

#[track_caller]
fn wait(what: &str, mut until: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !until() {
        assert!(Instant::now() < deadline, "waited too long until {what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_balloon_takes_memory_and_gives_it_back() {
    if ran_in_lab() {
        return;
    }
    for machine in BOTH {
        let mut vm = guest(machine, &["virtio_balloon"], &[]);
        let config = BalloonConfig { target_bytes: 0, free_page_reporting: false, deflate_on_oom: false };
        vm.launch.config.balloon = Some(config);
        let mut guest = Guest::boot(vm);
        guest.load(&["virtio_balloon"]);
        guest.touch(250);
        let (available, resident) = (guest.available_bytes(), guest.resident_bytes());
        assert!(resident > 250 * MIB);

        let begun = Instant::now();
        guest.set_balloon(256);
        println!("{machine:?}: 256 MiB inflated in {} ms", begun.elapsed().as_millis());
        let (less, small) = (guest.available_bytes(), guest.resident_bytes());
        assert!(less + 200 * MIB < available, "{available} available, then {less}");
        assert!(small + 200 * MIB < resident, "{resident} resident, then {small}");
        wait("the guest tells its statistics", || guest.balloon().told_at_ms > 0);
        let told = guest.balloon();
        assert!(told.total_bytes > 0 && told.available_bytes > 0, "{told:?}");
        // Nothing but the guest's memory was refused.
        assert_eq!(told.errors, 0);

        guest.set_balloon(0);
        let again = guest.available_bytes();
        // What the kernel keeps for itself differs a little each time.
        assert!(again + 64 * MIB > available, "{available} available, then {again}");
        guest.touch(250);
        println!(
            "{machine:?}: available {} → {} → {} MiB, resident {} → {} MiB",
            available / MIB,
            less / MIB,
            again / MIB,
            resident / MIB,
            small / MIB
        );
    }
}

#[test]
fn free_pages_are_reported_and_given_back() {
    if ran_in_lab() {
        return;
    }
    let mut vm = guest(MachineKind::Pci, &["virtio_balloon"], &[]);
    let config = BalloonConfig { target_bytes: 0, free_page_reporting: true, deflate_on_oom: true };
    vm.launch.config.balloon = Some(config);
    let mut guest = Guest::boot(vm);
    guest.load(&["virtio_balloon"]);
    guest.run("dd if=/dev/zero of=/tmp/touched bs=1M count=250 2>/dev/null");
    let resident = guest.resident_bytes();
    assert!(resident > 250 * MIB);
    guest.run("rm /tmp/touched");
    let begun = Instant::now();
    wait("the memory comes back", || guest.resident_bytes() + 200 * MIB < resident);
    println!(
        "resident {} → {} MiB in {} ms, {} MiB reported",
        resident / MIB,
        guest.resident_bytes() / MIB,
        begun.elapsed().as_millis(),
        guest.balloon().reported_bytes / MIB
    );
    guest.touch(250);
}

#[test]
fn vsock_connects_both_ways() {
    if ran_in_lab() {
        return;
    }
    let modules = ["vsock", "vmw_vsock_virtio_transport_common", "vmw_vsock_virtio_transport"];
    let mut files = vec!["/usr/bin/socat".to_owned()];
    // "name => path (address)", or "path (address)" for the loader.
    let libraries = output("ldd", &["/usr/bin/socat"]);
    files.extend(libraries.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned));
    for machine in BOTH {
        let mut vm = guest(machine, &modules, &files);
        let directory = vm.vsock(77);
        let mut guest = Guest::boot(vm);
        guest.load(&modules);

        // From the guest.
        let listener = UnixListener::bind(directory.join("vsock_5000")).unwrap();
        support::let_connect(&directory.join("vsock_5000"));
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            let mut said = String::new();
            stream.read_to_string(&mut said).unwrap();
            stream.write_all(format!("heard {said}").as_bytes()).unwrap();
        });
        let answer = guest.run("echo hello | /usr/bin/socat -t 30 - VSOCK-CONNECT:2:5000");
        assert_eq!(answer, "heard hello");
        server.join().unwrap();
        // Nobody listens there.
        guest.run("! /usr/bin/socat -u OPEN:/dev/null VSOCK-CONNECT:2:5001 2>/dev/null");

        // From the host: an echo, with enough to fill every buffer. (socat's own, PIPE, stands still when
        // its pipe is nearly full.)
        guest.run("/usr/bin/socat -t 30 VSOCK-LISTEN:1024,fork EXEC:'/bin/busybox cat' & sleep 1");
        let mut stream = UnixStream::connect(directory.join("vsock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"CONNECT 1024\n").unwrap();
        let mut greeting = [0; 3];
        stream.read_exact(&mut greeting).unwrap();
        assert_eq!(&greeting, b"OK ");
        while greeting[0] != b'\n' {
            stream.read_exact(&mut greeting[..1]).unwrap();
        }
        let data: Vec<u8> = (0..8 << 20).map(|index| (index / 3) as u8).collect();
        let begun = Instant::now();
        let mut writer = stream.try_clone().unwrap();
        let sent = data.clone();
        let writer = std::thread::spawn(move || {
            writer.write_all(&sent).unwrap();
            writer.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let mut echoed = Vec::new();
        stream.read_to_end(&mut echoed).unwrap();
        writer.join().unwrap();
        assert!(echoed == data, "{} of {} bytes came back", echoed.len(), data.len());
        let counted = guest.vm.control().metrics().unwrap().vsock.unwrap();
        println!("{machine:?}: 8 MiB there and back in {} ms; {counted:?}", begun.elapsed().as_millis());
        assert_eq!(counted.opened, 2);
        assert!(counted.refused >= 1);
        wait("all connections are gone", || {
            guest.vm.control().metrics().unwrap().vsock.unwrap().connections == 0
        });
    }
}

#[test]
fn a_panic_ends_the_process_where_the_guest_can_say_so() {
    if ran_in_lab() {
        return;
    }
    let modules = ["pvpanic", "pvpanic-mmio"];
    let mut guest = Guest::boot(self::guest(MachineKind::Pci, &modules, &[]));
    // Without the driver the guest reboots, as its command line says.
    guest.console.type_in("echo c >/proc/sysrq-trigger\n");
    guest.console.expect_within("GUEST-INIT", PATIENCE);
    guest.console.expect_within("guest# ", PATIENCE);
    assert_eq!(guest.vm.control().state().unwrap().reboots, 1);
    guest.load(&modules);
    guest.console.type_in("echo c >/proc/sysrq-trigger\n");
    let record = guest.vm.wait_for(PATIENCE).expect("an exit record");
    assert_eq!(record.reason, ExitReason::GuestPanicked);
}

#[test]
fn the_clock_is_right_and_the_generation_is_known() {
    if ran_in_lab() {
        return;
    }
    for machine in BOTH {
        let mut vm = guest(machine, &[], &[]);
        vm.launch.config.generation_id = Some("00112233-4455-6677-8899-aabbccddeeff".to_owned());
        let mut guest = Guest::boot(vm);
        let told: u64 = guest.run("date +%s").parse().unwrap();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        assert!(told.abs_diff(now) <= 5, "{machine:?}: the guest's clock says {told}, the host's {now}");

        let path = "/sys/bus/acpi/devices/VMGENCTR:00";
        assert_eq!(guest.run(&format!("cat {path}/hid")), "VMGENCTR");
        assert_eq!(guest.run(&format!("cat {path}/path")), "\\_SB_.VGEN");
        assert!(guest.run(&format!("cat {path}/modalias")).contains(":VM_GEN_COUNTER:"));
        let read = |guest: &mut Guest| guest.run("devmem 0xf0000 64; devmem 0xf0008 64");
        assert_eq!(read(&mut guest), "0x6677445500112233\n0xFFEEDDCCBBAA9988");
        let events = |guest: &mut Guest| {
            let line = guest.run("grep ' 7-edge' /proc/interrupts");
            line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
        };
        assert_eq!(events(&mut guest), 0);
        let id = "ffffffff-0000-0000-0000-000000000001".to_owned();
        guest.vm.control().command(&Verb::SetGenerationId { id: id.clone() }).unwrap();
        assert_eq!(guest.vm.control().state().unwrap().config.generation_id, Some(id));
        assert_eq!(read(&mut guest), "0x00000000FFFFFFFF\n0x0100000000000000");
        assert_eq!(events(&mut guest), 1);
    }
}
