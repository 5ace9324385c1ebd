//! `bench_many_vms COUNT`: so many VMs with a small guest, on this machine's KVM, started one after another and
//! all at once: the time until each guest has printed its word, and what each process needs of memory.

#[path = "../tests/support/mod.rs"]
mod support;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use support::{RunningVm, Vm, guest, memfd};

fn main() {
    let count = std::env::args().nth(1).map_or(50, |text| text.parse().expect("a number"));
    let beside = std::env::current_exe().expect("our own path");
    let program: PathBuf = beside.parent().and_then(Path::parent).expect("a folder").join("vmctl-vmm");
    // Once to warm up: the program's pages, and KVM's module.
    drop(start(&program));

    let begin = Instant::now();
    let vms: Vec<RunningVm> = (0..count).map(|_| start(&program)).collect();
    report("one after another", count, begin.elapsed());
    let kib: Vec<u64> = vms.iter().map(|vm| proportional_kib(vm.pid)).collect();
    let (total, most) = (kib.iter().sum::<u64>(), kib.iter().max().copied().unwrap_or(0));
    println!("memory of each, the guest's included: {} KiB on average, {most} KiB at most", total / count);
    drop(vms);

    let begin = Instant::now();
    let vms: Vec<RunningVm> = std::thread::scope(|scope| {
        let starting: Vec<_> = (0..count).map(|_| scope.spawn(|| start(&program))).collect();
        starting.into_iter().map(|thread| thread.join().expect("a started VM")).collect()
    });
    report("all at once", count, begin.elapsed());
    let begin = Instant::now();
    for vm in &vms {
        vm.control().state().expect("an answer");
    }
    println!("all asked for their state in {:.1} ms", begin.elapsed().as_secs_f64() * 1000.0);
}

/// Until its guest runs.
fn start(program: &Path) -> RunningVm {
    let vm = Vm::new(memfd(&guest::kernel()), "").launch(program).expect("a VM");
    vm.console().expect_within("boot1\n", Duration::from_secs(120));
    vm
}

fn report(how: &str, count: u64, took: Duration) {
    let each = took.as_secs_f64() * 1000.0 / count as f64;
    println!("{count} VMs started {how}: {:.2} s, {each:.1} ms each", took.as_secs_f64());
}

fn proportional_kib(pid: i32) -> u64 {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("smaps_rollup");
    let line = rollup.lines().find(|line| line.starts_with("Pss:")).expect("Pss");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number")
}
