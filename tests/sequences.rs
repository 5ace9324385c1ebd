//! Random sequences of hot-plug, unplug, growing, pauses, reboots and kills, on this host's KVM: nothing
//! hangs, what is left is what was asked for, and no descriptor, thread or memory leaks.
//!
//! `VMCTL_SEQUENCES=1000 cargo test --test sequences` for more of them, `VMCTL_SEQUENCES_FIRST=N` for others.

mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use support::script::{self, Op};
use support::{Holdings, RunningVm, Session, Vm, holdings, memfd, resident_kib};
use vmctl::vmm::client::{Control, ControlError};
use vmctl::vmm::config::{DiskConfig, DiskFormat, MachineKind, NicConfig};
use vmctl::vmm::protocol::{ConditionKind, Phase, Response, Verb, VmState};

const SEQUENCES: u64 = 20;
const DISK_BYTES: u64 = 1 << 20;
/// For what takes milliseconds, on a machine as busy as it likes.
const PATIENCE: Duration = Duration::from_secs(20);
/// What a process may gain from its first sequences to its last: its heap settles, it doesn't grow.
const GROWTH_KIB_MAX: u64 = 2048;

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_vmctl-vmm"))
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().map_or(default, |text| text.parse().expect("a number"))
}

/// A guest that does what ACPI's methods do: it reads who came and who is to go, lets those go, and says
/// `Z` for each key that is typed, but for `r`: then it resets the machine.
fn kernel() -> Vec<u8> {
    // Where the operations are that others go to.
    const ROUND: usize = 1;
    const ASKED: usize = 6;
    const REST: usize = 9;
    const RESET: usize = 11;
    let go = |value, mask, target| Op::Branch { mask, value, target };
    let script = [
        Op::Put(b'B'),
        Op::In { port: 0x620, width: 4 },
        Op::Typed,
        go(0, 0xff, ASKED),
        go(b'r'.into(), 0xff, RESET),
        Op::Put(b'Z'),
        Op::In { port: 0x624, width: 4 },
        go(0, u64::MAX, REST),
        Op::Forward { port: 0x628, width: 4 },
        Op::Spin(200),
        go(0, 0, ROUND),
        Op::Out { port: 0x602, width: 1, value: 6 },
    ];
    script::kernel(&script, &[])
}

/// Opens taps in a network namespace that has nothing else in it; they go with their descriptors.
struct Taps(mpsc::Sender<(String, mpsc::SyncSender<File>)>);

impl Taps {
    fn new() -> Self {
        let (sender, receiver) = mpsc::channel::<(String, mpsc::SyncSender<File>)>();
        std::thread::spawn(move || {
            // SAFETY: changes nothing but this thread's namespace.
            assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "needs root");
            for (name, reply) in receiver {
                reply.send(support::open_tap(&name)).unwrap();
            }
        });
        Self(sender)
    }

    fn open(&self, name: &str) -> File {
        let (reply, answer) = mpsc::sync_channel(1);
        self.0.send((name.to_owned(), reply)).unwrap();
        answer.recv().unwrap()
    }
}

/// xorshift: the state is never 0.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % bound
    }
}

/// A VM, and what is known of it.
struct Subject {
    vm: RunningVm,
    console: Session,
    control: Control,
    /// Disks with their sizes, NICs, and those of both that are to go.
    disks: BTreeMap<String, u64>,
    nics: BTreeSet<String>,
    leaving: BTreeSet<String>,
    fresh: Holdings,
}

impl Subject {
    fn start() -> Self {
        let mut vm = Vm::new(memfd(&kernel()), "");
        vm.launch.config.machine = MachineKind::Pci;
        let vm = vm.launch(program()).unwrap();
        let mut console = vm.console();
        console.expect_within("B", PATIENCE);
        let control = vm.control();
        control.state().unwrap();
        let fresh = holdings(vm.pid).unwrap();
        let (disks, nics, leaving) = Default::default();
        Self { vm, console, control, disks, nics, leaving, fresh }
    }

    fn state(&self) -> VmState {
        let begin = Instant::now();
        let state = self.control.state().expect("an answer");
        assert!(begin.elapsed() < PATIENCE, "the answer took {:?}", begin.elapsed());
        state
    }

    /// A verb that must be carried out.
    fn command(&self, verb: &Verb) {
        self.control.command(verb).unwrap_or_else(|error| panic!("{verb:?}: {error}"));
    }

    fn add_disk(&mut self, name: String) {
        let image = memfd(b"");
        image.set_len(DISK_BYTES).unwrap();
        let verb = Verb::AddDisk { disk: DiskConfig::new(&name, "image", DiskFormat::Raw) };
        let answer = self.control.request_with_fd(&verb, image.as_fd());
        // One that is there already stays the same disk, with the size that it has.
        self.expect_done(&verb, answer);
        self.disks.entry(name).or_insert(DISK_BYTES);
    }

    fn add_nic(&mut self, taps: &Taps, name: String) {
        let verb = Verb::AddNic { nic: NicConfig::new(&name, "tap", "52:54:00:00:00:02") };
        if self.nics.insert(name.clone()) {
            let tap = taps.open(&format!("{}{}", name, self.vm.pid));
            let answer = self.control.request_with_fd(&verb, tap.as_fd());
            self.expect_done(&verb, answer);
        }
    }

    fn expect_done(&self, verb: &Verb, answer: Result<Response, ControlError>) {
        assert!(matches!(answer, Ok(Response::Done)), "{verb:?}: {answer:?}");
    }

    fn remove(&mut self, name: String) {
        self.command(&Verb::RemoveDevice { device: name.clone() });
        if self.disks.contains_key(&name) || self.nics.contains(&name) {
            self.leaving.insert(name);
        }
    }

