//! Volume groups and thin pools as storage pools, with LVM and the device mapper for real: on loop devices,
//! with guests on logical volumes. Every test here runs in the lab (`tests/lab/`).

#[path = "support/in_lab.rs"]
mod in_lab;
#[path = "support/lvm.rs"]
mod lvm;
#[path = "support/tutorial.rs"]
mod tutorial;

use in_lab::ran_in_lab;
use lvm::*;
use tutorial::{run, said, shell};

const MIB: u64 = 1 << 20;

#[test]
fn a_group_is_made_on_a_blank_device_alone_and_with_consent() {
    if ran_in_lab() {
        return;
    }
    let lab = Lab::new();
    let device = lab.loop_device(64);
    let pool = format!("  lvm:\n    volumeGroup: vg0\n    devices: [{device}]\n");
    lab.write("pool.yaml", &manifest("StoragePool", "fast", &pool));

    // Whatever is on it stays on it, byte for byte.
    let refused = |what: &str, make: &str, because: &str| {
        run(make);
        let before = digest(&device);
        let plan = lab.diff();
        assert_eq!(plan["plan"]["actions"][0]["verb"], "blocked", "{what}: {plan}");
        let text = plan.to_string();
        assert!(text.contains(because), "{what}: no `{because}` in {text}");
        let output = lab.apply_output("--approve deadbeefdeadbeef");
        assert_ne!(output.status.code(), Some(0), "{what}: {}", said(&output));
        assert_eq!(digest(&device), before, "{what}: it was written to");
        assert!(run("vgs --noheadings").is_empty(), "{what}");
    };
    refused("a file system", &format!("mkfs.ext4 -q {device}"), "the signature of ext4");
    refused("a mount", &format!("mkdir -p /mnt && mount -o ro {device} /mnt"), "it is in use");
    run(&format!("umount /mnt && wipefs -qa {device}"));
    refused("swap space", &format!("mkswap -q {device}"), "the signature of swap");
    run(&format!("wipefs -qa {device}"));
    refused("a partition table", &format!("printf ',,L\\n' | sfdisk -q {device} 2>&1"), "dos");
    run(&format!("wipefs -qaf {device}; partx -d {device} || true; blockdev --flushbufs {device}"));
    refused("a physical volume of nobody's", &format!("pvcreate -q {device}"), "LVM2_member");
    run(&format!("pvremove -q {device}"));

    // Not blank, but without any signature: said in the plan. And it takes a consent of its own.
    run(&format!(
        "dd if=/dev/urandom of={device} bs=1M count=64 conv=fsync status=none; wipefs -qa {device}"
    ));
    let before = digest(&device);
    let plan = lab.diff();
    assert_eq!(plan["plan"]["actions"][0]["verb"], "refused", "{plan}");
    assert!(plan.to_string().contains("no signature, but not empty"), "{plan}");
    let output = lab.apply_output("");
    assert_eq!(output.status.code(), Some(5), "{}", said(&output));
    assert_eq!(digest(&device), before);
    let hash = plan["plan"]["hash"].as_str().unwrap();
    lab.apply(&format!("--approve {hash}"));
    assert_eq!(
        run("vgs --noheadings -o vg_name,vg_tags").trim(),
        "vg0 vmctl.owner=vmctl:default:StoragePool/fast"
    );
    lab.in_sync();

    // A blank volume on a device full of noise is blank.
    lab.write("data.yaml", &volume("data", "fast", "19532Ki", ""));
    lab.apply("");
    lab.in_sync();
    assert_eq!(bytes_of("/dev/vg0/data"), 20 * MIB, "rounded up to whole extents");
    run("cmp -n 20971520 /dev/vg0/data /dev/zero");
    run("dd if=/dev/urandom of=/dev/vg0/data bs=1M count=20 conv=fsync status=none");
    let content = digest("/dev/vg0/data");
    lab.write("data.yaml", &volume("data", "fast", "32Mi", ""));
    lab.apply("");
    lab.in_sync();
    assert_eq!(bytes_of("/dev/vg0/data"), 32 * MIB);
    assert_eq!(run("head -c 20971520 /dev/vg0/data | sha256sum"), content, "growing changes nothing");
    run("tail -c +20971521 /dev/vg0/data | cmp -n 12582912 - /dev/zero");
    // Nothing is shrunk.
    lab.write("data.yaml", &volume("data", "fast", "8Mi", ""));
    assert!(lab.diff().to_string().contains("a volume never shrinks"));
    assert_ne!(lab.apply_output("").status.code(), Some(0));
    assert_eq!(bytes_of("/dev/vg0/data"), 32 * MIB);
}

