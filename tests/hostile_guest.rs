//! A guest that attacks the process it runs in, on this host's KVM. Whatever it writes to whatever
//! register, ring or address, the process answers its control socket all the while, keeps its memory,
//! threads and descriptors, and ends only with a word why; a neighbour notices nothing.
//!
//! Each seed is one VM with a script of its own. A failure names its seed; to run more, or one again:
//! `VMCTL_HOSTILE_SEEDS=200 cargo test --test hostile_guest`, `VMCTL_HOSTILE_FIRST=1234`.

mod support;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Seek as _};
use std::path::Path;
use std::time::{Duration, Instant};

use support::script::{self, Op, Script};
use support::{Holdings, RunningVm, Session, Vm, guest, holdings, memfd, resident_kib};
use vmctl::vmm::client::Control;
use vmctl::vmm::config::{BackingConfig, BalloonConfig, DiskConfig, DiskFormat, MachineKind, NicConfig};
use vmctl::vmm::protocol::{ExitReason, FdRole, Verb};

const SEEDS: u64 = 16;
const MEMORY_BYTES: u64 = 32 << 20;
const DISK_BYTES: u64 = 1 << 20;
/// What the process may need beside the guest's memory, in a debug build.
const BESIDE_KIB_MAX: u64 = 48 << 10;
/// A busy machine is slow, but a process that a guest holds up is slower.
const ANSWER_MAX: Duration = Duration::from_secs(5);
const ATTACK_MAX: Duration = Duration::from_secs(4);

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_vmctl-vmm"))
}

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().map_or(default, |text| text.parse().expect("a number"))
}

/// splitmix64: any seed is a good one.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn one<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    fn bytes(&mut self, count: u64) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }

    /// Numbers that software trips over.
    fn number(&mut self) -> u64 {
        match self.below(6) {
            0 => self.below(4),
            1 => 1 << self.below(64),
            2 => (1 << self.below(64)) - 1,
            3 => u64::MAX - self.below(16),
            4 => self.below(0x1_0000),
            _ => self.next(),
        }
    }

    /// Where a guest may say that a ring or a buffer lies: RAM as a rule; else its own program, ROM,
    /// device registers, the end of RAM, or nowhere.
    fn address(&mut self) -> u64 {
        match self.below(12) {
            0 => 0xd000_0000 + self.below(0x1_0000),
            1 => 0xe_0000 + self.below(0x2_0000),
            2 => MEMORY_BYTES - self.below(64),
            3 => self.one(&[0xfec0_0000, 0xfee0_0000, 0xc000_0000, 4 << 30, 1 << 46]) + self.below(0x1000),
            4 => self.next(),
            5 if self.below(8) == 0 => 0x10_0000 + self.below(0x1_0000),
            _ => script::FREE + self.below(0x10_0000),
        }
    }

    fn width(&mut self) -> u8 {
        self.one(&[1, 2, 4, 4, 4, 8])
    }
}

/// A script as it is written.
struct Writer<'r> {
    machine: MachineKind,
    random: &'r mut Random,
    script: Script,
}

