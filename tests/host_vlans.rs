//! VLAN devices and VLAN-filtering bridges. Where this kernel lacks them, each test runs in the lab.

#[path = "support/host.rs"]
mod support;

use std::collections::BTreeMap;

use support::lab::has_or_ran_in_lab;
use support::*;
use vmctl::host::Host as _;
use vmctl::host::error::StepError;
use vmctl::host::linux::LinkEvents;
use vmctl::host::snapshot::{BridgeFacts, Capability, LinkKind, PortFacts, VlanFlags, VlanProtocol};
use vmctl::host::step::{LinkChange, NewLink, NewLinkKind, Step};
use vmctl::name::{Kind, VlanId};

const VLAN: &[Capability] = &[Capability::Bridge, Capability::Vlan];
const FILTERING: &[Capability] = &[Capability::Bridge, Capability::VlanFiltering, Capability::Tun];

fn vid(id: u64) -> VlanId {
    VlanId::new(id).unwrap()
}

fn vlan(link: &str, parent: &str, id: u64) -> NewLink {
    NewLink {
        name: name(link),
        kind: NewLinkKind::Vlan { parent: name(parent), id: vid(id), protocol: VlanProtocol::Ieee8021Q },
        mark: mark(Kind::Vlan, &link.replace('.', "-")),
        ..bridge("template")
    }
}

fn set(link: &str, change: LinkChange) -> Result<(), StepError> {
    run(Step::SetLink { link: name(link), change })
}

#[test]
fn a_vlan_device_comes_and_goes() {
    if !has_or_ran_in_lab(VLAN) {
        return;
    }
    private_network();
    ip("link add eth0 type veth peer name switch");
    create(&bridge("brvlan10")).unwrap();
    // A VLAN device is up no longer than its parent.
    let down = create(&vlan("eth0.9", "eth0", 9)).unwrap_err();
    assert!(down.hint().is_some_and(|hint| hint.contains("parent is down")), "{down:?}");
    ip("link set eth0 up");
    create(&vlan("eth0.9", "eth0", 9)).unwrap();
    let new = NewLink { master: Some(name("brvlan10")), mtu: Some(1400), ..vlan("eth0.10", "eth0", 10) };
    for _ in 0..2 {
        create(&new).unwrap();
        let there = link("eth0.10");
        assert_eq!(there.kind, LinkKind::Vlan { id: vid(10), protocol: VlanProtocol::Ieee8021Q });
        assert_eq!((there.parent, there.master), (Some(name("eth0")), Some(name("brvlan10"))));
        assert_eq!(there.alias, Some(new.mark.to_string()));
        assert_eq!((there.up, there.mtu), (true, 1400));
    }
    let service = NewLink {
        kind: NewLinkKind::Vlan { parent: name("eth0"), id: vid(4094), protocol: VlanProtocol::Ieee8021Ad },
        ..vlan("s4094", "eth0", 4094)
    };
    create(&service).unwrap();
    let kind = LinkKind::Vlan { id: vid(4094), protocol: VlanProtocol::Ieee8021Ad };
    assert_eq!(link("s4094").kind, kind);

    // Refusals, and what to do about them.
    let twin = create(&vlan("twin", "eth0", 10)).unwrap_err();
    assert!(twin.hint().is_some_and(|hint| hint.contains("another name")), "{twin:?}");
    let large = set("eth0.10", LinkChange::Mtu(1600)).unwrap_err();
    assert!(large.hint().is_some_and(|hint| hint.contains("parent")), "{large:?}");
    let large = create(&NewLink { mtu: Some(1600), ..vlan("eth0.20", "eth0", 20) }).unwrap_err();
    assert!(large.hint().is_some_and(|hint| hint.contains("parent")), "{large:?}");
    let changed = create(&NewLink { kind: vlan("x", "eth0", 11).kind, ..new.clone() }).unwrap_err();
    assert!(changed.to_string().contains("another kind"), "{changed}");
    assert!(create(&vlan("lost", "nowhere", 5)).unwrap_err().to_string().contains("nowhere"));
    // Under a foreign VLAN's name.
    ip("link add link eth0 name eth0.30 type vlan id 30");
    refused_as_not_ours(create(&vlan("eth0.30", "eth0", 30)));
    assert_eq!(link("eth0.30").alias, None);

    delete(&new).unwrap();
    delete(&new).unwrap();
    assert!(!observe().contains_key("eth0.10"));
}