#[test]
fn volumes_in_a_group_are_made_grown_kept_and_removed_and_others_are_left_alone() {
    if ran_in_lab() {
        return;
    }
    let lab = Lab::new();
    let device = lab.loop_device(512);
    run(&format!(
        "vgcreate -q vg0 {device} && lvcreate -q -n foreign -L 16m vg0 && lvcreate -q -n equal -L 8m vg0"
    ));
    run("lvcreate -q -n larger -L 8m vg0 && vgchange -q --addtag theirs vg0");
    run("dd if=/dev/urandom of=/dev/vg0/foreign bs=1M count=16 conv=fsync status=none");
    run("dd if=/dev/urandom of=/dev/vg0/equal bs=1M count=8 conv=fsync status=none");
    let foreign = || {
        (
            digest("/dev/vg0/foreign"),
            run("lvs --noheadings -o lv_uuid,lv_tags,lv_attr vg0/foreign vg0/larger"),
        )
    };
    let (before, equal) = (foreign(), digest("/dev/vg0/equal"));

    // Two images of the same content.
    run(
        "mkdir -p /tmp/i && dd if=/dev/urandom of=/tmp/i/a.raw bs=1M count=3 status=none && truncate -s 8M /tmp/i/a.raw",
    );
    run("dd if=/dev/urandom of=/tmp/i/a.raw bs=1M seek=6 count=1 conv=notrunc status=none");
    run("qemu-img convert -q -f raw -O qcow2 /tmp/i/a.raw /tmp/i/a.qcow2");
    lab.write("pool.yaml", &manifest("StoragePool", "fast", "  lvm:\n    volumeGroup: vg0\n"));
    lab.write(
        "cache.yaml",
        &manifest("StoragePool", "cache", "  directory:\n    path: /var/lib/vmctl/images\n"),
    );
    for format in ["raw", "qcow2"] {
        let sha256 =
            run(&format!("sha256sum /tmp/i/a.{format}")).split_whitespace().next().unwrap().to_owned();
        let image = format!(
            "  pool: cache\n  format: {format}\n  sha256: {sha256}\n  source:\n    path: /tmp/i/a.{format}\n"
        );
        lab.write(&format!("image-{format}.yaml"), &manifest("Image", &format!("image-{format}"), &image));
        let source = format!("  source:\n    image: image-{format}\n");
        lab.write(
            &format!("from-{format}.yaml"),
            &volume(&format!("from-{format}"), "fast", "12Mi", &source),
        );
    }
    lab.write("equal.yaml", &volume("equal", "fast", "8Mi", ""));
    lab.write("data.yaml", &volume("data", "fast", "64Mi", "  reclaimPolicy: Delete\n"));
    lab.write("vm.yaml", &vm("web", "data"));
    lab.apply("");
    lab.in_sync();
    for format in ["raw", "qcow2"] {
        run(&format!("cmp -n {} /dev/vg0/from-{format} /tmp/i/a.raw", 8 * MIB));
        run(&format!("tail -c +{} /dev/vg0/from-{format} | cmp -n {} - /dev/zero", 8 * MIB + 1, 4 * MIB));
    }
    assert_eq!(digest("/dev/vg0/equal"), equal, "adopted as it is");
    assert!(run("lvs --noheadings -o lv_tags vg0/equal").contains("vmctl.owner=vmctl:default:Volume/equal"));
    a_second_apply_asks_lvm_once_and_changes_nothing(&lab);

    // A guest on it, grown while it runs.
    let mut guest = lab.guest("web");
    assert_eq!(guest.succeeds("cat /sys/block/vda/size").trim(), (64 * MIB / 512).to_string());
    guest.succeeds("dd if=/dev/zero bs=1M count=2 | tr '\\000' 'V' | dd of=/dev/vda bs=1M && sync");
    lab.write("data.yaml", &volume("data", "fast", "96Mi", "  reclaimPolicy: Delete\n"));
    lab.apply("");
    lab.in_sync();
    assert_eq!(guest.succeeds("cat /sys/block/vda/size").trim(), (96 * MIB / 512).to_string());
    run("head -c 2097152 /dev/vg0/data | tr -d V | cmp - /dev/null");
    // The guest has it to itself: a mount, and another opener that asks for that, are kept out.
    assert_ne!(
        shell("mkfs.ext4 -q /dev/vg0/data").status.code(),
        Some(0),
        "mkfs over a running guest's disk"
    );

    exports_are_what_is_in_them(&lab);

    // What can't be had is refused with its reason.
    lab.write("larger.yaml", &volume("larger", "fast", "16Mi", ""));
    lab.write("huge.yaml", &volume("huge", "fast", "1Gi", ""));
    let plan = lab.diff().to_string();
    assert!(plan.contains("exists, is not vmctl's, and holds 8Mi where 16Mi is declared"), "{plan}");
    assert!(plan.contains("doesn't fit"), "{plan}");
    lab.remove("larger.yaml");
    lab.remove("huge.yaml");

    // Without its manifest: one is kept and loses its mark, one needs consent to go.
    lab.remove("equal.yaml");
    lab.remove("data.yaml");
    lab.remove("vm.yaml");
    let output = lab.apply_output("--prune");
    assert_eq!(output.status.code(), Some(5), "{}", said(&output));
    assert!(shell("lvs vg0/data").status.success(), "no data goes without consent");
    let plan = lab.diff_with("--prune");
    lab.apply(&format!("--prune --approve {}", plan["plan"]["hash"].as_str().unwrap()));
    assert!(!shell("lvs vg0/data").status.success());
    assert_eq!(digest("/dev/vg0/equal"), equal);
    let tags = run("lvs --noheadings -o lv_tags vg0/equal");
    assert_eq!(tags.trim(), "vmctl.retained=vmctl:default:Volume/equal");
    let plan = lab.diff_with("--prune");
    assert!(
        plan["plan"]["actions"].as_array().unwrap().iter().all(|action| action["verb"] == "noOp"),
        "{plan}"
    );

    // The pool goes from the manifests: the group stays, without our mark.
    run(&format!("rm {}/*", lab.source.display()));
    lab.write(
        "cache.yaml",
        &manifest("StoragePool", "cache", "  directory:\n    path: /var/lib/vmctl/images\n"),
    );
    let plan = lab.diff_with("--prune");
    lab.apply(&format!("--prune --approve {}", plan["plan"]["hash"].as_str().unwrap()));
    assert_eq!(run("vgs --noheadings -o vg_tags vg0").trim(), "theirs");
    assert_eq!(foreign(), before, "others' volumes are as they were");
}