impl Writer<'_> {
    fn push(&mut self, op: Op) {
        self.script.push(op);
    }

    fn write(&mut self, address: u64, width: u8, value: u64) {
        self.push(Op::Write { address, width, value });
    }

    fn again(&mut self, target: usize, times: u32) {
        self.push(Op::Loop { target, times });
    }

    /// Where no script of ours lies, and the guest has it mapped: else the attack would end itself.
    fn elsewhere(&mut self) -> u64 {
        match self.random.address() {
            0..script::FREE => 0xe_0000 + self.random.below(0x2_0000 - 8),
            address if address < (16 << 30) - 8 => address,
            _ => 0xd000_0000 + self.random.below(0x1_0000),
        }
    }

    /// Any register of any device, in any width.
    fn registers(&mut self) {
        for _ in 0..self.random.below(60) {
            let address = match self.random.below(8) {
                0 => self.elsewhere(),
                _ => self.register() + self.random.one(&[0, 0, 0, 1, 2]),
            };
            let (width, value) = (self.random.width(), self.random.number());
            match self.random.below(3) {
                0 => self.push(Op::Read { address, width }),
                _ => self.write(address, width, value),
            }
        }
    }

    fn register(&mut self) -> u64 {
        match self.machine {
            MachineKind::Micro => mmio_slot(self.random.below(16)) + self.random.one(&MMIO_REGISTERS),
            MachineKind::Pci => {
                // Common configuration, device configuration, notifications, MSI-X table and pending bits.
                let area = self.random.one(&[0, 0, 0x2000, 0x3000, 0x4000, 0x4000, 0x5000]);
                bar(self.random.below(6)) + area + self.random.below(16) * 4
            }
        }
    }

    /// Configuration space by either way: commands, BARs, MSI-X control, capabilities; hot-plug registers.
    fn bus(&mut self) {
        for _ in 0..self.random.below(60) {
            let slot = self.random.one(&[0, 1, 2, 3, 14, 28, 29, 31]);
            let register = match self.random.below(4) {
                0 => self.random.below(4096),
                _ => self.random.one(&[4, 6, 0x10, 0x10, 0x14, 0x34, 0x40, 0x42, 0x98, 0x9c, 0xa0, 0xa4]),
            };
            let value = match self.random.below(3) {
                0 => bar(self.random.below(6)) + 0x4000 * self.random.below(3),
                1 => self.random.one(&[0, 2, 6, 0x8000, 0xc000, 0xffff_ffff, 0xd000_0000, 0xfee0_0000]),
                _ => self.random.number(),
            };
            let width = self.random.one(&[1, 2, 4]);
            match self.random.below(4) {
                0 => self.push(Op::Read { address: ECAM + (slot << 15) + register, width }),
                1 => {
                    let address = 0x8000_0000 | (slot << 11) as u32 | (register & 0xfc) as u32;
                    self.push(Op::Out { port: 0xcf8, width: 4, value: address });
                    self.push(Op::Out { port: 0xcfc, width, value: value as u32 });
                }
                2 => {
                    let port = 0x620 + self.random.below(12) as u16;
                    self.push(Op::In { port, width });
                    self.push(Op::Out { port, width, value: value as u32 });
                }
                _ => self.write(ECAM + (slot << 15) + register, width, value),
            }
        }
    }

    /// Any port, but for the one that powers off: that would only end the attack.
    fn ports(&mut self) {
        for _ in 0..self.random.below(40) {
            let known =
                [0x3f8, 0x3f9, 0x3fa, 0x3fb, 0x3fc, 0x3fd, 0xcf8, 0xcfc, 0x70, 0x71, 0x505, 0x600, 0x604];
            let port = match self.random.below(4) {
                0 => self.random.next() as u16,
                _ => self.random.one(&known) + self.random.below(4) as u16,
            };
            let (width, value) = (self.random.one(&[1, 2, 4]), self.random.number() as u32);
            // 0xcf9 and 0x64 reset, and then the script starts again; a few rounds of that will do.
            let quits =
                port == 0x600 || (matches!(port, 0xcf8..=0xcfb | 0x602 | 0x64) && self.random.below(8) > 0);
            match self.random.below(4) {
                0 | 1 => self.push(Op::In { port, width }),
                2 if !quits => self.push(Op::Out { port, width, value }),
                3 if !quits => {
                    let (input, count) = (self.random.below(2) == 0, self.random.below(5000) as u32);
                    self.push(Op::Ports { port, input, address: script::FREE, count });
                }
                _ => {}
            }
        }
    }

    /// Configures a device as a driver does, but for rings that may lie anywhere.
    fn start_device(&mut self, device: u64) {
        match self.machine {
            MachineKind::Micro => self.start_mmio(device),
            MachineKind::Pci => self.start_pci(device),
        }
    }

    /// A queue's size and the addresses of its rings.
    fn rings(&mut self, device: u64, queue: u64) -> (u64, [u64; 3]) {
        let size = self.random.one(&[2, 16, 16, 64, 64, 256, 256, 256, 3, 32768]);
        let odd = self.random.below(6) == 0;
        let place = |at| if odd { self.random.address() } else { ring(device, queue) + at };
        (size, [0, 0x1000, 0x2000].map(place))
    }

    fn start_mmio(&mut self, device: u64) {
        let base = mmio_slot(device);
        for status in [0, 1, 3] {
            self.write(base + 0x70, 4, status);
        }
        for half in [0, 1] {
            self.write(base + 0x14, 4, half);
            self.push(Op::Read { address: base + 0x10, width: 4 });
            self.write(base + 0x24, 4, half);
            self.push(Op::Store { address: base + 0x20, width: 4 });
        }
        self.write(base + 0x70, 4, 11);
        for queue in 0..1 + self.random.below(3) {
            self.write(base + 0x30, 4, queue);
            let (size, addresses) = self.rings(device, queue);
            self.write(base + 0x38, 4, size);
            for (register, address) in [0x80, 0x90, 0xa0].into_iter().zip(addresses) {
                self.write(base + register, 4, address & 0xffff_ffff);
                self.write(base + register + 4, 4, address >> 32);
            }
            self.write(base + 0x44, 4, 1);
        }
        self.write(base + 0x70, 4, 15);
    }

    fn start_pci(&mut self, device: u64) {
        let (base, config) = (bar(device), ECAM + (PCI_SLOTS[device as usize] << 15));
        // Memory and bus mastering; MSI-X, whose capability is the first, at 0x40.
        self.write(config + 4, 2, 6);
        let control = self.random.one(&[0x8000, 0x8000, 0xc000, 0]);
        self.write(config + 0x42, 2, control);
        for vector in 0..4 {
            let message = self.random.one(&[0xfee0_0000, 0xfee0_0000, 0xfee0_1000, 0xd000_0000, u64::MAX]);
            let data = self.random.one(&[0x31, 0x80, 0, 0x4fff, 0xffff_ffff]);
            for (at, value) in [(0, message & 0xffff_ffff), (4, message >> 32), (8, data), (12, 0)] {
                self.write(base + 0x4000 + 16 * vector + at, 4, value);
            }
        }
        for status in [0, 1, 3] {
            self.write(base + 0x14, 1, status);
        }
        for half in [0, 1] {
            self.write(base, 4, half);
            self.push(Op::Read { address: base + 4, width: 4 });
            self.write(base + 8, 4, half);
            self.push(Op::Store { address: base + 0xc, width: 4 });
        }
        self.write(base + 0x14, 1, 11);
        for queue in 0..1 + self.random.below(3) {
            self.write(base + 0x16, 2, queue);
            let (size, addresses) = self.rings(device, queue);
            self.write(base + 0x18, 2, size);
            let vector = self.random.one(&[1, 2, 3, 0xffff]);
            self.write(base + 0x1a, 2, vector);
            for (register, address) in [0x20, 0x28, 0x30].into_iter().zip(addresses) {
                self.write(base + register, 8, address);
            }
            self.write(base + 0x1c, 2, 1);
        }
        self.write(base + 0x14, 1, 15);
    }

    /// Puts a device back, or tries to.
    fn reset_device(&mut self, device: u64) {
        match self.machine {
            MachineKind::Micro => self.write(mmio_slot(device) + 0x70, 4, 0),
            MachineKind::Pci => self.write(bar(device) + 0x14, 1, 0),
        }
    }

    fn notify(&mut self, device: u64, queue: u64) {
        match self.machine {
            MachineKind::Micro => self.write(mmio_slot(device) + 0x50, 4, queue),
            MachineKind::Pci => self.write(bar(device) + 0x3000 + 4 * queue, 2, queue),
        }
    }

    /// Descriptors: some chains as a driver makes them, some loops, lengths and addresses of all kinds.
    fn fill_ring(&mut self, device: u64, queue: u64) {
        let base = ring(device, queue);
        let mut table = Vec::new();
        // Half of the time the first chain is a whole request of a disk.
        let whole = self.random.below(2) == 0;
        for index in 0..16u16 {
            let (address, length) = match self.random.below(3) {
                0 => (self.random.address(), self.random.number() as u32),
                _ => (
                    script::FREE + 0x8_0000 + 0x1000 * u64::from(index),
                    self.random.one(&[1, 12, 16, 512, 4096]),
                ),
            };
            let flags = self.random.one(&[0u16, 1, 1, 2, 3, 4, 5, 0xffff]);
            let next = self.random.one(&[index + 1, index + 1, index, 0, u16::MAX]);
            let data = 0x1000 * u64::from(index) + script::FREE + 0x8_0000;
            let (address, length, flags, next) = match index {
                0 if whole => (data, 16, 1, 1),
                1 if whole => (data, self.random.one(&[512, 4096]), 1 | self.random.one(&[0, 2]), 2),
                2 if whole => (data, 1, 2, 0),
                _ => (address, length, flags, next),
            };
            table.extend(address.to_le_bytes());
            table.extend(length.to_le_bytes());
            table.extend(flags.to_le_bytes());
            table.extend(next.to_le_bytes());
        }
        self.push(Op::Copy { address: base, data: table });
        let mut available = vec![0, 0];
        let index = self.random.one(&[1u16, 2, 8, 16, 256, u16::MAX]);
        available.extend(index.to_le_bytes());
        for slot in 0..16u16 {
            let head = self.random.one(&[slot, slot, slot, 0, u16::MAX]);
            available.extend(head.to_le_bytes());
        }
        self.push(Op::Copy { address: base + 0x1000, data: available });
        // A disk request's header, now and then a good one.
        let mut header = Vec::new();
        header.extend(self.random.one(&[0u32, 1, 4, 8, 11, 13, 77]).to_le_bytes());
        header.extend([0; 4]);
        header.extend(
            self.random.one(&[0u64, 1, DISK_BYTES / 512 - 1, DISK_BYTES / 512, u64::MAX]).to_le_bytes(),
        );
        self.push(Op::Copy { address: script::FREE + 0x8_0000, data: header });
    }

    /// Notifies again and again, with or without a reset between.
    fn storm(&mut self, device: u64) {
        let start = self.script.len();
        for queue in 0..3 {
            self.notify(device, queue);
        }
        if self.random.below(4) == 0 {
            self.reset_device(device);
            self.start_device(device);
        }
        let times = self.random.one(&[1, 10, 100, 1000]);
        self.again(start, times);
    }

    /// Unmasks inputs of the IO-APIC and sends itself interrupts.
    fn interrupts(&mut self) {
        for input in 0..24 {
            let vector = self.random.one(&[0x20, 0x31, 0x80, 0xff]) | self.random.one(&[0, 0, 0x8000, 0x100]);
            for (register, value) in [(0x10 + 2 * input, vector), (0x11 + 2 * input, 0)] {
                self.write(0xfec0_0000, 4, register);
                self.write(0xfec0_0010, 4, value);
            }
        }
        self.write(0xfee0_00f0, 4, 0x1ff);
        self.push(Op::Interrupts(true));
        let start = self.script.len();
        let vector = self.random.one(&[0x30, 0x41, 0xfe]);
        self.write(0xfee0_0300, 4, 0x4_4000 | vector);
        let times = self.random.one(&[1, 50, 500]);
        self.again(start, times);
    }
}

