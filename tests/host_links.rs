//! The Linux host's links against the real kernel, each test in a network namespace of its own.

#[path = "support/host.rs"]
mod support;

use std::collections::{BTreeMap, BTreeSet};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use support::*;
use vmctl::host::Host as _;
use vmctl::host::error::StepError;
use vmctl::host::linux::{LinkEvents, capability};
use vmctl::host::snapshot::{BridgeFacts, Capability, LinkKind, PortFacts};
use vmctl::host::step::{LinkChange, NewLink, NewLinkKind, Step};
use vmctl::name::{Kind, MacAddress, Mark};

fn set(link: &str, change: LinkChange) -> Result<(), StepError> {
    run(Step::SetLink { link: name(link), change })
}

#[test]
fn a_bridge_comes_and_goes() {
    private_network();
    let new = NewLink { mtu: Some(1400), ..bridge("br0") };
    create(&new).unwrap();
    let there = link("br0");
    assert_eq!(there.mark(), Some(new.mark.clone()));
    assert_eq!(there.kind, LinkKind::Bridge(facts()));
    assert_eq!((there.mtu, there.up, there.master, there.parent), (1400, true, None, None));
    // What the iptables of the host may not judge.
    let shown = ip("-d link show br0");
    for pinned in ["nf_call_iptables 0", "nf_call_ip6tables 0", "nf_call_arptables 0"] {
        assert!(shown.contains(pinned) || !shown.contains("nf_call"), "{shown}");
    }
    delete(&new).unwrap();
    assert!(!observe().contains_key("br0"));
    delete(&new).unwrap();
}

#[test]
fn what_is_created_is_what_is_asked_for() {
    let bridges = (
        (any::<bool>(), 2..=30u32, 0..=1_000_000u32, any::<bool>()),
        proptest::option::of(68..=65535u32),
        proptest::option::of(any::<[u8; 6]>()),
        any::<bool>(),
    );
    let asked = bridges.prop_map(|((stp, delay, ageing, snooping), mtu, mac, up)| NewLink {
        kind: NewLinkKind::Bridge(BridgeFacts {
            stp,
            forward_delay_seconds: delay,
            ageing_seconds: ageing,
            multicast_snooping: snooping,
            ..facts()
        }),
        mtu,
        // Unicast, and not zero.
        mac_address: mac.map(|[first, rest @ ..]| {
            let [a, b, c, d, e] = rest;
            MacAddress([first & !1 | 2, a, b, c, d, e])
        }),
        up,
        ..bridge("br0")
    });
    let config = Config { cases: 100, failure_persistence: None, ..Config::default() };
    TestRunner::new(config)
        .run(&asked, |new| {
            // A new network takes less time than the removal of a bridge.
            private_network();
            create(&new).unwrap();
            // Again, to what is there: nothing changes.
            let there = link("br0");
            create(&new).unwrap();
            prop_assert_eq!(&there, &link("br0"));
            let NewLinkKind::Bridge(facts) = &new.kind else { unreachable!() };
            prop_assert_eq!(there.kind, LinkKind::Bridge(facts.clone()));
            prop_assert_eq!(there.mtu, new.mtu.unwrap_or(1500));
            prop_assert_eq!(there.up, new.up);
            if let Some(mac) = new.mac_address {
                prop_assert_eq!(there.mac_address, Some(mac));
            }
            Ok(())
        })
        .unwrap();
}

#[test]
fn each_setting_of_a_bridge_changes_alone() {
    private_network();
    create(&NewLink { up: false, ..bridge("br0") }).unwrap();
    let changes = [
        LinkChange::Mtu(9000),
        LinkChange::Up(true),
        LinkChange::Up(false),
        LinkChange::MacAddress(MacAddress([2, 0, 0, 0, 0, 7])),
        LinkChange::Stp(true),
        LinkChange::ForwardDelaySeconds(4),
        LinkChange::AgeingSeconds(77),
        LinkChange::MulticastSnooping(false),
    ];
    for change in changes {
        let mut expected = link("br0");
        let LinkKind::Bridge(facts) = &mut expected.kind else { panic!("{expected:?}") };
        match &change {
            LinkChange::Mtu(mtu) => expected.mtu = *mtu,
            LinkChange::Up(up) => expected.up = *up,
            LinkChange::MacAddress(mac) => expected.mac_address = Some(*mac),
            LinkChange::Stp(on) => facts.stp = *on,
            LinkChange::ForwardDelaySeconds(seconds) => facts.forward_delay_seconds = *seconds,
            LinkChange::AgeingSeconds(seconds) => facts.ageing_seconds = *seconds,
            LinkChange::MulticastSnooping(on) => facts.multicast_snooping = *on,
            other => panic!("{other:?}"),
        }
        for _ in 0..2 {
            set("br0", change.clone()).unwrap();
            assert_eq!(link("br0"), expected, "{change:?}");
        }
    }
}