    /// A guest that starts anew has let go of everything.
    fn leaving_is_gone(&mut self) {
        for name in std::mem::take(&mut self.leaving) {
            self.disks.remove(&name);
            self.nics.remove(&name);
        }
    }

    /// What is to go has gone.
    fn settle(&mut self) {
        self.command(&Verb::Resume);
        let deadline = Instant::now() + PATIENCE;
        self.leaving_is_gone();
        loop {
            let state = self.state();
            let pending = state.conditions.iter().any(|c| c.kind == ConditionKind::UnplugPending);
            let disks: BTreeSet<_> = state.config.disks.iter().map(|disk| disk.name.clone()).collect();
            let nics: BTreeSet<_> = state.config.nics.iter().map(|nic| nic.name.clone()).collect();
            let there = disks.iter().eq(self.disks.keys()) && nics == self.nics;
            if there && !pending {
                let sizes = disks_with_sizes(&state);
                assert_eq!(sizes, self.disks, "sizes");
                assert_eq!(state.phase, Phase::Running);
                return;
            }
            assert!(
                Instant::now() < deadline,
                "disks {disks:?} of {:?}, NICs {nics:?} of {:?}, conditions {:?}",
                self.disks,
                self.nics,
                state.conditions
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// The guest runs and hears.
    fn check_guest(&mut self) {
        self.console.type_in("x");
        self.console.expect_within("Z", PATIENCE);
    }

    fn remove_all(&mut self) {
        for name in self.disks.keys().cloned().chain(self.nics.clone()).collect::<Vec<_>>() {
            self.remove(name);
        }
        self.settle();
    }

    /// What came has gone without a trace. A thread that ends is gone a moment later.
    fn check_holdings(&self) {
        let deadline = Instant::now() + PATIENCE;
        while holdings(self.vm.pid) != Some(self.fresh) {
            let now = holdings(self.vm.pid);
            assert!(Instant::now() < deadline, "at the start {:?}, now {now:?}", self.fresh);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn disks_with_sizes(state: &VmState) -> BTreeMap<String, u64> {
    let names = state.config.disks.iter().map(|disk| disk.name.clone());
    names.zip(state.disk_capacity_bytes.iter().copied()).collect()
}

/// One step; says what it was.
fn step(subject: &mut Subject, random: &mut Random, taps: &Taps) -> String {
    let disk = format!("disk{}", random.below(4));
    let nic = format!("nic{}", random.below(3));
    let kind = random.below(12);
    match kind {
        // What is about to go can't be added again before it has gone.
        0..=2 if !subject.leaving.contains(&disk) => subject.add_disk(disk.clone()),
        3 if !subject.leaving.contains(&nic) => subject.add_nic(taps, nic.clone()),
        4 | 5 => subject.remove(disk.clone()),
        6 => subject.remove(nic.clone()),
        7 if !subject.leaving.contains(&disk) => {
            if let Some(bytes) = subject.disks.get_mut(&disk) {
                *bytes += 512 * random.below(64);
                let verb = Verb::ResizeDisk { disk: disk.clone(), capacity_bytes: *bytes };
                subject.command(&verb);
            }
        }
        8 => subject.command(&Verb::Pause),
        9 => subject.command(&Verb::Resume),
        10 => {
            subject.command(&Verb::Reboot);
            subject.leaving_is_gone();
        }
        11 => {
            // The guest resets itself. What is typed before it has done so would be lost.
            subject.command(&Verb::Resume);
            let (before, deadline) = (subject.state().reboots, Instant::now() + PATIENCE);
            subject.console.type_in("r");
            while subject.state().reboots == before {
                assert!(Instant::now() < deadline, "the guest didn't reset");
                std::thread::sleep(Duration::from_millis(2));
            }
            subject.leaving_is_gone();
        }
        _ => {}
    }
    format!("{kind}:{disk}:{nic}")
}

#[test]
fn random_sequences_end_where_they_should_and_leak_nothing() {
    let taps = Taps::new();
    let first = number("VMCTL_SEQUENCES_FIRST", 1);
    let count = number("VMCTL_SEQUENCES", SEQUENCES);
    let mut subject = Subject::start();
    let (mut kills, mut steps, mut settled_kib) = (0, 0, None);
    for seed in first..first + count {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut done = Vec::new();
        let mut run = || {
            for _ in 0..4 + random.below(12) {
                done.push(step(&mut subject, &mut random, &taps));
            }
            subject.settle();
            subject.check_guest();
            if random.below(4) == 0 {
                subject.remove_all();
                subject.check_holdings();
            }
            if random.below(10) == 0 {
                subject.vm.kill();
                assert_eq!(subject.vm.wait_for(PATIENCE), None, "a killed process says nothing");
                subject = Subject::start();
                (kills, settled_kib) = (kills + 1, None);
            }
        };
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(&mut run));
        steps += done.len();
        assert!(outcome.is_ok(), "sequence {seed}: {done:?}");
        // The process before the first sequence has not used all of its heap yet.
        let kib = resident_kib(subject.vm.pid).unwrap();
        let settled = *settled_kib.get_or_insert(kib + GROWTH_KIB_MAX);
        assert!(
            kib < settled,
            "sequence {seed}: {kib} KiB resident, {GROWTH_KIB_MAX} KiB more than at first"
        );
    }
    subject.remove_all();
    subject.check_holdings();
    println!(
        "{count} sequences, {steps} steps, {kills} kills, {} KiB resident",
        resident_kib(subject.vm.pid).unwrap()
    );
}