const MMIO_REGISTERS: [u64; 27] = [
    0, 4, 8, 0x10, 0x14, 0x20, 0x24, 0x30, 0x34, 0x38, 0x44, 0x50, 0x60, 0x64, 0x70, 0x80, 0x84, 0x90, 0x94,
    0xa0, 0xa4, 0xac, 0xb0, 0xc0, 0xfc, 0x100, 0x120,
];

const ECAM: u64 = 0xe000_0000;
/// Where the victim's devices are: three disks, a NIC, and what every machine has.
const PCI_SLOTS: [u64; 6] = [1, 2, 3, 14, 28, 29];

fn mmio_slot(device: u64) -> u64 {
    0xd000_0000 + 0x1000 * device
}

/// Where a device's BAR is at the start.
fn bar(device: u64) -> u64 {
    0xc000_0000 + 0x8000 * PCI_SLOTS[device as usize]
}

/// Where a queue's rings belong.
fn ring(device: u64, queue: u64) -> u64 {
    script::FREE + 0x10_0000 + 0x1_0000 * device + 0x4000 * queue
}

/// What the first vCPU does, and the second.
fn scripts(machine: MachineKind, random: &mut Random) -> (Script, Script) {
    let mut first = Writer { machine, random, script: Script::new() };
    first.script.extend(script::start_second());
    for _ in 0..12 {
        let device = first.random.below(6);
        match first.random.below(9) {
            0 => first.registers(),
            1 => first.ports(),
            2 => first.interrupts(),
            3 if machine == MachineKind::Pci => first.bus(),
            3 => first.storm(device),
            _ => {
                for queue in 0..3 {
                    first.fill_ring(device, queue);
                }
                first.start_device(device);
                first.storm(device);
            }
        }
    }
    let first = first.script;
    (first, flipper(machine, random))
}