#[test]
fn a_filtering_bridge_has_just_the_vlans_asked_for() {
    if !has_or_ran_in_lab(FILTERING) {
        return;
    }
    private_network();
    let facts = BridgeFacts { vlan_filtering: true, ..facts() };
    create(&NewLink { kind: NewLinkKind::Bridge(facts.clone()), ..bridge("br0") }).unwrap();
    let with_default = BridgeFacts { default_pvid: 7, ..facts.clone() };
    create(&NewLink { kind: NewLinkKind::Bridge(with_default.clone()), ..bridge("br7") }).unwrap();
    assert_eq!(link("br0").kind, LinkKind::Bridge(facts.clone()));
    assert_eq!(link("br7").kind, LinkKind::Bridge(with_default));

    let access = VlanFlags { pvid: true, untagged: true };
    let tagged = VlanFlags::default();
    let memberships: [BTreeMap<VlanId, VlanFlags>; 5] = [
        BTreeMap::new(),
        [(vid(10), access)].into(),
        [(vid(1), access), (vid(10), tagged), (vid(11), tagged), (vid(12), tagged), (vid(4094), tagged)]
            .into(),
        (1..=4094).map(|id| (vid(id), tagged)).collect(),
        (1..=4094).step_by(2).map(|id| (vid(id), tagged)).collect(),
    ];
    for master in ["br0", "br7"] {
        for (number, vlans) in memberships.iter().enumerate() {
            let port = PortFacts { learning: true, vlans: vlans.clone(), ..PortFacts::default() };
            let new =
                NewLink { port: Some(port.clone()), ..tap(&format!("{master}t{number}"), Some(master)) };
            create(&new).unwrap();
            assert_eq!(link(new.name.as_str()).port, Some(port));
        }
        // From any membership to any other.
        for vlans in memberships.iter().chain(memberships.iter().rev()) {
            let port = PortFacts { learning: true, vlans: vlans.clone(), ..PortFacts::default() };
            for _ in 0..2 {
                set(&format!("{master}t1"), LinkChange::PortVlans(port.clone())).unwrap();
                assert_eq!(link(&format!("{master}t1")).port.as_ref(), Some(&port));
            }
        }
    }
    let shown = String::from_utf8(
        std::process::Command::new("bridge").args(["vlan", "show", "dev", "br0t2"]).output().unwrap().stdout,
    );
    let shown = shown.unwrap();
    assert!(shown.contains("1 PVID Egress Untagged") && shown.contains("4094"), "{shown}");

    // Filtering off and on again, and another default.
    set("br0", LinkChange::VlanFiltering(false)).unwrap();
    assert!(link("br0t2").port.unwrap().vlans.is_empty());
    set("br0", LinkChange::VlanFiltering(true)).unwrap();
    set("br0", LinkChange::DefaultPvid(9)).unwrap();
    assert_eq!(link("br0").kind, LinkKind::Bridge(BridgeFacts { default_pvid: 9, ..facts }));
}

#[test]
fn changes_of_vlans_are_events() {
    if !has_or_ran_in_lab(FILTERING) {
        return;
    }
    private_network();
    let facts = BridgeFacts { vlan_filtering: true, ..facts() };
    create(&NewLink { kind: NewLinkKind::Bridge(facts), ..bridge("br0") }).unwrap();
    create(&tap("tap0", Some("br0"))).unwrap();
    let mut events = LinkEvents::open().unwrap();
    assert!(
        std::process::Command::new("bridge")
            .args(["vlan", "add", "dev", "tap0", "vid", "100"])
            .status()
            .unwrap()
            .success()
    );
    let drained = events.drain().unwrap();
    assert!(drained.relevant && drained.links.contains("tap0"), "{drained:?}");
}

#[test]
fn many_vlans_are_made_in_one_batch() {
    if !has_or_ran_in_lab(VLAN) {
        return;
    }
    private_network();
    ip("link add eth0 up type veth peer name switch");
    let steps: Vec<Step> =
        (1..=500).map(|id| Step::CreateLink(vlan(&format!("eth0.{id}"), "eth0", id))).collect();
    let results = host().run(&steps.iter().collect::<Vec<_>>());
    assert!(results.iter().all(Result::is_ok), "{:?}", results.iter().find(|result| result.is_err()));
    let there = observe();
    assert_eq!(there.values().filter(|link| link.parent.as_ref() == Some(&name("eth0"))).count(), 500);
    // The parent takes them along.
    ip("link del eth0");
    assert!(observe().keys().all(|link| !link.as_str().starts_with("eth0.")));
}
