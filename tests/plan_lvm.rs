//! Volume groups in plans: consent, rounding, growth below a running guest, removal, and what is never touched.

#[path = "support/objects.rs"]
mod objects;

use expect_test::{Expect, expect};
use objects::*;
use serde_json::{Value, json};
use vmctl::execute::execute;
use vmctl::host::sim::{Faults, SimGroup, SimHost, SimThinPool, SimVolume, logical_file};
use vmctl::host::snapshot::{BootFacts, BootSignature, DeviceFacts, ThinFacts};
use vmctl::host::{Host, Step};
use vmctl::name::LvmName;
use vmctl::plan::{Plan, Policy, Removal, plan};
use vmctl::report::text::{self, Style};
use vmctl::vmm::config::CacheMode;

const GIB: u64 = 1 << 30;

fn name(text: &str) -> LvmName {
    text.parse().unwrap()
}

fn blank(bytes: u64) -> DeviceFacts {
    DeviceFacts { size_bytes: bytes, in_use: None, signatures: Vec::new(), starts_empty: true }
}

/// A host with a volume group that holds two volumes of somebody's, and a thin pool.
fn group_host() -> SimHost {
    let host = host();
    let foreign = SimVolume { thin_pool: None, file: logical_file(GIB) };
    let facts = ThinFacts { data_used: 1_000, metadata_used: 500, zeroes: true, failing: None };
    host.edit_groups(|groups| {
        let mut group = SimGroup { bytes: 100 * GIB, ..SimGroup::default() };
        group.volumes.insert("os".to_owned(), foreign.clone());
        group.volumes.insert("swap".to_owned(), foreign);
        group.thin_pools.insert(name("pool"), SimThinPool { mark: None, bytes: 20 * GIB, facts });
        groups.insert(name("vg0"), group);
    });
    host
}

fn volume(pool: &str, capacity: &str, more: Value) -> Value {
    let mut spec = json!({"pool": pool, "format": "raw", "capacity": capacity});
    spec.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    spec
}

fn linear_and_thin() -> Objects {
    objects(&[
        ("StoragePool/fast", json!({"lvm": {"volumeGroup": "vg0"}})),
        ("StoragePool/thin", json!({"lvmThin": {"volumeGroup": "vg0", "thinPool": "pool"}})),
        ("StoragePool/cache", json!({"directory": {"path": "/pool"}})),
        (
            "Image/linux",
            json!({"pool": "cache", "source": {"path": "/src/linux.qcow2"}, "sha256": SHA, "format": "qcow2"}),
        ),
        ("Volume/data", volume("fast", "50Mi", json!({}))),
        ("Volume/root", volume("thin", "2Gi", json!({"source": {"image": "linux"}}))),
        ("Volume/copy", volume("thin", "3Gi", json!({"source": {"volume": "root"}}))),
        (
            "VirtualMachine/web",
            json!({
                "memory": "256Mi",
                "boot": {"kernel": "/boot/vmlinux"},
                "disks": [{"volume": "root"}, {"volume": "data"}],
            }),
        ),
    ])
}

fn without(objects: &Objects, names: &[&str]) -> Objects {
    objects
        .iter()
        .filter(|(id, _)| !names.contains(&id.to_string().as_str()))
        .map(|(id, spec)| (id.clone(), spec.clone()))
        .collect()
}

fn diff(objects: &Objects, host: &SimHost, policy: &Policy) -> Plan {
    let desired = desire(objects);
    plan(&desired, &host.snapshot(&desired.scope()), policy)
}

fn prune() -> Policy {
    Policy { removal: Removal::Prune, ..Policy::default() }
}

fn says(plan: &Plan) -> String {
    text::plan(plan, Style::default())
}

/// Plans and runs, with consent, until nothing is left.
fn converge(objects: &Objects, host: &SimHost, policy: &Policy) {
    for _ in 0..4 {
        let hash = diff(objects, host, policy).hash;
        let plan = diff(objects, host, &Policy { approve: Some(hash), ..policy.clone() });
        if !plan.has_steps() {
            assert!(plan.is_empty(), "{}", says(&plan));
            return;
        }
        execute(&plan, host, &mut |_| {});
    }
    panic!("{}", says(&diff(objects, host, policy)));
}

fn check(objects: &Objects, host: &SimHost, policy: &Policy, expected: Expect) {
    expected.assert_eq(&says(&diff(objects, host, policy)));
}

