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
use vmctl::kinds::virtual_machine::default_mac;

/// Sends each frame a few times; each bears its name. `M`: the guest's MAC address.
const SENDER: &str = r#"
import socket, struct, sys, time
mac = bytes.fromhex(sys.argv[1].replace(":", ""))
other, all = bytes.fromhex("525400aaaaaa"), b"\xff" * 6
v4, v6 = socket.inet_aton, lambda text: socket.inet_pton(socket.AF_INET6, text)
def ether(kind, body, source=mac, to=all): return to + source + struct.pack("!H", kind) + body
def name(text): return b"<" + text.encode() + b">"
def arp(text, address, hardware=mac):
    body = struct.pack("!HHBBH", 1, 0x800, 6, 4, 2) + hardware + v4(address) + all + v4("192.168.100.99")
    return ether(0x806, body + name(text))
def sum16(data):
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack("!%dH" % (len(data) // 2), data))
    while total >> 16: total = (total & 0xffff) + (total >> 16)
    return ~total & 0xffff
def udp(text, address, sport, dport, **more):
    data = struct.pack("!HHHH", sport, dport, 8 + len(name(text)), 0) + name(text)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(data), 0, 0, 64, 17, 0) + v4(address) + v4("255.255.255.255")
    return ether(0x800, head[:10] + struct.pack("!H", sum16(head)) + head[12:] + data, **more)
def icmp6(text, source, kind, body):
    data = struct.pack("!BBH", kind, 0, 0) + body + name(text)
    to = v6("ff02::1")
    pseudo = v6(source) + to + struct.pack("!II", len(data), 58)
    data = data[:2] + struct.pack("!H", sum16(pseudo + data)) + data[4:]
    head = struct.pack("!IHBB", 0x60000000, len(data), 58, 255) + v6(source) + to
    return ether(0x86dd, head + data, to=bytes.fromhex("333300000001"))
def neighbour(text, source, target): return icmp6(text, source, 136, b"\x20\0\0\0" + v6(target))
frames = [
    arp("good-arp", "192.168.100.10"), arp("good-probe", "0.0.0.0"),
    udp("good-ipv4", "192.168.100.10", 1000, 1000), udp("good-dhcp", "0.0.0.0", 68, 67),
    neighbour("good-nd", "fd00:100::10", "fd00:100::10"), neighbour("good-ll", "fe80::10", "fe80::10"),
    udp("bad-mac", "192.168.100.10", 1000, 1000, source=other),
    arp("bad-arp-neighbour", "192.168.100.11"), arp("bad-arp-gateway", "192.168.100.1"),
    arp("bad-arp-mac", "192.168.100.10", hardware=other),
    udp("bad-ipv4", "192.168.100.11", 1000, 1000), udp("bad-dhcp", "192.168.100.10", 67, 68),
    icmp6("bad-ra", "fe80::10", 134, b"\x40\0\x07\x08" + b"\0" * 8),
    icmp6("bad-redirect", "fe80::10", 137, b"\0" * 36),
    neighbour("bad-nd-neighbour", "fe80::10", "fd00:100::11"), neighbour("bad-nd-gateway", "fe80::10", "fd00:100::1"),
    icmp6("bad-ipv6", "fd00:100::11", 128, b"\0\1\0\1"),
    ether(0x8100, struct.pack("!HH", 10, 0x800) + udp("bad-tag", "192.168.100.10", 1, 1)[14:]),
]
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
wire.bind(("eth0", 0))
for _ in range(3):
    for frame in frames: wire.send(frame + b"\0" * (60 - len(frame)))
    time.sleep(0.05)
"#;

const LISTENER: &str = r#"
import re, socket, time
wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
wire.bind(("eth0", 3))
wire.settimeout(0.1)
print("ready", flush=True)
seen, end = set(), time.time() + 2.5
while time.time() < end:
    try: frame = wire.recv(4096)
    except socket.timeout: continue
    seen.update(re.findall(rb"<([a-z0-9-]+)>", frame))
print(" ".join(sorted(name.decode() for name in seen)))
"#;

fn python(namespace: &Namespace, program: &str, argument: &str) -> Command {
    let mut command = namespace.command("python3 -c");
    command.args([program, argument]);
    command
}

/// What `to` hears of what `from` sends.
fn heard(from: &Namespace, mac: &str, to: &Namespace) -> BTreeSet<String> {
    use std::io::{BufRead as _, BufReader, Read as _};
    let mut listener = python(to, LISTENER, "").stdout(Stdio::piped()).spawn().expect("python3");
    let mut output = BufReader::new(listener.stdout.take().unwrap());
    let mut line = String::new();
    output.read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    assert!(python(from, SENDER, mac).status().unwrap().success());
    let mut names = String::new();
    output.read_to_string(&mut names).unwrap();
    assert!(listener.wait().unwrap().success());
    names.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn spoofed_frames_reach_nobody() {
    private_network();
    let host = Host::new("spoofing");
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
    let mut all: Objects = [
        (id("Network/lab"), network),
        (id("VirtualMachine/web"), vm(json!(["192.168.100.10", "fd00:100::10"]))),
        (id("VirtualMachine/db"), vm(json!(["192.168.100.11", "fd00:100::11"]))),
    ]
    .into();
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
    let mac = default_mac(&"default".parse().unwrap(), &"web".parse().unwrap(), "net0").to_string();
    std::thread::sleep(std::time::Duration::from_millis(300));

    let good = ["good-arp", "good-dhcp", "good-ipv4", "good-ll", "good-nd", "good-probe"].map(str::to_owned);
    assert_eq!(heard(&web, &mac, &db), BTreeSet::from(good));

    // A guest that declares no address may use any but the gateway's.
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
    let free = heard(&web, &mac, &db);
    for name in ["bad-ipv4", "bad-arp-neighbour", "bad-ipv6", "bad-nd-neighbour", "good-ipv4"] {
        assert!(free.contains(name), "{name}: {free:?}");
    }
    for name in
        ["bad-mac", "bad-arp-gateway", "bad-dhcp", "bad-ra", "bad-nd-gateway", "bad-tag", "bad-arp-mac"]
    {
        assert!(!free.contains(name), "{name}: {free:?}");
    }

    // Off by choice: all of it arrives, so that the frames above were good ones.
    ip("link del db.net0");
    ip("link del web.net0");
    nic(&mut all, "antiSpoofing", json!(false));
    host.apply(&all);
    let (web, db) = (guest("web"), guest("db"));
    std::thread::sleep(std::time::Duration::from_millis(300));
    assert_eq!(heard(&web, &mac, &db).len(), 18);
    ip("link del db.net0");
    ip("link del web.net0");
    host.apply(&Objects::new());
    assert_eq!(net::nft("list ruleset"), "");
}
