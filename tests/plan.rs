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
use vmctl::host::snapshot::{Capability, CpuShare, LinkKind, Snapshot, VmProcess};
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

fn vm<'a>(objects: &'a mut Objects, name: &str) -> &'a mut serde_json::Value {
    objects.get_mut(&id(&format!("VirtualMachine/{name}"))).unwrap()
}

/// A blank volume, for a disk that is added later.
fn add_volume(objects: &mut Objects, name: &str) {
    let volume = json!({"pool": "default", "format": "raw", "capacity": "1Gi"});
    objects.insert(id(&format!("Volume/{name}")), volume);
}

fn push(list: &mut serde_json::Value, item: serde_json::Value) {
    list.as_array_mut().unwrap().push(item);
}

/// The process's pid and the names of its devices.
fn running(host: &SimHost, vm: &str) -> (i32, Vec<String>) {
    let vms = host.snapshot(&everything()).vms.unwrap();
    let process = vms[vm].process.as_ref().unwrap().as_ref().unwrap();
    let disks = process.config.disks.iter().map(|disk| disk.name.clone());
    (process.pid, disks.chain(process.config.nics.iter().map(|nic| nic.name.clone())).collect())
}

#[test]
fn disks_and_nics_come_and_go_while_the_guest_runs() {
    let mut objects = tutorial();
    let host = applied(&objects);
    let (pid, _) = running(&host, "vm1");
    add_volume(&mut objects, "more");
    push(&mut vm(&mut objects, "vm1")["disks"], json!({"volume": "more", "name": "more"}));
    push(&mut vm(&mut objects, "vm1")["interfaces"], json!({"bridge": "brvlan20"}));
    check_applies(
        &objects,
        &host,
        &prune(),
        expect![[r#"
        + Volume/more         raw 1Gi in pool default, blank
        ~ VirtualMachine/vm1  1 vCPU, 256Mi, 3 disks, 2 NICs
              disks[more]       none → /pool/more.raw     live
              interfaces[net1]  none → 52:54:00:65:27:96  live
        Plan: 1 to create, 1 to update live. Downtime: none.
    "#]],
    );
    assert_eq!(
        running(&host, "vm1"),
        (pid, ["disk0", "disk1", "more", "net0", "net1"].map(String::from).into())
    );
    // The disk goes before its volume is let go of, the NIC before its tap.
    let objects = tutorial();
    check_applies(
        &objects,
        &host,
        &prune(),
        expect![[r#"
        ~ VirtualMachine/vm1  1 vCPU, 256Mi, 2 disks, 1 NIC
              disks[more]       /pool/more.raw → none     live
              interfaces[net1]  52:54:00:65:27:96 → none  live
        . Volume/more         retain: declared no more; the data stays where it is
        Plan: 1 to update live, 1 retained. Downtime: none.
    "#]],
    );
    assert_eq!(running(&host, "vm1"), (pid, ["disk0", "disk1", "net0"].map(String::from).into()));
    let order: Vec<String> = host.log().iter().rev().take(5).rev().map(ToString::to_string).collect();
    expect![[r#"
        [
            "define VM vm1",
            "unplug more from VM vm1",
            "unplug net1 from VM vm1",
            "delete vm1.net1",
            "let go of /pool/more.raw",
        ]
    "#]]
    .assert_debug_eq(&order);
}

#[test]
fn a_micro_machine_has_what_it_was_started_with() {
    let mut objects = tutorial();
    vm(&mut objects, "vm1")["machine"] = json!("micro");
    let host = applied(&objects);
    add_volume(&mut objects, "more");
    push(&mut vm(&mut objects, "vm1")["disks"], json!({"volume": "more", "name": "more"}));
    check_applies(
        &objects,
        &host,
        &prune(),
        expect![[r#"
        + Volume/more         raw 1Gi in pool default, blank
        ~ VirtualMachine/vm1  staged: restartPolicy is Never
              disks[more]  none → /pool/more.raw  staged
        Plan: 1 to create, 1 staged. Downtime: none.
    "#]],
    );
    vm(&mut objects, "vm1")["machine"] = json!("pci");
    check(
        &objects,
        &host,
        &prune(),
        expect![[r#"
        ~ VirtualMachine/vm1  staged: restartPolicy is Never
              machine      micro → pci            staged
              disks[more]  none → /pool/more.raw  staged
        Plan: 1 staged. Downtime: none.
    "#]],
    );
}

#[test]
fn settings_change_live_one_by_one() {
    let mut objects = tutorial();
    vm(&mut objects, "vm1")["balloon"] = json!({});
    let host = applied(&objects);
    vm(&mut objects, "vm1")["balloon"] = json!({"target": "64Mi"});
    vm(&mut objects, "vm1")["disks"][1]["limits"] =
        json!({"bytesPerSecond": "50Mi", "operationsPerSecond": 100});
    vm(&mut objects, "vm1")["interfaces"][0]["linkUp"] = json!(false);
    vm(&mut objects, "vm1")["interfaces"][0]["limits"] =
        json!({"transmit": {"packetsPerSecond": 5, "burstPackets": 9}});
    vm(&mut objects, "vm1")["cpu"] = json!({"model": "x86-64-v3"});
    check_applies(
        &objects,
        &host,
        &prune(),
        expect![[r#"
        ~ VirtualMachine/vm1  staged: restartPolicy is Never
              cpu.model                host → x86-64-v3                       staged
              balloon.target           0 → 64Mi                               live
              disks[disk1].limits      none → 50Mi/s, 100 operations/s        live
              interfaces[net0].linkUp  true → false                           live
              interfaces[net0].limits  none → transmit 5 packets/s (burst 9)  live
        Plan: 1 staged. Downtime: none.
    "#]],
    );
}

#[test]
fn a_part_of_the_cpus_changes_live_and_is_healed() {
    let mut objects = tutorial();
    let host = applied(&objects);
    vm(&mut objects, "vm1")["cpu"] = json!({"weight": 200, "quotaPercent": 150});
    check_applies(
        &objects,
        &host,
        &prune(),
        expect![[r#"
        ~ VirtualMachine/vm1  1 vCPU, 256Mi, 2 disks, 1 NIC
              cpu.weight        100 → 200   live
              cpu.quotaPercent  none → 150  live
        Plan: 1 to update live. Downtime: none.
    "#]],
    );
    // Somebody writes into its cgroup.
    host.edit(|world| {
        let vm = world.vms.as_mut().unwrap().values_mut().find(|vm| vm.process.is_some()).unwrap();
        let process = vm.process.as_mut().unwrap().as_mut().unwrap();
        assert_eq!(process.cpu_share, Some(CpuShare { weight: 200, quota_percent: Some(150) }));
        process.cpu_share = Some(CpuShare { weight: 1, quota_percent: Some(150) });
    });
    check_applies(
        &objects,
        &host,
        &prune(),
        expect![[r#"
        ~ VirtualMachine/vm1  1 vCPU, 256Mi, 2 disks, 1 NIC
              cpu.weight  1 → 200  live
        Plan: 1 to update live. Downtime: none.
    "#]],
    );
}

#[test]
fn limits_that_somebody_changed_are_healed() {
    let objects = tutorial();
    let host = applied(&objects);
    let edit = |change: fn(&mut VmProcess)| {
        host.edit(|world| {
            let vm = world.vms.as_mut().unwrap().values_mut().find(|vm| vm.process.is_some()).unwrap();
            change(vm.process.as_mut().unwrap().as_mut().unwrap());
        });
    };
    edit(|process| {
        let limits = process.limits.as_mut().unwrap();
        assert_eq!(limits.threads.replace(3), Some(512));
        assert_eq!(limits.memory_bytes.take(), Some((256 + 32 + 128) << 20));
    });
    check_applies(
        &objects,
        &host,
        &prune(),
        expect![[r#"
        ~ VirtualMachine/vm1  1 vCPU, 256Mi, 2 disks, 1 NIC
              process.memoryMax   none → 416Mi  live
              process.threadsMax  3 → 512       live
        Plan: 1 to update live. Downtime: none.
    "#]],
    );
    // Pages of a file in memory can't go: with such a disk there is no limit, and that is as it should be.
    edit(|process| {
        process.files_in_memory = true;
        process.limits.as_mut().unwrap().memory_bytes = None;
    });
    check(
        &objects,
        &host,
        &prune(),
        expect![[r#"
        No differences (15 objects).
    "#]],
    );
    // Without a cgroup of its own there is nothing to heal.
    edit(|process| process.limits = None);
    check(
        &objects,
        &host,
        &prune(),
        expect![[r#"
        No differences (15 objects).
    "#]],
    );
}

#[test]
fn a_device_of_another_identity_is_unplugged_and_plugged() {
    let mut objects = tutorial();
    let host = applied(&objects);
    vm(&mut objects, "vm1")["disks"][1]["readOnly"] = json!(true);
    vm(&mut objects, "vm1")["interfaces"][0]["macAddress"] = json!("52:54:00:aa:bb:cc");
    check_applies(
        &objects,
        &host,
        &prune(),
        expect![[r#"
        ~ VirtualMachine/vm1  1 vCPU, 256Mi, 2 disks, 1 NIC
              disks[disk1]      /pool/vm1-data.raw → /pool/vm1-data.raw (read-only)  live
              interfaces[net0]  52:54:00:86:8b:09 → 52:54:00:aa:bb:cc  live
        Plan: 1 to update live. Downtime: none.
    "#]],
    );
    let steps: Vec<String> = host.log().iter().rev().take(7).rev().map(ToString::to_string).collect();
    expect![[r#"
        [
            "define VM vm1",
            "unplug disk1 from VM vm1",
            "plug the disk disk1 into VM vm1",
            "unplug net0 from VM vm1",
            "delete vm1.net0",
            "create tap vm1.net0",
            "plug the NIC net0 into VM vm1",
        ]
    "#]]
    .assert_debug_eq(&steps);
}

#[test]
fn a_guest_that_refuses_holds_up_only_what_it_must() {
    let mut objects = tutorial();
    add_volume(&mut objects, "more");
    push(&mut vm(&mut objects, "vm1")["disks"], json!({"volume": "more", "name": "more"}));
    let host = applied(&objects);
    host.set_faults(Faults { guests_refuse: true, ..Faults::default() });
    // One goes, another comes, and the volume of the first is let go of.
    let mut objects = tutorial();
    add_volume(&mut objects, "other");
    push(&mut vm(&mut objects, "vm1")["disks"], json!({"volume": "other", "name": "other"}));
    let outcomes = run(&diff(&desire(&objects), &host, &prune()), &host);
    let failed: Vec<String> =
        outcomes.iter().filter(|(_, outcome)| !outcome.is_done()).map(|(id, _)| id.to_string()).collect();
    assert_eq!(failed, ["Volume/more", "VirtualMachine/vm1"]);
    assert!(running(&host, "vm1").1.contains(&"other".to_owned()));
    // It stays asked, and a later apply ends what was begun.
    check(
        &objects,
        &host,
        &prune(),
        expect![[r#"
        ~ VirtualMachine/vm1  1 vCPU, 256Mi, 3 disks, 1 NIC
              disks[more]  /pool/more.raw → none  live
              note: the guest was asked to let go of more
        . Volume/more         retain: declared no more; the data stays where it is
        Plan: 1 to update live, 1 retained. Downtime: none.
    "#]],
    );
    host.set_faults(Faults::default());
    let plan = converge(&objects, &host, &prune());
    assert!(plan.is_empty(), "{}", text::plan(&plan, Style::default()));
    assert_eq!(running(&host, "vm1").1, ["disk0", "disk1", "other", "net0"]);
}

#[test]
fn a_disk_moves_from_one_running_guest_to_another() {
    let mut objects = tutorial();
    add_volume(&mut objects, "moving");
    push(&mut vm(&mut objects, "vm2")["disks"], json!({"volume": "moving", "name": "moving"}));
    let host = applied(&objects);
    vm(&mut objects, "vm2")["disks"].as_array_mut().unwrap().pop();
    push(&mut vm(&mut objects, "vm1")["disks"], json!({"volume": "moving", "name": "moving"}));
    let outcomes = run(&diff(&desire(&objects), &host, &prune()), &host);
    assert!(outcomes.values().all(|outcome| outcome.is_done()), "{outcomes:#?}");
    assert_eq!(running(&host, "vm1").1, ["disk0", "disk1", "moving", "net0"]);
    assert!(diff(&desire(&objects), &host, &prune()).is_empty());
}

#[test]
fn a_disk_that_its_guest_can_not_let_go_of_is_no_other_guests() {
    let mut objects = tutorial();
    vm(&mut objects, "vm2")["machine"] = json!("micro");
    let host = applied(&objects);
    let disk = vm(&mut objects, "vm2")["disks"].as_array_mut().unwrap().pop().unwrap();
    push(&mut vm(&mut objects, "vm1")["disks"], disk);
    check(
        &objects,
        &host,
        &prune(),
        expect![[r#"
        ! VirtualMachine/vm1  blocked: /pool/vm2-data.raw is a disk of VirtualMachine/vm2, which runs on it until its next start
              disks[disk2]  none → /pool/vm2-data.raw  live
              hint: `vmctl restart vm2`, then apply again
        ~ VirtualMachine/vm2  staged: restartPolicy is Never
              disks[disk1]  /pool/vm2-data.raw → none  staged
        Plan: 1 staged, 1 blocked. Downtime: none.
    "#]],
    );
}

#[test]
fn a_volume_to_be_deleted_waits_until_no_guest_runs_on_it() {
    let mut objects = tutorial();
    vm(&mut objects, "vm1")["machine"] = json!("micro");
    add_volume(&mut objects, "scratch");
    objects.get_mut(&id("Volume/scratch")).unwrap()["reclaimPolicy"] = json!("Delete");
    push(&mut vm(&mut objects, "vm1")["disks"], json!({"volume": "scratch", "name": "scratch"}));
    let host = applied(&objects);
    vm(&mut objects, "vm1")["disks"].as_array_mut().unwrap().pop();
    objects.remove(&id("Volume/scratch"));
    check(
        &objects,
        &host,
        &prune(),
        expect![[r#"
            ~ VirtualMachine/vm1  staged: restartPolicy is Never
                  disks[scratch]  /pool/scratch.raw → none  staged
            ! Volume/scratch      blocked: declared no more, and its reclaimPolicy was Delete
                  data  /pool/scratch.raw → the pool's trash  DATA LOSS
                  blocked: VirtualMachine/vm1 runs on it until its next start
                  hint: `vmctl restart vm1`, then apply again
            Plan: 1 staged, 1 blocked. Downtime: none.
        "#]],
    );
}

#[test]
fn a_nic_changes_its_vlan_live() {
    let mut objects = objects(&[
        ("Bridge/trunk", json!({"vlanFiltering": true})),
        (
            "VirtualMachine/web",
            json!({
                "memory": "256Mi",
                "boot": {"kernel": "/boot/vmlinux"},
                "interfaces": [{"bridge": "trunk", "vlan": {"access": 10}}],
            }),
        ),
    ]);
    let host = applied(&objects);
    let vlans = |host: &SimHost| {
        let links = host.snapshot(&everything()).links.unwrap();
        vmctl::kinds::describe_vlans(&links[&link("web.net0")].port.as_ref().unwrap().vlans)
    };
    assert_eq!(vlans(&host), "10 pvid untagged");
    vm(&mut objects, "web")["interfaces"][0]["vlan"] = json!({"trunk": [20, "30-31"], "native": 10});
    check_applies(
        &objects,
        &host,
        &prune(),
        expect![[r#"
        ~ VirtualMachine/web  1 vCPU, 256Mi, 0 disks, 1 NIC
              interfaces[net0].vlan  10 pvid untagged → 10 pvid untagged, 20, 30-31  live
        Plan: 1 to update live. Downtime: none.
    "#]],
    );
    assert_eq!(vlans(&host), "10 pvid untagged, 20, 30-31");
    vm(&mut objects, "web")["interfaces"][0]["vlan"] = json!(null);
    check_applies(
        &objects,
        &host,
        &prune(),
        expect![[r#"
        ~ VirtualMachine/web  1 vCPU, 256Mi, 0 disks, 1 NIC
              interfaces[net0].vlan  10 pvid untagged, 20, 30-31 → none  live
        Plan: 1 to update live. Downtime: none.
    "#]],
    );
}

#[test]
fn a_guest_booted_from_its_disk_keeps_that_disk() {
    let mut objects = tutorial();
    vm(&mut objects, "vm1")["boot"] = json!({"disk": "disk0", "append": "quiet"});
    let host = applied(&objects);
    vm(&mut objects, "vm1")["disks"][0]["readOnly"] = json!(true);
    check_applies(
        &objects,
        &host,
        &prune(),
        expect![[r#"
        ~ VirtualMachine/vm1  staged: restartPolicy is Never
              disks[disk0]  /pool/vm1-root.qcow2 → /pool/vm1-root.qcow2 (read-only)  staged
        Plan: 1 staged. Downtime: none.
    "#]],
    );
}

#[test]
fn what_a_guest_suffers_from_is_told_and_not_restarted() {
    use vmctl::vmm::protocol::{Condition, ConditionKind, Phase};
    let host = applied(&tutorial());
    host.edit(|world| {
        let vm = world.vms.as_mut().unwrap().get_mut("vm1").unwrap();
        let process = vm.process.as_mut().unwrap().as_mut().unwrap();
        process.phase = Phase::Paused;
        process.conditions.push(Condition {
            kind: ConditionKind::DiskFull,
            device: Some("disk1".into()),
            message: "the storage below disk1 is full".into(),
            age_ms: 5,
        });
    });
    check(
        &tutorial(),
        &host,
        &prune(),
        expect![[r#"
          VirtualMachine/vm1  1 vCPU, 256Mi, 2 disks, 1 NIC
              note: the storage below disk1 is full
        No differences (15 objects).
    "#]],
    );
}

/// What a process of before PCI answers with, and what it was defined as.
#[test]
fn a_guest_from_before_pci_runs_on_and_is_told_what_comes() {
    let host = applied(&tutorial());
    host.edit(|world| {
        let vm = world.vms.as_mut().unwrap().get_mut("vm1").unwrap();
        let definition = vm.definition.as_mut().unwrap();
        definition.config.machine = vmctl::vmm::config::MachineKind::Micro;
        definition.config.generation_id = None;
        vm.process.as_mut().unwrap().as_mut().unwrap().config = definition.config.clone();
    });
    check_applies(
        &tutorial(),
        &host,
        &prune(),
        expect![[r#"
        ~ VirtualMachine/vm1  staged: restartPolicy is Never
              machine       micro → pci                                  staged
              generationId  none → 4af516c9-044b-889f-9dba-b8bb4b131950  staged
        Plan: 1 staged. Downtime: none.
    "#]],
    );
    check(
        &tutorial(),
        &host,
        &prune(),
        expect![[r#"
          VirtualMachine/vm1  1 vCPU, 256Mi, 2 disks, 1 NIC
              note: machine pci takes effect at the next start
              note: generationId 4af516c9-044b-889f-9dba-b8bb4b131950 takes effect at the next start
        No differences (15 objects).
    "#]],
    );
}

#[test]
fn a_panicked_guest_has_failed() {
    use vmctl::vmm::protocol::{ExitReason, ExitRecord};
    for (strategy, starts) in
        [("Always", true), ("RerunOnFailure", true), ("Manual", false), ("Halted", false)]
    {
        let mut objects = tutorial();
        let host = applied(&objects);
        vm(&mut objects, "vm1")["runStrategy"] = json!(strategy);
        host.edit(|world| {
            let vm = world.vms.as_mut().unwrap().get_mut("vm1").unwrap();
            let message = "the guest's kernel panicked".to_owned();
            vm.process = None;
            vm.exit = Some(ExitRecord { reason: ExitReason::GuestPanicked, message });
        });
        converge(&objects, &host, &prune());
        let vms = host.snapshot(&everything()).vms.unwrap();
        assert_eq!(vms["vm1"].process.is_some(), starts, "{strategy}");
    }
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
            No differences (1 object). 1 to adopt: `apply` only marks what is there.
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
    let plugged = (0u8..4, 0u8..3, any::<bool>(), any::<bool>());
    (keep, mtu, data, bridge, strategy, memory, any::<bool>(), any::<bool>(), plugged).prop_map(
        |(keep, mtu, data, bridge, strategy, memory, allowed, addresses, plugged)| {
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
            plug_in(&mut objects, plugged);
            objects
        },
    )
}

/// Gives vm1 some devices more, and vm3 too, which has now one machine and now the other. The disk `moving` is
/// now vm1's, now vm2's.
fn plug_in(objects: &mut Objects, (disks, nics, read_only, micro): (u8, u8, bool, bool)) {
    for name in ["vm1", "vm3"] {
        let Some(mut spec) = objects.remove(&id(&format!("VirtualMachine/{name}"))) else { continue };
        for index in 0..disks {
            let volume = format!("{name}-more{index}");
            add_volume(objects, &volume);
            let disk = json!({"volume": volume, "name": format!("more{index}"), "readOnly": read_only});
            push(&mut spec["disks"], disk);
        }
        for index in 0..nics {
            let bridge = if read_only { "brvlan10" } else { "brvlan20" };
            push(&mut spec["interfaces"], json!({"bridge": bridge, "name": format!("more-net{index}")}));
        }
        if name == "vm3" && micro {
            spec["machine"] = json!("micro");
        }
        objects.insert(id(&format!("VirtualMachine/{name}")), spec);
    }
    add_volume(objects, "moving");
    let owner = if read_only { "VirtualMachine/vm1" } else { "VirtualMachine/vm2" };
    if let Some(spec) = objects.get_mut(&id(owner)) {
        push(&mut spec["disks"], json!({"volume": "moving", "name": "moving"}));
    }
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
    fn a_process_that_dies_at_any_step_is_no_end(objects in edited(), at in 1usize..40, refuse in any::<bool>()) {
        let host = host();
        converge_approved(&tutorial(), &host);
        let vm_dies_at = Some(host.steps_run() + at);
        host.set_faults(Faults { vm_dies_at, guests_refuse: refuse, ..Faults::default() });
        let approve = Some(diff(&desire(&objects), &host, &prune()).hash);
        run(&diff(&desire(&objects), &host, &Policy { approve, ..prune() }), &host);
        host.set_faults(Faults::default());
        let plan = converge_approved(&objects, &host);
        prop_assert!(plan.is_empty(), "{}", text::plan(&plan, Style::default()));
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
