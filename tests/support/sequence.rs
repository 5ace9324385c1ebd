//! Random sequences of hot-plug, unplug, growing, pauses, reboots and kills, against a model of what must be
//! there in the end. What a guest is, and how it is spoken to, is the test's ([`Guest`]).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::AsFd as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use vmctl::vmm::client::{Control, ControlError};
use vmctl::vmm::config::{DiskConfig, DiskFormat, NicConfig};
use vmctl::vmm::protocol::{ConditionKind, Phase, Response, Verb, VmState};

use crate::support::{Holdings, RunningVm, Session, holdings, memfd, open_tap};

const DISK_BYTES: u64 = 1 << 20;
/// What a process may gain from its first sequences to its last: its heap settles, it doesn't grow.
const GROWTH_KIB_MAX: u64 = 2048;
/// A guest may be asked for a device while it doesn't listen yet.
const ASK_AGAIN: Duration = Duration::from_secs(2);

pub fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().map_or(default, |text| text.parse().expect("a number"))
}

/// The kind of guest that a test has.
pub trait Guest {
    /// For what takes a moment, on a machine as busy as it likes.
    const PATIENCE: Duration;
    /// How often what isn't there yet is looked for.
    const POLL: Duration;
    const MEMORY_BYTES: u64;

    /// Starts one, and waits until it hears.
    fn launch(&mut self) -> (RunningVm, Session);
    /// It hears again, whatever it was made to do.
    fn wait_up(&mut self, console: &mut Session);
    /// Has it reset the machine, by itself. It hears.
    fn reset(&mut self, console: &mut Session);
    /// It runs, hears, and sees this: disks with their sizes, addresses of NICs.
    fn check(&mut self, console: &mut Session, disks: &BTreeMap<String, u64>, nics: &BTreeSet<String>);
    /// After a failure: was the guest lost by the machine below rather than by us? Then the sequence counts as
    /// lost, and another one is run in its place. `resets`: how many were asked for.
    fn is_lost(&mut self, vm: &RunningVm, resets: u64) -> bool;
}

pub fn mac_address(nic: &str) -> String {
    let number: u8 = nic.trim_start_matches("nic").parse().unwrap();
    format!("52:54:00:00:01:{number:02x}")
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
                reply.send(open_tap(&name)).unwrap();
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
    resets: u64,
    fresh: Holdings,
    settled_kib: Option<u64>,
}

impl Subject {
    fn start<G: Guest>(guest: &mut G) -> Self {
        let (vm, console) = guest.launch();
        let control = vm.control();
        let resets = control.state().unwrap().reboots;
        let fresh = holdings(vm.pid).unwrap();
        let (disks, nics, leaving) = Default::default();
        Self { vm, console, control, disks, nics, leaving, resets, fresh, settled_kib: None }
    }

    fn state(&self, patience: Duration) -> VmState {
        let begin = Instant::now();
        let state = self.control.state().expect("an answer");
        assert!(begin.elapsed() < patience, "the answer took {:?}", begin.elapsed());
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
        expect_done(&verb, answer);
        self.disks.entry(name).or_insert(DISK_BYTES);
    }

