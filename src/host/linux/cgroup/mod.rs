//! One cgroup for each VM process: what it may use at most, and its part of the CPUs.
//!
//! | | version 2 | version 1, in each of `memory`, `cpu`, `pids` |
//! |---|---|---|
//! | where | `<root>/vmctl/<vm>.<uid>` | the same |
//! | memory | `memory.max` | `memory.limit_in_bytes` |
//! | threads | `pids.max` | `pids.max` |
//! | CPU | `cpu.weight`, `cpu.max` | `cpu.shares`, `cpu.cfs_quota_us` |
//!
//! It lies beside systemd's own, where LXC and Podman put theirs: in a unit of systemd's a VM would end
//! with its session or count against its agent, and systemd leaves alone what it didn't make. In a
//! container, whose processes are not below one of systemd's units, it lies below our own cgroup.
//!
//! A cgroup outlives its processes. Whoever looks at VMs removes those that are empty; one that is being
//! made is locked meanwhile, and an empty one of the same VM is taken over.

mod place;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, OFlags, StatFs};

use self::place::{Hierarchy, Version};
use crate::host::limits::{MEMORY_OVERHEAD_BYTES, ProcessLimits};
use crate::host::snapshot::CpuShare;
use crate::name::ObjectName;
use crate::vmm::protocol::FdRole;

/// What a VM process is held to.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub process: ProcessLimits,
    pub cpu: CpuShare,
}

const PERIOD_US: u64 = 100_000;
const ATTEMPTS: u32 = 16;

/// Whether the pages of this file are its only copy.
pub fn lies_in_memory(file: &OwnedFd) -> bool {
    rustix::fs::fstatfs(file).is_ok_and(|facts| is_memory(&facts))
}

fn is_memory(facts: &StatFs) -> bool {
    const RAMFS_MAGIC: u64 = 0x8584_58f6;
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    [RAMFS_MAGIC, TMPFS_MAGIC].contains(&(facts.f_type as u64))
}

/// Whether such files are disks of this VM process, or were: what was read and written of them is charged
/// to it until they are deleted.
pub fn files_in_memory<'a>(pid: i32, mut disks: impl Iterator<Item = &'a Path>) -> bool {
    // Less finds room in what is kept free beside the guest.
    const MUCH: u64 = MEMORY_OVERHEAD_BYTES / 2;
    let charged = || {
        let (path, version) = place::of(pid, "memory").ok()??;
        let text = std::fs::read_to_string(path.join("memory.stat")).ok()?;
        let field = if version == Version::Two { "shmem " } else { "total_shmem " };
        text.lines().find_map(|line| line.strip_prefix(field))?.trim().parse::<u64>().ok()
    };
    disks.any(|disk| rustix::fs::statfs(disk).is_ok_and(|facts| is_memory(&facts)))
        || charged().is_some_and(|bytes| bytes > MUCH)
}

/// A VM's cgroup, made and not yet in use. As long as this is there, nobody removes it.
#[derive(Debug)]
pub struct NewCgroup {
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    version: Version,
    controllers: Vec<&'static str>,
    path: PathBuf,
    directory: OwnedFd,
}

impl NewCgroup {
    /// Makes it, or takes over what is left of an earlier one. An error says what this host doesn't let us
    /// do; a VM can do without.
    pub fn make(vm: &ObjectName, uid: u32, limits: &Limits) -> io::Result<Self> {
        let hierarchies = place::hierarchies()?;
        let mut new = Self { parts: Vec::new() };
        for hierarchy in &hierarchies {
            hierarchy.prepare()?;
            let path = hierarchy.base.join(format!("{vm}.{uid:x}"));
            let directory = make_locked(&path)?;
            let controllers = hierarchy.controllers.clone();
            new.parts.push(Part { version: hierarchy.version, controllers, path, directory });
        }
        for part in &new.parts {
            part.limit(limits).map_err(|error| named(&part.path, error))?;
        }
        Ok(new)
    }

    /// What a new process needs to be in it.
    pub fn open(&self) -> io::Result<Vec<(FdRole, OwnedFd)>> {
        let open = |part: &Part| match part.version {
            Version::Two => Ok((FdRole::Cgroup, part.directory.try_clone()?)),
            Version::One => {
                let file = File::options().write(true).open(part.path.join("cgroup.procs"))?;
                Ok((FdRole::CgroupProcs { hierarchy: part.controllers.join(",") }, file.into()))
            }
        };
        self.parts.iter().map(open).collect()
    }
}

