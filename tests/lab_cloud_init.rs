//! A Linux guest finds its cloud-init seed as cloud-init does: by the label, on a disk that it can't write.
//! Every test here runs in the lab (`tests/lab/`).

#[path = "support/in_lab.rs"]
mod in_lab;
#[path = "support/tutorial.rs"]
mod tutorial;

use in_lab::ran_in_lab;
use tutorial::*;

/// What the guest's kernel mounts the seed with.
const MODULES: [&str; 4] = ["fat", "vfat", "nls_cp437", "nls_ascii"];

#[test]
fn a_guest_reads_its_seed() {
    if ran_in_lab() {
        return;
    }
    let tutorial = Tutorial::new();
    let loaded = initrd_with(&MODULES, "/tmp/t/initrd");
    std::fs::write("/tmp/t/secret", "#!/bin/sh\necho secret\n").unwrap();
    tutorial.edit("vm1.yaml", "initrd: /guest/initrd", "initrd: /tmp/t/initrd");
    tutorial.edit(
        "vm1.yaml",
        "  disks:\n",
        "  cloudInit: {hostname: web, userDataFile: /tmp/t/secret}\n  disks:\n",
    );
    let said = tutorial.apply();
    assert!(!said.contains("echo secret"), "{said}");
    tutorial.diff(0);
    let boot = || {
        let mut guest = tutorial.guest("vm1");
        for module in &loaded {
            guest.succeeds(&format!("insmod /extra/{module}.ko"));
        }
        guest
    };
    let mut guest = boot();
    // The tutorial's VM has two disks of its own: the seed comes after them.
    assert_eq!(guest.succeeds("cat /sys/block/vdc/serial"), "cidata");
    assert_eq!(guest.succeeds("cat /sys/block/vdc/ro"), "1");
    guest.succeeds("mkdir -p /seed && mount -t vfat -o ro /dev/vdc /seed");
    assert_eq!(guest.succeeds("cat /seed/user-data"), "#!/bin/sh\necho secret");
    let meta_data = guest.succeeds("cat /seed/meta-data");
    assert_eq!(meta_data, "instance-id: \"vmctl-default-vm1\"\nlocal-hostname: \"web\"");
    let mac = guest.succeeds("cat /sys/class/net/eth0/address");
    let network = guest.succeeds("cat /seed/network-config");
    assert!(network.contains(&format!("macaddress: \"{mac}\"")), "{network}");
    assert!(network.contains("dhcp4: true"), "{network}");
    assert_ne!(guest.run("dd if=/dev/zero of=/dev/vdc bs=512 count=1").0, 0);

    // Another secret: nothing happens to the guest, and the plan says what waits.
    std::fs::write("/tmp/t/secret", "#!/bin/sh\necho another\n").unwrap();
    let pid = tutorial.pid("vm1");
    let plan = tutorial.diff(1);
    assert!(plan.contains("cloudInit") && plan.contains("Downtime: none"), "{plan}");
    tutorial.apply();
    assert!(tutorial.diff(0).contains("takes effect at the next start"));
    assert_eq!(tutorial.pid("vm1"), pid);
    assert_eq!(guest.succeeds("cat /seed/user-data"), "#!/bin/sh\necho secret");
    run("vmctl restart --force vm1");
    let mut guest = boot();
    guest.succeeds("mkdir -p /seed && mount -t vfat -o ro /dev/vdc /seed");
    assert_eq!(guest.succeeds("cat /seed/user-data"), "#!/bin/sh\necho another");
    // The same instance: cloud-init does nothing of what it does once.
    assert_eq!(guest.succeeds("cat /seed/meta-data"), meta_data);
}
