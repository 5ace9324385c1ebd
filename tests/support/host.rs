//! What tests of the Linux host share: a network of one's own, and links to be made in it.

#![allow(dead_code)] // Each test binary uses a part.

#[path = "lab.rs"]
pub mod lab;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;

use vmctl::host::error::StepError;
use vmctl::host::linux::{LinuxHost, links};
use vmctl::host::snapshot::{BridgeFacts, Link};
use vmctl::host::step::{NewLink, NewLinkKind, Step};
use vmctl::host::{Host as _, Snapshot};
use vmctl::name::{Kind, LinkName, Mark, ObjectId};

/// Moves this thread, and what it starts, into a network namespace of its own. There is nothing in it
/// but a loopback that is down; it goes with the thread.
pub fn private_network() {
    // SAFETY: only this test's thread changes its network namespace; nothing else is unshared.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }
        .expect("tests of the host need root");
    let links = links::observe().unwrap();
    assert_eq!(links.keys().map(LinkName::as_str).collect::<Vec<_>>(), ["lo"]);
}

pub fn host() -> LinuxHost {
    LinuxHost::new(scratch("state"), scratch("run"), "/nonexistent/vmctl-vmm")
}

/// A path for this test alone.
pub fn scratch(name: &str) -> PathBuf {
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("test").replace("::", "-");
    std::env::temp_dir().join(format!("vmctl-{}-{test}-{name}", std::process::id()))
}

pub fn name(text: &str) -> LinkName {
    LinkName::parse(text).unwrap()
}

pub fn mark(kind: Kind, name: &str) -> Mark {
    Mark::new("default".parse().unwrap(), ObjectId::new(kind, name.parse().unwrap()))
}

pub fn facts() -> BridgeFacts {
    BridgeFacts {
        stp: false,
        forward_delay_seconds: 15,
        ageing_seconds: 300,
        vlan_filtering: false,
        default_pvid: 0,
        multicast_snooping: true,
    }
}

pub fn bridge(link: &str) -> NewLink {
    NewLink {
        name: name(link),
        mark: mark(Kind::Bridge, link),
        kind: NewLinkKind::Bridge(facts()),
        mtu: None,
        mac_address: None,
        master: None,
        port: None,
        up: true,
    }
}

pub fn tap(link: &str, master: Option<&str>) -> NewLink {
    let owner = mark(Kind::VirtualMachine, "web");
    NewLink {
        mark: Mark::part(owner.set, owner.owner, "net0"),
        kind: NewLinkKind::Tap { multi_queue: false },
        master: master.map(name),
        ..bridge(link)
    }
}

/// One step in a batch of its own.
pub fn run(step: Step) -> Result<(), StepError> {
    let mut results = host().run(&[&step]);
    assert_eq!(results.len(), 1);
    results.remove(0)
}

pub fn create(new: &NewLink) -> Result<(), StepError> {
    run(Step::CreateLink(new.clone()))
}

pub fn delete(new: &NewLink) -> Result<(), StepError> {
    run(Step::DeleteLink { link: new.name.clone(), mark: new.mark.clone() })
}

pub fn snapshot() -> Snapshot {
    host().snapshot(&Default::default())
}

pub fn observe() -> BTreeMap<LinkName, Link> {
    links::observe().unwrap()
}

pub fn link(link: &str) -> Link {
    observe().remove(link).unwrap_or_else(|| panic!("{link} is not there"))
}

/// Runs `ip`, as a stranger would.
pub fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
pub fn refused_as_not_ours(result: Result<(), StepError>) {
    match result {
        Err(StepError::NotOurs { .. }) => {}
        other => panic!("{other:?}"),
    }
}
