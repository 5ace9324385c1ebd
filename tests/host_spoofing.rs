//! What a guest may say that it is: frames made by hand, and what of them reaches a neighbour.

#[path = "support/net.rs"]
mod net;
#[path = "support/objects.rs"]
mod objects;
#[path = "support/host.rs"]
mod support;

use std::collections::BTreeSet;
use std::process::{Command, Stdio};

use net::{Host, Namespace};
use objects::{Objects, id};
use serde_json::json;
use support::{ip, private_network};
use vmctl::host::linux::LinkEvents;
use vmctl::kinds::virtual_machine::default_mac;
use vmctl::name::MacAddress;

const SENDER: &str = include_str!("support/frames/sender.py");
const LISTENER: &str = include_str!("support/frames/listener.py");

fn python(namespace: &Namespace, program: &str, arguments: &[&str]) -> Command {
    let mut command = namespace.command("python3 -c");
    command.arg(program).args(arguments);
    command
}

fn mac_of(vm: &str) -> MacAddress {
    default_mac(&"default".parse().unwrap(), &vm.parse().unwrap(), "net0")
}

/// What an interface with this MAC address makes of it.
fn link_local(mac: MacAddress) -> String {
    let [a, b, c, d, e, f] = mac.0;
    format!("fe80::{:x}{b:02x}:{c:x}ff:fe{d:02x}:{e:x}{f:02x}", a ^ 2)
}

/// What `to` hears of what `from` sends.
fn heard(from: &Namespace, to: &Namespace) -> BTreeSet<String> {
    use std::io::{BufRead as _, BufReader, Read as _};
    let mut listener =
        python(to, LISTENER, &["eth0", "2.5"]).stdout(Stdio::piped()).spawn().expect("python3");
    let mut output = BufReader::new(listener.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    assert!(
        python(from, SENDER, &[&mac_of("web").to_string(), "eth0", &link_local(mac_of("db"))])
            .status()
            .unwrap()
            .success()
    );
    let mut names = String::new();
    output.read_to_string(&mut names).unwrap();
    assert!(listener.wait().unwrap().success());
    names.split_whitespace().map(str::to_owned).collect()
}

fn set_up(name: &str) -> (Host, Objects) {
    private_network();
    let host = Host::new(name);
    let kernel = host.root.join("kernel");
    std::fs::write(&kernel, [0; 4096]).unwrap();
    let vm = |addresses: serde_json::Value| {
        json!({
            "memory": "64Mi", "boot": {"kernel": kernel}, "runStrategy": "Halted",
            "interfaces": [{"network": "lab", "addresses": addresses}],
        })
    };
    let network = json!({
        "bridge": "virbr0", "ipv4": {"address": "192.168.100.1/24"}, "ipv6": {"address": "fd00:100::1/64"},
    });
    let all = [
        (id("Network/lab"), network),
        (id("VirtualMachine/web"), vm(json!(["192.168.100.10", "fd00:100::10"]))),
        (id("VirtualMachine/db"), vm(json!(["192.168.100.11", "fd00:100::11"]))),
    ];
    (host, all.into())
}

#[test]
fn spoofed_frames_reach_nobody() {
    let (host, mut all) = set_up("spoofing");
    host.apply(&all);
    // Namespaces stand in for the guests, behind links that are named as their taps.
    let guest = |name: &str| {
        let guest = Namespace::new();
        let _ = Command::new("ip").args(["link", "del", &format!("{name}.net0")]).output();
        guest.join(&format!("{name}.net0"), "eth0");
        ip(&format!("link set {name}.net0 master virbr0"));
        guest
    };
    let (web, db) = (guest("web"), guest("db"));
    std::thread::sleep(std::time::Duration::from_millis(300));

    let good = ["good-arp", "good-dhcp", "good-ipv4", "good-ll", "good-nd", "good-probe"].map(str::to_owned);
    let good = BTreeSet::from(good);
    assert_eq!(heard(&web, &db), good);

    // A guest that declares no address may use any that is nobody's.
    ip("link del db.net0");
    ip("link del web.net0");
    let nic = |all: &mut Objects, field: &str, value: serde_json::Value| {
        all.get_mut(&id("VirtualMachine/web")).unwrap()["interfaces"][0][field] = value;
    };
    nic(&mut all, "addresses", json!([]));
    let shown = host.apply(&all);
    assert!(shown.contains("nftables.nic-web.net0"), "{shown}");
    let (web, db) = (guest("web"), guest("db"));
    std::thread::sleep(std::time::Duration::from_millis(300));
    let free = heard(&web, &db);
    assert_eq!(free, good);

    // Off by choice: all of it arrives, so that the frames above were good ones.
    ip("link del db.net0");
    ip("link del web.net0");
    nic(&mut all, "antiSpoofing", json!(false));
    host.apply(&all);
    let (web, db) = (guest("web"), guest("db"));
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(heard(&web, &db).len(), 20);
    ip("link del db.net0");
    ip("link del web.net0");
    host.apply(&Objects::new());
    assert_eq!(net::nft("list ruleset"), "");
}

#[test]
fn drift_of_the_guards_is_healed_element_by_element() {
    let (host, all) = set_up("guards");
    host.apply(&all);
    let listed = || net::nft("list table bridge vmctl.default.lab");
    let good = listed();
    let mut events = LinkEvents::open().unwrap();
    for drift in [
        "delete element bridge vmctl.default.lab nics { web.net0 }",
        "flush map bridge vmctl.default.lab nics",
        "delete element bridge vmctl.default.lab ipv4 { 192.168.100.11 }",
        "add element bridge vmctl.default.lab ipv6 { fd00:100::99 }",
        "flush chain bridge vmctl.default.lab neighbours",
        "add set bridge vmctl.default.lab ours { type ipv4_addr; flags timeout; timeout 1h; }",
        "delete table bridge vmctl.default.lab",
    ] {
        events.drain().unwrap();
        net::nft(drift);
        assert!(events.drain().unwrap().relevant, "{drift}");
        let shown = host.apply(&all);
        assert!(shown.contains("nftables"), "{shown}");
        assert_eq!(listed(), good, "{drift}\n{shown}");
    }
    host.apply(&Objects::new());
}