#[test]
fn a_foreign_link_is_never_touched() {
    private_network();
    ip("link add br0 type bridge");
    ip("link add veth0 type veth peer name veth1");
    ip("link set veth1 alias theirs");
    create(&bridge("ours")).unwrap();
    let mut other_set = bridge("ours");
    other_set.mark.set = "other".parse().unwrap();
    let before = (observe(), ip("link show"));

    let prefix = "10.0.0.1/24".parse().unwrap();
    refused_as_not_ours(create(&bridge("br0")));
    refused_as_not_ours(create(&bridge("veth0")));
    refused_as_not_ours(create(&tap("br0", None)));
    refused_as_not_ours(create(&tap("veth1", None)));
    refused_as_not_ours(create(&other_set));
    refused_as_not_ours(delete(&other_set));
    refused_as_not_ours(delete(&bridge("br0")));
    refused_as_not_ours(delete(&bridge("veth1")));
    refused_as_not_ours(set("br0", LinkChange::Up(true)));
    refused_as_not_ours(set("veth0", LinkChange::Master(Some(name("ours")))));
    refused_as_not_ours(run(Step::AddAddress { link: name("br0"), address: prefix }));
    refused_as_not_ours(run(Step::RemoveAddress { link: name("br0"), address: prefix }));
    refused_as_not_ours(run(Step::MarkLink { link: name("veth1"), mark: mark(Kind::Bridge, "ours") }));
    run(Step::UnmarkLink { link: name("veth1"), mark: mark(Kind::Bridge, "ours") }).unwrap();
    assert_eq!(before, (observe(), ip("link show")));
}

#[test]
fn a_foreign_port_is_marked_before_it_is_used() {
    private_network();
    ip("link add veth0 type veth peer name veth1");
    ip("link add theirs type veth peer name peer");
    create(&bridge("br0")).unwrap();
    let owner = mark(Kind::Bridge, "br0");
    let port_mark = Mark::part(owner.set, owner.owner, "port-veth0");
    let mark_it = Step::MarkLink { link: name("veth0"), mark: port_mark.clone() };
    let port = PortFacts { isolated: true, hairpin: true, unicast_flood: true, ..PortFacts::default() };
    for _ in 0..2 {
        run(mark_it.clone()).unwrap();
        set("veth0", LinkChange::Master(Some(name("br0")))).unwrap();
        set("veth0", LinkChange::PortFlags(port.clone())).unwrap();
        set("veth0", LinkChange::Up(true)).unwrap();
    }
    let there = link("veth0");
    assert_eq!((there.master, there.port, there.parent), (Some(name("br0")), Some(port), None));
    // The link itself stays its owner's.
    refused_as_not_ours(set("veth0", LinkChange::Mtu(1400)));
    refused_as_not_ours(run(Step::DeleteLink { link: name("veth0"), mark: port_mark.clone() }));
    for _ in 0..2 {
        set("veth0", LinkChange::Master(None)).ok();
        run(Step::UnmarkLink { link: name("veth0"), mark: port_mark.clone() }).unwrap();
    }
    let there = link("veth0");
    assert_eq!((there.master, there.port, there.alias), (None, None, None));
}

#[test]
fn a_tap_outlives_us_and_is_in_its_bridge() {
    private_network();
    create(&bridge("br0")).unwrap();
    let port = PortFacts { isolated: true, learning: true, unicast_flood: true, ..PortFacts::default() };
    let mac = MacAddress([2, 0, 0, 0, 0, 9]);
    let new = NewLink {
        mtu: Some(1400),
        mac_address: Some(mac),
        port: Some(port.clone()),
        ..tap("tap0", Some("br0"))
    };
    for _ in 0..2 {
        create(&new).unwrap();
        let there = link("tap0");
        assert_eq!((there.mark(), there.mtu, there.up), (Some(new.mark.clone()), 1400, true));
        assert_eq!((there.kind, there.master), (LinkKind::Tap { multi_queue: false }, Some(name("br0"))));
        assert_eq!((there.port, there.mac_address), (Some(port.clone()), Some(mac)));
    }
    let shown = ip("-d link show tap0");
    assert!(shown.contains("type tap pi off vnet_hdr on persist on user root"), "{shown}");
    // A tap that can't be put where it belongs is not there at all.
    match create(&tap("tap1", Some("nowhere"))) {
        Err(StepError::Failed { why, .. }) => assert!(why.contains("nowhere"), "{why}"),
        other => panic!("{other:?}"),
    }
    let lo = create(&NewLink { master: Some(name("lo")), ..tap("tap1", None) });
    assert!(matches!(lo, Err(StepError::Failed { .. })), "{lo:?}");
    assert!(!observe().contains_key("tap1"));
    delete(&new).unwrap();
    assert!(!observe().contains_key("tap0"));
}

