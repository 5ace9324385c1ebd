//! What a VM process takes beside its guest's memory, and what that is made of: with one vCPU and no
//! devices but the machine's own, and with eight devices. With the small guest on this host's KVM, as
//! root.
//!
//! ```text
//! bench_memory [VMCTL-VMM]
//! ```
//!
//! Resident pages of the program's file are shared by all VM processes of a host: `pss` divides them by
//! the number of sharers, `rss` doesn't.

#[path = "../tests/support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use support::{RunningVm, Vm, guest, memfd, open_tap};
use vmctl::vmm::config::{DiskConfig, DiskFormat, NicConfig, PageKind, TransparentHugepages};

const GUEST_BYTES: u64 = 64 << 20;
const DISKS: usize = 4;
const NICS: usize = 4;

#[derive(Clone, Copy, Default)]
struct Kib {
    rss: u64,
    pss: u64,
}

impl Kib {
    fn add(&mut self, other: Kib) {
        self.rss += other.rss;
        self.pss += other.pss;
    }
}

/// What the process's mappings are, the guest's memory apart.
fn parts(pid: i32) -> (BTreeMap<&'static str, Kib>, Kib) {
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).unwrap();
    let (mut parts, mut guest) = (BTreeMap::<_, Kib>::new(), Kib::default());
    let (mut kind, mut size) = ("", 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(first), second) = (words.next(), words.next().unwrap_or_default()) else { continue };
        let kib = || second.parse::<u64>().unwrap_or(0);
        match first {
            "Size:" => size = kib(),
            "Rss:" | "Pss:" => {
                let found = match first {
                    "Rss:" => Kib { rss: kib(), pss: 0 },
                    _ => Kib { rss: 0, pss: kib() },
                };
                if size << 10 >= GUEST_BYTES {
                    guest.add(found);
                } else {
                    parts
                        .entry(if kind == "anonymous" { anonymous(size) } else { kind })
                        .or_default()
                        .add(found);
                }
            }
            // A mapping's first line: addresses, rights, offset, device, inode, name.
            _ if first.contains('-') && !first.ends_with(':') => {
                let name = line.split_whitespace().nth(5).unwrap_or_default();
                kind = kind_of(name, second);
            }
            _ => {}
        }
    }
    (parts, guest)
}

fn kind_of(name: &str, rights: &str) -> &'static str {
    let program = name.contains("vmctl-vmm");
    match (name, rights.as_bytes()) {
        ("[heap]", _) => "heap",
        ("[stack]", _) => "main stack",
        (name, _) if name.contains("kvm-vcpu") => "pages shared with KVM",
        (name, _) if name.contains("io_uring") => "io_uring rings",
        (name, _) if name.starts_with('[') => "vdso and the like",
        ("", _) => "anonymous",
        (_, [_, _, b'x', _]) if program => "program: code",
        (_, [_, b'w', ..]) if program => "program: data",
        _ if program => "program: constants",
        _ => "libraries",
    }
}

/// The VMM's threads have stacks of 256 KiB.
fn anonymous(size_kib: u64) -> &'static str {
    if size_kib == 256 { "thread stacks" } else { "other anonymous" }
}

fn print(title: &str, vm: &RunningVm) {
    let (parts, guest) = parts(vm.pid);
    let mut sum = Kib::default();
    for part in parts.values() {
        sum.add(*part);
    }
    println!(
        "{title}: {} KiB beside the guest (pss), {} KiB (rss); the guest has {} KiB",
        sum.pss, sum.rss, guest.rss
    );
    let mut parts: Vec<_> = parts.into_iter().filter(|(_, part)| part.rss > 0).collect();
    parts.sort_by_key(|(_, part)| std::cmp::Reverse(part.rss));
    for (kind, part) in parts {
        println!("  {kind:<24} {:>6} pss {:>6} rss", part.pss, part.rss);
    }
}

fn small() -> Vm {
    Vm::new(memfd(&guest::kernel()), "").memory_bytes(GUEST_BYTES)
}

fn boot(vm: Vm, program: &Path) -> (RunningVm, Duration) {
    let begun = Instant::now();
    let vm = vm.launch(program).unwrap();
    vm.console().expect("boot1\n");
    (vm, begun.elapsed())
}

fn with_devices() -> Vm {
    let mut vm = small();
    for number in 0..DISKS {
        let image = memfd(&[]);
        image.set_len(1 << 20).unwrap();
        vm = vm.disk(DiskConfig::new(format!("disk{number}"), "/image", DiskFormat::Raw), image);
    }
    for number in 0..NICS {
        let tap = format!("benchtap{number}");
        let made =
            Command::new("ip").args(["tuntap", "add", &tap, "mode", "tap", "vnet_hdr"]).status().unwrap();
        assert!(made.success(), "make the tap {tap}");
        let mac = format!("52:54:00:00:00:{number:02x}");
        vm = vm.nic(NicConfig::new(format!("nic{number}"), &tap, mac), open_tap(&tap));
    }
    vm
}

/// Start times and resident guest memory by what the memory is made of.
fn kinds_of_memory(program: &Path) {
    for (title, pages, transparent, ksm) in [
        ("4Ki, transparent huge pages as the host says", PageKind::Small, TransparentHugepages::Host, false),
        ("4Ki, transparent huge pages always", PageKind::Small, TransparentHugepages::Always, false),
        ("4Ki, transparent huge pages never", PageKind::Small, TransparentHugepages::Never, false),
        ("4Ki, KSM", PageKind::Small, TransparentHugepages::Host, true),
        ("2Mi of the pool", PageKind::Huge2Mi, TransparentHugepages::Host, false),
    ] {
        let run = || {
            let mut vm = small();
            vm.launch.config.memory.pages = pages;
            vm.launch.config.memory.transparent_hugepages = transparent;
            vm.launch.config.memory.ksm = ksm;
            let begun = Instant::now();
            let vm = vm.launch(program).map_err(|error| error.to_string())?;
            vm.console().expect("boot1\n");
            Ok::<_, String>((begun.elapsed(), parts(vm.pid).1.rss))
        };
        let runs: Result<Vec<_>, _> = (0..10).map(|_| run()).collect();
        match runs {
            Ok(mut runs) => {
                runs.sort();
                let (median, guest_kib) = runs[runs.len() / 2];
                println!(
                    "{title}: {:.1} ms to the guest's first line (median of 10), {guest_kib} KiB of it resident",
                    median.as_secs_f64() * 1e3
                );
            }
            Err(error) => println!("{title}: {error}"),
        }
    }
}

fn main() {
    let beside = || std::env::current_exe().unwrap().parent().unwrap().join("../vmctl-vmm");
    let program = std::env::args_os().nth(1).map_or_else(beside, PathBuf::from);
    // SAFETY: no other thread runs, and only the network namespace is left: the taps go with us.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.expect("run as root");
    let (vm, _) = boot(small(), &program);
    print("1 vCPU", &vm);
    drop(vm);
    let (vm, _) = boot(with_devices(), &program);
    print(&format!("1 vCPU, {DISKS} disks, {NICS} NICs"), &vm);
    drop(vm);
    kinds_of_memory(&program);
}
