//! Both ways to have VLANs, with guests that run: a sub-device and a bridge for each, and one bridge that filters. Who
//! hears whom is what the manifests say, frame by frame with its tag; and as the running guests move from the one way
//! to the other, nobody hears more. Every test here runs in the lab (`tests/lab/`).

#[path = "support/in_lab.rs"]
mod in_lab;
#[path = "support/tutorial.rs"]
mod tutorial;

use std::collections::{BTreeMap, BTreeSet};
use std::process::{Child, Command};
use std::time::Duration;

use in_lab::ran_in_lab;
use tutorial::*;

/// What a guest's VLAN devices need.
const MODULES: [&str; 5] = ["llc", "stp", "garp", "mrp", "8021q"];
/// Nobody has it: a bridge sends it everywhere that it may go.
const UNKNOWN: &str = "02:00:00:00:00:99";
const KINDS: [&str; 3] = ["broadcast", "multicast", "unicast"];
/// The guests' VLANs, as the manifests say.
const ACCESS: [(&str, u16); 3] = [("vm1", 10), ("vm2", 10), ("vm3", 20)];

/// A frame that came by: where, with which tag, and to whom it was.
type Heard = BTreeSet<(String, Option<u16>, &'static str)>;

/// Listens at the guests' taps and in the switch.
struct Listeners(Vec<(String, Child)>);

impl Listeners {
    fn new(vms: &[&str]) -> Self {
        let taps = vms.iter().map(|vm| (vm.to_string(), format!("tcpdump -i {vm}.net0")));
        let switch = ("switch".to_owned(), "ip netns exec switch tcpdump -i trunk".to_owned());
        let listen = |(place, command): (String, String)| {
            let files = format!("/tmp/heard.{place}");
            run(&format!("rm -f {files}*"));
            let command = format!("exec {command} -U -l -nnet >{files} 2>{files}.err");
            let child = Command::new("sh").args(["-c", &command]).spawn().unwrap();
            until("tcpdump listens", Duration::from_secs(20), || {
                std::fs::read_to_string(format!("{files}.err"))
                    .unwrap_or_default()
                    .contains("listening on")
                    .then_some(())
            });
            (place, child)
        };
        Self(taps.chain([switch]).map(listen).collect())
    }

    /// What was heard, by the senders' MAC addresses.
    fn end(self) -> BTreeMap<String, Heard> {
        std::thread::sleep(Duration::from_millis(500));
        let mut heard = BTreeMap::<String, Heard>::new();
        for (place, mut child) in self.0 {
            run(&format!("kill -INT {}", child.id()));
            child.wait().unwrap();
            let text = std::fs::read_to_string(format!("/tmp/heard.{place}")).unwrap();
            for line in text.lines() {
                let Some((mac, rest)) = line.split_once(" > ") else { continue };
                let (to, rest) = rest.split_once(", ").unwrap_or_else(|| panic!("{line}"));
                let tag = rest
                    .split_once(": vlan ")
                    .map(|(_, rest)| rest.split(',').next().unwrap().parse().unwrap());
                let kind = match to {
                    "ff:ff:ff:ff:ff:ff" => "broadcast",
                    UNKNOWN => "unicast",
                    _ if to.starts_with("33:33:") || to.starts_with("01:00:5e:") => "multicast",
                    // An answer to somebody who asked.
                    _ => continue,
                };
                heard.entry(mac.to_owned()).or_default().insert((place.clone(), tag, kind));
            }
        }
        heard
    }
}

fn all_kinds(places: impl IntoIterator<Item = (String, Option<u16>)>) -> Heard {
    let every = |(place, tag): (String, Option<u16>)| KINDS.map(|kind| (place.clone(), tag, kind));
    places.into_iter().flat_map(every).collect()
}

/// Prepares a link of a guest to send to nobody in particular.
fn prepare(guest: &mut Guest, link: &str, number: u16) {
    guest.succeeds(&format!(
        "ip addr add 10.{number}.0.9/24 dev {link}; arp -i {link} -s 10.{number}.0.1 {UNKNOWN}"
    ));
}

/// Sends to one, to several and to all.
fn send(guest: &mut Guest, link: &str, number: u16) {
    guest.run(&format!(
        "ping -c 1 -W 1 10.{number}.0.1 & arping -c 1 -w 1 -I {link} 10.{number}.0.2 & ping -6 -c 1 -W 1 -I {link} ff02::1; wait"
    ));
}

/// Each guest and the switch's side is heard by its VLAN, and by nobody else. `trunk`: of a guest with tags.
fn check_matrix(guests: &mut BTreeMap<&str, Guest>, trunk: Option<(&str, u16, u16)>) {
    let vms: Vec<&str> = guests.keys().copied().collect();
    // A place's tag for a VLAN; `None`: it isn't in it.
    let member = |place: &str, vlan: u16| match (place, trunk) {
        ("switch", _) => Some(Some(vlan)),
        (place, Some((name, native, tagged))) if place == name => {
            if vlan == native {
                Some(None)
            } else {
                (vlan == tagged).then_some(Some(vlan))
            }
        }
        _ => ACCESS.contains(&(place, vlan)).then_some(None),
    };
    let expected = |from: &str, vlan: u16| {
        let others = vms.iter().copied().chain(["switch"]).filter(|place| *place != from);
        all_kinds(others.filter_map(|place| Some((place.to_owned(), member(place, vlan)?))))
    };
    let mut sent = Vec::from(ACCESS.map(|(vm, vlan)| (vm, "eth0".to_owned(), 0, vlan)));
    if let Some((name, native, tagged)) = trunk {
        sent.extend([(name, "eth0".to_owned(), 0, native), (name, format!("eth0.{tagged}"), tagged, tagged)]);
    }
    let listeners = Listeners::new(&vms);
    let mut senders = Vec::new();
    for (vm, link, number, vlan) in sent {
        let guest = guests.get_mut(vm).unwrap();
        senders.push((guest.succeeds(&format!("cat /sys/class/net/{link}/address")), vm, expected(vm, vlan)));
        send(guest, &link, number);
    }
    // From the switch, with a tag that a VLAN has, and with one that none has.
    for vlan in [10, 20, 30] {
        let mac = format!("02:00:00:00:77:{vlan}");
        let frame = format!("{} 8100 00{vlan:02x} 88b5 {}", mac.replace(':', ""), "00".repeat(46));
        run(&format!(
            "ip netns exec switch python3 -c \"
import socket
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
wire.bind(('trunk', 0))
for to in ('ffffffffffff', '333300000001', '{}'):
    wire.send(bytes.fromhex(to + '{frame}'))
\"",
            UNKNOWN.replace(':', "")
        ));
        let expected = if vlan == 30 { Heard::new() } else { expected("switch", vlan) };
        senders.push((mac, "switch", expected));
    }
    let mut heard = listeners.end();
    for (mac, from, expected) in senders {
        let mut heard = heard.remove(&mac).unwrap_or_default();
        heard.retain(|(place, ..)| place != from);
        assert_eq!(heard, expected, "what {mac} of {from} sends");
    }
}

const ROUTER: &str = "apiVersion: vmctl.dev/v1alpha1
kind: VirtualMachine
metadata: {name: router}
spec:
  memory: 128Mi
  boot: {kernel: /guest/vmlinux, initrd: /tmp/t/initrd, cmdline: console=ttyS0 quiet host=router}
  interfaces: [{bridge: trunk, vlan: {native: 10, trunk: [20]}}]
";

#[test]
fn both_ways_to_have_vlans_reach_the_same_and_nothing_else() {
    if ran_in_lab() {
        return;
    }
    let tutorial = Tutorial::new();
    tutorial.apply();
    let mut guests: BTreeMap<&str, Guest> = ACCESS.iter().map(|(vm, _)| (*vm, tutorial.guest(vm))).collect();
    guests.values_mut().for_each(|guest| prepare(guest, "eth0", 0));
    check_matrix(&mut guests, None);

    // The other way, while they run; one of them sends all the while.
    let pids = ACCESS.map(|(vm, _)| tutorial.pid(vm));
    std::fs::write(
        tutorial.source.join("network.yaml"),
        "apiVersion: vmctl.dev/v1alpha1\nkind: Bridge\nmetadata: {name: trunk}\nspec:\n  vlanFiltering: true\n  \
         ports: [{interface: eth0, tagged: [10, 20]}]\n",
    )
    .unwrap();
    for (vm, vlan) in ACCESS {
        let from = format!("- bridge: brvlan{vlan}");
        tutorial.edit(
            &format!("{vm}.yaml"),
            &from,
            &format!("- bridge: trunk\n      vlan: {{access: {vlan}}}"),
        );
    }
    let plan = tutorial.diff(1);
    assert!(plan.contains("Downtime: none"), "{plan}");
    let sender = guests.get_mut("vm1").unwrap();
    let mac = sender.succeeds("cat /sys/class/net/eth0/address");
    sender
        .succeeds("(while :; do ping -c 100 -i 0.01 -W 1 10.0.0.1; done) >/dev/null 2>&1 & echo $! >/sender");
    let listeners = Listeners::new(&["vm2", "vm3"]);
    // All VLANs and bridges of before go at once: somebody has seen the plan.
    let (_, hash) = plan.split_once("--approve ").expect("it asks for consent");
    let hash = hash.split_whitespace().next().unwrap();
    run(&format!("vmctl apply --prune --approve {hash} -f {}", tutorial.source.display()));
    let sender = guests.get_mut("vm1").unwrap();
    // (Once more the news of where it is, which a move tells by itself.)
    sender.succeeds(
        "kill $(cat /sender); arping -c 2 -w 2 -I eth0 10.0.0.2; ping -6 -c 2 -W 1 -I eth0 ff02::1",
    );
    let heard = &listeners.end()[&mac];
    assert_eq!(
        *heard,
        all_kinds([("vm2".to_owned(), None), ("switch".to_owned(), Some(10))]),
        "amid the move"
    );
    tutorial.diff(0);
    assert_eq!(ACCESS.map(|(vm, _)| tutorial.pid(vm)), pids, "nobody was started anew");
    check_matrix(&mut guests, None);

    // And a guest with tags.
    let modules = initrd_with(&MODULES, "/tmp/t/initrd");
    std::fs::write(tutorial.source.join("router.yaml"), ROUTER).unwrap();
    tutorial.apply();
    let mut router = tutorial.guest("router");
    for module in modules {
        router.succeeds(&format!("insmod /extra/{module}.ko"));
    }
    router.succeeds("ip link set eth0 up && vconfig add eth0 20");
    // With an address of its own: what is heard is told by it.
    router.succeeds("ip link set eth0.20 address 02:00:00:00:00:20 && ip link set eth0.20 up");
    prepare(&mut router, "eth0", 0);
    prepare(&mut router, "eth0.20", 20);
    guests.insert("router", router);
    check_matrix(&mut guests, Some(("router", 10, 20)));
}