/// `from-qcow2` holds still, and `data` has a guest; a volume's content never says what it is.
fn exports_are_what_is_in_them(lab: &Lab) {
    let export = |volume: &str, file: &str| shell(&format!("vmctl export volume/{volume} {file}"));
    for (file, format) in [("x.raw", "raw"), ("x.qcow2", "qcow2"), ("x.vmdk", "vmdk")] {
        let output = export("from-qcow2", &format!("/tmp/i/{file}"));
        assert!(output.status.success(), "{}", said(&output));
        run(&format!("qemu-img compare -q -f raw -F {format} /dev/vg0/from-qcow2 /tmp/i/{file}"));
        assert!(run(&format!("qemu-img info --output=json -f {format} /tmp/i/{file}")).contains("12582912"));
    }
    let refused = |volume: &str, why: &str, hint: &str| {
        let output = export(volume, "/tmp/i/refused.raw");
        let text = said(&output);
        assert!(output.status.code() == Some(3) && text.contains(why) && text.contains(hint), "{text}");
        assert!(!shell("ls /tmp/i/refused.raw").status.success());
    };
    refused("data", "Volume/data is a disk of VirtualMachine/web, which runs", "`vmctl stop web` first");
    // A guest may write there what it likes: an image that names the host's files is bytes.
    run("qemu-img create -q -f qcow2 -b /etc/hostname -F raw /tmp/i/evil.qcow2 8M");
    run("dd if=/tmp/i/evil.qcow2 of=/dev/vg0/from-raw conv=notrunc,fsync status=none");
    let output = export("from-raw", "/tmp/i/bytes.raw");
    assert!(output.status.success(), "{}", said(&output));
    run("cmp /dev/vg0/from-raw /tmp/i/bytes.raw");
    // By others than VMs, too.
    run("mkfs.ext4 -q /dev/vg0/from-raw && mkdir -p /mnt/x && mount /dev/vg0/from-raw /mnt/x");
    refused("from-raw", "it is mounted, or another program has it for itself", "unmount it");
    run("umount /mnt/x && lvchange -q -an vg0/from-raw");
    refused("from-raw", "is not active", "`lvchange -ay /dev/vg0/from-raw`");
    lab.apply("");
    lab.in_sync();
}

