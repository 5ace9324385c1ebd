//! What a VM's processors and memory are, as a host and a guest see them. Every test here runs in the lab
//! (`tests/lab/`): it has huge pages to give away, and real guests.

#[path = "support/in_lab.rs"]
mod in_lab;
mod support;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::Path;
use std::time::Duration;

use in_lab::ran_in_lab;
use support::{RunningVm, Session, Vm};
use vm_memory::{Bytes as _, GuestAddress};
use vmctl::vmm::client::LaunchError;
use vmctl::vmm::config::{CpuModel, CpuTopology, MemoryConfig, PageKind};
use vmctl::vmm::memory::{self, MemoryError};

fn pool(which: &str) -> String {
    format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{which}_hugepages")
}

/// Pages of the pool that are free, and those of them that are reserved.
fn free_and_reserved() -> (u64, u64) {
    let count = |which| fs::read_to_string(pool(which)).unwrap().trim().parse().unwrap();
    (count("free"), count("resv"))
}

#[test]
fn huge_pages_are_reserved_and_stay_so_through_a_reset() {
    if ran_in_lab() {
        return;
    }
    fs::write(pool("nr"), "8").unwrap();
    assert_eq!(free_and_reserved(), (8, 0));
    let huge = MemoryConfig { pages: PageKind::Huge2Mi, ..Default::default() };
    let guest = memory::create_of(&[(0, 12 << 20), (1 << 32, 4 << 20)], huge).unwrap();
    assert_eq!(free_and_reserved(), (8, 8), "reserved, none touched");
    let refused = memory::create_of(&[(0, 2 << 20)], huge);
    let Err(MemoryError::PoolEmpty { pages: 1, page_bytes: 0x20_0000 }) = refused else {
        panic!("{refused:?}")
    };
    let (low, high) = (GuestAddress(10 << 20), GuestAddress(1 << 32));
    guest.write_obj(7u64, low).unwrap();
    guest.write_obj(8u64, high).unwrap();
    assert_eq!(free_and_reserved(), (6, 6));
    assert_eq!(memory::discard(&guest, low, 2 << 20).unwrap(), 0, "none is given away");
    assert_eq!(guest.read_obj::<u64>(low).unwrap(), 7);
    memory::clear(&guest).unwrap();
    assert_eq!(free_and_reserved(), (8, 8), "given back, and reserved again");
    assert_eq!((guest.read_obj::<u64>(low).unwrap(), guest.read_obj::<u64>(high).unwrap()), (0, 0));
}

const BOOT: Duration = Duration::from_secs(120);

/// A stock Linux, at its shell.
struct Guest {
    vm: RunningVm,
    console: Session,
}

fn linux(vcpus: u8) -> Vm {
    let open = |path: &str| File::open(path).unwrap();
    let cmdline = "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable";
    Vm::new(open("/guest/vmlinux"), cmdline)
        .initrd(open("/guest/initrd"))
        .vcpus(vcpus)
        .memory_bytes(128 << 20)
}

impl Guest {
    fn boot(vm: Vm) -> Self {
        let vm = vm.launch(Path::new("/usr/local/bin/vmctl-vmm")).unwrap();
        let mut console = vm.console();
        console.expect_within("GUEST-READY", BOOT);
        console.expect_within("guest# ", BOOT);
        Self { vm, console }
    }

    /// What a command prints.
    fn run(&mut self, command: &str) -> String {
        // The echo of what is typed must not be taken for the marks.
        self.console.type_in(&format!("echo BEG''IN; {command}; echo E''ND\n"));
        self.console.expect_within("BEGIN\r\n", BOOT);
        let said = self.console.expect_within("END\r\n", BOOT);
        said.trim_end_matches("END\r\n").replace('\r', "")
    }

    fn flags(&mut self) -> BTreeSet<String> {
        let line = self.run("grep -m1 ^flags /proc/cpuinfo");
        line.split_whitespace().skip(2).map(str::to_owned).collect()
    }
}

/// What Linux shows of the instructions of each level; the rest of the psABI's lists is not shown.
const V2: [&str; 7] = ["cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3"];
const V3: [&str; 9] = ["abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave"];
/// Of what an EPYC has more, what programs look for.
const ABOVE: [&str; 12] = [
    "aes",
    "pclmulqdq",
    "rdrand",
    "rdseed",
    "adx",
    "sha_ni",
    "sse4a",
    "xsaveopt",
    "xsavec",
    "fsgsbase",
    "clflushopt",
    "rdtscp",
];

