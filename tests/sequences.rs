//! Random sequences of hot-plug, unplug, growing, pauses, reboots and kills, on this host's KVM: nothing
//! hangs, what is left is what was asked for, and no descriptor, thread or memory leaks. The same with Linux
//! is `lab_sequences`.
//!
//! `VMCTL_SEQUENCES=1000 cargo test --test sequences` for more of them, `VMCTL_SEQUENCES_FIRST=N` for others.

#[path = "support/sequence.rs"]
mod sequence;
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::Duration;

use sequence::{Guest, number};
use support::script::{self, Op};
use support::{RunningVm, Session, Vm, memfd};
use vmctl::vmm::config::MachineKind;

const SEQUENCES: u64 = 20;

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

struct Small;

impl Guest for Small {
    const PATIENCE: Duration = Duration::from_secs(20);
    const POLL: Duration = Duration::from_millis(5);
    const MEMORY_BYTES: u64 = 32 << 20;

    fn launch(&mut self) -> (RunningVm, Session) {
        let mut vm = Vm::new(memfd(&kernel()), "").memory_bytes(Self::MEMORY_BYTES);
        vm.launch.config.machine = MachineKind::Pci;
        let vm = vm.launch(Path::new(env!("CARGO_BIN_EXE_vmctl-vmm"))).unwrap();
        let mut console = vm.console();
        console.expect_within("B", Self::PATIENCE);
        (vm, console)
    }

    /// It starts in no time.
    fn wait_up(&mut self, _: &mut Session) {}

    fn reset(&mut self, console: &mut Session) {
        console.type_in("r");
    }

    /// It has no drivers: that it hears must do.
    fn check(&mut self, console: &mut Session, _: &BTreeMap<String, u64>, _: &BTreeSet<String>) {
        console.type_in("x");
        console.expect_within("Z", Self::PATIENCE);
    }

    fn is_lost(&mut self, _: &RunningVm, _: u64) -> bool {
        false
    }
}

#[test]
fn random_sequences_end_where_they_should_and_leak_nothing() {
    let (first, count) = (number("VMCTL_SEQUENCES_FIRST", 1), number("VMCTL_SEQUENCES", SEQUENCES));
    sequence::run(&mut Small, first, count);
}
