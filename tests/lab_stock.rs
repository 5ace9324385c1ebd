//! Stock Debian from its own disk, with no kernel named: raw and qcow2, 1 and 2 vCPUs, to its login and back;
//! disks and NICs come, grow and go under it, and nobody there runs a command to look for them. Every test
//! here runs in the lab (`tests/lab/`), with the disk that `tests/lab/stock` makes.

#[path = "support/in_lab.rs"]
mod in_lab;
#[path = "support/lost.rs"]
mod lost;
mod support;

use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use in_lab::ran_in_lab_with;
use support::{RunningVm, Session, Vm};
use vmctl::vmm::config::{DiskConfig, DiskFormat, MachineKind, NicConfig};
use vmctl::vmm::protocol::{ExitReason, Response, Verb};

const PROGRAM: &str = "/usr/local/bin/vmctl-vmm";
const LAB: &[&str] = &["--stock", "--memory", "4G", "--timeout", "1200"];
/// A login takes minutes where the machine below is busy (166 s at load 13): the limit is for what hangs.
const BOOT: Duration = Duration::from_secs(400);
const LONG: Duration = Duration::from_secs(120);
const PROMPT: &str = "root@stock:~# ";
const MAC: &str = "52:54:00:00:00:01";
const GUEST_ADDRESS: &str = "fe80::5054:ff:fe00:1%tap1";

#[derive(PartialEq)]
enum End {
    Command,
    PowerButton,
}

fn tool(program: &str, arguments: &str) {
    let done = Command::new(program).args(arguments.split(' ')).status().unwrap();
    assert!(done.success(), "{program} {arguments}");
}

/// A copy of the stock disk on the scratch disk.
fn stock_disk(name: &str) -> PathBuf {
    // What is on it has changed since the lab was saved.
    tool("blockdev", "--flushbufs /dev/vdd");
    std::fs::create_dir_all("/stock").unwrap();
    tool("mount", "-o ro /dev/vdd /stock");
    tool("lab-scratch", "ext4 /scratch");
    tool("cp", &format!("--sparse=always /stock/{name} /scratch/{name}"));
    Path::new("/scratch").join(name)
}

struct Guest {
    vm: RunningVm,
    session: Session,
    commands: usize,
}

impl Drop for Guest {
    /// A test that fails says what became of its guest.
    fn drop(&mut self) {
        if std::thread::panicking() {
            let verdict = lost::judge(&self.vm.control_path(), &self.vm.log(), 1);
            println!("lost by the lab: {}; {}", verdict.lost, verdict.evidence);
        }
    }
}

impl Guest {
    fn login(&mut self) {
        self.session.expect_within("stock login: ", BOOT);
        self.session.type_in("root\n");
        self.session.expect_within("Password: ", LONG);
        self.session.type_in("stock\n");
        self.session.expect_within(PROMPT, LONG);
    }

    /// Runs a command in the guest; gives what it printed.
    fn run(&mut self, command: &str) -> String {
        self.commands += 1;
        // The echo of the line has the quotes, the output hasn't.
        self.session.type_in(&format!("{command}; echo END-''{}\n", self.commands));
        let said = self.session.expect_within(&format!("END-{}", self.commands), LONG);
        self.session.expect_within(PROMPT, LONG);
        said
    }

    /// Waits in the guest, by looking alone; says how long it took, as the guest saw it.
    fn until(&mut self, condition: &str) {
        let begin = Instant::now();
        let said = self.run(&format!(
            "for n in $(seq 300); do if {condition}; then echo it-''is; break; fi; sleep 0.1; done"
        ));
        assert!(said.contains("it-is"), "never: {condition}: {said}");
        println!("  {} ms: {condition}", begin.elapsed().as_millis());
    }

    fn command(&self, verb: &Verb) {
        self.vm.control().command(verb).unwrap_or_else(|error| panic!("{verb:?}: {error}"));
    }