/// Changes descriptors, indexes and registers for ever while the first vCPU has them in use.
fn flipper(machine: MachineKind, random: &mut Random) -> Script {
    let mut second = Writer { machine, random, script: Script::new() };
    for _ in 0..40 {
        let (device, queue) = (second.random.below(6), second.random.below(3));
        let at = ring(device, queue) + second.random.one(&[0, 8, 12, 14, 16, 24, 28, 0x1002, 0x1004, 0x2002]);
        let (width, value) = (second.random.one(&[2, 4, 8]), second.random.number());
        second.write(at, width, value);
        if second.random.below(8) == 0 {
            let register = second.register();
            second.write(register, 4, value);
        }
    }
    second.again(0, u32::MAX);
    second.script
}

/// The victim: disks of all kinds, a NIC, a balloon, and what of the host's it must not touch.
struct Victim {
    vm: RunningVm,
    untouched: Vec<(&'static str, File, Vec<u8>)>,
}

fn victim(machine: MachineKind, random: &mut Random) -> Victim {
    let (first, second) = scripts(machine, random);
    let mut vm = Vm::new(memfd(&script::kernel(&first, &second)), "").vcpus(2).memory_bytes(MEMORY_BYTES);
    vm.launch.config.machine = machine;
    let pattern: Vec<u8> = (0..DISK_BYTES).map(|at| (at >> 9) as u8).collect();
    let (read_only, base) = (memfd(&pattern), memfd(&pattern));
    let untouched = vec![
        ("the read-only disk", read_only.try_clone().unwrap(), pattern.clone()),
        ("the backing file", base.try_clone().unwrap(), pattern),
    ];
    let disk = |name, format| DiskConfig::new(name, "image", format);
    let blank = memfd(b"");
    blank.set_len(DISK_BYTES).unwrap();
    vm = vm
        .disk(disk("raw", DiskFormat::Raw), blank)
        .disk(DiskConfig { read_only: true, ..disk("read-only", DiskFormat::Raw) }, read_only);
    let backing = vec![BackingConfig { path: "base".into(), format: DiskFormat::Raw }];
    vm = vm.disk(DiskConfig { backing, ..disk("overlay", DiskFormat::Qcow2) }, memfd(&overlay()));
    vm.pass(FdRole::Backing { disk: "overlay".into(), depth: 0 }, base);
    vm.launch.config.balloon =
        Some(BalloonConfig { target_bytes: 1 << 20, free_page_reporting: true, deflate_on_oom: false });
    vm = vm.nic(NicConfig::new("lan", "hostile0", "52:54:00:00:00:01"), tap());
    Victim { vm: vm.launch(program()).unwrap(), untouched }
}

/// An empty qcow2 image over a raw one, in 4 KiB clusters.
fn overlay() -> Vec<u8> {
    const CLUSTER: usize = 4096;
    let mut image = vec![0; 4 * CLUSTER];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"QFI\xfb");
    put(4, &3u32.to_be_bytes());
    // The backing file's name.
    put(8, &512u64.to_be_bytes());
    put(16, &4u32.to_be_bytes());
    put(512, b"base");
    put(20, &12u32.to_be_bytes());
    put(24, &DISK_BYTES.to_be_bytes());
    // The L1 table has one entry, in cluster 3; the refcount table is cluster 1, its block cluster 2.
    put(36, &1u32.to_be_bytes());
    put(40, &(3 * CLUSTER as u64).to_be_bytes());
    put(48, &(CLUSTER as u64).to_be_bytes());
    put(56, &1u32.to_be_bytes());
    put(96, &4u32.to_be_bytes());
    put(100, &104u32.to_be_bytes());
    put(CLUSTER, &(2 * CLUSTER as u64).to_be_bytes());
    for cluster in 0..4 {
        put(2 * CLUSTER + 2 * cluster, &1u16.to_be_bytes());
    }
    image
}

