//! What the VMs that run use: what their processes count, and what the host's scheduler and memory
//! management know of these processes. Nothing here changes or stops a VM.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use super::parallel::ask_all;
use super::vm_place::VmPlace;
use super::vm_process::{self, LookError};
use crate::host::error::ObserveError;
use crate::name::ObjectName;
use crate::vmm::client::ControlError;
use crate::vmm::protocol::{Metrics, VmState};

/// How long a VM process may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// How the VM process names the threads that run vCPUs.
const VCPU_THREADS: &str = "vcpu";

/// One VM at one instant.
#[derive(Clone, Debug)]
pub struct Usage {
    pub at: Instant,
    pub state: VmState,
    /// `None`: an older process, which doesn't count.
    pub metrics: Option<Metrics>,
    pub process: ProcessUsage,
}

/// What the host knows of a VM's process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ProcessUsage {
    /// Guest memory that was touched, and the process's own; of huge pages, too.
    pub resident_bytes: u64,
    /// How long the vCPU threads ran, all together.
    pub vcpu_run_ns: u64,
    /// How long they could have run and had to wait for a processor: what a guest sees as stolen.
    pub vcpu_wait_ns: u64,
}

/// All VMs that run, or these alone. One that can't be asked is there, with the reason.
pub fn observe(
    state_dir: &Path,
    run_dir: &Path,
    only: &[ObjectName],
) -> Result<BTreeMap<ObjectName, Result<Usage, ObserveError>>, ObserveError> {
    let mut names =
        VmPlace::list(state_dir, run_dir).map_err(|error| ObserveError::new("list the VMs", error))?;
    if !only.is_empty() {
        names.retain(|name| only.contains(name));
    }
    let look = |name: &ObjectName| {
        let failed = |error: LookError| ObserveError::new(format!("ask the process of the VM {name}"), error);
        usage(&VmPlace::new(state_dir, run_dir, name)).map_err(failed).transpose()
    };
    let seen = ask_all(names, look)?;
    Ok(seen.into_iter().filter_map(|(name, usage)| Some((name, usage?))).collect())
}

/// `None`: it does not run.
fn usage(place: &VmPlace) -> Result<Option<Usage>, LookError> {
    let Some(directory) = place.socket_directory()? else { return Ok(None) };
    let Some(control) = vm_process::connect(&directory, ANSWER_TIMEOUT)? else { return Ok(None) };
    let process = process_usage(Path::new("/proc"), control.peer_pid()?);
    let at = Instant::now();
    let metrics = match control.metrics() {
        Ok(metrics) => Some(metrics),
        Err(ControlError::Refused(_)) => None,
        Err(error) => return Err(error.into()),
    };
    // It answered after its files were read: they were its own, not those of a later process.
    Ok(Some(Usage { at, state: control.state()?, metrics, process: process? }))
}

fn process_usage(proc: &Path, pid: i32) -> io::Result<ProcessUsage> {
    let directory = proc.join(pid.to_string());
    let status = fs::read_to_string(directory.join("status"))?;
    let kib = |field: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(field))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
    };
    let resident_kib = kib("VmRSS:").unwrap_or(0) + kib("HugetlbPages:").unwrap_or(0);
    let mut usage = ProcessUsage { resident_bytes: resident_kib << 10, ..Default::default() };
    for thread in fs::read_dir(directory.join("task"))? {
        let thread = thread?.path();
        // A thread may end meanwhile.
        let read = |file: &str| fs::read_to_string(thread.join(file)).unwrap_or_default();
        if !read("comm").starts_with(VCPU_THREADS) {
            continue;
        }
        // Nanoseconds that it ran, nanoseconds that it waited, how often it ran.
        let times = read("schedstat");
        let mut times = times.split_whitespace().map(|number| number.parse::<u64>().unwrap_or(0));
        usage.vcpu_run_ns += times.next().unwrap_or(0);
        usage.vcpu_wait_ns += times.next().unwrap_or(0);
    }
    Ok(usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_read_from_its_files() {
        let proc = std::env::temp_dir().join(format!("vmctl-proc-{}", std::process::id()));
        let write = |path: &str, text: &str| {
            let path = proc.join("7").join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("status", "Name:\tvmctl-vmm\nVmRSS:\t  1024 kB\nHugetlbPages:\t    2048 kB\n");
        for (thread, name, times) in [
            (7, "vmctl-vmm", "9 9 9"),
            (8, "vcpu0", "100 20 3"),
            (9, "vcpu1", "1000 200 30"),
            (10, "block", "5 5 5"),
        ] {
            write(&format!("task/{thread}/comm"), &format!("{name}\n"));
            write(&format!("task/{thread}/schedstat"), &format!("{times}\n"));
        }
        let expected = ProcessUsage { resident_bytes: 3 << 20, vcpu_run_ns: 1100, vcpu_wait_ns: 220 };
        assert_eq!(process_usage(&proc, 7).unwrap(), expected);
        assert!(process_usage(&proc, 8).is_err());
        fs::remove_dir_all(&proc).unwrap();
    }
}
