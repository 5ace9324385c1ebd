//! The planner against the simulated host: what is planned, what it comes to, and what must never be.

#[path = "support/objects.rs"]
mod objects;

use std::collections::BTreeSet;

use expect_test::{Expect, expect};
use objects::*;
use proptest::prelude::*;
use serde_json::json;
use vmctl::execute::{Outcomes, execute};
use vmctl::host::Host;
use vmctl::host::sim::{Faults, SimHost};
use vmctl::host::snapshot::{Capability, LinkKind, Snapshot};
use vmctl::name::ObjectId;
use vmctl::plan::{Plan, Policy, Removal};
use vmctl::report::text::{self, Style};
use vmctl::resolve::Desired;

fn prune() -> Policy {
    Policy { removal: Removal::Prune, ..Policy::default() }
}

fn diff(desired: &Desired, host: &SimHost, policy: &Policy) -> Plan {
    vmctl::plan::plan(desired, &host.snapshot(&desired.scope()), policy)
}

fn run(plan: &Plan, host: &SimHost) -> Outcomes {
    execute(plan, host, &mut |_| {})
}

/// Plans and runs until nothing is left to run, or five times.
fn converge(objects: &Objects, host: &SimHost, policy: &Policy) -> Plan {
    let desired = desire(objects);
    for _ in 0..5 {
        let plan = diff(&desired, host, policy);
        if !plan.has_steps() {
            return plan;
        }
        run(&plan, host);
    }
    diff(&desired, host, policy)
}

fn applied(objects: &Objects) -> SimHost {
    let host = host();
    let plan = converge(objects, &host, &Policy::default());
    assert!(plan.is_empty(), "{}", text::plan(&plan, Style::default()));
    host
}

fn everything() -> vmctl::host::Scope {
    desire(&tutorial()).scope()
}

/// The plan's text for these objects on this host.
fn check(objects: &Objects, host: &SimHost, policy: &Policy, expected: Expect) {
    let plan = diff(&desire(objects), host, policy);
    expected.assert_eq(&text::plan(&plan, Style::default()));
}

/// As `check`; then the plan is applied, and the next one must be empty.
fn check_applies(objects: &Objects, host: &SimHost, policy: &Policy, expected: Expect) {
    check(objects, host, policy, expected);
    let plan = converge(objects, host, policy);
    assert!(plan.is_empty(), "{}", text::plan(&plan, Style::default()));
}

#[test]
fn the_tutorial_is_made_in_one_run() {
    let host = host();
    let plan = diff(&desire(&tutorial()), &host, &Policy::default());
    let outcomes = run(&plan, &host);
    assert!(outcomes.values().all(|outcome| outcome.is_done()), "{outcomes:#?}");
    assert_eq!(outcomes.len(), 15);
    let again = diff(&desire(&tutorial()), &host, &prune());
    assert!(again.is_empty(), "{}", text::plan(&again, Style::default()));
}

