//! Random sequences of hot-plug, unplug, growing, pauses, reboots and kills under unmodified Linux guests: the
//! guest sees what is there, nothing hangs, and no descriptor, thread or memory leaks. In the lab
//! (`tests/lab/`), where guests are real; the same with a guest of our own is `sequences`.
//!
//! `VMCTL_LAB_SEQUENCES=50 cargo test --test lab_sequences` for more of them, `VMCTL_LAB_SEQUENCES_FIRST=N`
//! for others.

#[path = "support/in_lab.rs"]
mod in_lab;
#[path = "support/lost.rs"]
mod lost;
#[path = "support/sequence.rs"]
mod sequence;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use in_lab::ran_in_lab_with;
use sequence::{Guest, number};
use support::{RunningVm, Session, Vm};
use vmctl::vmm::config::MachineKind;

const PROGRAM: &str = "/usr/local/bin/vmctl-vmm";
const SEQUENCES: u64 = 4;
/// In the lab each takes a few boots.
const SEQUENCE_S: u64 = 90;
const LAUNCHES: usize = 3;
/// What is typed while a guest starts may be lost.
const TYPE_AGAIN: Duration = Duration::from_secs(3);

struct Linux {
    commands: usize,
    launches: u8,
}

impl Linux {
    /// Runs a command in the guest; gives what it printed.
    fn run(&mut self, console: &mut Session, command: &str) -> String {
        self.commands += 1;
        // The echo of the line has the quotes, the output hasn't.
        console.type_in(&format!("{command}; echo END-''{}\n", self.commands));
        console.expect_within(&format!("END-{}\r", self.commands), Self::PATIENCE)
    }
}

impl Guest for Linux {
    const PATIENCE: Duration = Duration::from_secs(90);
    const POLL: Duration = Duration::from_millis(100);
    const MEMORY_BYTES: u64 = 256 << 20;

    fn launch(&mut self) -> (RunningVm, Session) {
        for _ in 0..LAUNCHES {
            self.launches += 1;
            let cmdline =
                "console=ttyS0 earlyprintk=ttyS0,115200 loglevel=5 panic=-1 mitigations=off tsc=reliable";
            let mut vm = Vm::new(File::open("/guest/vmlinux").unwrap(), cmdline)
                .vcpus(1 + self.launches % 2)
                .memory_bytes(Self::MEMORY_BYTES)
                .initrd(File::open("/guest/initrd").unwrap());
            vm.launch.config.machine = MachineKind::Pci;
            let vm = vm.launch(Path::new(PROGRAM)).unwrap();
            let mut console = vm.console();
            let up = catch_unwind(AssertUnwindSafe(|| self.wait_up(&mut console)));
            if up.is_ok() && vm.control().state().unwrap().reboots == 0 {
                return (vm, console);
            }
            assert!(self.is_lost(&vm, 0), "it doesn't start");
        }
        panic!("{LAUNCHES} guests were lost while they started");
    }

    fn wait_up(&mut self, console: &mut Session) {
        let deadline = Instant::now() + Self::PATIENCE;
        self.commands += 1;
        let wanted = format!("UP-{}\r", self.commands);
        let mut typed: Option<Instant> = None;
        while !console.text.contains(&wanted) {
            assert!(Instant::now() < deadline, "the guest doesn't hear; it said {:?}", console.text);
            if typed.is_none_or(|typed| typed.elapsed() >= TYPE_AGAIN) {
                console.type_in(&format!("\necho UP-''{}\n", self.commands));
                typed = Some(Instant::now());
            }
            let mut buffer = [0; 4096];
            match console.console.read(&mut buffer, Self::POLL).unwrap() {
                Some(0) => panic!("the console ended"),
                Some(length) => console.text += &String::from_utf8_lossy(&buffer[..length]),
                None => {}
            }
        }
        // All before it is of a guest that there may be no longer.
        console.expect_within(&wanted, Self::PATIENCE);
    }

    fn reset(&mut self, console: &mut Session) {
        console.type_in("reboot -f\n");
    }

    fn check(&mut self, console: &mut Session, disks: &BTreeMap<String, u64>, nics: &BTreeSet<String>) {
        let deadline = Instant::now() + Self::PATIENCE;
        let disks: BTreeSet<String> =
            disks.iter().map(|(name, bytes)| format!("DISK {name} {}", bytes / 512)).collect();
        let nics: BTreeSet<String> = nics.iter().map(|address| format!("NIC {address}")).collect();
        let expected: BTreeSet<String> = &disks | &nics;
        loop {
            let said = self.run(
                console,
                "for d in /sys/block/vd?; do [ -e $d ] && echo DISK $(cat $d/serial) $(cat $d/size); done; \
                 for n in /sys/class/net/eth*; do [ -e $n ] && echo NIC $(cat $n/address); done",
            );
            let seen: BTreeSet<String> = said
                .lines()
                .map(|line| line.trim().to_owned())
                .filter(|line| line.starts_with("DISK ") || line.starts_with("NIC "))
                .collect();
            if seen == expected {
                break;
            }
            assert!(Instant::now() < deadline, "the guest sees {seen:?}, not {expected:?}: {said:?}");
            std::thread::sleep(Self::POLL);
        }
        // They work, too.
        let said = self
            .run(console, "for d in /dev/vd?; do [ -e $d ] && dd if=$d of=/dev/null bs=64k count=4; done");
        let read = said.matches("4+0 records in").count();
        assert_eq!(read, disks.len(), "{said}");
    }

    fn is_lost(&mut self, vm: &RunningVm, resets: u64) -> bool {
        let verdict = lost::judge(&vm.control_path(), &vm.log(), resets);
        println!("{}: {}", if verdict.lost { "LOST by the lab" } else { "FAILED" }, verdict.evidence);
        verdict.lost
    }
}

#[test]
fn random_sequences_end_where_they_should_and_leak_nothing() {
    let (first, count) = (number("VMCTL_LAB_SEQUENCES_FIRST", 1), number("VMCTL_LAB_SEQUENCES", SEQUENCES));
    let timeout = (300 + count * SEQUENCE_S).to_string();
    let passed = ["--env", "VMCTL_LAB_SEQUENCES", "--env", "VMCTL_LAB_SEQUENCES_FIRST"];
    if ran_in_lab_with(&[&["--memory", "2G", "--timeout", &timeout][..], &passed].concat()) {
        return;
    }
    sequence::run(&mut Linux { commands: 0, launches: 0 }, first, count);
}
