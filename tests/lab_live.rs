//! Manifests change under running Linux guests: disks and NICs come and go by `apply`, with no command in the
//! guest, which goes on as if nothing had been. Every test here runs in the lab (`tests/lab/`).

#[path = "support/in_lab.rs"]
mod in_lab;
#[path = "support/tutorial.rs"]
mod tutorial;

use std::process::{Command, Stdio};
use std::time::Duration;

use in_lab::ran_in_lab;
use tutorial::*;

/// For a guest under emulation to notice something.
const PATIENCE: Duration = Duration::from_secs(60);
const MORE_VOLUME: &str = "---
apiVersion: vmctl.dev/v1alpha1
kind: Volume
metadata: {name: vm1-more}
spec: {pool: default, format: raw, capacity: 64Mi}
";

#[track_caller]
fn comes_to(guest: &mut Guest, what: &str, command: &str, expected: &str) {
    until(what, PATIENCE, || (guest.run(command).1 == expected).then_some(()));
}

/// Gives vm1 the volume, the disk `more` on it, and the NIC `extra` on a bridge.
fn plug(tutorial: &Tutorial, bridge: &str) {
    let path = tutorial.source.join("vm1.yaml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, format!("{text}{MORE_VOLUME}")).unwrap();
    tutorial.edit(
        "vm1.yaml",
        "    - volume: vm1-data\n",
        "    - volume: vm1-data\n    - {volume: vm1-more, name: more}\n",
    );
    tutorial.edit(
        "vm1.yaml",
        "    - bridge: brvlan10\n",
        &format!("    - bridge: brvlan10\n    - {{bridge: {bridge}, name: extra}}\n"),
    );
}

fn devices(tutorial: &Tutorial) -> Vec<String> {
    let config = tutorial.control("vm1").unwrap().state().unwrap().config;
    let disks = config.disks.into_iter().map(|disk| disk.name);
    disks.chain(config.nics.into_iter().map(|nic| nic.name)).collect()
}

#[test]
fn a_running_guest_gets_a_disk_and_a_nic_and_loses_them() {
    if ran_in_lab() {
        return;
    }
    let tutorial = Tutorial::new();
    tutorial.apply();
    let before = std::fs::read_to_string(tutorial.source.join("vm1.yaml")).unwrap();
    let mut guest = tutorial.guest("vm1");
    let (pid, uptime) = (tutorial.pid("vm1"), guest.uptime_s());

    plug(&tutorial, "brvlan20");
    let plan = tutorial.diff(1);
    assert!(plan.contains("disks[more]") && plan.contains("interfaces[extra]"), "{plan}");
    assert!(plan.contains("Plan: 1 to create, 1 to update live. Downtime: none."), "{plan}");
    tutorial.apply();
    tutorial.diff(0);
    comes_to(&mut guest, "the disk is there", "cat /sys/block/vdc/size", "131072");
    assert_eq!(guest.succeeds("cat /sys/block/vdc/serial"), "more");
    comes_to(&mut guest, "the NIC is there", "test -e /sys/class/net/eth1; echo $?", "0");
    guest.succeeds("ip addr add 192.168.20.21/24 dev eth1 && ip link set eth1 up");
    guest.succeeds("ping -c 2 -W 10 192.168.20.1");
    guest.succeeds("echo precious | dd of=/dev/vdc conv=fsync 2>/dev/null");

    // It grows, and the NIC moves from one VLAN's bridge to the other's.
    tutorial.edit("vm1.yaml", "capacity: 64Mi", "capacity: 128Mi");
    tutorial.edit("vm1.yaml", "{bridge: brvlan20, name: extra}", "{bridge: brvlan10, name: extra}");
    assert_eq!(tutorial.differing(), ["VirtualMachine/vm1", "Volume/vm1-more"]);
    tutorial.apply();
    tutorial.diff(0);
    comes_to(&mut guest, "the disk has grown", "cat /sys/block/vdc/size", "262144");
    assert_ne!(guest.run("ping -c 2 -W 2 192.168.20.1").0, 0, "still in VLAN 20");
    guest.succeeds("ip addr add 192.168.10.21/24 dev eth1");
    guest.succeeds("ping -c 2 -W 10 -I 192.168.10.21 192.168.10.1");

    // Somebody pulls the cable.
    tutorial.edit(
        "vm1.yaml",
        "{bridge: brvlan10, name: extra}",
        "{bridge: brvlan10, name: extra, linkUp: false}",
    );
    tutorial.apply();
    comes_to(&mut guest, "the carrier is gone", "cat /sys/class/net/eth1/carrier", "0");

    std::fs::write(tutorial.source.join("vm1.yaml"), &before).unwrap();
    let plan = tutorial.diff(1);
    assert!(plan.contains(". Volume/vm1-more"), "{plan}");
    tutorial.apply();
    tutorial.diff(0);
    comes_to(&mut guest, "the disk is gone", "test -e /sys/block/vdc; echo $?", "1");
    comes_to(&mut guest, "the NIC is gone", "test -e /sys/class/net/eth1; echo $?", "1");
    assert!(!run("ip link").contains("vm1.extra"), "nothing is behind the tap");
    // The data outlives it, and nobody holds the file.
    run(
        "flock -n -x /var/lib/vmctl/images/vm1-more.raw head -c 8 /var/lib/vmctl/images/vm1-more.raw | grep precious",
    );

    assert_eq!(tutorial.pid("vm1"), pid, "the process is the same");
    assert!(guest.uptime_s() > uptime, "the guest was never rebooted");
    guest.succeeds("ping -c 2 -W 10 192.168.10.1");
}

#[test]
fn a_nic_changes_its_vlan_on_a_bridge_that_filters() {
    if ran_in_lab() {
        return;
    }
    let tutorial = Tutorial::new();
    for file in ["network.yaml", "vm1.yaml", "vm2.yaml", "vm3.yaml"] {
        std::fs::remove_file(tutorial.source.join(file)).unwrap();
    }
    std::fs::write(
        tutorial.source.join("web.yaml"),
        "apiVersion: vmctl.dev/v1alpha1
kind: Bridge
metadata: {name: trunk0}
spec:
  vlanFiltering: true
  ports: [{interface: eth0, tagged: [10, 20]}]
---
apiVersion: vmctl.dev/v1alpha1
kind: VirtualMachine
metadata: {name: web}
spec:
  memory: 128Mi
  boot: {kernel: /guest/vmlinux, initrd: /guest/initrd, cmdline: console=ttyS0 quiet ip.eth0=192.168.10.31/24}
  interfaces: [{bridge: trunk0, vlan: {access: 10}}]
",
    )
    .unwrap();
    tutorial.apply();
    let mut guest = tutorial.guest("web");
    let pid = tutorial.pid("web");
    guest.succeeds("ping -c 2 -W 10 192.168.10.1");
    guest.succeeds("ip addr add 192.168.20.31/24 dev eth0");
    assert_ne!(guest.run("ping -c 2 -W 2 192.168.20.1").0, 0, "VLAN 20 leaks");

    tutorial.edit("web.yaml", "vlan: {access: 10}", "vlan: {access: 20}");
    assert!(tutorial.diff(1).contains("interfaces[net0].vlan  10 pvid untagged → 20 pvid untagged  live"));
    tutorial.apply();
    tutorial.diff(0);
    guest.succeeds("ping -c 2 -W 10 192.168.20.1");
    assert_ne!(guest.run("ping -c 2 -W 2 192.168.10.1").0, 0, "still in VLAN 10");

    // Somebody gives the port another VLAN: it is taken away.
    run("bridge vlan add dev web.net0 vid 10");
    assert_eq!(tutorial.differing(), ["VirtualMachine/web"]);
    tutorial.apply();
    assert!(!run("bridge vlan show dev web.net0").contains(" 10"));
    assert_eq!(tutorial.pid("web"), pid);
}

#[test]
fn killed_at_any_instant_the_next_apply_ends_what_was_begun() {
    if ran_in_lab() {
        return;
    }
    let tutorial = Tutorial::new();
    tutorial.apply();
    let without = std::fs::read_to_string(tutorial.source.join("vm1.yaml")).unwrap();
    plug(&tutorial, "brvlan20");
    let with = std::fs::read_to_string(tutorial.source.join("vm1.yaml")).unwrap();
    let mut guest = tutorial.guest("vm1");
    let pid = tutorial.pid("vm1");
    for round in 0..16u64 {
        let (text, expected) = if round % 2 == 0 {
            (&with, vec!["disk0", "disk1", "more", "net0", "extra"])
        } else {
            (&without, vec!["disk0", "disk1", "net0"])
        };
        std::fs::write(tutorial.source.join("vm1.yaml"), text).unwrap();
        let mut apply = Command::new("vmctl")
            .args(["apply", "--prune", "-f"])
            .arg(&tutorial.source)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        // From before its first step to after its last.
        std::thread::sleep(Duration::from_millis(20 + round * 25));
        let _ = apply.kill();
        apply.wait().unwrap();
        tutorial.apply();
        tutorial.diff(0);
        assert_eq!(devices(&tutorial), expected, "round {round}");
        let taps = run("ip -br -o link | grep -c '^vm1' || true");
        assert_eq!(taps.trim(), if round % 2 == 0 { "2" } else { "1" }, "round {round}");
    }
    comes_to(&mut guest, "nothing is left in the guest", "test -e /sys/block/vdc; echo $?", "1");
    assert_eq!(tutorial.pid("vm1"), pid);
}