#[test]
fn drift_is_named_exactly_and_healed_exactly() {
    let host = applied(&tutorial());
    host.edit(|world| {
        let links = world.links.as_mut().unwrap();
        links.remove(&link("brvlan10"));
        for port in ["eth0.10", "vm1.net0", "vm2.net0"] {
            let port = links.get_mut(&link(port)).unwrap();
            port.master = None;
            port.port = None;
        }
        links.get_mut(&link("vm3.net0")).unwrap().master = None;
        links.get_mut(&link("eth0.20")).unwrap().mtu = 1400;
        world.vms.as_mut().unwrap().get_mut("vm2").unwrap().process = None;
    });
    check_applies(
        &tutorial(),
        &host,
        &prune(),
        expect![[r#"
            + Bridge/brvlan10     bridge, mtu 1500
            ~ Vlan/eth0-10        eth0.10 on eth0, VLAN 10, port of brvlan10
                  bridge  none → brvlan10  live
            ~ Vlan/eth0-20        eth0.20 on eth0, VLAN 20, port of brvlan20
                  mtu  1400 → 1500  live
            ~ VirtualMachine/vm1  1 vCPU, 256Mi, 2 disks, 1 NIC
                  interfaces[net0].bridge  none → brvlan10  live
            ~ VirtualMachine/vm2  not running
                  status.phase             Stopped → Running  live
                  interfaces[net0].bridge  none → brvlan10    live
            ~ VirtualMachine/vm3  1 vCPU, 256Mi, 2 disks, 1 NIC
                  interfaces[net0].bridge  none → brvlan20  live
            Plan: 1 to create, 5 to update live. Downtime: none.
        "#]],
    );
}

#[test]
fn a_deleted_tap_is_given_back_to_the_running_guest() {
    let host = applied(&tutorial());
    host.edit(|world| world.links.as_mut().unwrap().remove(&link("vm1.net0")));
    check_applies(
        &tutorial(),
        &host,
        &prune(),
        expect![[r#"
            ~ VirtualMachine/vm1  1 vCPU, 256Mi, 2 disks, 1 NIC
                  interfaces[net0].tap  none → vm1.net0  live
            Plan: 1 to update live. Downtime: none.
        "#]],
    );
}

#[test]
fn memory_is_staged_unless_a_restart_is_allowed() {
    let mut objects = tutorial();
    let host = applied(&objects);
    objects.get_mut(&id("VirtualMachine/vm1")).unwrap()["memory"] = json!("512Mi");
    check_applies(
        &objects,
        &host,
        &prune(),
        expect![[r#"
            ~ VirtualMachine/vm1  staged: restartPolicy is Never
                  memory  256Mi → 512Mi  staged
            Plan: 1 staged. Downtime: none.
        "#]],
    );
    check(
        &objects,
        &host,
        &prune(),
        expect![[r#"
              VirtualMachine/vm1  1 vCPU, 512Mi, 2 disks, 1 NIC
                  note: memory 512Mi takes effect at the next start
            No differences (15 objects).
        "#]],
    );
    objects.get_mut(&id("VirtualMachine/vm1")).unwrap()["restartPolicy"] = json!("Allowed");
    check_applies(
        &objects,
        &host,
        &prune(),
        expect![[r#"
            ~ VirtualMachine/vm1  the guest must restart for this, and restartPolicy allows it
                  memory  256Mi → 512Mi  restart
            Plan: 1 to restart. Downtime: vm1 restart.
        "#]],
    );
}

#[test]
fn a_volume_grows_live_and_never_shrinks() {
    let mut objects = tutorial();
    let host = applied(&objects);
    objects.get_mut(&id("Volume/vm1-root")).unwrap()["capacity"] = json!("4Gi");
    check_applies(
        &objects,
        &host,
        &prune(),
        expect![[r#"
            ~ Volume/vm1-root  qcow2 4Gi in pool default, overlay on image linux
                  capacity  2Gi → 4Gi  live
            Plan: 1 to update live. Downtime: none.
        "#]],
    );
    objects.get_mut(&id("Volume/vm1-root")).unwrap()["capacity"] = json!("1Gi");
    check(
        &objects,
        &host,
        &prune(),
        expect![[r#"
            ! Volume/vm1-root  blocked: capacity 4Gi → 1Gi: a volume never shrinks, for what lies beyond would be lost
                  capacity  4Gi → 1Gi  DATA LOSS
                  hint: declare `capacity: 4Gi`, or copy the data to a new volume
            Plan: 1 blocked. Downtime: none.
        "#]],
    );
}

#[test]
fn a_nic_moves_live_and_a_vm_goes_while_its_volumes_stay() {
    let mut objects = tutorial();
    let host = applied(&objects);
    objects.get_mut(&id("VirtualMachine/vm2")).unwrap()["interfaces"][0]["bridge"] = json!("brvlan20");
    for gone in ["VirtualMachine/vm3", "Volume/vm3-root", "Volume/vm3-data"] {
        objects.remove(&id(gone));
    }
    check_applies(
        &objects,
        &host,
        &prune(),
        expect![[r#"
            - VirtualMachine/vm3  delete: declared no more; its volumes are objects of their own
            . Volume/vm3-data     retain: declared no more; the data stays where it is
            . Volume/vm3-root     retain: declared no more; the data stays where it is
            ~ VirtualMachine/vm2  1 vCPU, 256Mi, 2 disks, 1 NIC
                  interfaces[net0].bridge  brvlan10 → brvlan20  live
            Plan: 1 to update live, 1 to delete, 2 retained. Downtime: none.
        "#]],
    );
    // Declared again, the volumes are what they were.
    let objects = tutorial();
    let plan = diff(&desire(&objects), &host, &prune());
    let adopted =
        plan.actions.iter().filter(|action| action.verb == vmctl::kinds::action::Verb::Adopt).count();
    assert_eq!(adopted, 2, "{}", text::plan(&plan, Style::default()));
}

#[test]
fn a_renamed_bridge_takes_its_ports_along() {
    let mut objects = tutorial();
    let host = applied(&objects);
    objects.remove(&id("Bridge/brvlan20"));
    objects.insert(id("Bridge/servers"), json!({}));
    objects.get_mut(&id("Vlan/eth0-20")).unwrap()["bridge"] = json!("servers");
    objects.get_mut(&id("VirtualMachine/vm3")).unwrap()["interfaces"][0]["bridge"] = json!("servers");
    check_applies(
        &objects,
        &host,
        &prune(),
        expect![[r#"
            + Bridge/servers      bridge, mtu 1500
            ~ Vlan/eth0-20        eth0.20 on eth0, VLAN 20, port of servers
                  bridge  brvlan20 → servers  live
            ~ VirtualMachine/vm3  1 vCPU, 256Mi, 2 disks, 1 NIC
                  interfaces[net0].bridge  brvlan20 → servers  live
            - Bridge/brvlan20     delete: carries the set's mark and is declared no more
            Plan: 1 to create, 2 to update live, 1 to delete. Downtime: none.
        "#]],
    );
}

#[test]
fn an_object_renamed_over_the_same_interface_keeps_it() {
    let mut objects = tutorial();
    let host = applied(&objects);
    objects.remove(&id("Bridge/brvlan20"));
    objects.insert(id("Bridge/servers"), json!({"interfaceName": "brvlan20"}));
    objects.get_mut(&id("Vlan/eth0-20")).unwrap()["bridge"] = json!("servers");
    objects.get_mut(&id("VirtualMachine/vm3")).unwrap()["interfaces"][0]["bridge"] = json!("servers");
    check_applies(
        &objects,
        &host,
        &prune(),
        expect![[r#"
            ~ Bridge/servers  bridge, mtu 1500
                  metadata.name  Bridge/brvlan20 → Bridge/servers  live
            Plan: 1 to update live. Downtime: none.
        "#]],
    );
}

#[test]
fn a_renamed_vm_hands_its_disks_over() {
    let mut objects = tutorial();
    let host = applied(&objects);
    let vm = objects.remove(&id("VirtualMachine/vm1")).unwrap();
    objects.insert(id("VirtualMachine/web"), vm);
    check_applies(
        &objects,
        &host,
        &prune(),
        expect![[r#"
            - VirtualMachine/vm1  delete: declared no more; its volumes are objects of their own
            + VirtualMachine/web  1 vCPU, 256Mi, 2 disks, 1 NIC
            Plan: 1 to create, 1 to delete. Downtime: none.
        "#]],
    );
}

#[test]
fn a_mass_removal_is_refused_until_exactly_it_is_approved() {
    let host = applied(&tutorial());
    let objects = objects(&[("Bridge/brvlan10", json!({}))]);
    let plan = diff(&desire(&objects), &host, &prune());
    assert!(plan.is_refused());
    assert!(!plan.has_steps(), "{}", text::plan(&plan, Style::default()));
    let approved = Policy { approve: Some(plan.hash.clone()), ..prune() };
    let other = Policy { approve: Some("0123456789ab".into()), ..prune() };
    assert!(!diff(&desire(&objects), &host, &other).has_steps());
    let plan = converge(&objects, &host, &approved);
    // The plan has changed after the first run, and so has its hash; nothing is left to remove.
    assert!(plan.is_empty(), "{}", text::plan(&plan, Style::default()));
    let left = host.snapshot(&everything());
    let ours = left.links.unwrap().values().filter(|link| link.mark().is_some()).count();
    assert_eq!(ours, 1);
}

#[test]
fn deleting_data_needs_the_policy_applied_earlier_and_consent() {
    let mut objects = tutorial();
    objects.insert(
        id("Volume/scratch"),
        json!({"pool": "default", "format": "raw", "capacity": "1Gi", "reclaimPolicy": "Delete"}),
    );
    let host = applied(&objects);
    objects.remove(&id("Volume/scratch"));
    let plan = diff(&desire(&objects), &host, &prune());
    assert!(plan.is_refused() && !plan.has_steps(), "{}", text::plan(&plan, Style::default()));
    let approved = Policy { approve: Some(plan.hash[..12].to_owned()), ..prune() };
    assert!(converge(&objects, &host, &approved).is_empty());
}

#[test]
fn what_this_host_lacks_blocks_only_what_needs_it() {
    let host = host();
    host.lack(Capability::Vlan);
    let plan = converge(&tutorial(), &host, &prune());
    let blocked: Vec<String> = plan
        .actions
        .iter()
        .filter(|action| !action.blockers.is_empty())
        .map(|action| action.object.to_string())
        .collect();
    assert_eq!(blocked, ["Vlan/eth0-10", "Vlan/eth0-20"]);
    assert!(text::plan(&plan, Style::default()).contains("modprobe 8021q"));
}

#[test]
fn what_could_not_be_looked_at_is_neither_made_nor_removed() {
    let host = applied(&tutorial());
    let before = host.snapshot(&everything());
    let faults = [
        Faults { links_unseen: true, ..Faults::default() },
        Faults { vms_unseen: true, ..Faults::default() },
        Faults { pools_unseen: ["default".parse().unwrap()].into(), ..Faults::default() },
    ];
    for faults in faults {
        for objects in [tutorial(), Objects::new()] {
            host.set_faults(faults.clone());
            let approve = diff(&desire(&objects), &host, &prune()).hash;
            // Keep what can be seen from being pruned: only what can't be seen is of interest here.
            let plan =
                diff(&desire(&objects), &host, &Policy { approve: Some(approve), ..Policy::default() });
            run(&plan, &host);
            host.set_faults(Faults::default());
            assert_eq!(host.snapshot(&everything()), before, "{faults:?}");
        }
    }
}

#[test]
fn an_unmarked_link_is_adopted_only_if_it_is_what_is_declared() {
    let objects = objects(&[("Bridge/br0", json!({"mtu": 9000}))]);
    let host = applied(&objects);
    let made = host.edit(|world| {
        let link = world.links.as_mut().unwrap().get_mut(&link("br0")).unwrap();
        link.alias = None;
        link.clone()
    });
    check_applies(
        &objects,
        &host,
        &prune(),
        expect![[r#"
            = Bridge/br0  adopt: br0 exists and already is what is declared
            Plan: 1 to adopt. Downtime: none.
        "#]],
    );
    host.edit(|world| {
        let link = world.links.as_mut().unwrap().get_mut(&link("br0")).unwrap();
        *link = made;
        link.mtu = 1500;
    });
    check(
        &objects,
        &host,
        &prune(),
        expect![[r#"
            ! Bridge/br0  blocked: br0 exists, is not vmctl's, and differs from what is declared (mtu)
                  mtu  1500 → 9000  live
                  hint: make the manifest say what br0 is, or choose another `interfaceName`
            Plan: 1 blocked. Downtime: none.
        "#]],
    );
}

#[test]
fn two_sets_never_touch_one_another() {
    let host = applied(&tutorial());
    let before = host.snapshot(&everything());
    let other: vmctl::name::SetName = "other".parse().unwrap();
    for objects in [Objects::new(), tutorial()] {
        let desired = desire_in(other.clone(), &objects);
        let hash = diff(&desired, &host, &prune()).hash;
        let plan = diff(&desired, &host, &Policy { approve: Some(hash), ..prune() });
        run(&plan, &host);
        assert_eq!(host.snapshot(&everything()), before);
    }
}

/// Everything on the host that doesn't carry our set's mark.
fn unmarked(snapshot: &Snapshot) -> String {
    let links: Vec<_> =
        snapshot.links.as_ref().unwrap().iter().filter(|(_, link)| link.mark().is_none()).collect();
    let files: Vec<_> = snapshot
        .pools
        .values()
        .flatten()
        .flat_map(|pool| pool.directory.iter())
        .flat_map(|directory| {
            directory.files.iter().filter(|(_, file)| file.mark.is_none() && file.retained.is_none())
        })
        .collect();
    format!("{links:?} {files:?}")
}

/// A subset of the tutorial with some fields changed; references stay whole.
fn edited() -> impl Strategy<Value = Objects> {
    let keep = prop::collection::vec(any::<bool>(), 3);
    let mtu = prop::sample::select(vec![1500u32, 1400, 9000]);
    let data = prop::sample::select(vec!["1Gi", "2Gi", "3Gi"]);
    let bridge = prop::sample::select(vec!["brvlan10", "brvlan20"]);
    let strategy = prop::sample::select(vec!["Always", "Halted", "RerunOnFailure", "Manual"]);
    let memory = prop::sample::select(vec!["256Mi", "512Mi"]);
    (keep, mtu, data, bridge, strategy, memory, any::<bool>(), any::<bool>()).prop_map(
        |(keep, mtu, data, bridge, strategy, memory, allowed, addresses)| {
            let mut objects = tutorial();
            for (index, keep) in keep.iter().enumerate() {
                let vm = format!("vm{}", index + 1);
                if !keep {
                    objects.remove(&id(&format!("VirtualMachine/{vm}")));
                    objects.remove(&id(&format!("Volume/{vm}-data")));
                }
            }
            objects.get_mut(&id("Bridge/brvlan20")).unwrap()["mtu"] = json!(mtu);
            if addresses {
                objects.get_mut(&id("Bridge/brvlan10")).unwrap()["addresses"] = json!(["192.168.10.1/24"]);
            }
            if let Some(volume) = objects.get_mut(&id("Volume/vm1-data")) {
                volume["capacity"] = json!(data);
            }
            if let Some(vm) = objects.get_mut(&id("VirtualMachine/vm1")) {
                vm["interfaces"][0]["bridge"] = json!(bridge);
                vm["memory"] = json!(memory);
                vm["restartPolicy"] = json!(if allowed { "Allowed" } else { "Never" });
            }
            if let Some(vm) = objects.get_mut(&id("VirtualMachine/vm2")) {
                vm["runStrategy"] = json!(strategy);
            }
            objects
        },
    )
}

/// Approves whatever the guards ask for: these properties are about what happens then.
fn converge_approved(objects: &Objects, host: &SimHost) -> Plan {
    for _ in 0..6 {
        let approve = Some(diff(&desire(objects), host, &prune()).hash);
        let plan = diff(&desire(objects), host, &Policy { approve, ..prune() });
        if !plan.has_steps() {
            return plan;
        }
        run(&plan, host);
    }
    diff(&desire(objects), host, &prune())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_second_plan_is_empty_and_the_unmarked_is_untouched(edits in prop::collection::vec(edited(), 1..4)) {
        let host = host();
        let before = unmarked(&host.snapshot(&everything()));
        let mut capacity = 0;
        for objects in &edits {
            // Shrinking is refused, and so never comes to an empty plan.
            let declared = objects.get(&id("Volume/vm1-data")).map(|json| json["capacity"].clone());
            let wanted = declared.and_then(|text| text.as_str()?[..1].parse::<u32>().ok()).unwrap_or(capacity);
            if wanted < capacity {
                continue;
            }
            capacity = wanted;
            let plan = converge_approved(objects, &host);
            prop_assert!(plan.is_empty(), "{}", text::plan(&plan, Style::default()));
            prop_assert_eq!(unmarked(&host.snapshot(&everything())), before.clone());
        }
    }

    #[test]
    fn a_crash_at_any_step_converges_to_the_same_world(objects in edited(), at in 1usize..60, after in any::<bool>()) {
        let smooth = host();
        converge_approved(&tutorial(), &smooth);
        converge_approved(&objects, &smooth);

        let crashed = host();
        converge_approved(&tutorial(), &crashed);
        let at = crashed.steps_run() + at;
        let (crash_before, crash_after) = if after { (None, Some(at)) } else { (Some(at), None) };
        crashed.set_faults(Faults { crash_before, crash_after, ..Faults::default() });
        let approve = Some(diff(&desire(&objects), &crashed, &prune()).hash);
        let plan = diff(&desire(&objects), &crashed, &Policy { approve, ..prune() });
        run(&plan, &crashed);
        crashed.set_faults(Faults::default());
        let plan = converge_approved(&objects, &crashed);
        prop_assert!(plan.is_empty(), "{}", text::plan(&plan, Style::default()));
        prop_assert_eq!(settled(crashed.snapshot(&everything())), settled(smooth.snapshot(&everything())));
    }

    #[test]
    fn foreign_edits_are_healed(objects in edited(), edits in prop::collection::vec((0usize..40, 0usize..6), 1..6)) {
        let host = host();
        converge_approved(&objects, &host);
        let whole = settled(host.snapshot(&everything()));
        host.edit(|world| edits.iter().for_each(|(which, how)| meddle(world, *which, *how)));
        let plan = converge_approved(&objects, &host);
        prop_assert!(plan.is_empty(), "{}", text::plan(&plan, Style::default()));
        prop_assert_eq!(settled(host.snapshot(&everything())), whole);
    }

    #[test]
    fn plans_are_deterministic(objects in edited()) {
        let host = applied(&tutorial());
        let first = diff(&desire(&objects), &host, &prune());
        let second = diff(&desire(&objects), &host, &prune());
        prop_assert_eq!(first, second);
    }
}

/// Without what differs from run to run.
fn settled(mut snapshot: Snapshot) -> Snapshot {
    for vm in snapshot.vms.as_mut().unwrap().values_mut() {
        if let Some(Ok(process)) = &mut vm.process {
            process.pid = 0;
        }
    }
    snapshot
}

/// What another hand might do to a link or VM of ours.
fn meddle(world: &mut Snapshot, which: usize, how: usize) {
    let links = world.links.as_mut().unwrap();
    let ours: Vec<_> =
        links.iter().filter(|(_, link)| link.mark().is_some()).map(|(name, _)| name.clone()).collect();
    let name = &ours[which % ours.len()];
    let link = links.get_mut(name).unwrap();
    match how {
        0 => link.mtu = 1280,
        1 => link.up = false,
        2 => {
            link.master = None;
            link.port = None;
        }
        3 => {
            link.addresses.insert("203.0.113.9/24".parse().unwrap());
            if !matches!(link.kind, LinkKind::Bridge(_)) {
                link.addresses.clear();
            }
        }
        4 => {
            if let LinkKind::Bridge(bridge) = &mut link.kind {
                bridge.stp = true;
                bridge.ageing_seconds = 1;
            }
        }
        _ => {
            let name = name.clone();
            links.remove(&name);
            for link in links.values_mut().filter(|link| link.master.as_ref() == Some(&name)) {
                link.master = None;
                link.port = None;
            }
        }
    }
}

#[test]
fn every_step_is_told_before_it_begins() {
    let host = host();
    let plan = diff(&desire(&tutorial()), &host, &Policy::default());
    let mut begun = 0;
    let mut ended: BTreeSet<ObjectId> = BTreeSet::new();
    execute(&plan, &host, &mut |progress| match progress {
        vmctl::execute::Progress::Begins { number, .. } => {
            begun += 1;
            assert_eq!(number, begun);
        }
        vmctl::execute::Progress::Ended { object, .. } => {
            ended.insert(object.clone());
        }
    });
    assert_eq!(begun, plan.steps().count());
    assert_eq!(ended.len(), plan.actions.len());
}

#[test]
fn a_failed_step_stops_only_what_waits_for_it() {
    let host = host();
    let plan = diff(&desire(&tutorial()), &host, &Policy::default());
    let pool_step = 1 + plan.steps().position(|(id, _)| id.to_string() == "StoragePool/default").unwrap();
    assert!(pool_step > 0);
    host.lack(Capability::Vlan);
    let outcomes = run(&plan, &host);
    let failed: Vec<String> =
        outcomes.iter().filter(|(_, outcome)| !outcome.is_done()).map(|(id, _)| id.to_string()).collect();
    assert_eq!(failed, ["Vlan/eth0-10", "Vlan/eth0-20"]);
}