/// A tap in a network namespace that has nothing else in it.
fn tap() -> File {
    let make = || {
        // SAFETY: changes nothing but this thread's namespace.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "needs root");
        support::open_tap("hostile0")
    };
    std::thread::spawn(make).join().unwrap()
}

/// What was seen of a run.
#[derive(Default)]
struct Seen {
    slowest_answer: Duration,
    largest_kib: u64,
    /// Requests that devices took from their rings, as far as they were counted before the end.
    requests: u64,
}

fn ask(vm: &RunningVm, seen: &mut Seen) {
    let begin = Instant::now();
    // A process that ends meanwhile says why in its record.
    let answered = Control::connect(&vm.control_path()).and_then(|control| control.state());
    assert!(answered.is_ok() || vm.wait_for(ANSWER_MAX).is_some(), "no answer: {answered:?}");
    let took = begin.elapsed();
    assert!(took < ANSWER_MAX, "an answer took {took:?}");
    seen.slowest_answer = seen.slowest_answer.max(took);
    if let Ok(metrics) = Control::connect(&vm.control_path()).and_then(|control| control.metrics()) {
        let disks: u64 = metrics.disks.values().map(|disk| disk.reads + disk.writes + disk.errors).sum();
        seen.requests = seen.requests.max(disks);
    }
    if let Some(kib) = resident_kib(vm.pid) {
        seen.largest_kib = seen.largest_kib.max(kib);
    }
}

