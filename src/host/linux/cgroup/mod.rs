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

use rustix::fs::{FlockOperation, Mode, OFlags};

use self::place::{Hierarchy, Version};
use crate::host::snapshot::CpuShare;
use crate::name::ObjectName;
use crate::vmm::config::VmConfig;
use crate::vmm::protocol::FdRole;

/// What a VM process is held to.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// `None`: no limit.
    pub memory_bytes: Option<u64>,
    pub cpu: CpuShare,
}

/// More threads than a full machine has, KVM's and vhost's own included.
const THREADS_MAX: u32 = 512;
/// Of the VM process itself, and what the kernel keeps for it.
const MEMORY_OVERHEAD_BYTES: u64 = 128 << 20;
/// Of the guest's memory: its page tables, those of nested paging, KVM's bookkeeping.
const MEMORY_OVERHEAD_PART: u64 = 8;
const PERIOD_US: u64 = 100_000;
const ATTEMPTS: u32 = 16;

/// The most memory that a VM process may come to use: there to hold up one that runs away, not to press.
///
/// The page cache of its disks is charged to it as well. That never kills it, for the kernel drops or
/// writes back such pages first, and within these bounds there is room for a working set of them. But
/// the pages of a file that lies in memory (tmpfs) can't be dropped: with such a disk there is no limit.
pub fn memory_max(config: &VmConfig, disk_in_memory: bool) -> Option<u64> {
    let guest = config.memory_bytes;
    (!disk_in_memory).then_some(guest + guest / MEMORY_OVERHEAD_PART + MEMORY_OVERHEAD_BYTES)
}

/// Whether the pages of this file are its only copy.
pub fn lies_in_memory(file: &OwnedFd) -> bool {
    const RAMFS_MAGIC: u64 = 0x8584_58f6;
    const TMPFS_MAGIC: u64 = 0x0102_1994;
    rustix::fs::fstatfs(file).is_ok_and(|facts| [RAMFS_MAGIC, TMPFS_MAGIC].contains(&(facts.f_type as u64)))
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
        let write = |file: &str, value: String| write_value(&self.path.join(file), &value);
        let has = |controller| self.controllers.contains(&controller);
        if has("memory") {
            match (self.version, limits.memory_bytes) {
                (Version::Two, Some(bytes)) => write("memory.max", bytes.to_string())?,
                (Version::Two, None) => write("memory.max", "max".into())?,
                (Version::One, Some(bytes)) => write("memory.limit_in_bytes", bytes.to_string())?,
                (Version::One, None) => write("memory.limit_in_bytes", "-1".into())?,
            }
        }
        if has("pids") {
            write("pids.max", THREADS_MAX.to_string())?;
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

/// For a running VM that gets a disk whose pages are memory: see [`memory_max`].
pub fn lift_memory_limit(pid: i32) -> io::Result<()> {
    match place::of(pid, "memory")? {
        Some((path, Version::Two)) => write_value(&path.join("memory.max"), "max"),
        Some((path, Version::One)) => write_value(&path.join("memory.limit_in_bytes"), "-1"),
        None => Ok(()),
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
    fn there_is_room_beside_the_guest_and_no_limit_where_the_disk_is_memory() {
        let boot = crate::vmm::config::BootConfig::kernel("k", None, "");
        let config = VmConfig::new("web", "mark", 1 << 30, boot);
        assert_eq!(memory_max(&config, false), Some((1 << 30) + (128 << 20) + (128 << 20)));
        assert_eq!(memory_max(&config, true), None);
        let memory: OwnedFd =
            File::from(rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap()).into();
        assert!(lies_in_memory(&memory));
        assert!(!lies_in_memory(&File::open("/proc/self/status").unwrap().into()));
    }
}