/// Observed system call by system call: one process, LVM's report, and no write.
fn a_second_apply_asks_lvm_once_and_changes_nothing(lab: &Lab) {
    let sequence = run("vgs --noheadings -o vg_seqno vg0");
    run(&format!("strace -f -e trace=execve -o /tmp/trace vmctl apply -f {}", lab.source.display()));
    let trace = run("grep -c 'execve(.*= 0' /tmp/trace");
    // `vmctl` itself, and the report.
    assert_eq!(trace.trim(), "2", "{}", run("cat /tmp/trace"));
    assert!(run("cat /tmp/trace").contains("fullreport"));
    assert_eq!(run("vgs --noheadings -o vg_seqno vg0"), sequence, "the metadata was written");
}

#[test]
fn death_before_any_step_converges() {
    if ran_in_lab() {
        return;
    }
    let lab = Lab::new();
    let device = lab.loop_device(256);
    let devices = format!("    devices: [{device}]\n    size: 128Mi\n");
    lab.write(
        "pool.yaml",
        &manifest(
            "StoragePool",
            "thin",
            &format!("  lvmThin:\n    volumeGroup: vg0\n    thinPool: pool\n{devices}"),
        ),
    );
    lab.write("a.yaml", &volume("a", "thin", "16Mi", ""));
    lab.write("b.yaml", &volume("b", "thin", "20Mi", "  source:\n    volume: a\n"));
    lab.write("linear.yaml", &manifest("StoragePool", "fast", "  lvm:\n    volumeGroup: vg0\n"));
    lab.write("c.yaml", &volume("c", "fast", "16Mi", ""));
    let clean_up = || {
        shell("lvremove -qy vg0; vgremove -qy vg0");
        run(&format!("pvremove -q {device} || true; wipefs -qa {device}; rm -rf /var/lib/vmctl /run/vmctl"));
    };
    // Approved anew each time: the group, and what waits for it.
    let approved = |prefix: &str| {
        let plan = lab.diff();
        shell(&format!(
            "{prefix} vmctl apply --approve {} -f {}",
            plan["plan"]["hash"].as_str().unwrap(),
            lab.source.display()
        ))
    };
    let census = || {
        run(
            "lvs --noheadings -a -o lv_name,lv_size,lv_tags,lv_layout,pool_lv,origin vg0 | sort; vgs --noheadings -o vg_tags vg0",
        )
    };
    let converge = |when: &str| {
        // The second pool can only be seen whole once its group is there.
        for _ in 0..3 {
            let output = approved("");
            if output.status.success()
                && shell(&format!("vmctl diff -f {}", lab.source.display())).status.success()
            {
                return;
            }
        }
        panic!("{when}: {}", said(&approved("")));
    };
    converge("smooth");
    let smooth = census();
    assert!(!smooth.contains("vmctl.making") && !smooth.contains("vmctl.growing"), "{smooth}");
    clean_up();
    let mut deaths = 0;
    for step in 1.. {
        let output = approved(&format!("VMCTL_CRASH_BEFORE_STEP={step}"));
        let killed = output.status.code().is_none() || output.status.code() == Some(137);
        converge(&format!("killed before step {step}"));
        assert_eq!(census(), smooth, "killed before step {step}");
        clean_up();
        if !killed {
            break;
        }
        deaths += 1;
    }
    assert!(deaths >= 3, "only {deaths} steps");
    println!("killed before each of {deaths} steps; each time the next applies converged");

    // And in the middle of commands: at instants spread over the run.
    let mut killed = 0;
    for round in 0..12 {
        let plan = lab.diff();
        let mut child = std::process::Command::new("vmctl")
            .args(["apply", "--approve", plan["plan"]["hash"].as_str().unwrap(), "-f"])
            .arg(&lab.source)
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(std::time::Duration::from_millis(150 + round * 250));
        killed += u32::from(child.try_wait().unwrap().is_none());
        let _ = child.kill();
        child.wait().unwrap();
        // A command of LVM's that it left behind ends by itself.
        tutorial::until("LVM is quiet", std::time::Duration::from_secs(30), || {
            (!shell("pgrep -x lvm").status.success()).then_some(())
        });
        converge(&format!("killed after {} ms", 150 + round * 250));
        assert_eq!(census(), smooth, "killed after {} ms", 150 + round * 250);
        clean_up();
    }
    println!("killed at {killed} instants");
    assert!(killed > 3, "only {killed} runs were killed in time");
}