/// What is not ours in the groups.
fn foreign(host: &SimHost) -> String {
    host.edit_groups(|groups| {
        let volumes = groups.values().flat_map(|group| &group.volumes);
        format!("{:?}", volumes.filter(|(_, volume)| volume.file.mark.is_none()).collect::<Vec<_>>())
    })
}

#[test]
fn a_group_is_made_with_consent_on_blank_devices() {
    let host = host();
    let pool = json!({"lvm": {"volumeGroup": "vg0", "devices": ["/dev/sdb"]}});
    let declared = objects(&[("StoragePool/fast", pool), ("Volume/data", volume("fast", "1Gi", json!({})))]);
    check(
        &declared,
        &host,
        &Policy::default(),
        expect![[r#"
        ! StoragePool/fast  blocked: /dev/sdb is not there
        ! Volume/data       blocked: /dev/vg0/data is not there
              blocked: waits for StoragePool/fast, which is blocked
        Plan: 2 blocked. Downtime: none.
    "#]],
    );
    let with = |facts: DeviceFacts| {
        host.add_device("/dev/sdb", facts);
        says(&diff(&declared, &host, &Policy::default()))
    };
    let text = with(DeviceFacts { signatures: vec!["ext4".into()], ..blank(10 * GIB) });
    assert!(text.contains("/dev/sdb: it carries the signature of ext4"), "{text}");
    let text = with(DeviceFacts { in_use: Some("sdb1 is mounted".into()), ..blank(10 * GIB) });
    assert!(text.contains("/dev/sdb: it is in use: sdb1 is mounted"), "{text}");
    host.add_device("/dev/sdb", blank(10 * GIB));
    check(
        &declared,
        &host,
        &Policy::default(),
        expect![[r#"
        ! StoragePool/fast  refused: the volume group vg0 is written to /dev/sdb; refused without consent: a device would be written over
              devices  blank → volume group vg0  DATA LOSS
        ! Volume/data       blocked: /dev/vg0/data is not there
              blocked: waits for StoragePool/fast, which is refused
        Refused: a device would be written over (StoragePool/fast)
        To allow exactly this plan: --approve 4e9bb82f939e
        Plan: 1 refused, 1 blocked. Downtime: none.
    "#]],
    );
    // Without consent nothing of it runs.
    let plan = diff(&declared, &host, &Policy::default());
    execute(&plan, &host, &mut |_| {});
    assert!(host.log().is_empty());
    converge(&declared, &host, &Policy::default());
    // Nobody makes a second one, and a group that is gone is not made anew unasked.
    host.edit_groups(|groups| groups.clear());
    let text = says(&diff(&declared, &host, &Policy::default()));
    assert!(text.contains("it carries the signature of LVM2_member"), "{text}");
}

#[test]
fn volumes_are_made_and_the_second_plan_is_empty() {
    let host = group_host();
    let before = foreign(&host);
    check(
        &linear_and_thin(),
        &host,
        &Policy::default(),
        expect![[r#"
        + StoragePool/cache   directory /pool
        = StoragePool/fast    adopt: volume group vg0 exists; what is in it stays as it is
        = StoragePool/thin    adopt: thin pool vg0/pool exists; what is in it stays as it is
        + Image/linux         qcow2 from /src/linux.qcow2, sha256 001122334455…
        + Volume/data         raw 50Mi in pool fast, blank
        + Volume/root         raw 2Gi in pool thin, from image linux
        + Volume/copy         raw 3Gi in pool thin, snapshot of volume root
        + VirtualMachine/web  1 vCPU, 256Mi, 2 disks, 0 NICs
        Plan: 6 to create, 2 to adopt. Downtime: none.
    "#]],
    );
    converge(&linear_and_thin(), &host, &Policy::default());
    assert_eq!(foreign(&host), before);
    let data = host.edit_groups(|groups| groups[&name("vg0")].volumes["data"].file.size_bytes);
    assert_eq!(data, 52 << 20, "rounded up to whole extents");
    // A full thin pool holds a guest up, if its writes go past the page cache.
    let snapshot = host.snapshot(&desire(&linear_and_thin()).scope());
    let web = &snapshot.vms.unwrap()["web"];
    let caches: Vec<CacheMode> =
        web.definition.as_ref().unwrap().config.disks.iter().map(|disk| disk.cache).collect();
    assert_eq!(caches, [CacheMode::Direct, CacheMode::Writeback]);
}

#[test]
fn a_running_guests_volume_grows_from_below() {
    let host = group_host();
    let mut declared = linear_and_thin();
    converge(&declared, &host, &Policy::default());
    declared.insert(id("Volume/data"), volume("fast", "60Mi", json!({})));
    check(
        &declared,
        &host,
        &Policy::default(),
        expect![[r#"
        ~ Volume/data  raw 60Mi in pool fast, blank
              capacity  52Mi → 60Mi  live
        Plan: 1 to update live. Downtime: none.
    "#]],
    );
    // Killed between the two: the guest is told all the same.
    host.set_faults(Faults { crash_before: Some(host.steps_run() + 2), ..Faults::default() });
    execute(&diff(&declared, &host, &Policy::default()), &host, &mut |_| {});
    host.set_faults(Faults::default());
    let plan = diff(&declared, &host, &Policy::default());
    let steps: Vec<&Step> = plan.steps().map(|(_, step)| step).collect();
    assert!(matches!(steps[..], [Step::ResizeDisk { capacity_bytes: 62914560, .. }]), "{steps:?}");
    converge(&declared, &host, &Policy::default());
    declared.insert(id("Volume/data"), volume("fast", "40Mi", json!({})));
    assert!(says(&diff(&declared, &host, &Policy::default())).contains("a volume never shrinks"));
}

#[test]
fn volumes_are_kept_or_removed_for_good_and_come_back() {
    let host = group_host();
    let mut declared = without(&linear_and_thin(), &["VirtualMachine/web"]);
    declared.insert(id("Volume/copy"), volume("thin", "3Gi", json!({"reclaimPolicy": "Delete"})));
    converge(&declared, &host, &prune());
    let before = foreign(&host);
    let fewer = without(&declared, &["Volume/copy", "Volume/data"]);
    check(
        &fewer,
        &host,
        &prune(),
        expect![[r#"
        ! Volume/copy  refused: declared no more, and its reclaimPolicy was Delete; refused without consent: data would be lost
              data  /dev/vg0/copy → gone for good  DATA LOSS
        . Volume/data  retain: declared no more; the data stays where it is
        Refused: data would be lost (Volume/copy)
        To allow exactly this plan: --approve 767017bb205a
        Plan: 1 retained, 1 refused. Downtime: none.
    "#]],
    );
    converge(&fewer, &host, &prune());
    let retained = host.edit_groups(|groups| {
        let volumes = &mut groups.get_mut(&name("vg0")).unwrap().volumes;
        assert!(!volumes.contains_key("copy"));
        volumes["data"].file.retained.clone()
    });
    assert_eq!(retained, "vmctl:default:Volume/data".parse().ok());
    converge(&declared, &host, &prune());
    assert_eq!(foreign(&host), before);
    // The pools let go of the group and of what is in it.
    let cache = without(
        &declared,
        &["StoragePool/fast", "StoragePool/thin", "Volume/data", "Volume/root", "Volume/copy"],
    );
    converge(&cache, &host, &prune());
    let (marks, left) = host.edit_groups(|groups| {
        let group = &groups[&name("vg0")];
        (group.mark.clone(), group.volumes.keys().cloned().collect::<Vec<_>>())
    });
    assert_eq!((marks, left), (None, ["data", "os", "root", "swap"].map(str::to_owned).to_vec()));
}

#[test]
fn what_is_in_the_way_is_named() {
    let host = group_host();
    let mut declared = without(&linear_and_thin(), &["VirtualMachine/web", "Volume/copy"]);
    declared.insert(id("Volume/swap"), volume("thin", "1Gi", json!({})));
    declared.insert(id("Volume/pool"), volume("fast", "1Gi", json!({})));
    declared.insert(id("Volume/huge"), volume("fast", "1Ti", json!({})));
    check(
        &declared,
        &host,
        &Policy::default(),
        expect![[r#"
        + StoragePool/cache  directory /pool
        = StoragePool/fast   adopt: volume group vg0 exists; what is in it stays as it is
        = StoragePool/thin   adopt: thin pool vg0/pool exists; what is in it stays as it is
        + Image/linux        qcow2 from /src/linux.qcow2, sha256 001122334455…
        + Volume/data        raw 50Mi in pool fast, blank
        ! Volume/huge        blocked: 1Ti doesn't fit: the volume group vg0 has 79868Mi left
              hint: `vgextend` it by another device, or declare a smaller capacity
        ! Volume/pool        blocked: /dev/vg0/pool is a logical volume outside of the volume group vg0
              hint: give the Volume another name, or declare the pool that it is in
        + Volume/root        raw 2Gi in pool thin, from image linux
        ! Volume/swap        blocked: /dev/vg0/swap is a logical volume outside of the thin pool vg0/pool
              hint: give the Volume another name, or declare the pool that it is in
        Plan: 4 to create, 2 to adopt, 3 blocked. Downtime: none.
    "#]],
    );
    // A half-made one is made anew, an inactive one gets its device.
    let host = group_host();
    let declared = linear_and_thin();
    converge(&declared, &host, &Policy::default());
    host.edit_groups(|groups| {
        let volumes = &mut groups.get_mut(&name("vg0")).unwrap().volumes;
        volumes.get_mut("copy").unwrap().file.half_made = true;
        volumes.get_mut("data").unwrap().file.inactive = true;
        groups.get_mut(&name("vg0")).unwrap().thin_pools.get_mut(&name("pool")).unwrap().facts.data_used =
            8_512;
    });
    check(
        &declared,
        &host,
        &Policy::default(),
        expect![[r#"
          StoragePool/thin  thin pool vg0/pool
              note: PoolNearlyFull: 85.12 % of its data space in use; `lvextend -L +10G vg0/pool` gives it more
        ~ Volume/data       raw 50Mi in pool fast, blank
              status.device  inactive → active  live
        + Volume/copy       raw 3Gi in pool thin, snapshot of volume root
        Plan: 1 to create, 1 to update live. Downtime: none.
    "#]],
    );
    converge(&declared, &host, &Policy::default());
}

#[test]
fn dying_at_any_step_converges() {
    let smooth = {
        let host = group_host();
        converge(&linear_and_thin(), &host, &prune());
        host.edit_groups(|groups| format!("{groups:?}"))
    };
    let mut deaths = 0;
    for at in 1.. {
        let mut died = false;
        for after in [false, true] {
            let host = group_host();
            let (crash_before, crash_after) = if after { (None, Some(at)) } else { (Some(at), None) };
            host.set_faults(Faults { crash_before, crash_after, ..Faults::default() });
            let outcomes = execute(&diff(&linear_and_thin(), &host, &prune()), &host, &mut |_| {});
            died |= !outcomes.values().all(|outcome| outcome.is_done());
            host.set_faults(Faults::default());
            converge(&linear_and_thin(), &host, &prune());
            assert_eq!(host.edit_groups(|groups| format!("{groups:?}")), smooth, "at {at}, after: {after}");
        }
        if !died {
            break;
        }
        deaths += 1;
    }
    assert!(deaths >= 7, "{deaths}");
}

#[test]
fn a_blank_volume_is_no_disk_to_boot_from_whatever_its_pool() {
    let host = group_host();
    let mut declared = without(&linear_and_thin(), &["Volume/copy"]);
    declared.insert(id("Volume/plain"), volume("cache", "1Gi", json!({})));
    let web =
        |volume: &str| json!({"memory": "256Mi", "boot": {"disk": "disk0"}, "disks": [{"volume": volume}]});
    for blank in ["data", "plain"] {
        declared.insert(id("VirtualMachine/web"), web(blank));
        let text = says(&diff(&declared, &host, &Policy::default()));
        assert!(text.contains(&format!("NotBootable: Volume/{blank} has no partition table")), "{text}");
    }
    // Nor is it once it is there. One from an image is.
    declared.remove(&id("VirtualMachine/web"));
    converge(&declared, &host, &Policy::default());
    for (volume, blank) in [("data", true), ("plain", true), ("root", false)] {
        declared.insert(id("VirtualMachine/web"), web(volume));
        let text = says(&diff(&declared, &host, &Policy::default()));
        assert_eq!(text.contains("NotBootable"), blank, "{text}");
    }
    // What a guest, or anybody, has put there counts.
    host.edit_groups(|groups| {
        let data = groups.get_mut(&name("vg0")).unwrap().volumes.get_mut("data").unwrap();
        data.file.boot = Some(BootFacts { signature: BootSignature::Gpt, file_system: false });
    });
    declared.insert(id("VirtualMachine/web"), web("data"));
    converge(&declared, &host, &Policy::default());
}