#[test]
fn a_declared_mtu_stays_when_ports_come() {
    private_network();
    create(&NewLink { mtu: Some(1500), ..bridge("br0") }).unwrap();
    create(&bridge("free")).unwrap();
    for (tap_name, master) in [("tap0", "br0"), ("tap1", "free")] {
        create(&NewLink { mtu: Some(1300), ..tap(tap_name, Some(master)) }).unwrap();
    }
    assert_eq!((link("br0").mtu, link("free").mtu), (1500, 1300));
}

#[test]
fn addresses_come_and_go_alone() {
    private_network();
    create(&bridge("br0")).unwrap();
    let prefix = |text: &str| text.parse().unwrap();
    let texts = ["10.0.0.1/24", "10.0.0.2/24", "10.0.0.3/24", "10.9.0.1/16", "fd00::1/64", "fe80::1/64"];
    for text in texts.iter().chain(&texts) {
        run(Step::AddAddress { link: name("br0"), address: prefix(text) }).unwrap();
    }
    // The kernel's own link-local address is nobody's declaration.
    assert!(ip("addr show br0").matches("fe80::").count() >= 1);
    assert_eq!(link("br0").addresses, texts.iter().map(|text| prefix(text)).collect());

    // The first was the primary of the second and third; the third is removed with it.
    let remove = ["10.0.0.1/24", "10.0.0.3/24", "fd00::1/64"];
    let steps = remove.map(|text| Step::RemoveAddress { link: name("br0"), address: prefix(text) });
    for _ in 0..2 {
        let results = host().run(&steps.iter().collect::<Vec<_>>());
        assert!(results.iter().all(Result::is_ok), "{results:?}");
        let left = ["10.0.0.2/24", "10.9.0.1/16", "fe80::1/64"];
        assert_eq!(link("br0").addresses, left.iter().map(|text| prefix(text)).collect());
    }
    match run(Step::AddAddress { link: name("br0"), address: prefix("fe80::1/80") }) {
        Err(error @ StepError::Failed { .. }) => {
            assert!(error.hint().is_some_and(|hint| hint.contains("prefix")), "{error:?}");
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_batch_gives_each_step_its_own_result() {
    private_network();
    ip("link add taken5 type bridge");
    let steps: Vec<Step> = (0..1000)
        .map(|number| match number {
            5 => Step::CreateLink(bridge("taken5")),
            6 => Step::SetLink { link: name("nowhere"), change: LinkChange::Up(true) },
            7 => Step::DeleteLink { link: name("nowhere"), mark: mark(Kind::Bridge, "nowhere") },
            _ => Step::CreateLink(bridge(&format!("br{number}"))),
        })
        .collect();
    let results = host().run(&steps.iter().collect::<Vec<_>>());
    assert_eq!(results.len(), steps.len());
    for (number, result) in results.iter().enumerate() {
        match number {
            5 => assert!(matches!(result, Err(StepError::NotOurs { .. })), "{result:?}"),
            6 => assert!(matches!(result, Err(StepError::Failed { .. })), "{result:?}"),
            _ => assert!(result.is_ok(), "{number}: {result:?}"),
        }
    }
    let there = observe();
    assert_eq!(there.values().filter(|link| link.mark().is_some()).count(), 997);
    assert_eq!(there["taken5"].alias, None);
}

#[test]
fn refusals_say_what_and_why() {
    private_network();
    create(&bridge("br0")).unwrap();
    let error = set("br0", LinkChange::Mtu(70_000)).unwrap_err();
    assert!(error.to_string().starts_with("set the MTU of br0 to 70000: "), "{error}");
    assert!(error.hint().is_some(), "{error:?}");
    create(&bridge("br1")).unwrap();
    let error = set("br0", LinkChange::Master(Some(name("br1")))).unwrap_err();
    assert!(error.to_string().starts_with("put br0 into br1: "), "{error}");
    assert!(error.hint().is_some(), "{error:?}");
}

/// Whatever the instant at which we die: a link carries its mark, or is not there.
#[test]
fn a_killed_creation_leaves_nothing_unmarked() {
    let mut marked = 0;
    for round in 0..40 {
        private_network();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "creates_until_it_is_killed", "--ignored", "--nocapture"])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        while observe().len() < 2 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_micros(100));
        }
        std::thread::sleep(Duration::from_micros(round * 617 % 15_000));
        child.kill().unwrap();
        child.wait().unwrap();
        // A tap that isn't persistent goes with its process.
        let links = observe();
        for (name, link) in links.iter().filter(|(name, _)| name.as_str() != "lo") {
            assert!(link.mark().is_some(), "round {round}: {name} is not marked: {link:?}");
            marked += 1;
        }
    }
    assert!(marked > 40, "only {marked} links were made: the child was killed too early to tell");
}