    fn add_nic(&mut self, taps: &Taps, name: String) {
        let verb = Verb::AddNic { nic: NicConfig::new(&name, "tap", mac_address(&name)) };
        if self.nics.insert(name.clone()) {
            let tap = taps.open(&format!("{}{}", name, self.vm.pid));
            let answer = self.control.request_with_fd(&verb, tap.as_fd());
            expect_done(&verb, answer);
        }
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

    /// What is to go has gone, and the guest sees what is there.
    fn settle<G: Guest>(&mut self, guest: &mut G) {
        self.command(&Verb::Resume);
        guest.wait_up(&mut self.console);
        let deadline = Instant::now() + G::PATIENCE;
        let mut asked = Instant::now();
        let leaving = self.leaving.clone();
        self.leaving_is_gone();
        loop {
            let state = self.state(G::PATIENCE);
            let pending = state.conditions.iter().any(|c| c.kind == ConditionKind::UnplugPending);
            let disks: BTreeSet<_> = state.config.disks.iter().map(|disk| disk.name.clone()).collect();
            let nics: BTreeSet<_> = state.config.nics.iter().map(|nic| nic.name.clone()).collect();
            let there = disks.iter().eq(self.disks.keys()) && nics == self.nics;
            if there && !pending {
                let sizes = disks_with_sizes(&state);
                assert_eq!(sizes, self.disks, "sizes");
                assert_eq!((state.phase, state.reboots), (Phase::Running, self.resets));
                break;
            }
            assert!(
                Instant::now() < deadline,
                "disks {disks:?} of {:?}, NICs {nics:?} of {:?}, conditions {:?}",
                self.disks,
                self.nics,
                state.conditions
            );
            if asked.elapsed() >= ASK_AGAIN {
                for device in
                    leaving.iter().filter(|device| disks.contains(*device) || nics.contains(*device))
                {
                    self.command(&Verb::RemoveDevice { device: device.clone() });
                }
                asked = Instant::now();
            }
            std::thread::sleep(G::POLL);
        }
        let addresses = self.nics.iter().map(|nic| mac_address(nic)).collect();
        guest.check(&mut self.console, &self.disks, &addresses);
        assert_eq!(self.state(G::PATIENCE).reboots, self.resets, "the guest started anew meanwhile");
    }

    fn reset_by_guest<G: Guest>(&mut self, guest: &mut G) {
        self.command(&Verb::Resume);
        guest.wait_up(&mut self.console);
        let deadline = Instant::now() + G::PATIENCE;
        guest.reset(&mut self.console);
        // What is typed before it has done so would be lost.
        while self.state(G::PATIENCE).reboots == self.resets {
            assert!(Instant::now() < deadline, "the guest didn't reset");
            std::thread::sleep(G::POLL);
        }
        self.resets += 1;
        self.leaving_is_gone();
    }

    fn remove_all<G: Guest>(&mut self, guest: &mut G) {
        for name in self.disks.keys().cloned().chain(self.nics.clone()).collect::<Vec<_>>() {
            self.remove(name);
        }
        self.settle(guest);
    }

    /// What came has gone without a trace. A thread that ends is gone a moment later.
    fn check_holdings<G: Guest>(&self) {
        let deadline = Instant::now() + G::PATIENCE;
        while holdings(self.vm.pid) != Some(self.fresh) {
            let now = holdings(self.vm.pid);
            assert!(Instant::now() < deadline, "at the start {:?}, now {now:?}", self.fresh);
            std::thread::sleep(G::POLL);
        }
    }

    /// The process before its first sequence has not used all of its heap yet.
    fn check_memory<G: Guest>(&mut self) {
        let kib = self.own_kib::<G>();
        let most = *self.settled_kib.get_or_insert(kib + GROWTH_KIB_MAX);
        assert!(kib < most, "{kib} KiB resident, {GROWTH_KIB_MAX} KiB more than at first");
    }

    /// Resident, without the guest's memory: that fills as the guest likes.
    fn own_kib<G: Guest>(&self) -> u64 {
        let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", self.vm.pid)).unwrap();
        let kib = |line: &str, field: &str| {
            line.strip_prefix(field)?.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
        };
        let (mut sum, mut of_guest) = (0, false);
        for line in smaps.lines() {
            if let Some(kib) = kib(line, "Size:") {
                of_guest = kib >= G::MEMORY_BYTES >> 10;
            }
            sum += kib(line, "Rss:").filter(|_| !of_guest).unwrap_or(0);
        }
        sum
    }
}

fn expect_done(verb: &Verb, answer: Result<Response, ControlError>) {
    assert!(matches!(answer, Ok(Response::Done)), "{verb:?}: {answer:?}");
}

fn disks_with_sizes(state: &VmState) -> BTreeMap<String, u64> {
    let names = state.config.disks.iter().map(|disk| disk.name.clone());
    names.zip(state.disk_capacity_bytes.iter().copied()).collect()
}

/// One step; says what it was.
fn step<G: Guest>(subject: &mut Subject, guest: &mut G, random: &mut Random, taps: &Taps) -> String {
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
            subject.resets += 1;
            subject.leaving_is_gone();
        }
        11 => subject.reset_by_guest(guest),
        _ => {}
    }
    format!("{kind}:{disk}:{nic}")
}

/// One sequence. True: its process was killed in the end.
fn sequence<G: Guest>(
    subject: &mut Subject,
    guest: &mut G,
    random: &mut Random,
    taps: &Taps,
    done: &mut Vec<String>,
) -> bool {
    for _ in 0..4 + random.below(12) {
        done.push(step(subject, guest, random, taps));
    }
    subject.settle(guest);
    if random.below(4) == 0 {
        subject.remove_all(guest);
        subject.check_holdings::<G>();
    }
    if random.below(10) == 0 {
        subject.vm.kill();
        assert_eq!(subject.vm.wait_for(G::PATIENCE), None, "a killed process says nothing");
        return true;
    }
    subject.check_memory::<G>();
    false
}

/// Runs sequences from `first` on until `count` of them have ended well; says what was done.
pub fn run<G: Guest>(guest: &mut G, first: u64, count: u64) {
    let lost_max = 2 + count / 5;
    let taps = Taps::new();
    let (mut completed, mut kills, mut steps, mut lost) = (0, 0, 0, Vec::new());
    let mut subject = Subject::start(guest);
    let mut seed = first;
    while completed < count {
        let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let mut done = Vec::new();
        let mut run = || {
            let killed = sequence(&mut subject, guest, &mut random, &taps, &mut done);
            if completed + 1 == count && !killed {
                subject.remove_all(guest);
                subject.check_holdings::<G>();
            }
            killed
        };
        let outcome = catch_unwind(AssertUnwindSafe(&mut run));
        steps += done.len();
        match outcome {
            Ok(killed) => {
                completed += 1;
                if killed {
                    kills += 1;
                    subject = Subject::start(guest);
                }
            }
            Err(_) => {
                println!("sequence {seed} failed: {done:?}");
                assert!(guest.is_lost(&subject.vm, subject.resets), "sequence {seed}: {done:?}");
                lost.push(seed);
                assert!(lost.len() as u64 <= lost_max, "guests lost in {lost:?}, {completed} sequences done");
                subject = Subject::start(guest);
            }
        }
        seed += 1;
    }
    let kib = subject.own_kib::<G>();
    println!(
        "{count} sequences, {steps} steps, {kills} kills, {kib} KiB resident; {} guests lost by the machine \
         below, in the sequences {lost:?}",
        lost.len()
    );
}
