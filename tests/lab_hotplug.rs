//! Disks and NICs come and go under a running, unmodified Linux guest, which is given no command to look
//! for them. Every test here runs in the lab (`tests/lab/`), where guests are real.

#[path = "support/in_lab.rs"]
mod in_lab;
mod support;

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use in_lab::ran_in_lab;
use support::{RunningVm, Session, Vm};
use vmctl::vmm::config::{DiskConfig, DiskFormat, MachineKind, NicConfig};
use vmctl::vmm::protocol::{ConditionKind, Event, Response, Verb, VmState};

const PROGRAM: &str = "/usr/local/bin/vmctl-vmm";
const LONG: Duration = Duration::from_secs(60);

struct Guest {
    vm: RunningVm,
    session: Session,
    commands: usize,
}

fn boot(vcpus: u8, machine: MachineKind) -> Guest {
    let cmdline = "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable";
    let mut vm = Vm::new(File::open("/guest/vmlinux").unwrap(), cmdline)
        .vcpus(vcpus)
        .memory_bytes(256 << 20)
        .initrd(File::open("/guest/initrd").unwrap());
    vm.launch.config.machine = machine;
    let vm = vm.launch(Path::new(PROGRAM)).unwrap();
    let session = vm.console();
    let mut guest = Guest { vm, session, commands: 0 };
    guest.session.expect_within("guest# ", LONG);
    guest
}

impl Guest {
    /// Runs a command in the guest; gives what it printed.
    fn run(&mut self, command: &str) -> String {
        self.commands += 1;
        let end = format!("END-{}", self.commands);
        // The echo of the line has the quotes, the output hasn't.
        self.session.type_in(&format!("{command}; echo END-''{}\n", self.commands));
        self.session.expect_within(&end, LONG)
    }

    /// Waits in the guest, by looking alone.
    fn until(&mut self, condition: &str) {
        let said = self.run(&format!(
            "n=0; until {condition}; do n=$((n+1)); [ $n = 200 ] && break; sleep 0.1; done; echo n-''is $n"
        ));
        assert!(said.contains("n-is") && !said.contains("n-is 200"), "never: {condition}: {said}");
    }

    fn state(&self) -> VmState {
        self.vm.control().state().unwrap()
    }

    fn add_disk(&self, name: &str, image: &Path, format: DiskFormat) -> Response {
        let disk = DiskConfig::new(name, image.to_str().unwrap(), format);
        let file = File::options().read(true).write(true).open(image).unwrap();
        let answer = self.vm.control().request_with_fd(&Verb::AddDisk { disk }, file.as_fd());
        answer.unwrap_or_else(|error| panic!("{error:?}: {:?}", self.vm.wait()))
    }

    fn add_nic(&self, name: &str, tap: &str, mac: &str) -> Response {
        let nic = NicConfig::new(name, tap, mac);
        let file = support::open_tap(tap);
        self.vm.control().request_with_fd(&Verb::AddNic { nic }, file.as_fd()).unwrap()
    }

