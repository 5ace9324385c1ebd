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
    let host = Tutorial { source: "/tmp/manifests".into(), state: "/x".into(), run: "/x".into() };
    assert!(host.diff(1).contains("Plan: 4 to adopt. Downtime: none."));
    host.apply();
    host.diff(0);
    let text = run("cat /tmp/manifests/*");
    for line in [
        "pvid: 30",
        "parent: eth7",
        "id: 20",
        "interfaceName: lan20",
        "bridge: brvlan10",
        "vlanFiltering: true",
    ] {
        assert!(text.contains(line), "no `{line}` in\n{text}");
    }
}