/// The child of the test above; in its network.
#[test]
#[ignore = "run by another test"]
fn creates_until_it_is_killed() {
    for number in 0.. {
        let steps = [
            Step::CreateLink(NewLink { mtu: Some(1400), ..bridge(&format!("b{number}")) }),
            Step::CreateLink(tap(&format!("t{number}"), None)),
        ];
        let results = host().run(&[&steps[0], &steps[1]]);
        assert!(results.iter().all(Result::is_ok), "{results:?}");
    }
}

#[test]
fn events_name_what_changed() {
    private_network();
    let mut events = LinkEvents::open().unwrap();
    assert!(!events.drain().unwrap().relevant);
    let mut named = |what: &str| -> BTreeSet<String> {
        // Link-local addresses come a moment later than the link.
        let drained = events.drain().unwrap();
        assert!(drained.relevant && !drained.overrun, "{what}: {drained:?}");
        drained.links.iter().map(|link| link.to_string()).collect()
    };
    create(&bridge("br0")).unwrap();
    assert!(named("a bridge is created").contains("br0"));
    ip("addr add 10.0.0.1/24 dev br0");
    assert!(named("an address is added").contains("br0"));
    ip("tuntap add tap0 mode tap");
    ip("link set tap0 master br0");
    assert!(named("a port is added").contains("tap0"));
    ip("link set tap0 nomaster");
    assert!(named("a port is taken out").contains("tap0"));
    ip("link set br0 mtu 1400");
    assert!(named("an MTU is changed").contains("br0"));
    ip("link del br0");
    assert!(named("a bridge is deleted").contains("br0"));
}

#[test]
fn what_the_host_lacks_is_what_it_refuses() {
    private_network();
    let lacks: BTreeMap<Capability, String> =
        Capability::ALL.into_iter().filter_map(|one| Some((one, capability::lacks(one)?))).collect();
    assert_eq!(observe().len(), 1, "the probes left something");
    let can = |arguments: &str| {
        Command::new("ip").args(arguments.split(' ')).stderr(Stdio::null()).status().unwrap().success()
    };
    let bridges = can("link add br0 type bridge");
    assert_eq!(lacks.contains_key(&Capability::Bridge), !bridges);
    assert_eq!(
        lacks.contains_key(&Capability::Vlan),
        !can("link add link br0 name br0.2 type vlan id 2"),
        "{lacks:?}"
    );
    assert_eq!(
        lacks.contains_key(&Capability::VlanFiltering),
        !can("link add br1 type bridge vlan_filtering 1"),
        "{lacks:?}"
    );
    assert_eq!(lacks.contains_key(&Capability::Tun), !can("tuntap add tap0 mode tap"));
    assert_eq!(lacks.contains_key(&Capability::Kvm), !std::path::Path::new("/dev/kvm").exists());
    // Steps that need them say the same.
    let filtering = BridgeFacts { vlan_filtering: true, ..facts() };
    let new = NewLink { kind: NewLinkKind::Bridge(filtering), ..bridge("br2") };
    match (create(&new), capability::lacks(Capability::VlanFiltering)) {
        (Ok(()), None) => {}
        (Err(StepError::Lacks { capability: Capability::VlanFiltering, .. }), Some(_)) => {
            assert!(!observe().contains_key("br2"));
        }
        other => panic!("{other:?}"),
    }
}

/// Looking at everything while everything changes gives a whole picture, or none.
#[test]
fn a_look_under_change_is_whole() {
    private_network();
    let steady: Vec<Step> = (0..300).map(|n| Step::CreateLink(bridge(&format!("steady{n}")))).collect();
    assert!(host().run(&steady.iter().collect::<Vec<_>>()).iter().all(Result::is_ok));
    let mut stranger = Command::new("sh")
        .args(["-c", "i=0; while ip link add x$i type veth peer y$i && ip link del x$i; do i=$((i+1)); done"])
        .spawn()
        .unwrap();
    for _ in 0..100 {
        let seen = observe().keys().filter(|name| name.as_str().starts_with("steady")).count();
        assert_eq!(seen, 300);
    }
    stranger.kill().unwrap();
    stranger.wait().unwrap();
}