fn check_echo(neighbour: &mut Session) {
    neighbour.type_in("Z");
    neighbour.expect_within("Z", ANSWER_MAX);
}

/// Lets one victim run its script and looks after it. Gives how it ended, if it did so by itself.
fn attack(seed: u64, machine: MachineKind, neighbour: &mut Session) -> (Option<ExitReason>, Seen) {
    let Victim { vm, untouched } = victim(machine, &mut Random(seed));
    let mut seen = Seen::default();
    let before = holdings(vm.pid);
    let begin = Instant::now();
    while begin.elapsed() < ATTACK_MAX && !vm.has_ended() && !vm.log().contains('E') {
        ask(&vm, &mut seen);
        std::thread::sleep(Duration::from_millis(20));
    }
    check_echo(neighbour);
    let ended = if vm.has_ended() { None } else { after(&vm, before, &mut seen) };
    let record = ended.or_else(|| vm.wait()).expect("a process that ends says why");
    assert_ne!(record.reason, ExitReason::Internal, "{}", record.message);
    assert!(seen.largest_kib < (MEMORY_BYTES >> 10) + BESIDE_KIB_MAX, "{} KiB resident", seen.largest_kib);
    for (what, mut file, content) in untouched {
        let mut now = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut now).unwrap();
        assert!(now == content, "{what} was written to");
    }
    ((record.reason != ExitReason::Stopped).then_some(record.reason), seen)
}

/// The guest is still there: it obeys, holds what it held, and stops when told.
fn after(
    vm: &RunningVm,
    before: Option<Holdings>,
    seen: &mut Seen,
) -> Option<vmctl::vmm::protocol::ExitRecord> {
    let control = vm.control();
    for verb in [Verb::Pause, Verb::Resume, Verb::Reboot, Verb::Pause] {
        if let Err(error) = control.command(&verb) {
            // It may end at any moment, but not without a record.
            return Some(vm.wait_for(ANSWER_MAX).unwrap_or_else(|| panic!("{verb:?}: {error}")));
        }
    }
    ask(vm, seen);
    // The connection is one descriptor more.
    let (before, now) = (before.unwrap(), holdings(vm.pid).unwrap());
    assert_eq!(now.threads, before.threads, "threads");
    assert!(now.fds <= before.fds + 2, "descriptors: {before:?}, now {now:?}");
    control.command(&Verb::Stop).unwrap();
    None
}