    /// Asks the guest to let go of a device, and waits until it has.
    fn remove(&self, device: &str) {
        let deadline = Instant::now() + LONG;
        self.vm.control().command(&Verb::RemoveDevice { device: device.into() }).unwrap();
        loop {
            let config = self.state().config;
            let there = config.disks.iter().map(|disk| &disk.name).any(|name| name == device)
                || config.nics.iter().any(|nic| nic.name == device);
            if !there {
                return;
            }
            assert!(Instant::now() < deadline, "the guest has not let go of {device}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    fn threads_and_files(&self) -> (usize, usize) {
        let count = |what: &str| std::fs::read_dir(format!("/proc/{}/{what}", self.vm.pid)).unwrap().count();
        (count("task"), count("fd"))
    }
}

fn image(name: &str, mebibytes: u64) -> std::path::PathBuf {
    let path = std::env::temp_dir().join(name);
    File::create(&path).unwrap().set_len(mebibytes << 20).unwrap();
    path
}

fn ip(arguments: &str) {
    let done = Command::new("ip").args(arguments.split(' ')).status().unwrap();
    assert!(done.success(), "ip {arguments}");
}

fn tap(name: &str, address: &str) {
    ip(&format!("tuntap add {name} mode tap user 65534 vnet_hdr"));
    ip(&format!("addr add {address} dev {name}"));
    ip(&format!("link set {name} up"));
}

#[test]
fn a_disk_comes_grows_works_and_goes() {
    if ran_in_lab() {
        return;
    }
    let mut guest = boot(2, MachineKind::Pci);
    let uptime = guest.state().uptime_ms;
    let events = guest.vm.control().watch().unwrap();
    let (data, scratch) = (image("data", 32), image("scratch", 64));
    assert_eq!(guest.add_disk("data", &data, DiskFormat::Raw), Response::Done);
    // Asked again, nothing is done again.
    assert_eq!(guest.add_disk("data", &data, DiskFormat::Raw), Response::Done);
    assert!(matches!(guest.add_disk("data", &scratch, DiskFormat::Raw), Response::Error { .. }));
    guest.until("[ -b /dev/vda ]");
    assert!(guest.run("cat /sys/block/vda/serial; cat /sys/block/vda/size").contains("data"));
    guest.run("dd if=/dev/urandom of=/dev/vda bs=1M count=8 conv=fsync");
    assert!(guest.run("dd if=/dev/vda bs=1M count=8 2>/dev/null | md5sum").len() > 30);

    let grow = Verb::ResizeDisk { disk: "data".into(), capacity_bytes: 48 << 20 };
    guest.vm.control().command(&grow).unwrap();
    guest.until(&format!("[ $(cat /sys/block/vda/size) = {} ]", (48 << 20) / 512));

    assert_eq!(guest.add_disk("scratch", &scratch, DiskFormat::Raw), Response::Done);
    guest.until("[ -b /dev/vdb ]");
    guest.remove("data");
    guest.until("[ ! -e /dev/vda ]");
    let state = guest.state();
    assert_eq!(state.config.disks.iter().map(|disk| disk.name.as_str()).collect::<Vec<_>>(), ["scratch"]);
    assert!(state.conditions.is_empty(), "{:?}", state.conditions);
    // What isn't there is gone already.
    guest.vm.control().command(&Verb::RemoveDevice { device: "data".into() }).unwrap();

    let mut heard = Vec::new();
    while let Ok(Some(event)) = events.next(Duration::from_millis(200)) {
        heard.push(event);
    }
    assert!(heard.contains(&Event::DeviceAdded { device: "data".into() }), "{heard:?}");
    assert!(heard.contains(&Event::DeviceRemoved { device: "data".into() }), "{heard:?}");

    // After a reboot the guest finds what is there.
    guest.session.type_in("reboot -f\n");
    guest.session.expect_within("GUEST-READY", LONG);
    guest.session.expect_within("guest# ", LONG);
    guest.until("[ -b /dev/vda ] && [ ! -e /dev/vdb ]");
    assert!(guest.run("cat /sys/block/vda/serial").contains("scratch"));
    assert_eq!(guest.state().reboots, 1);
    assert!(guest.state().uptime_ms > uptime);
}

#[test]
fn a_nic_comes_carries_and_goes() {
    if ran_in_lab() {
        return;
    }
    let mut guest = boot(1, MachineKind::Pci);
    tap("tap1", "10.9.1.1/24");
    assert_eq!(guest.add_nic("lan", "tap1", "52:54:00:00:00:01"), Response::Done);
    guest.until("[ -e /sys/class/net/eth0 ]");
    let said = guest.run("ip addr add 10.9.1.2/24 dev eth0; ip link set eth0 up; ping -c 2 -W 5 10.9.1.1");
    assert!(said.contains("2 packets received"), "{said}");
    guest.remove("lan");
    guest.until("[ ! -e /sys/class/net/eth0 ]");
    // The same again, with nothing left of the first.
    assert_eq!(guest.add_nic("lan", "tap1", "52:54:00:00:00:02"), Response::Done);
    guest.until("grep -q 00:00:02 /sys/class/net/eth0/address");
}

#[test]
fn coming_and_going_leaves_nothing_behind() {
    if ran_in_lab() {
        return;
    }
    let mut guest = boot(2, MachineKind::Pci);
    let data = image("data", 16);
    let mut before = None;
    for round in 0..15 {
        assert_eq!(guest.add_disk("data", &data, DiskFormat::Raw), Response::Done);
        guest.until("[ -b /dev/vda ]");
        guest.run("dd if=/dev/vda of=/dev/null bs=1M count=1 2>/dev/null");
        guest.remove("data");
        guest.until("[ ! -e /dev/vda ]");
        let now = guest.threads_and_files();
        // The first round may leave what is made once.
        if round > 0 {
            assert_eq!(*before.get_or_insert(now), now, "round {round}");
        }
    }
}

/// A guest that doesn't answer keeps the device until it starts anew.
#[test]
fn an_unanswered_request_is_done_at_the_next_reset() {
    if ran_in_lab() {
        return;
    }
    let mut guest = boot(1, MachineKind::Pci);
    let data = image("data", 16);
    assert_eq!(guest.add_disk("data", &data, DiskFormat::Raw), Response::Done);
    guest.until("[ -b /dev/vda ]");
    let control = guest.vm.control();
    control.command(&Verb::Pause).unwrap();
    control.command(&Verb::RemoveDevice { device: "data".into() }).unwrap();
    let state = guest.state();
    assert_eq!(state.config.disks.len(), 1);
    assert_eq!(state.conditions[0].kind, ConditionKind::UnplugPending);
    control.command(&Verb::Reboot).unwrap();
    let state = guest.state();
    assert!(state.config.disks.is_empty() && state.conditions.is_empty(), "{state:?}");
    control.command(&Verb::Resume).unwrap();
    guest.session.expect_within("GUEST-READY", LONG);
    guest.session.expect_within("guest# ", LONG);
    guest.until("[ ! -e /dev/vda ]");
}

#[test]
fn a_micro_machine_keeps_what_it_started_with() {
    if ran_in_lab() {
        return;
    }
    let guest = boot(1, MachineKind::Micro);
    let data = image("data", 16);
    let Response::Error { message } = guest.add_disk("data", &data, DiskFormat::Raw) else { panic!() };
    assert!(message.contains("micro"), "{message}");
}