#[test]
fn a_guest_sees_the_level_and_nothing_above() {
    if ran_in_lab() {
        return;
    }
    for (model, has, lacks) in [
        (CpuModel::X86_64V2, [&V2[..], &[]].concat(), [&V3[..], &ABOVE].concat()),
        (CpuModel::X86_64V3, [&V2[..], &V3].concat(), ABOVE.to_vec()),
    ] {
        let mut vm = linux(1);
        vm.launch.config.cpu.model = model;
        let mut guest = Guest::boot(vm);
        let flags = guest.flags();
        let missing: Vec<_> = has.iter().filter(|flag| !flags.contains(**flag)).collect();
        let above: Vec<_> = lacks.iter().filter(|flag| flags.contains(**flag)).collect();
        assert!(
            missing.is_empty() && above.is_empty(),
            "{model:?} lacks {missing:?}, has {above:?}: {flags:?}"
        );
        for needed in ["hypervisor", "tsc_deadline_timer", "x2apic", "nx"] {
            assert!(flags.contains(needed), "{model:?} lacks {needed}: {flags:?}");
        }
        assert!(!flags.contains("svm") && !flags.contains("monitor"), "{flags:?}");
        let clock = guest.run("cat /sys/devices/system/clocksource/clocksource0/available_clocksource");
        assert!(clock.contains("kvm-clock"), "{clock}");
        guest.console.type_in("poweroff -f\n");
        guest.vm.wait_for(BOOT).unwrap();
    }
}

#[test]
fn a_guest_sees_its_topology_and_a_vcpu_stays_where_it_is_pinned() {
    if ran_in_lab() {
        return;
    }
    let mut vm = linux(6);
    vm.launch.config.cpu.topology = Some(CpuTopology { sockets: 1, cores: 3, threads: 2 });
    vm.launch.config.cpu.pinning = vec![vec![0], vec![1], vec![0, 1]];
    let mut guest = Guest::boot(vm);
    let shown = guest.run(
        "cd /sys/devices/system/cpu; for c in 0 1 2 3 4 5; do \
         cat cpu$c/topology/physical_package_id cpu$c/topology/core_id cpu$c/topology/thread_siblings_list; done",
    );
    let expected = ["0 0 0-1", "0 0 0-1", "0 1 2-3", "0 1 2-3", "0 2 4-5", "0 2 4-5"].join(" ");
    assert_eq!(shown.split_whitespace().collect::<Vec<_>>().join(" "), expected);

    let tasks = format!("/proc/{}/task", guest.vm.pid);
    let mut allowed: Vec<(String, String)> = fs::read_dir(tasks)
        .unwrap()
        .map(|task| fs::read_to_string(task.unwrap().path().join("status")).unwrap())
        .filter_map(|status| {
            let field =
                |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
            Some((field("Name:\t")?, field("Cpus_allowed_list:\t")?))
        })
        .filter(|(name, _)| name.starts_with("vcpu"))
        .collect();
    allowed.sort();
    let allowed: Vec<_> = allowed.iter().map(|(name, cpus)| (name.as_str(), cpus.as_str())).collect();
    let everywhere = ["vcpu2", "vcpu3", "vcpu4", "vcpu5"].map(|name| (name, "0-1"));
    assert_eq!(allowed, [&[("vcpu0", "0"), ("vcpu1", "1")][..], &everywhere].concat());

    let mut vm = linux(1);
    vm.launch.config.cpu.pinning = vec![vec![0, 77]];
    match vm.launch(Path::new("/usr/local/bin/vmctl-vmm")) {
        Err(LaunchError::Refused { error, .. }) => {
            assert!(error.contains("pin vCPU 0") && error.contains("no CPU 77"), "{error}")
        }
        other => panic!("{:?}", other.map(|vm| vm.pid)),
    }
}

#[test]
fn a_guest_of_huge_pages_boots_and_reboots() {
    if ran_in_lab() {
        return;
    }
    fs::write(pool("nr"), "64").unwrap();
    let mut vm = linux(1);
    vm.launch.config.memory.pages = PageKind::Huge2Mi;
    let mut guest = Guest::boot(vm);
    let (free, reserved) = free_and_reserved();
    assert_eq!(free, reserved, "all that is free is the guest's");
    guest.console.type_in("reboot -f\n");
    guest.console.expect_within("GUEST-READY", BOOT);
    let (free, reserved) = free_and_reserved();
    assert_eq!(free, reserved, "still");
    let mut second = linux(1);
    second.launch.config.memory.pages = PageKind::Huge2Mi;
    match second.launch(Path::new("/usr/local/bin/vmctl-vmm")) {
        Err(LaunchError::Refused { error, .. }) => {
            assert!(error.contains("fewer than 64 free huge pages"), "{error}")
        }
        other => panic!("{:?}", other.map(|vm| vm.pid)),
    }
}