fn attack_many(machine: MachineKind) {
    let first = number("VMCTL_HOSTILE_FIRST", 1);
    let mut neighbour_vm = Vm::new(memfd(&guest::kernel()), "");
    neighbour_vm.launch.config.machine = machine;
    let neighbour_vm = neighbour_vm.launch(program()).unwrap();
    let mut neighbour = neighbour_vm.console();
    neighbour.expect("boot1\n");
    let before = holdings(neighbour_vm.pid);
    let mut ends: BTreeMap<String, u32> = BTreeMap::new();
    let mut worst = Seen::default();
    for seed in first..first + number("VMCTL_HOSTILE_SEEDS", SEEDS) {
        let run = std::panic::AssertUnwindSafe(|| attack(seed, machine, &mut neighbour));
        let Ok((end, seen)) = std::panic::catch_unwind(run) else { panic!("{machine:?}: seed {seed}") };
        *ends.entry(end.map_or("stopped by us".into(), |end| format!("{end:?}"))).or_default() += 1;
        worst.slowest_answer = worst.slowest_answer.max(seen.slowest_answer);
        worst.largest_kib = worst.largest_kib.max(seen.largest_kib);
        worst.requests += seen.requests;
    }
    assert_eq!(holdings(neighbour_vm.pid), before, "the neighbour");
    assert!(worst.requests > 0, "no attack got as far as a device's ring");
    println!(
        "{machine:?}: {ends:?}; {} disk requests, slowest answer {:?}, most resident {} KiB",
        worst.requests, worst.slowest_answer, worst.largest_kib
    );
}

#[test]
fn a_hostile_guest_harms_nobody_over_mmio() {
    attack_many(MachineKind::Micro);
}

#[test]
fn a_hostile_guest_harms_nobody_over_pci() {
    attack_many(MachineKind::Pci);
}

#[test]
fn garbage_at_the_kernels_entry_ends_cleanly() {
    let mut random = Random(number("VMCTL_HOSTILE_FIRST", 1));
    let mut ends: BTreeMap<String, u32> = BTreeMap::new();
    for _ in 0..number("VMCTL_HOSTILE_SEEDS", SEEDS) {
        let code = random.bytes(4096);
        let vm = Vm::new(memfd(&guest::elf(&code, Some(0x10_0000))), "").launch(program()).unwrap();
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_millis(300) && !vm.has_ended() {
            ask(&vm, &mut Seen::default());
            std::thread::sleep(Duration::from_millis(20));
        }
        if !vm.has_ended() {
            vm.control().command(&Verb::Stop).unwrap();
        }
        let record = vm.wait().expect("a record");
        assert_ne!(record.reason, ExitReason::Internal, "{}: {code:x?}", record.message);
        *ends.entry(format!("{:?}", record.reason)).or_default() += 1;
    }
    println!("{ends:?}");
}

#[test]
fn the_script_guest_does_what_it_is_told() {
    let mut first: Script = script::start_second().into();
    first.extend([
        // Waits for the second vCPU's word, counts to three, and shows memory, a port and a copy.
        Op::Read { address: script::FREE, width: 4 },
        Op::Branch { mask: u64::MAX, value: 0, target: 6 },
        Op::Print,
        Op::Put(b'.'),
        Op::Loop { target: 9, times: 3 },
        Op::Copy { address: script::FREE + 1, data: b"copied".into() },
        Op::Read { address: script::FREE + 1, width: 8 },
        Op::Print,
        Op::In { port: 0x5f0, width: 2 },
        Op::Print,
        Op::Write { address: 0xfee0_00f0, width: 4, value: 0x1ff },
        Op::Interrupts(true),
        Op::Write { address: 0xfee0_0300, width: 4, value: 0x4_4030 },
        Op::Spin(1000),
        Op::Read { address: script::INTERRUPTS, width: 8 },
        Op::Print,
        Op::Typed,
        Op::Branch { mask: 0xff, value: 0, target: 22 },
        Op::Print,
    ]);
    let second = [Op::Write { address: script::FREE, width: 4, value: 0xcafe }];
    let vm = Vm::new(memfd(&script::kernel(&first, &second)), "").vcpus(2).launch(program()).unwrap();
    let mut console = vm.console();
    console.expect("000000000000cafe\n...0000646569706f63\n000000000000ffff\n0000000000000001\n");
    console.type_in("a");
    console.expect("0000000000000061\nE");
}
