//! What a VM process counts, with the small guest on this host's KVM.

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use support::{RunningVm, Vm, guest, memfd};
use vmctl::vmm::protocol::Verb;

fn start(vcpus: u8) -> RunningVm {
    let vm = Vm::new(memfd(&guest::kernel()), "").vcpus(vcpus);
    vm.launch(Path::new(env!("CARGO_BIN_EXE_vmctl-vmm"))).unwrap()
}

#[test]
fn exits_are_counted_by_their_reasons() {
    let vm = start(2);
    let mut console = vm.console();
    console.expect("boot1\n");
    let control = vm.control();
    let before = control.metrics().unwrap();
    assert_eq!(before.vcpus.len(), 2);
    assert_eq!(before.process.guest_bytes, 32 << 20);
    // One write for each dot and the newline; one read and one write of an address where nothing is.
    console.type_in("on");
    console.expect(".\nN");
    let after = control.metrics().unwrap();
    let (was, is) = (&before.vcpus[0], &after.vcpus[0]);
    assert_eq!(is.exits.port_writes - was.exits.port_writes, 4096 + 1 + 1);
    assert_eq!(is.exits.mmio_reads - was.exits.mmio_reads, 1);
    assert_eq!(is.exits.mmio_writes - was.exits.mmio_writes, 1);
    assert!(is.exits.port_reads > was.exits.port_reads);
    assert!(is.run_us > was.run_us);
    assert!(after.uptime_ms >= before.uptime_ms && after.process.run_us > before.process.run_us);
    if let (Some(was), Some(is)) = (&was.kvm, &is.kvm) {
        assert!(is.exits - was.exits >= 4096, "KVM counts at least what we see: {was:?} {is:?}");
    }
    // The second vCPU waits for its start-up message.
    assert_eq!(after.vcpus[1].exits.port_writes, 0);
}

#[test]
fn readings_stop_no_vcpu() {
    let vm = start(1);
    vm.console().expect("boot1\n");
    let control = vm.control();
    let before = control.metrics().unwrap();
    let begun = Instant::now();
    for _ in 0..200 {
        control.metrics().unwrap();
    }
    let after = control.metrics().unwrap();
    let interrupted = after.vcpus[0].exits.interrupted - before.vcpus[0].exits.interrupted;
    assert_eq!(interrupted, 0, "a reading kicked the vCPU");
    assert!(begun.elapsed() < Duration::from_secs(10));
    // A paused guest is read as well, and its counts stand still.
    control.command(&Verb::Pause).unwrap();
    let paused = control.metrics().unwrap().vcpus.remove(0).exits;
    assert!(paused.interrupted > 0, "a pause kicks");
    assert_eq!(control.metrics().unwrap().vcpus[0].exits, paused);
}
