//! Networks planned against the simulated host.

#[path = "support/objects.rs"]
mod objects;

use expect_test::{Expect, expect};
use objects::*;
use serde_json::json;
use vmctl::execute::execute;
use vmctl::host::Host as _;
use vmctl::host::sim::{Faults, SimHost};
use vmctl::host::snapshot::{Capability, IpFamily, Rule};
use vmctl::host::step::Step;
use vmctl::plan::{Plan, Policy, Removal, plan};
use vmctl::report::text::{self, Style};

fn networks() -> Objects {
    objects(&[(
        "Network/lab",
        json!({
            "bridge": "virbr0",
            "ipv4": {"address": "192.168.100.1/24", "dhcp": {"start": "192.168.100.50", "options": [{"number": 42, "value": "192.168.100.1"}]}},
            "ipv6": {"address": "fd00:100::1/64", "routerAdvertisements": true},
            "dns": {"domain": "lab.internal", "forwarders": ["192.0.2.53"]},
            "portForwards": [{"port": 8080, "to": "192.168.100.10", "toPort": 80}],
        }),
    )])
}

fn with_vm() -> Objects {
    let mut all = networks();
    let vm = json!({
        "memory": "64Mi",
        "boot": {"kernel": "/boot/vmlinux"},
        "interfaces": [{"network": "lab", "addresses": ["192.168.100.10", "fd00:100::10"]}],
    });
    all.insert(id("VirtualMachine/web"), vm);
    all
}

fn prune() -> Policy {
    Policy { removal: Removal::Prune, ..Policy::default() }
}

fn diff(objects: &Objects, host: &SimHost) -> Plan {
    let desired = desire(objects);
    plan(&desired, &host.snapshot(&desired.scope()), &prune())
}

fn text_of(plan: &Plan) -> String {
    text::plan(plan, Style::default())
}

fn converge(objects: &Objects, host: &SimHost) {
    for _ in 0..4 {
        let plan = diff(objects, host);
        if !plan.has_steps() {
            break;
        }
        execute(&plan, host, &mut |_| {});
    }
    let plan = diff(objects, host);
    assert!(plan.is_empty(), "{}", text_of(&plan));
}

fn check(objects: &Objects, host: &SimHost, expected: Expect) {
    expected.assert_eq(&text_of(&diff(objects, host)));
    converge(objects, host);
}

fn forwards(host: &SimHost) -> Vec<bool> {
    let seen = host.snapshot(&Default::default()).forwarding.unwrap();
    IpFamily::ALL.iter().map(|family| seen[family].on).collect()
}

#[test]
fn a_network_and_its_guest_are_made_in_one_run_and_go_without_a_trace() {
    let host = host();
    let before = host.snapshot(&Default::default());
    let plan = diff(&with_vm(), &host);
    assert_eq!(
        text_of(&plan),
        "+ Network/lab         NAT network, 192.168.100.1/24, fd00:100::1/64, 1 port forward\n\
         + VirtualMachine/web  1 vCPU, 64Mi, 0 disks, 1 NIC\n\
         Plan: 2 to create. Downtime: none.\n"
    );
    let outcomes = execute(&plan, &host, &mut |_| {});
    assert!(outcomes.values().all(|outcome| outcome.is_done()), "{outcomes:#?}");
    let again = diff(&with_vm(), &host);
    assert!(again.is_empty(), "{}", text_of(&again));
    assert_eq!(forwards(&host), [true, true]);
    let seen = host.snapshot(&Default::default());
    let links = seen.links.unwrap();
    assert_eq!(links[&link("web.net0")].master, Some(link("virbr0")));
    assert_eq!(links[&link("virbr0")].addresses.len(), 2);

    converge(&Objects::new(), &host);
    assert_eq!(host.snapshot(&Default::default()), before);
}