    /// The guest is asked to let go of it, and has.
    fn remove(&self, device: &str) {
        let deadline = Instant::now() + LONG;
        self.command(&Verb::RemoveDevice { device: device.into() });
        loop {
            let config = self.vm.control().state().unwrap().config;
            let mut disks = config.disks.iter().map(|disk| &disk.name);
            let mut nics = config.nics.iter().map(|nic| &nic.name);
            if !disks.any(|name| name == device) && !nics.any(|name| name == device) {
                return;
            }
            assert!(Instant::now() < deadline, "the guest has not let go of {device}");
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn boot(format: DiskFormat, vcpus: u8) -> Guest {
    let name = if format == DiskFormat::Raw { "raw" } else { "qcow2" };
    let path = stock_disk(name);
    let image = File::options().read(true).write(true).open(&path).unwrap();
    let mut vm = Vm::from_disk("root", "").vcpus(vcpus).memory_bytes(1 << 30);
    vm.launch.config.machine = MachineKind::Pci;
    let vm = vm.disk(DiskConfig::new("root", path.to_str().unwrap(), format), image);
    let vm = vm.launch(Path::new(PROGRAM)).unwrap();
    let session = vm.console();
    let mut guest = Guest { vm, session, commands: 0 };
    let begin = Instant::now();
    guest.login();
    println!("{name}, {vcpus} vCPUs: at its prompt after {} ms", begin.elapsed().as_millis());
    guest
}

fn check_system(guest: &mut Guest, vcpus: u8) {
    let said =
        guest.run("cat /proc/cmdline; echo CPUS=$(nproc) FAILED=$(systemctl --failed --no-legend | wc -l)");
    assert!(said.contains("BOOT_IMAGE=/boot/vmlinuz-") && said.contains(" root=UUID="), "{said}");
    assert!(said.contains(&format!("CPUS={vcpus} FAILED=0")), "{said}");
}

/// A disk comes and grows, the root grows, a NIC comes and carries; all of it is there without a look for it.
fn plug(guest: &mut Guest) {
    let path = Path::new("/scratch/data");
    File::create(path).unwrap().set_len(32 << 20).unwrap();
    let data = File::options().read(true).write(true).open(path).unwrap();
    let disk = DiskConfig::new("data", path.to_str().unwrap(), DiskFormat::Raw);
    let answer = guest.vm.control().request_with_fd(&Verb::AddDisk { disk }, data.as_fd());
    assert_eq!(answer.unwrap(), Response::Done);
    guest.until(&format!("[ \"$(cat /sys/block/vdb/size 2>&1)\" = {} ]", (32 << 20) / 512));
    let said = guest.run("echo SERIAL $(cat /sys/block/vdb/serial); lsblk -dbno NAME,SIZE");
    assert!(said.contains("SERIAL data\r") && said.contains("vdb "), "{said}");
    let said = guest
        .run("dd if=/dev/urandom of=/dev/vdb bs=1M count=4 conv=fsync 2>&1; cmp -n 4096 /dev/zero /dev/vdb");
    assert!(said.contains("4+0 records out") && said.contains("differ"), "{said}");

    let size = |bytes: u64| format!("[ $(cat /sys/block/vdb/size) = {} ]", bytes / 512);
    guest.command(&Verb::ResizeDisk { disk: "data".into(), capacity_bytes: 48 << 20 });
    guest.until(&size(48 << 20));
    let root_bytes = guest.vm.control().state().unwrap().disk_capacity_bytes[0] + (64 << 20);
    guest.command(&Verb::ResizeDisk { disk: "root".into(), capacity_bytes: root_bytes });
    guest.until(&size(root_bytes).replace("vdb", "vda"));

    tool("ip", "tuntap add tap1 mode tap user 65534 vnet_hdr");
    tool("ip", "link set tap1 up");
    let verb = Verb::AddNic { nic: NicConfig::new("lan", "tap1", MAC) };
    let answer = guest.vm.control().request_with_fd(&verb, support::open_tap("tap1").as_fd());
    assert_eq!(answer.unwrap(), Response::Done);
    guest.until(&format!("ip -br link | grep -q {MAC}"));
    // udev gives it its lasting name a moment later.
    guest.until("ls /sys/class/net | grep -q ^en");
    // The guest's own network manager has set it up meanwhile, with the address that the NIC gives itself.
    let deadline = Instant::now() + LONG;
    while !Command::new("ping").args(["-q", "-c", "2", "-W", "5", GUEST_ADDRESS]).status().unwrap().success()
    {
        assert!(
            Instant::now() < deadline,
            "the NIC carries nothing: {}",
            guest.run("ip address; networkctl")
        );
    }
}

fn unplug(guest: &mut Guest) {
    guest.remove("lan");
    guest.until(&format!("! ip -br link | grep -q {MAC}"));
    guest.remove("data");
    guest.until("! [ -e /sys/block/vdb ]");
    let state = guest.vm.control().state().unwrap();
    assert!(state.conditions.is_empty(), "{:?}", state.conditions);
}

/// There and back, in a lab of its own.
fn check(format: DiskFormat, vcpus: u8, end: End) {
    if ran_in_lab_with(LAB) {
        return;
    }
    let mut guest = boot(format, vcpus);
    check_system(&mut guest, vcpus);
    plug(&mut guest);
    if end == End::Command {
        unplug(&mut guest);
    }
    guest.session.type_in("reboot\n");
    guest.session.expect_within("reboot: Restarting system", LONG);
    guest.login();
    assert_eq!(guest.vm.control().state().unwrap().reboots, 1);
    // What has been plugged in stays, and goes as well after a reboot.
    if end == End::PowerButton {
        guest.until("[ -e /sys/block/vdb ]");
        unplug(&mut guest);
    }
    match end {
        End::Command => guest.session.type_in("poweroff\n"),
        End::PowerButton => guest.command(&Verb::PowerButton),
    }
    guest.session.expect_within("reboot: Power down", LONG);
    let record = guest.vm.wait().expect("it says how it ended");
    assert_eq!(record.reason, ExitReason::GuestPowerOff, "{record:?}");
    if format == DiskFormat::Qcow2 {
        drop(guest);
        tool("qemu-img", "check -q /scratch/qcow2");
    }
}

#[test]
fn raw_with_one_vcpu() {
    check(DiskFormat::Raw, 1, End::Command);
}

#[test]
fn raw_with_two_vcpus() {
    check(DiskFormat::Raw, 2, End::PowerButton);
}

#[test]
fn qcow2_with_one_vcpu() {
    check(DiskFormat::Qcow2, 1, End::PowerButton);
}

#[test]
fn qcow2_with_two_vcpus() {
    check(DiskFormat::Qcow2, 2, End::Command);
}
