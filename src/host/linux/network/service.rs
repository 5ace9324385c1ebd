//! One `dnsmasq` a network: started so that it outlives us, known again by its pid and start time, told of
//! new names by a signal.
//!
//! A network's directory holds what the process was given (`service.json`, written after it), its files and
//! its leases. dnsmasq writes the leases and nobody else does; it gives up its rights by itself.
//!
//! The directory is the first to come and the last to go, and its name says whose it is: whatever is half
//! made or half removed is found again. The record says nothing of a process while that is being changed.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use super::nft::find_program;
use super::replace_file;
use crate::host::error::{ObserveError, StepError};
use crate::host::snapshot::{Capability, Lease, Observed, Service, ServiceConfig};
use crate::name::{Kind, Mark, ObjectId};

const RECORD: &str = "service.json";
const LEASES: &str = "leases";
const LOG: &str = "log";
/// How long it may take to say that it can't start; one that is alive then has its sockets.
const START_WAIT: Duration = Duration::from_millis(150);
const STOP_WAIT: Duration = Duration::from_secs(2);
const LEASES_BYTES_MAX: u64 = 8 << 20;

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    /// What it was started with, and the names that it was told of since. `None`: that is being changed.
    applied: Option<ServiceConfig>,
    process: Option<Process>,
}

/// A process, and not another that got its number later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Process {
    pid: i32,
    /// In ticks since the host was started.
    start_time: u64,
    boot_id: String,
    /// Of the bridge that it listens on: one that was made anew is another.
    bridge_index: u32,
}

struct Place {
    directory: PathBuf,
}

fn place(networks: &Path, mark: &Mark) -> Place {
    Place { directory: networks.join("services").join(format!("{}.{}", mark.set, mark.owner.name)) }
}

/// Whose directory this is. (No name of a set or an object has a dot.)
fn owner(directory: &Path) -> Option<Mark> {
    let (set, network) = directory.file_name()?.to_str()?.split_once('.')?;
    Some(Mark::new(set.parse().ok()?, ObjectId::new(Kind::Network, network.parse().ok()?)))
}

impl Place {
    fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn record(&self) -> io::Result<Option<Record>> {
        match std::fs::read(self.file(RECORD)) {
            Ok(text) => serde_json::from_slice(&text).map(Some).map_err(io::Error::other),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn write(&self, record: &Record) -> io::Result<()> {
        replace_file(&self.directory, RECORD, &serde_json::to_vec(record)?)
    }

    /// The argument by which a process shows that it serves this network.
    fn argument(&self) -> String {
        format!("--conf-file={}", self.file("dnsmasq.conf").display())
    }

    fn leases(&self) -> io::Result<Vec<Lease>> {
        use std::io::Read as _;
        let file = match File::open(self.file(LEASES)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut text = Vec::new();
        file.take(LEASES_BYTES_MAX).read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).lines().filter_map(parse_lease).collect())
    }

    /// Processes that serve this network, whatever is recorded.
    fn strays(&self) -> io::Result<Vec<i32>> {
        let argument = self.argument();
        let mut found = Vec::new();
        for entry in std::fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
                continue;
            };
            let Ok(arguments) = std::fs::read(entry.path().join("cmdline")) else { continue };
            let mut words = arguments.split(|byte| *byte == 0);
            let is_dnsmasq = words.next().is_some_and(|program| program.ends_with(b"/dnsmasq"));
            if is_dnsmasq && words.any(|word| word == argument.as_bytes()) {
                found.push(pid);
            }
        }
        Ok(found)
    }
}

/// `1700000000 52:54:00:12:34:56 192.168.122.10 web 01:52:54:00:12:34:56`; `*`: it gave no name. Of
/// DHCPv6 the second word is the number of the guest's interface (its IAID).
fn parse_lease(line: &str) -> Option<Lease> {
    let mut words = line.split_whitespace();
    let (expires, client, address, name) = (words.next()?, words.next()?, words.next()?, words.next()?);
    let address: std::net::IpAddr = address.parse().ok()?;
    Some(Lease {
        expires_unix_seconds: expires.parse().ok()?,
        mac_address: if address.is_ipv4() { Some(client.parse().ok()?) } else { None },
        address,
        host_name: (name != "*").then(|| name.to_owned()),
    })
}

fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// `None`: there is no such process, or it has ended and only waits to be reaped.
fn start_time(pid: i32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, which may hold anything, ends at the last parenthesis.
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    if matches!(*fields.first()?, "Z" | "X") {
        return None;
    }
    fields.get(19)?.parse().ok()
}

impl Process {
    fn is_alive(&self) -> bool {
        boot_id().is_ok_and(|boot| boot == self.boot_id) && start_time(self.pid) == Some(self.start_time)
    }
}

/// Opened first and checked then: a pidfd can't become another process.
fn signal(pid: i32, start: u64, signal: Signal) -> io::Result<bool> {
    let Some(target) = Pid::from_raw(pid) else { return Ok(false) };
    let fd = match pidfd_open(target, PidfdFlags::empty()) {
        Ok(fd) => fd,
        Err(rustix::io::Errno::SRCH) => return Ok(false),
        Err(errno) => return Err(errno.into()),
    };
    if start_time(pid) != Some(start) {
        return Ok(false);
    }
    match pidfd_send_signal(&fd, signal) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::SRCH) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

fn stop(place: &Place) -> io::Result<()> {
    let begun = Instant::now();
    loop {
        let left = place.strays()?;
        if left.is_empty() {
            return Ok(());
        }
        let with = if begun.elapsed() < STOP_WAIT { Signal::TERM } else { Signal::KILL };
        for pid in left {
            if let Some(start) = start_time(pid) {
                signal(pid, start, with)?;
            }
        }
        if begun.elapsed() > STOP_WAIT * 2 {
            return Err(io::Error::other("its dnsmasq doesn't end"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn bridge_index(config: &ServiceConfig) -> Option<u32> {
    // (sysfs shows the network in which it was mounted, which may be another.)
    let socket =
        rustix::net::socket(rustix::net::AddressFamily::INET, rustix::net::SocketType::DGRAM, None).ok()?;
    rustix::net::netdevice::name_to_index(&socket, config.bridge.as_str()).ok()
}

pub fn observe(networks: &Path) -> Observed<BTreeMap<Mark, Service>> {
    let look = || -> io::Result<_> {
        let mut services = BTreeMap::new();
        let entries = match std::fs::read_dir(networks.join("services")) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(services),
            Err(error) => return Err(error),
        };
        for entry in entries {
            let place = Place { directory: entry?.path() };
            let Some(mark) = owner(&place.directory) else { continue };
            let (config, process) = match place.record()? {
                Some(record) => (record.applied, record.process),
                None => (None, None),
            };
            let same_bridge = |process: &Process| {
                config.as_ref().is_none_or(|config| bridge_index(config) == Some(process.bridge_index))
            };
            let alive = process.filter(|process| process.is_alive() && same_bridge(process));
            let pid = alive.map(|process| process.pid);
            services.insert(mark, Service { config, pid, leases: place.leases()? });
        }
        Ok(services)
    };
    look().map_err(|error| ObserveError::new("look at the networks' DHCP and DNS services", error))
}

pub fn set(networks: &Path, mark: &Mark, config: &ServiceConfig) -> Result<(), StepError> {
    let what = || format!("run dnsmasq for {}", mark.owner);
    let failed = |error: io::Error| StepError::failed(what(), error);
    let program = find_program("dnsmasq")
        .ok_or_else(|| StepError::Lacks { what: what(), capability: Capability::Dnsmasq })?;
    let place = place(networks, mark);
    prepare(networks, &place).map_err(failed)?;
    let record = place.record().map_err(failed)?;
    let process = record.as_ref().and_then(|record| record.process.clone());
    let applied = record.and_then(|record| record.applied);
    let running = process.clone().filter(|process| {
        let same = |applied: &ServiceConfig| applied.main == config.main;
        applied.as_ref().is_some_and(same)
            && process.is_alive()
            && bridge_index(config) == Some(process.bridge_index)
    });
    // Whoever is killed from here on leaves a process of which nobody knows what it was given.
    let changing = Record { applied: None, process };
    place.write(&changing).map_err(failed)?;
    for (name, content) in
        [("dnsmasq.conf", &config.main), ("hosts", &config.hosts), ("names", &config.names)]
    {
        write_readable(&place, name, content).map_err(failed)?;
    }
    let process = match running {
        Some(process) => {
            signal(process.pid, process.start_time, Signal::HUP).map_err(failed)?;
            process
        }
        None => {
            stop(&place).map_err(failed)?;
            start(&program, &place, config).map_err(|error| StepError::Failed {
                what: what(),
                hint: error.to_string().contains("in use").then(|| {
                    "another DNS or DHCP server holds the port on this address; `ss -lunp` names it"
                        .to_owned()
                }),
                why: error.to_string(),
            })?
        }
    };
    let record = Record { applied: Some(config.clone()), process: Some(process) };
    place.write(&record).map_err(failed)
}

/// dnsmasq reads its files again when it has no rights any more.
fn prepare(networks: &Path, place: &Place) -> io::Result<()> {
    std::fs::create_dir_all(&place.directory)?;
    for directory in [networks, &networks.join("services"), &place.directory] {
        std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

fn write_readable(place: &Place, name: &str, content: &str) -> io::Result<()> {
    replace_file(&place.directory, name, content.as_bytes())?;
    std::fs::set_permissions(place.file(name), std::fs::Permissions::from_mode(0o644))
}

fn start(program: &Path, place: &Place, config: &ServiceConfig) -> io::Result<Process> {
    let bridge_index = bridge_index(config)
        .ok_or_else(|| io::Error::other(format!("the bridge {} is not there", config.bridge)))?;
    let log = File::create(place.file(LOG))?;
    let mut command = Command::new(program);
    command
        .args(["--keep-in-foreground", "--log-facility=-", "--pid-file="])
        .arg(place.argument())
        .arg(format!("--dhcp-leasefile={}", place.file(LEASES).display()))
        .arg(format!("--dhcp-hostsfile={}", place.file("hosts").display()))
        .arg(format!("--addn-hosts={}", place.file("names").display()))
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        // Not in our process group: what is typed at our terminal isn't meant for it.
        .process_group(0);
    let mut child = command.spawn()?;
    let pid = child.id() as i32;
    let begun = Instant::now();
    while begun.elapsed() < START_WAIT {
        if let Some(status) = child.try_wait()? {
            let log = std::fs::read_to_string(place.file(LOG)).unwrap_or_default();
            let last = log.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("it said nothing");
            return Err(io::Error::other(format!("it ended at once ({status}): {last}")));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    // Somebody has to take note of its end while we live; later that is init's.
    std::thread::Builder::new().name("dnsmasq".to_owned()).spawn(move || drop(child.wait()))?;
    let start_time = start_time(pid).ok_or_else(|| io::Error::other("it ended at once"))?;
    Ok(Process { pid, start_time, boot_id: boot_id()?, bridge_index })
}

pub fn remove(networks: &Path, mark: &Mark) -> Result<(), StepError> {
    let failed = |error: io::Error| StepError::failed(format!("stop dnsmasq of {}", mark.owner), error);
    let place = place(networks, mark);
    if !place.directory.exists() {
        return Ok(());
    }
    stop(&place).map_err(failed)?;
    std::fs::remove_dir_all(&place.directory).map_err(failed)?;
    // (Only if it was the last.)
    let _ = std::fs::remove_dir(networks.join("services"));
    Ok(())
}

/// A descriptor that becomes readable when the network's process ends.
pub fn watch(networks: &Path, mark: &Mark) -> Option<std::os::fd::OwnedFd> {
    let process = place(networks, mark).record().ok()??.process?;
    let fd = pidfd_open(Pid::from_raw(process.pid)?, PidfdFlags::empty()).ok()?;
    process.is_alive().then_some(fd)
}

pub fn lacks() -> Option<String> {
    find_program("dnsmasq").is_none().then(|| "the program `dnsmasq` is not there".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leases_of_both_families_are_read() {
        let read = |line: &str| {
            parse_lease(line).map(|lease| (lease.address.to_string(), lease.mac_address.is_some()))
        };
        let ipv4 = read("1700000000 52:54:00:12:34:56 192.168.122.10 web 01:52:54:00:12:34:56");
        assert_eq!(ipv4, Some(("192.168.122.10".into(), true)));
        let ipv6 = read("1700000000 305419896 fd00:122::10 web 00:02:00:00:ab:11:5b:3d");
        assert_eq!(ipv6, Some(("fd00:122::10".into(), false)));
        assert_eq!(read("duid 00:01:00:01:2a:3b:4c:5d:52:54:00:12:34:56"), None);
    }
}
