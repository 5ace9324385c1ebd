//! `vmctl adopt` where VLANs are real: both ways to have them, made by hand. Runs in the lab (`tests/lab/`).

#[path = "support/in_lab.rs"]
mod in_lab;
#[path = "support/tutorial.rs"]
mod tutorial;

use in_lab::ran_in_lab;
use tutorial::*;

#[test]
fn vlans_made_by_hand_are_written_as_they_are_and_adopted() {
    if ran_in_lab() {
        return;
    }
    for command in [
        "ip link add eth7 type veth peer name far7 && ip link set far7 up && ip link set eth7 up",
        "ip link add eth8 type veth peer name far8 && ip link set far8 up && ip link set eth8 up",
        "modprobe bonding max_bonds=0; ip link add bond0 type bond mode active-backup miimon 100",
        "for n in 5 6; do ip link add eth$n type veth peer name far$n && ip link set far$n up && ip link set eth$n master bond0; done",
        "ip link set bond0 up && ip link add link bond0 name bond0.40 type vlan id 40",
        "ip link add brbond type bridge && ip link set brbond up && ip link set bond0.40 master brbond up",
        "ip link add brvlan10 type bridge && ip link set brvlan10 up",
        "ip link add link eth7 name eth7.10 type vlan id 10 && ip link set eth7.10 master brvlan10 up",
        "ip link add link eth7 name lan20 mtu 1400 type vlan id 20 && ip addr add 192.0.2.1/24 dev lan20 && ip link set lan20 up",
        "ip link add br1 type bridge vlan_filtering 1 vlan_default_pvid 0 && ip link set br1 up",
        "ip link set eth8 master br1",
        "bridge vlan add dev eth8 vid 30 pvid untagged && bridge vlan add dev eth8 vid 31-32",
    ] {
        run(command);
    }
    std::thread::sleep(std::time::Duration::from_secs(4));
    let look = || run("ip -d -o link | sed -E 's/[a-z_]*timer +[0-9.]+//g'; ip -o -4 addr; bridge vlan");
    let before = look();
    let adopted = shell("vmctl adopt -o /tmp/manifests");
    println!("{}\n{}", said(&adopted), run("cat /tmp/manifests/*"));
    assert_eq!(adopted.status.code(), Some(0));
    assert_eq!(look(), before, "nothing was changed");
    // There is no kind for a bond: what is built on it is declared, and names it.
    assert!(said(&adopted).contains("left out: bond0: a bond (of eth5 and eth6) has no manifest"));
    let host = Tutorial { source: "/tmp/manifests".into(), state: "/x".into(), run: "/x".into() };
    assert!(host.diff(0).contains("No differences (6 objects). 6 to adopt"));
    host.apply();
    host.diff(0);
    let text = run("cat /tmp/manifests/*");
    for line in [
        "pvid: 30",
        "parent: eth7",
        "parent: bond0",
        "id: 20",
        "interfaceName: lan20",
        "bridge: brvlan10",
        "vlanFiltering: true",
    ] {
        assert!(text.contains(line), "no `{line}` in\n{text}");
    }
}

#[test]
fn volume_groups_and_thin_pools_are_written_as_they_are_and_adopted() {
    if ran_in_lab() {
        return;
    }
    for command in [
        "truncate -s 400M /tmp/device && losetup /dev/loop5 /tmp/device",
        "pvcreate -q /dev/loop5 && vgcreate -q vg0 /dev/loop5",
        "lvcreate -q -y -n web -L 32m vg0 && lvcreate -q -y -n Data_1 -L 8m vg0",
        "lvcreate -q -y --type thin-pool -n thin0 -L 64m --zero y vg0 && lvcreate -q -y -n slim -V 128m --thinpool vg0/thin0",
        "mkdir -p /tmp/libvirt/storage /tmp/libvirt/qemu",
    ] {
        run(command);
    }
    let pool = "<pool type='logical'><name>fast</name><source><name>vg0</name></source><target><path>/dev/vg0</path></target></pool>";
    std::fs::write("/tmp/libvirt/storage/fast.xml", pool).unwrap();
    let domain = "<domain type='kvm'><name>web</name><memory unit='MiB'>128</memory><os><kernel>/guest/vmlinux</kernel></os>
      <devices><disk type='block' device='disk'><driver name='qemu' type='raw'/><source dev='/dev/vg0/web'/><target dev='vda' bus='virtio'/></disk>
      <disk type='block' device='disk'><source dev='/dev/mapper/vg0-slim'/><target dev='vdb' bus='virtio'/></disk></devices></domain>";
    std::fs::write("/tmp/libvirt/qemu/web.xml", domain).unwrap();
    let look = || {
        run("lvs --noheadings -o lv_full_name,lv_uuid,lv_tags,lv_size,lv_attr; vgs --noheadings -o vg_tags")
    };
    let before = look();
    let adopted = shell("vmctl adopt --libvirt /tmp/libvirt --volume-group vg0/thin0 -o /tmp/manifests");
    println!("{}", said(&adopted));
    assert_eq!(look(), before, "nothing was changed");
    let adopted = said(&adopted);
    assert!(adopted.contains("5 objects: 4 as the host has it, 1 that differ; 1 left out"), "{adopted}");
    assert!(adopted.contains("left out: /dev/vg0/Data_1") && adopted.contains("lvrename"), "{adopted}");
    let host = Tutorial { source: "/tmp/manifests".into(), state: "/x".into(), run: "/x".into() };
    let diff = host.diff(1);
    assert!(diff.contains("1 to create, 4 to adopt"), "{diff}");
    host.apply();
    host.diff(0);
}
