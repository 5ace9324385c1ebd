//! A host's policy against the simulated host: which VMs fit, which don't and why, and settings that are
//! healed and come back.

#[path = "support/objects.rs"]
mod objects;

use std::collections::BTreeSet;

use expect_test::{Expect, expect};
use objects::*;
use serde_json::{Value, json};
use vmctl::execute::execute;
use vmctl::host::Host;
use vmctl::host::sim::{Faults, SimHost};
use vmctl::host::snapshot::{HostSetting, HugePages, Previous};
use vmctl::kinds::virtual_machine::power::{Power, power};
use vmctl::name::Kind;
use vmctl::plan::{Plan, Policy, Removal, admit};
use vmctl::report::text::{self, Style};

const GI: u64 = 1 << 30;
const MI: u64 = 1 << 20;

fn vm(memory: &str, cpus: u8) -> Value {
    json!({"memory": memory, "cpus": cpus, "boot": {"kernel": "/boot/vmlinux"}})
}

fn with(policy: Value, vms: &[(&str, Value)]) -> Objects {
    let mut all = objects(&[("HostPolicy/host", policy)]);
    all.extend(vms.iter().map(|(name, json)| (id(&format!("VirtualMachine/{name}")), json.clone())));
    all
}

fn prune() -> Policy {
    Policy { removal: Removal::Prune, ..Policy::default() }
}

fn diff(objects: &Objects, host: &SimHost) -> Plan {
    let desired = desire(objects);
    vmctl::plan::plan(&desired, &host.snapshot(&desired.scope()), &prune())
}

#[track_caller]
fn check(objects: &Objects, host: &SimHost, expected: Expect) {
    expected.assert_eq(&text::plan(&diff(objects, host), Style::default()));
}

/// Plans and runs; then nothing is left that could be run.
#[track_caller]
fn apply(objects: &Objects, host: &SimHost) -> Plan {
    let plan = diff(objects, host);
    let outcomes = execute(&plan, host, &mut |_| {});
    assert!(outcomes.values().all(|outcome| outcome.is_done()), "{outcomes:#?}");
    let again = diff(objects, host);
    assert!(!again.has_steps(), "{}", text::plan(&again, Style::default()));
    again
}

fn running(host: &SimHost) -> BTreeSet<String> {
    let snapshot = host.snapshot(&Default::default());
    let vms = snapshot.vms.unwrap().into_iter();
    vms.filter(|(_, vm)| vm.process.is_some()).map(|(name, _)| name.to_string()).collect()
}

/// 16 CPUs and 64 Gi.
fn small(cpus: u32, memory_gi: u64) -> SimHost {
    let host = host();
    host.edit(|world| {
        let facts = world.host.as_mut().unwrap();
        (facts.cpus, facts.memory_bytes) = (cpus, memory_gi * GI);
    });
    host
}

