//! Was a guest lost by the emulated lab? QEMU's emulation of VMRUN mixes up host and guest now and then. Then
//! a guest faults three times in a row and starts anew, or its vCPU does nothing but leave for pages at an
//! address that is the lab's own: of the instructions around VMRUN in `kvm_amd`. Either shows in what the VM
//! process and KVM count and trace; a guest that merely hangs shows neither, and is a failure.

#![allow(dead_code)] // Each test binary uses its own part.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use vmctl::vmm::client::{Control, ControlError};

const TRACING: &str = "/sys/kernel/tracing";
const TRACED: Duration = Duration::from_secs(2);
const MOST: usize = 6;
/// The lab's code that is left by VMRUN and entered by its end.
const SYMBOL: &str = "__svm_vcpu_run";

/// What was found.
pub struct Verdict {
    pub lost: bool,
    pub evidence: String,
}

/// Looks at a VM of which a test has failed, by its control socket. `log`: what it printed. `resets`: those that were
/// asked for.
pub fn judge(control: &Path, log: &str, resets: u64) -> Verdict {
    let failed = |evidence: String| Verdict { lost: false, evidence };
    let look = || -> Result<_, ControlError> {
        let control = Control::connect(control)?;
        Ok((control.state()?, control.metrics()?))
    };
    let (state, metrics) = match look() {
        Ok(found) => found,
        Err(error) => return failed(format!("its process doesn't answer: {error:?}")),
    };
    let faults: u64 = metrics.vcpus.iter().map(|vcpu| vcpu.exits.others).sum();
    let tail: String = log.chars().skip(log.chars().count().saturating_sub(400)).collect();
    let counts = format!(
        "{:?}, {} resets where {resets} were asked for, {faults} triple faults; the console's end: {tail:?}",
        state.phase, state.reboots
    );
    if state.reboots > resets {
        return Verdict { lost: faults > 0, evidence: counts };
    }
    let exits = match trace(state.pid) {
        Ok(found) => found,
        Err(error) => return failed(format!("{counts}; no trace of KVM: {error}")),
    };
    let kvm = kvm_counts(state.pid);
    let (events, threads) = (events_not_taken(state.pid), threads(state.pid));
    let devices = format!("{:?} {:?}", metrics.disks, metrics.nics);
    Verdict {
        lost: exits.in_host > 0 && exits.in_host * 2 > exits.count,
        evidence: format!(
            "{counts}; of {} exits in {TRACED:?} {} at {SYMBOL} of the lab, most: {:?}; events not taken, by \
             descriptor: {events:?}; threads: {threads:?}; {devices}; {kvm}",
            exits.count, exits.in_host, exits.most_common
        ),
    }
}

/// Exits of the guest within a while.
struct Exits {
    count: usize,
    /// At an address of the lab's own code.
    in_host: usize,
    most_common: Vec<(usize, String)>,
}

fn trace(pid: i32) -> std::io::Result<Exits> {
    // Where it is mounted already this fails, and is as well.
    let _ = Command::new("mount").args(["-t", "tracefs", "tracefs", TRACING]).output();
    let tracing = Path::new(TRACING);
    let ours = range_of(SYMBOL)?;
    std::fs::write(tracing.join("trace"), "")?;
    std::fs::write(tracing.join("events/kvm/kvm_exit/enable"), "1")?;
    std::fs::write(tracing.join("tracing_on"), "1")?;
    std::thread::sleep(TRACED);
    std::fs::write(tracing.join("tracing_on"), "0")?;
    let text = std::fs::read(tracing.join("trace"))?;
    std::fs::write(tracing.join("events/kvm/kvm_exit/enable"), "0")?;
    let threads: Vec<String> = std::fs::read_dir(format!("/proc/{pid}/task"))?
        .flatten()
        .map(|task| format!("-{} ", task.file_name().to_string_lossy()))
        .collect();
    let text = String::from_utf8_lossy(&text);
    let mut by_kind = BTreeMap::<&str, usize>::new();
    let (mut count, mut in_host) = (0, 0);
    for line in text.lines().filter(|line| threads.iter().any(|thread| line.contains(thread))) {
        let Some((_, kind)) = line.split_once("reason ") else { continue };
        let Some((_, rest)) = kind.split_once(" rip 0x") else { continue };
        let Ok(address) = u64::from_str_radix(rest.split(' ').next().unwrap_or_default(), 16) else {
            continue;
        };
        count += 1;
        in_host += usize::from(ours.contains(&address));
        *by_kind.entry(kind.split(" info").next().unwrap_or(kind)).or_default() += 1;
    }
    let mut most_common: Vec<(usize, String)> =
        by_kind.into_iter().map(|(kind, count)| (count, kind.to_owned())).collect();
    most_common.sort_by(|one, other| other.cmp(one));
    most_common.truncate(MOST);
    Ok(Exits { count, in_host, most_common })
}

fn range_of(symbol: &str) -> std::io::Result<Range<u64>> {
    let text = std::fs::read_to_string("/proc/kallsyms")?;
    let address = |line: &str| u64::from_str_radix(line.split(' ').next()?, 16).ok();
    let named = |line: &&str| line.split_whitespace().nth(2) == Some(symbol);
    let none = || std::io::Error::other(format!("the kernel knows no {symbol}"));
    let start = text.lines().find(named).and_then(address).ok_or_else(none)?;
    let end = text.lines().filter_map(address).filter(|&other| other > start).min().unwrap_or(start + 512);
    Ok(start..end)
}

/// The event descriptors that were written to and not read since, with their counts.
fn events_not_taken(pid: i32) -> Vec<(String, u64)> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fdinfo")).into_iter().flatten().flatten();
    let count = |entry: std::fs::DirEntry| {
        let text = std::fs::read_to_string(entry.path()).ok()?;
        let count = text.lines().find_map(|line| line.strip_prefix("eventfd-count:"))?.trim();
        let count = u64::from_str_radix(count, 16).ok().filter(|&count| count > 0)?;
        Some((entry.file_name().to_string_lossy().into_owned(), count))
    };
    entries.filter_map(count).collect()
}

/// Names of threads, and the system calls in which they are.
fn threads(pid: i32) -> Vec<(String, String)> {
    let entries = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let read = |path: std::path::PathBuf| std::fs::read_to_string(path).unwrap_or_default().trim().to_owned();
    entries.map(|task| (read(task.path().join("comm")), read(task.path().join("syscall")))).collect()
}

/// What KVM counts of the VM, without zeroes.
fn kvm_counts(pid: i32) -> String {
    let _ = Command::new("mount").args(["-t", "debugfs", "debugfs", "/sys/kernel/debug"]).output();
    let Ok(entries) = std::fs::read_dir("/sys/kernel/debug/kvm") else { return "no counts of KVM".into() };
    let mut counts = Vec::new();
    let of_vm =
        |entry: &std::fs::DirEntry| entry.file_name().to_string_lossy().starts_with(&format!("{pid}-"));
    for directory in entries.flatten().filter(of_vm) {
        for file in std::fs::read_dir(directory.path()).into_iter().flatten().flatten() {
            if let Ok(count) = std::fs::read_to_string(file.path())
                && !["", "0"].contains(&count.trim())
            {
                counts.push(format!("{}={}", file.file_name().to_string_lossy(), count.trim()));
            }
        }
    }
    counts.sort();
    counts.join(" ")
}