impl Part {
    fn limit(&self, limits: &Limits) -> io::Result<()> {
        let has = |controller| self.controllers.contains(&controller);
        if has("memory") {
            limit_memory(&self.path, self.version, limits.process.memory_bytes)?;
        }
        if has("pids") {
            limit_threads(&self.path, limits.process.threads)?;
        }
        if has("cpu") { set_share_in(&self.path, self.version, limits.cpu) } else { Ok(()) }
    }
}

/// The directory, locked against removal. Somebody may remove it between any two of these steps, up to
/// the lock; what is locked and still at its path stays.
fn make_locked(path: &Path) -> io::Result<OwnedFd> {
    for _ in 0..ATTEMPTS {
        match std::fs::create_dir_all(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            other => other.map_err(|error| named(path, error))?,
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = match rustix::fs::open(path, flags, Mode::empty()) {
            Err(rustix::io::Errno::NOENT) => continue,
            other => other?,
        };
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockShared) {
            Err(rustix::io::Errno::WOULDBLOCK) => {
                // Somebody is about to remove it, or found out that it can't be.
                std::thread::yield_now();
                continue;
            }
            other => other?,
        }
        let (held, there) = (rustix::fs::fstat(&directory)?, rustix::fs::stat(path));
        if there.is_ok_and(|there| (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino)) {
            return Ok(directory);
        }
    }
    Err(named(path, io::Error::other("somebody removes it again and again")))
}

/// Removes the cgroups whose processes are gone, and the place for them with the last one. What can't be
/// removed is in use, or there is nothing to remove: neither is an error. `runs`: VMs of this name need no
/// trial.
pub fn sweep(runs: &dyn Fn(&str) -> bool) {
    for hierarchy in place::hierarchies().unwrap_or_default() {
        let Ok(entries) = std::fs::read_dir(&hierarchy.base) else { continue };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let vm = name.to_str().and_then(|name| name.rsplit_once('.')).map(|(vm, _)| vm);
            if vm.is_some_and(|vm| !runs(vm)) {
                remove_if_empty(&entry.path());
            }
        }
        let _ = std::fs::remove_dir(&hierarchy.base);
    }
}

fn remove_if_empty(path: &Path) {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(directory) = rustix::fs::open(path, flags, Mode::empty()) else { return };
    if rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive).is_ok() {
        let _ = std::fs::remove_dir(path);
    }
}

/// The part of the CPUs that this VM process has. `None`: it is in no cgroup of ours.
pub fn share(pid: i32) -> io::Result<Option<CpuShare>> {
    let Some((path, version)) = place::of(pid, "cpu")? else { return Ok(None) };
    let read =
        |file: &str| std::fs::read_to_string(path.join(file)).map_err(|error| named(&path.join(file), error));
    let nonsense = |text: &str| named(&path, io::Error::other(format!("it says {text:?}")));
    let number = |text: &str| text.trim().parse::<i64>().map_err(|_| nonsense(text));
    let (weight, quota, period) = match version {
        Version::Two => {
            let text = read("cpu.max")?;
            let (quota, period) = text.trim().split_once(' ').ok_or_else(|| nonsense(&text))?;
            let quota = if quota == "max" { -1 } else { number(quota)? };
            (number(&read("cpu.weight")?)?, quota, number(period)?)
        }
        Version::One => {
            let weight = weight_of(number(&read("cpu.shares")?)?);
            (weight, number(&read("cpu.cfs_quota_us")?)?, number(&read("cpu.cfs_period_us")?)?)
        }
    };
    let percent =
        |quota: i64| (quota * 100).checked_div(period).and_then(|percent| u16::try_from(percent).ok());
    Ok(Some(CpuShare {
        weight: u16::try_from(weight).map_err(|_| nonsense(&weight.to_string()))?,
        quota_percent: if quota < 0 { None } else { percent(quota) },
    }))
}

/// Gives a running VM process another part of the CPUs.
pub fn set_share(pid: i32, share: CpuShare) -> io::Result<()> {
    match place::of(pid, "cpu")? {
        Some((path, version)) => set_share_in(&path, version, share),
        None => Err(io::Error::other("its process is in no cgroup of its own")),
    }
}

/// What this VM process may use. `None`: it is in no cgroup of ours.
pub fn limits(pid: i32) -> io::Result<Option<ProcessLimits>> {
    let (Some((memory, version)), Some((pids, _))) = (place::of(pid, "memory")?, place::of(pid, "pids")?)
    else {
        return Ok(None);
    };
    Ok(Some(ProcessLimits {
        memory_bytes: read_limit(&memory.join(memory_file(version)))?,
        threads: read_limit(&pids.join("pids.max"))?,
    }))
}