#[test]
fn each_drift_is_named_and_healed() {
    let host = host();
    converge(&with_vm(), &host);
    host.edit(|world| {
        let tables = world.tables.as_mut().unwrap();
        let table = tables.values_mut().next().unwrap();
        table.chains.get_mut("postrouting").unwrap().rules.remove(0);
        let rogue = Rule { comment: "rogue".into(), expr: vec![json!({"accept": null})] };
        table.chains.get_mut("forward").unwrap().rules.insert(0, rogue);
        let forwarding = world.forwarding.as_mut().unwrap();
        forwarding.get_mut(&IpFamily::Ipv4).unwrap().on = false;
        let links = world.links.as_mut().unwrap();
        links.get_mut(&link("virbr0")).unwrap().addresses.clear();
        links.get_mut(&link("web.net0")).unwrap().master = None;
    });
    check(
        &with_vm(),
        &host,
        expect![[r#"
            ~ Network/lab         NAT network, 192.168.100.1/24, fd00:100::1/64, 1 port forward
                  nftables.forward      rogue → none                            live
                  nftables.postrouting  none → IPv4 port forwards among guests  live
                  addresses             none → 192.168.100.1/24                 live
                  addresses             none → fd00:100::1/64                   live
                  forwarding.IPv4       off → on                                live
            ~ VirtualMachine/web  1 vCPU, 64Mi, 0 disks, 1 NIC
                  interfaces[net0].bridge  none → virbr0  live
            Plan: 2 to update live. Downtime: none.
        "#]],
    );
}

#[test]
fn modes_and_bridges_change_live() {
    let host = host();
    let mut all = networks();
    converge(&all, &host);
    let spec = all.get_mut(&id("Network/lab")).unwrap();
    *spec = json!({"bridge": "lab0", "mode": "isolated", "ipv4": {"address": "192.168.100.1/24"}});
    converge(&all, &host);
    assert_eq!(forwards(&host), [false, false]);
    let links = host.snapshot(&Default::default()).links.unwrap();
    assert!(links.contains_key(&link("lab0")) && !links.contains_key(&link("virbr0")));

    // Onto a Bridge that is declared, and off it again.
    all.insert(id("Bridge/lab0"), json!({"addresses": ["10.9.9.9/24"]}));
    converge(&all, &host);
    let addresses = |host: &SimHost| {
        let links = host.snapshot(&Default::default()).links.unwrap();
        links[&link("lab0")].addresses.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(addresses(&host), ["10.9.9.9/24", "192.168.100.1/24"]);
    all.remove(&id("Network/lab"));
    converge(&all, &host);
    assert_eq!(addresses(&host), ["10.9.9.9/24"]);
}

#[test]
fn forwarding_stays_for_whom_else_needs_it_and_as_it_was() {
    for was_on in [false, true] {
        let host = host();
        host.edit(|world| {
            world.forwarding.as_mut().unwrap().get_mut(&IpFamily::Ipv4).unwrap().on = was_on;
        });
        let mut all = networks();
        all.insert(id("Network/other"), json!({"mode": "routed", "ipv4": {"address": "10.7.0.1/24"}}));
        converge(&all, &host);
        all.remove(&id("Network/lab"));
        converge(&all, &host);
        assert_eq!(forwards(&host), [true, false]);
        all.remove(&id("Network/other"));
        converge(&all, &host);
        assert_eq!(forwards(&host), [was_on, false]);
    }
}

#[test]
fn a_crash_at_any_step_leaves_nothing_behind() {
    let steps = {
        let host = host();
        converge(&with_vm(), &host);
        converge(&Objects::new(), &host);
        host.steps_run()
    };
    for at in 1..=steps {
        for before in [true, false] {
            let host = host();
            let start = host.snapshot(&Default::default());
            let crash = if before {
                Faults { crash_before: Some(at), ..Faults::default() }
            } else {
                Faults { crash_after: Some(at), ..Faults::default() }
            };
            host.set_faults(crash);
            execute(&diff(&with_vm(), &host), &host, &mut |_| {});
            execute(&diff(&Objects::new(), &host), &host, &mut |_| {});
            host.set_faults(Faults::default());
            converge(&with_vm(), &host);
            converge(&Objects::new(), &host);
            assert_eq!(host.snapshot(&Default::default()), start, "crash at step {at}");
        }
    }
}

#[test]
fn what_is_lacking_or_dangerous_blocks() {
    let blocked = |host: &SimHost| {
        let plan = diff(&with_vm(), host);
        assert!(!plan.has_steps(), "{}", text_of(&plan));
        plan.actions[0].blockers.iter().map(|blocker| blocker.because.clone()).collect::<String>()
    };
    let bare = host();
    bare.lack(Capability::Nftables);
    assert!(blocked(&bare).contains("lacks nftables"));

    let unseen = host();
    unseen.set_faults(Faults { tables_unseen: true, ..Faults::default() });
    assert!(blocked(&unseen).contains("could not look"));

    let by_ra = host();
    by_ra.edit(|world| {
        let ipv6 = world.forwarding.as_mut().unwrap().get_mut(&IpFamily::Ipv6).unwrap();
        ipv6.default_route_by_ra = Some(link("eth0"));
    });
    assert!(blocked(&by_ra).contains("would cut this host off"));

    let taken = host();
    taken.edit(|world| world.links.as_mut().unwrap().insert(link("virbr0"), foreign_link("dummy")));
    assert!(blocked(&taken).contains("virbr0 exists, is not vmctl's"));
}

#[test]
fn the_routers_link_local_address_is_nobodys_else() {
    let taken = |objects: &Objects| {
        let host = host();
        converge(objects, &host);
        let tables = host.snapshot(&Default::default()).tables.unwrap();
        tables.values().find_map(|table| table.sets.get("ipv6").cloned()).expect("guards").elements
    };
    let mut all = with_vm();
    all.get_mut(&id("Network/lab")).unwrap()["bridge"] = json!("lab0");
    all.insert(id("Bridge/lab0"), json!({"macAddress": "52:54:00:12:34:56"}));
    let declared = taken(&all);
    assert!(declared.contains_key("fe80::5054:ff:fe12:3456"), "{declared:?}");
    // A bridge of its own has an address that is made from its name; a declared one without has any.
    assert_eq!(taken(&with_vm()).len(), declared.len());
    all.insert(id("Bridge/lab0"), json!({}));
    assert_eq!(taken(&all).len(), declared.len() - 2);
}

#[test]
fn another_sets_networks_are_left_alone() {
    let host = host();
    converge(&networks(), &host);
    let other = "other".parse().unwrap();
    let desired =
        desire_in(other, &objects(&[("Network/mine", json!({"ipv4": {"address": "10.1.0.1/24"}}))]));
    let made = plan(&desired, &host.snapshot(&desired.scope()), &prune());
    execute(&made, &host, &mut |_| {});
    let about_ours = |step: &Step| format!("{step:?}").contains("virbr0");
    assert!(!made.steps().any(|(_, step)| about_ours(step)));
    assert!(diff(&networks(), &host).is_empty());
}

#[test]
fn a_service_is_given_what_is_declared_and_nothing_of_others() {
    let host = host();
    converge(&with_vm(), &host);
    let seen = host.snapshot(&Default::default()).services.unwrap();
    let service = seen.values().next().unwrap();
    let config = service.config.as_ref().unwrap();
    expect![[r#"
        # Written by vmctl for Network/lab: change the manifest, not this.
        # 192.168.100.1/24
        # fd00:100::1/64
        bind-interfaces
        except-interface=lo
        no-hosts
        quiet-dhcp
        quiet-ra
        interface=virbr0
        domain-needed
        bogus-priv
        domain=lab.internal
        local=/lab.internal/
        expand-hosts
        no-resolv
        server=192.0.2.53
        dhcp-authoritative
        no-ping
        dhcp-range=192.168.100.50,192.168.100.254,255.255.255.0,3600
        dhcp-option=42,192.168.100.1
        enable-ra
        dhcp-range=fd00:100::,static,slaac,64,3600
    "#]]
    .assert_eq(&config.main);
    assert_eq!(config.names, "192.168.100.10 web\nfd00:100::10 web\n");
    assert!(config.hosts.ends_with(",192.168.100.10,[fd00:100::10],web\n"), "{}", config.hosts);
    let pid = service.pid;

    // A name more is told to the process that runs; a domain takes another one.
    let mut all = with_vm();
    let mut other = all[&id("VirtualMachine/web")].clone();
    other["interfaces"][0]["addresses"] = json!(["192.168.100.11"]);
    all.insert(id("VirtualMachine/db"), other);
    converge(&all, &host);
    let pid_now =
        |host: &SimHost| host.snapshot(&Default::default()).services.unwrap().values().next().unwrap().pid;
    assert_eq!(pid_now(&host), pid);
    all.get_mut(&id("Network/lab")).unwrap()["dns"]["domain"] = json!("other.internal");
    converge(&all, &host);
    assert_ne!(pid_now(&host), pid);

    // One that died is started; a host without dnsmasq has the network all the same, and says so.
    host.edit(|world| world.services.as_mut().unwrap().values_mut().for_each(|service| service.pid = None));
    assert!(text_of(&diff(&all, &host)).contains("dnsmasq  not running → running"));
    converge(&all, &host);
    let bare = objects::host();
    bare.lack(Capability::Dnsmasq);
    execute(&diff(&networks(), &bare), &bare, &mut |_| {});
    let plan = diff(&networks(), &bare);
    assert!(plan.is_blocked() && text_of(&plan).contains("dnsmasq-base"), "{}", text_of(&plan));
    assert!(bare.snapshot(&Default::default()).links.unwrap().contains_key(&link("virbr0")));
}