#[test]
fn thin_volumes_share_what_they_have_and_a_full_pool_loses_nothing() {
    if ran_in_lab() {
        return;
    }
    let lab = Lab::new();
    let device = lab.loop_device(256);
    run(&format!("vgcreate -q vg0 {device} && lvcreate -q -n foreign -L 8m vg0"));
    run("dd if=/dev/urandom of=/dev/vg0/foreign bs=1M count=8 conv=fsync status=none");
    let foreign = digest("/dev/vg0/foreign");
    let thin = "  lvmThin:\n    volumeGroup: vg0\n    thinPool: pool\n    size: 64Mi\n";
    lab.write("pool.yaml", &manifest("StoragePool", "thin", thin));
    lab.write("golden.yaml", &volume("golden", "thin", "16Mi", ""));
    lab.apply("");
    lab.in_sync();
    assert_eq!(run("lvs --noheadings -o lv_when_full vg0/pool").trim(), "error");
    run("dd if=/dev/urandom of=/dev/vg0/golden bs=1M count=4 conv=fsync status=none");
    let golden = digest("/dev/vg0/golden");

    // A snapshot, larger than its source, with a device of its own.
    lab.write("copy.yaml", &volume("copy", "thin", "20Mi", "  source:\n    volume: golden\n"));
    lab.apply("");
    lab.in_sync();
    assert_eq!(bytes_of("/dev/vg0/copy"), 20 * MIB);
    assert_eq!(run("head -c 16777216 /dev/vg0/copy | sha256sum"), golden);
    run("tail -c +16777217 /dev/vg0/copy | cmp -n 4194304 - /dev/zero");
    run("dd if=/dev/zero of=/dev/vg0/copy bs=1M count=1 conv=fsync status=none");
    assert_eq!(digest("/dev/vg0/golden"), golden, "they part where one is written to");
    // As after a boot that didn't activate it.
    run("lvchange -q -an -ky vg0/copy");
    lab.apply("");
    lab.in_sync();
    assert_eq!(bytes_of("/dev/vg0/copy"), 20 * MIB);

    // More than the pool holds, written by a guest.
    lab.write("data.yaml", &volume("data", "thin", "96Mi", ""));
    lab.write("vm.yaml", &vm("web", "data"));
    lab.apply("");
    lab.in_sync();
    let mut guest = lab.guest("web");
    guest.succeeds(
        "{ (tr '\\000' V < /dev/zero | dd of=/dev/vda bs=1M count=80 iflag=fullblock oflag=direct; echo over=$? > /tmp/over) >/dev/null 2>&1 & }",
    );
    let patience = std::time::Duration::from_secs(90);
    let says = |what: &str, word: &str| shell(&format!("vmctl get {what} -o json")).stdout_has(word);
    tutorial::until("the guest waits for room", patience, || says("vm", "DiskFull").then_some(()));
    assert!(says("pool", "PoolNearlyFull"), "{}", run("vmctl get pool -o json"));
    let plan = lab.diff().to_string();
    assert!(plan.contains("PoolNearlyFull"), "{plan}");
    // It is paused: nothing was called done that isn't, and nothing failed.
    assert!(says("vm", "\"Paused\""), "{}", run("vmctl get vm -o json"));
    // Room comes, and the guest goes on as if nothing had been.
    run("lvextend -q -L +64m vg0/pool");
    tutorial::until("the guest's writes are over", patience, || {
        (guest.run("cat /tmp/over").1.trim() == "over=0").then_some(())
    });
    tutorial::until("the condition is over", patience, || (!says("vm", "DiskFull")).then_some(()));
    run("head -c 83886080 /dev/vg0/data | tr -d V | cmp - /dev/null");
    assert_eq!(digest("/dev/vg0/golden"), golden);
    assert_eq!(digest("/dev/vg0/foreign"), foreign);
}