/// Holds a running VM process to other limits.
pub fn set_limits(pid: i32, limits: ProcessLimits) -> io::Result<()> {
    let (Some((memory, version)), Some((pids, _))) = (place::of(pid, "memory")?, place::of(pid, "pids")?)
    else {
        return Err(io::Error::other("its process is in no cgroup of its own"));
    };
    limit_memory(&memory, version, limits.memory_bytes)?;
    limit_threads(&pids, limits.threads)
}

/// For a running VM that gets a disk whose pages are memory: see [`ProcessLimits::of`].
pub fn lift_memory_limit(pid: i32) -> io::Result<()> {
    match place::of(pid, "memory")? {
        Some((path, version)) => limit_memory(&path, version, None),
        None => Ok(()),
    }
}

fn memory_file(version: Version) -> &'static str {
    match version {
        Version::Two => "memory.max",
        Version::One => "memory.limit_in_bytes",
    }
}

fn limit_memory(path: &Path, version: Version, bytes: Option<u64>) -> io::Result<()> {
    let none = if version == Version::Two { "max" } else { "-1" };
    let value = bytes.map_or(none.to_owned(), |bytes| bytes.to_string());
    write_value(&path.join(memory_file(version)), &value)
}

fn limit_threads(path: &Path, threads: Option<u64>) -> io::Result<()> {
    write_value(&path.join("pids.max"), &threads.map_or("max".to_owned(), |threads| threads.to_string()))
}

/// `None`: there is no limit.
fn read_limit(path: &Path) -> io::Result<Option<u64>> {
    let text = std::fs::read_to_string(path).map_err(|error| named(path, error))?;
    limit_of(text.trim()).ok_or_else(|| named(path, io::Error::other(format!("it says {text:?}"))))
}

/// Version 1 says of no limit the greatest number of whole pages that it can count.
fn limit_of(text: &str) -> Option<Option<u64>> {
    const NONE_FROM: u64 = i64::MAX as u64 - (1 << 20);
    match text {
        "max" => Some(None),
        number => number.parse().ok().map(|number| (number < NONE_FROM).then_some(number)),
    }
}

fn set_share_in(path: &Path, version: Version, share: CpuShare) -> io::Result<()> {
    let write = |file: &str, value: String| write_value(&path.join(file), &value);
    let quota = share.quota_percent.map(|percent| u64::from(percent) * PERIOD_US / 100);
    match version {
        Version::Two => {
            write("cpu.weight", share.weight.to_string())?;
            let quota = quota.map_or("max".to_owned(), |quota| quota.to_string());
            write("cpu.max", format!("{quota} {PERIOD_US}"))
        }
        Version::One => {
            write("cpu.shares", shares_of(share.weight).to_string())?;
            write("cpu.cfs_period_us", PERIOD_US.to_string())?;
            write("cpu.cfs_quota_us", quota.map_or("-1".to_owned(), |quota| quota.to_string()))
        }
    }
}

/// Version 1 counts from 1024 where version 2 counts from 100.
fn shares_of(weight: u16) -> i64 {
    (i64::from(weight) * 1024 + 50) / 100
}

fn weight_of(shares: i64) -> i64 {
    (shares * 100 + 512) / 1024
}

fn write_value(path: &Path, value: &str) -> io::Result<()> {
    // Never made: a controller that isn't there has no file.
    let file = File::options().write(true).open(path).map_err(|error| named(path, error))?;
    rustix::io::write(&file, value.as_bytes())
        .map(|_| ())
        .map_err(|errno| named(path, io::Error::other(format!("write {value}: {}", io::Error::from(errno)))))
}

fn named(path: &Path, error: io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

/// Why VMs have no limits here. `None`: they have.
pub fn lacking() -> Option<String> {
    let tried = place::hierarchies().and_then(|hierarchies| {
        hierarchies.iter().try_for_each(Hierarchy::prepare)?;
        // What was made for the trial goes again.
        sweep(&|_| false);
        Ok(())
    });
    tried.err().map(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_survive_the_older_unit() {
        for weight in 1..=10_000u16 {
            assert_eq!(weight_of(shares_of(weight)), i64::from(weight));
        }
    }

    #[test]
    fn limits_are_read_in_both_versions_spellings() {
        assert_eq!(limit_of("1048576"), Some(Some(1 << 20)));
        assert_eq!([limit_of("max"), limit_of("9223372036854771712")], [Some(None); 2]);
        assert_eq!([limit_of(""), limit_of("-1")], [None; 2]);
    }

    #[test]
    fn files_in_memory_are_told_from_others() {
        let memory: OwnedFd =
            File::from(rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap()).into();
        assert!(lies_in_memory(&memory));
        assert!(!lies_in_memory(&File::open("/proc/self/status").unwrap().into()));
    }
}