#[test]
fn what_fits_starts_by_name_and_what_does_not_says_why() {
    let host = small(2, 10);
    let objects = with(
        json!({"cpuOvercommit": 2, "memoryOvercommit": 1.5, "reservedMemory": "2Gi"}),
        &[("c", vm("4Gi", 1)), ("a", vm("6Gi", 2)), ("b", vm("8Gi", 1)), ("d", vm("1Gi", 2))],
    );
    check(
        &objects,
        &host,
        expect![[r#"
            + HostPolicy/host   CPU × 2, memory × 1.5
            + VirtualMachine/a  2 vCPUs, 6Gi, 0 disks, 0 NICs
            ! VirtualMachine/b  blocked: not defined on this host
                  blocked: its 8Gi of memory don't fit: 6Gi of 12Gi are taken by a (8Gi for guests, memoryOvercommit 1.5)
                  hint: stop another VM, make this one smaller, or raise `memoryOvercommit` of the HostPolicy; those that run are never stopped for it
            + VirtualMachine/c  1 vCPU, 4Gi, 0 disks, 0 NICs
            ! VirtualMachine/d  blocked: not defined on this host
                  blocked: its 2 vCPUs don't fit: 3 of 4 are taken by a, c (cpuOvercommit 2)
                  hint: stop another VM, make this one smaller, or raise `cpuOvercommit` of the HostPolicy; those that run are never stopped for it
            Plan: 3 to create, 2 blocked. Downtime: none.
        "#]],
    );
    apply(&objects, &host);
    assert_eq!(running(&host), ["a", "c"].map(str::to_owned).into());
    assert!(diff(&objects, &host).is_blocked());
}

#[test]
fn those_that_run_come_first_and_are_never_stopped() {
    let host = small(2, 10);
    let mut objects = with(json!({"memoryOvercommit": 1}), &[("z", vm("6Gi", 1))]);
    apply(&objects, &host);
    objects.insert(id("VirtualMachine/a"), vm("6Gi", 1));
    apply(&objects, &host);
    assert_eq!(running(&host), ["z".to_owned()].into());
    // A policy that is too small for what runs stops nothing.
    objects.insert(id("HostPolicy/host"), json!({"memoryOvercommit": 0.1}));
    apply(&objects, &host);
    assert_eq!(running(&host), ["z".to_owned()].into());
    // Once it has gone, there is room, in the same run and after it.
    objects.insert(id("HostPolicy/host"), json!({"memoryOvercommit": 1}));
    objects.remove(&id("VirtualMachine/z"));
    let plan = diff(&objects, &host);
    let action = plan.actions.iter().find(|action| action.object == id("VirtualMachine/a")).unwrap();
    assert_eq!(action.after, [id("VirtualMachine/z")]);
    apply(&objects, &host);
    assert_eq!(running(&host), ["a".to_owned()].into());
}

#[test]
fn a_restart_may_not_grow_beyond_the_room_and_the_guest_runs_on() {
    let host = small(4, 10);
    let mut objects = with(json!({"memoryOvercommit": 1}), &[("a", vm("4Gi", 1)), ("b", vm("4Gi", 1))]);
    apply(&objects, &host);
    let mut larger = vm("8Gi", 1);
    larger["restartPolicy"] = json!("Allowed");
    objects.insert(id("VirtualMachine/a"), larger.clone());
    let plan = apply(&objects, &host);
    assert!(
        text::plan(&plan, Style::default())
            .contains("its 8Gi of memory don't fit: 4Gi of 10Gi are taken by a, b")
    );
    assert_eq!(running(&host), ["a", "b"].map(str::to_owned).into());
    // A smaller one is no question, even where all of it is too much.
    larger["memory"] = json!("3Gi");
    objects.insert(id("VirtualMachine/a"), larger);
    objects.insert(id("HostPolicy/host"), json!({"memoryOvercommit": 0.1}));
    let plan = apply(&objects, &host);
    assert!(plan.is_empty(), "{}", text::plan(&plan, Style::default()));
}

#[test]
fn the_policy_of_another_set_holds_and_a_start_by_name_obeys_it() {
    let host = small(2, 10);
    apply(&with(json!({"cpuOvercommit": 1}), &[]), &host);
    let others = objects(&[("VirtualMachine/big", vm("1Gi", 3))]);
    let desired = desire_in("other".parse().unwrap(), &others);
    let plan = vmctl::plan::plan(&desired, &host.snapshot(&desired.scope()), &prune());
    assert!(
        text::plan(&plan, Style::default())
            .contains("its 3 vCPUs don't fit: 0 of 2 are taken (cpuOvercommit 1)")
    );
    // A second policy is refused.
    let second = objects_of_other(&host);
    assert!(second.contains("this host's policy is HostPolicy/host of set default"), "{second}");

    let manual = |cpus| {
        let mut vm = vm("1Gi", cpus);
        vm["runStrategy"] = json!("Manual");
        vm
    };
    let mine = with(json!({"cpuOvercommit": 1}), &[("a", manual(2)), ("b", manual(1))]);
    apply(&mine, &host);
    let start = |name: &str| {
        let snapshot = host.snapshot(&Default::default());
        let mut actions = vec![power(&name.parse().unwrap(), &set(), Power::Start, &snapshot)];
        admit(&snapshot, &mut actions);
        let action = actions.remove(0);
        for step in &action.steps {
            host.run(&[step]).remove(0).unwrap();
        }
        action.blockers.first().map(|blocker| blocker.because.clone())
    };
    assert_eq!(start("b"), None);
    let because = start("a").unwrap();
    assert_eq!(because, "its 2 vCPUs don't fit: 1 of 2 are taken by b (cpuOvercommit 1)");
}

fn objects_of_other(host: &SimHost) -> String {
    let desired = desire_in("other".parse().unwrap(), &with(json!({}), &[]));
    let plan = vmctl::plan::plan(&desired, &host.snapshot(&desired.scope()), &prune());
    text::plan(&plan, Style::default())
}

#[test]
fn what_could_not_be_looked_at_starts_nothing() {
    let host = small(2, 10);
    let objects = with(json!({"cpuOvercommit": 1}), &[("a", vm("1Gi", 1))]);
    host.set_faults(Faults { host_unseen: true, ..Faults::default() });
    let plan = diff(&objects, &host);
    assert!(!plan.has_steps() && plan.is_blocked());
    host.set_faults(Faults::default());
    apply(&objects, &host);
    // And nothing of what runs is touched.
    host.set_faults(Faults { host_unseen: true, ..Faults::default() });
    let plan = diff(&objects, &host);
    let vm = plan.actions.iter().find(|action| action.object.kind == Kind::VirtualMachine).unwrap();
    assert!(!vm.is_difference());
}

fn settings(host: &SimHost) -> (u64, u64, u64) {
    let facts = host.snapshot(&Default::default()).host.unwrap();
    let ksm = facts.ksm.unwrap();
    (facts.hugepages[&(2 * MI)].total, ksm.run, ksm.pages_to_scan)
}

#[test]
fn settings_are_made_healed_and_given_back() {
    let host = host();
    host.edit(|world| {
        let pages = &mut world.host.as_mut().unwrap().hugepages;
        pages.insert(2 * MI, HugePages { total: 3, free: 3 });
    });
    let all = json!({"hugepages": {"2Mi": 64}, "ksm": {"run": true, "pagesToScan": 500}});
    let mut objects = with(all, &[]);
    check(
        &objects,
        &host,
        expect![[r#"
            + HostPolicy/host  64 huge pages of 2Mi, KSM on
                  ksm.pagesToScan  100 → 500  live
                  ksm.run          0 → 1      live
                  hugepages.2Mi    3 → 64     live
            Plan: 1 to create. Downtime: none.
        "#]],
    );
    assert!(apply(&objects, &host).is_empty());
    assert_eq!(settings(&host), (64, 1, 500));
    // Somebody turns at it.
    host.edit(|world| {
        let facts = world.host.as_mut().unwrap();
        facts.hugepages.get_mut(&(2 * MI)).unwrap().total = 8;
        facts.ksm.as_mut().unwrap().run = 0;
    });
    check(
        &objects,
        &host,
        expect![[r#"
            ~ HostPolicy/host  64 huge pages of 2Mi, KSM on
                  ksm.run        0 → 1   live
                  hugepages.2Mi  8 → 64  live
            Plan: 1 to update live. Downtime: none.
        "#]],
    );
    apply(&objects, &host);
    assert_eq!(settings(&host), (64, 1, 500));
    let policy = host.snapshot(&Default::default()).host.unwrap().policy.unwrap();
    assert_eq!(
        policy.previous(HostSetting::HugePages { page_bytes: 2 * MI }),
        Some(3),
        "the first value counts"
    );
    // A part is declared no more: it becomes what it was, and the rest stays.
    objects.insert(id("HostPolicy/host"), json!({"hugepages": {"2Mi": 64}}));
    apply(&objects, &host);
    assert_eq!(settings(&host), (64, 0, 100));
    // Another name takes all of it over.
    let renamed = objects.remove(&id("HostPolicy/host")).unwrap();
    objects.insert(id("HostPolicy/renamed"), renamed);
    apply(&objects, &host);
    assert_eq!(settings(&host), (64, 0, 100));
    let policy = host.snapshot(&Default::default()).host.unwrap().policy.unwrap();
    let setting = HostSetting::HugePages { page_bytes: 2 * MI };
    assert_eq!(
        (policy.mark.owner, policy.previous),
        (id("HostPolicy/renamed"), vec![Previous { setting, value: 3 }])
    );
    // And without any policy nothing of it is left.
    apply(&Objects::new(), &host);
    assert_eq!(settings(&host), (3, 0, 100));
    assert_eq!(host.snapshot(&Default::default()).host.unwrap().policy, None);
}

#[test]
fn huge_pages_in_use_stay_and_guests_wait_for_theirs() {
    let host = host();
    let huge = |memory: &str| {
        let mut vm = vm(memory, 1);
        vm["memoryBacking"] = json!({"hugepages": "2Mi"});
        vm
    };
    let mut objects = with(json!({"hugepages": {"2Mi": 64}}), &[("a", huge("64Mi")), ("b", huge("128Mi"))]);
    let plan = diff(&objects, &host);
    let vm = plan.actions.iter().find(|action| action.object == id("VirtualMachine/a")).unwrap();
    assert!(vm.after.contains(&id("HostPolicy/host")), "its pages are to be there before it");
    let again = apply(&objects, &host);
    assert!(
        text::plan(&again, Style::default())
            .contains("its 64 huge pages of 2Mi don't fit: 32 of 64 are taken by a")
    );
    assert_eq!(running(&host), ["a".to_owned()].into());
    // Never below what is in use; the rest is told and comes later.
    objects.insert(id("HostPolicy/host"), json!({"hugepages": {"2Mi": 0}}));
    objects.remove(&id("VirtualMachine/b"));
    let again = apply(&objects, &host);
    assert_eq!(settings(&host).0, 32);
    assert!(again.is_empty());
    assert!(
        text::plan(&again, Style::default()).contains("32 huge pages of 2Mi are in use; they go down to 0")
    );
    objects.remove(&id("VirtualMachine/a"));
    execute(&diff(&objects, &host), &host, &mut |_| {});
    assert_eq!(settings(&host).0, 32, "they were in use when it was planned");
    apply(&objects, &host);
    assert_eq!(settings(&host).0, 0);
}

#[test]
fn what_a_host_has_not_is_said_and_the_rest_is_done() {
    let host = host();
    host.edit(|world| {
        let facts = world.host.as_mut().unwrap();
        facts.ksm = None;
        facts.hugepages.remove(&GI);
    });
    let policy = json!({"cpuOvercommit": 2, "hugepages": {"2Mi": 4, "1Gi": 1}, "ksm": {"run": true}});
    let objects = with(policy, &[("a", vm("1Gi", 1))]);
    let plan = diff(&objects, &host);
    execute(&plan, &host, &mut |_| {});
    let again = text::plan(&diff(&objects, &host), Style::default());
    assert!(again.contains("this host has no huge pages of 1Gi"), "{again}");
    assert!(again.contains("this host's kernel has no KSM"), "{again}");
    let facts = host.snapshot(&Default::default()).host.unwrap();
    assert_eq!((facts.hugepages[&(2 * MI)].total, facts.policy.is_some()), (4, true));
    assert_eq!(running(&host), ["a".to_owned()].into());
}

#[test]
fn a_balloon_that_follows_memory_is_no_drift_within_its_bounds() {
    let host = host();
    let balloon = |least: Option<&str>| {
        let mut vm = vm("4Gi", 1);
        vm["balloon"] = json!({"target": "256Mi", "minMemory": least});
        vm
    };
    let rules = json!({"balloon": {"low": "1Gi", "high": "2Gi"}});
    let objects = with(rules, &[("a", balloon(Some("1Gi")))]);
    apply(&objects, &host);
    let fill = |bytes: u64| {
        host.edit(|world| {
            let vm = world.vms.as_mut().unwrap().get_mut("a").unwrap();
            let process = vm.process.as_mut().unwrap().as_mut().unwrap();
            process.config.balloon.as_mut().unwrap().target_bytes = bytes;
        });
    };
    for (bytes, is_drift) in [(256 * MI, false), (GI, false), (3 * GI, false), (3 * GI + MI, true), (0, true)]
    {
        fill(bytes);
        assert_eq!(!diff(&objects, &host).is_empty(), is_drift, "{bytes}");
    }
    // Where nobody moves balloons, the manifest's word is the target.
    fill(GI);
    apply(&with(json!({}), &[("a", balloon(Some("1Gi")))]), &host);
    let snapshot = host.snapshot(&Default::default());
    let vm = &snapshot.vms.unwrap()["a"];
    let process = vm.process.as_ref().unwrap().as_ref().unwrap();
    assert_eq!(process.config.balloon.unwrap().target_bytes, 256 * MI);
}

/// Killed before and after every step, and run again: it always comes to the same end.
#[test]
fn a_policy_may_be_killed_in_anywhere() {
    let all = json!({"cpuOvercommit": 1, "hugepages": {"2Mi": 64}, "ksm": {"run": true, "pagesToScan": 500}});
    for (crash_after, at) in [false, true].into_iter().flat_map(|after| (1..12).map(move |at| (after, at))) {
        let host = host();
        let faults = Faults {
            crash_after: crash_after.then_some(at),
            crash_before: (!crash_after).then_some(at),
            ..Faults::default()
        };
        host.set_faults(faults.clone());
        let objects = with(all.clone(), &[("a", vm("1Gi", 1))]);
        execute(&diff(&objects, &host), &host, &mut |_| {});
        host.set_faults(Faults::default());
        assert!(apply(&objects, &host).is_empty());
        assert_eq!(settings(&host), (64, 1, 500));
        let faults = Faults {
            crash_after: faults.crash_after.map(|at| at + host.steps_run()),
            crash_before: faults.crash_before.map(|at| at + host.steps_run()),
            ..Faults::default()
        };
        host.set_faults(faults);
        execute(&diff(&Objects::new(), &host), &host, &mut |_| {});
        host.set_faults(Faults::default());
        apply(&Objects::new(), &host);
        assert_eq!(settings(&host), (0, 0, 100), "{crash_after} {at}");
    }
}
