//! The VM process with a small guest of our own, on this host's KVM: no lab, milliseconds each.

mod support;

use std::path::Path;
use std::time::Duration;

use support::{RunningVm, Vm, guest, memfd};
use vmctl::vmm::protocol::{Event, ExitReason, ExitRecord, Phase};

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_vmctl-vmm"))
}

fn start(vm: Vm) -> RunningVm {
    vm.launch(program()).unwrap()
}

fn small() -> Vm {
    Vm::new(memfd(&guest::kernel()), "")
}

fn reason(record: Option<ExitRecord>) -> ExitReason {
    record.expect("an exit record").reason
}

#[test]
fn a_guest_prints_and_powers_off() {
    let vm = start(small());
    let mut console = vm.console();
    console.expect("boot1\n");
    console.type_in("q");
    assert_eq!(reason(vm.wait()), ExitReason::GuestPowerOff);
    assert_eq!(vm.log(), "boot1\n");
}
