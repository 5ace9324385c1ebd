//! Whether the host forwards packets: turned on while a network needs it, and then what it was before.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{remove_file, replace_file};
use crate::host::error::ObserveError;
use crate::host::snapshot::{Forwarding, IpFamily, Observed};
use crate::name::{LinkName, Mark};

const FILE: &str = "forwarding.json";

/// What is remembered of one family.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    /// A later start of the host has settings of its own.
    boot_id: String,
    was_on: bool,
    users: BTreeSet<Mark>,
}

type Records = BTreeMap<IpFamily, Record>;

fn setting(family: IpFamily) -> &'static str {
    match family {
        IpFamily::Ipv4 => "/proc/sys/net/ipv4/ip_forward",
        IpFamily::Ipv6 => "/proc/sys/net/ipv6/conf/all/forwarding",
    }
}

fn is_on(family: IpFamily) -> io::Result<bool> {
    match std::fs::read_to_string(setting(family)) {
        Ok(text) => Ok(text.trim() != "0"),
        // A kernel without IPv6.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

fn read(directory: &Path) -> io::Result<Records> {
    match std::fs::read(directory.join(FILE)) {
        Ok(text) => serde_json::from_slice(&text).map_err(io::Error::other),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Records::new()),
        Err(error) => Err(error),
    }
}

fn write(directory: &Path, records: &Records) -> io::Result<()> {
    if records.is_empty() {
        return remove_file(&directory.join(FILE));
    }
    replace_file(directory, FILE, &serde_json::to_vec(records)?)
}

pub fn observe(directory: &Path) -> Observed<BTreeMap<IpFamily, Forwarding>> {
    let look = || -> io::Result<_> {
        let mut records = read(directory)?;
        let mut facts = BTreeMap::new();
        for family in IpFamily::ALL {
            let on = is_on(family)?;
            let default_route_by_ra =
                if family == IpFamily::Ipv6 && !on { default_route_by_ra()? } else { None };
            let users = records.remove(&family).map(|record| record.users).unwrap_or_default();
            facts.insert(family, Forwarding { on, users, default_route_by_ra });
        }
        Ok(facts)
    };
    look().map_err(|error| ObserveError::new("read whether this host forwards packets", error))
}

/// What was is noted before it is changed: who is killed in between loses nothing.
pub fn require(directory: &Path, family: IpFamily, mark: &Mark) -> io::Result<()> {
    let (mut records, boot_id) = (read(directory)?, boot_id()?);
    let record = records.entry(family).or_default();
    if record.boot_id != boot_id {
        (record.boot_id, record.was_on) = (boot_id, is_on(family)?);
    }
    record.users.insert(mark.clone());
    write(directory, &records)?;
    set(family, true)
}

pub fn release(directory: &Path, family: IpFamily, mark: &Mark) -> io::Result<()> {
    let mut records = read(directory)?;
    let Some(record) = records.get_mut(&family) else { return Ok(()) };
    let only = BTreeSet::from([mark.clone()]);
    if record.users.is_subset(&only) {
        // Put back first, forgotten then: the other way round a crash would leave it on for ever.
        if !record.was_on && record.boot_id == boot_id()? {
            set(family, false)?;
        }
        records.remove(&family);
    } else {
        record.users.remove(mark);
    }
    write(directory, &records)
}

fn set(family: IpFamily, on: bool) -> io::Result<()> {
    // To write what it is already would reset other settings that follow it.
    if is_on(family)? == on {
        return Ok(());
    }
    std::fs::write(setting(family), if on { "1" } else { "0" })
}

/// The link whose router advertisements gave the default route, if it heeds none once the host is a router.
fn default_route_by_ra() -> io::Result<Option<LinkName>> {
    const RTF_ADDRCONF: u32 = 0x0004_0000;
    const EVEN_IF_ROUTER: &str = "2";
    // (Of this thread's network, which `/proc/net` isn't.)
    let routes = match std::fs::read_to_string("/proc/thread-self/net/ipv6_route") {
        Ok(routes) => routes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    for line in routes.lines() {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let [_, prefix_len, .., flags, link] = fields[..] else { continue };
        let by_ra = u32::from_str_radix(flags, 16).is_ok_and(|flags| flags & RTF_ADDRCONF != 0);
        if prefix_len != "00" || !by_ra {
            continue;
        }
        let Ok(link) = LinkName::parse(link) else { continue };
        let heeds = std::fs::read_to_string(format!("/proc/sys/net/ipv6/conf/{link}/accept_ra"));
        if heeds.is_ok_and(|heeds| heeds.trim() != EVEN_IF_ROUTER) {
            return Ok(Some(link));
        }
    }
    Ok(None)
}
