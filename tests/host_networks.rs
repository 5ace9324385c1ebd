//! Networks on the real kernel: nftables, forwarding and bridges in network namespaces of a test's own.

#[path = "support/net.rs"]
mod net;
#[path = "support/objects.rs"]
mod objects;
#[path = "support/host.rs"]
mod support;

use std::io::{BufRead as _, BufReader, ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use net::{Host, Namespace, nft};
use objects::{Objects, id};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use serde_json::{Value, json};
use support::{ip, private_network};
use vmctl::host::linux::LinkEvents;
use vmctl::report::text::{self, Style};

fn network(spec: Value) -> Objects {
    [(id("Network/lab"), spec)].into()
}

fn nat() -> Value {
    json!({
        "bridge": "virbr0",
        "ipv4": {"address": "192.168.100.1/24"},
        "ipv6": {"address": "fd00:100::1/64"},
        "portForwards": [
            {"port": 8080, "to": "192.168.100.10", "toPort": 80},
            {"port": 8080, "to": "fd00:100::10", "toPort": 80},
            {"protocol": "udp", "address": "203.0.113.1", "port": 53, "to": "192.168.100.10"},
        ],
    })
}

fn setting(path: &str) -> String {
    std::fs::read_to_string(format!("/proc/sys/net/{path}")).unwrap().trim().to_owned()
}

/// A guest's end: a namespace whose link is a port of the bridge.
fn guest(bridge: &str, outside: &str, address: u8) -> Namespace {
    let guest = Namespace::new();
    guest.join(outside, "eth0");
    ip(&format!("link set {outside} master {bridge}"));
    guest.run(&format!("ip addr add 192.168.100.{address}/24 dev eth0"));
    guest.run(&format!("ip addr add fd00:100::{address}/64 dev eth0 nodad"));
    guest.run("ip route add default via 192.168.100.1");
    guest.run("ip -6 route add default via fd00:100::1");
    guest
}

/// The world: a namespace behind the host's other link. It knows no route to guests.
fn world() -> Namespace {
    let world = Namespace::new();
    world.join("uplink", "eth0");
    ip("addr add 203.0.113.1/24 dev uplink");
    ip("addr add 2001:db8::1/64 dev uplink nodad");
    world.run("ip addr add 203.0.113.2/24 dev eth0");
    world.run("ip addr add 2001:db8::2/64 dev eth0 nodad");
    world
}

const WAIT: Duration = Duration::from_secs(2);

/// Answers one connection with the address that it came from.
fn serve(at: SocketAddr) -> impl FnOnce() -> Option<IpAddr> {
    let begun = Instant::now();
    let listener = loop {
        match TcpListener::bind(at) {
            // The one before it still goes.
            Err(error) if error.kind() == ErrorKind::AddrInUse && begun.elapsed() < WAIT => {}
            done => break done.unwrap(),
        }
        std::thread::sleep(Duration::from_millis(2));
    };
    listener.set_nonblocking(true).unwrap();
    move || {
        let deadline = Instant::now() + WAIT + WAIT;
        while Instant::now() < deadline {
            if let Ok((mut stream, from)) = listener.accept() {
                stream.write_all(b"hello").unwrap();
                return Some(from.ip());
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        None
    }
}

/// Connects from `client` to `to`, where `server` listens at `at`; gives the address that it saw.
fn connect(client: &Namespace, to: &str, server: &Namespace, at: &str) -> Option<IpAddr> {
    let (to, at): (SocketAddr, SocketAddr) = (to.parse().unwrap(), at.parse().unwrap());
    let (ready, is_ready) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let serving = scope.spawn(move || {
            server.within(move || {
                let serve = serve(at);
                ready.send(()).unwrap();
                serve()
            })
        });
        is_ready.recv().unwrap();
        let heard = client.within(move || {
            let mut stream = TcpStream::connect_timeout(&to, WAIT).ok()?;
            stream.set_read_timeout(Some(WAIT)).unwrap();
            let mut text = [0; 5];
            stream.read_exact(&mut text).ok()
        });
        let saw = serving.join().unwrap();
        assert_eq!(heard.is_some(), saw.is_some());
        saw
    })
}

fn v4(text: &str) -> Option<IpAddr> {
    Some(text.parse::<IpAddr>().unwrap())
}

#[test]
fn guests_reach_the_world_under_the_hosts_address_and_ports_reach_guests() {
    private_network();
    let host = Host::new("nat");
    let world = world();
    assert_eq!(setting("ipv4/ip_forward"), "0");
    host.apply(&network(nat()));
    assert_eq!((setting("ipv4/ip_forward"), setting("ipv6/conf/all/forwarding")), ("1".into(), "1".into()));
    let guest = guest("virbr0", "guest0", 10);

    // Out, under the host's address.
    assert_eq!(connect(&guest, "203.0.113.2:7000", &world, "0.0.0.0:7000"), v4("203.0.113.1"));
    assert_eq!(connect(&guest, "[2001:db8::2]:7000", &world, "[::]:7000"), v4("2001:db8::1"));
    // In, by the port that is forwarded, and by no other way.
    assert_eq!(connect(&world, "203.0.113.1:8080", &guest, "0.0.0.0:80"), v4("203.0.113.2"));
    assert_eq!(connect(&world, "[2001:db8::1]:8080", &guest, "[::]:80"), v4("2001:db8::2"));
    world.run("ip route add 192.168.100.0/24 via 203.0.113.1");
    assert_eq!(connect(&world, "192.168.100.10:80", &guest, "0.0.0.0:80"), None);
    // From another guest by the host's port: the answer comes back by the host.
    let neighbour = guest_of(11);
    let by_port = connect(&neighbour, "203.0.113.1:8080", &guest, "0.0.0.0:80");
    assert_eq!(by_port, v4("192.168.100.1"));
    // And from the host itself.
    let listening = std::thread::scope(|scope| {
        let (ready, is_ready) = std::sync::mpsc::channel();
        let guest = &guest;
        let serving = scope.spawn(move || {
            guest.within(move || {
                let serve = serve(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 80)));
                ready.send(()).unwrap();
                serve()
            })
        });
        is_ready.recv().unwrap();
        let stream = TcpStream::connect_timeout(&"203.0.113.1:8080".parse().unwrap(), WAIT);
        drop(stream);
        serving.join().unwrap()
    });
    assert!(listening.is_some());

    // A bridge that somebody else's link is a port of stays.
    assert!(text::plan(&host.diff(&Objects::new()), Style::default()).contains("is not this set's"));
    ip("link del guest0");
    ip("link del guest11");
    // Gone without a trace.
    host.apply(&Objects::new());
    assert_eq!((setting("ipv4/ip_forward"), setting("ipv6/conf/all/forwarding")), ("0".into(), "0".into()));
    assert_eq!(nft("list ruleset"), "");
    assert!(!ip("link show").contains("virbr0"));
    assert_eq!(std::fs::read_dir(host.root.join("state/networks")).unwrap().count(), 0);
}

fn guest_of(address: u8) -> Namespace {
    guest("virbr0", &format!("guest{address}"), address)
}

#[test]
fn isolated_guests_reach_one_another_and_routed_ones_keep_their_addresses() {
    private_network();
    let host = Host::new("modes");
    let world = world();
    let isolated = json!({"bridge": "virbr0", "mode": "isolated", "ipv4": {"address": "192.168.100.1/24"}});
    host.apply(&network(isolated));
    let (one, two) = (guest_of(10), guest_of(11));
    // Somebody else turns forwarding on: isolated stays isolated.
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
    world.run("ip route add 192.168.100.0/24 via 203.0.113.1");
    assert_eq!(connect(&one, "203.0.113.2:7000", &world, "0.0.0.0:7000"), None);
    assert_eq!(connect(&world, "192.168.100.10:80", &one, "0.0.0.0:80"), None);
    assert_eq!(connect(&one, "192.168.100.11:80", &two, "0.0.0.0:80"), v4("192.168.100.10"));

    let shown = host.apply(&network(
        json!({"bridge": "virbr0", "mode": "routed", "ipv4": {"address": "192.168.100.1/24"}}),
    ));
    assert!(shown.contains("nftables.forward  none → IPv4 from guests"), "{shown}");
    assert_eq!(connect(&one, "203.0.113.2:7000", &world, "0.0.0.0:7000"), v4("192.168.100.10"));
    assert_eq!(connect(&world, "192.168.100.10:80", &one, "0.0.0.0:80"), v4("203.0.113.2"));
    // A foreign source doesn't get out.
    one.run("ip addr add 198.51.100.7/32 dev eth0");
    one.run("ip route add 203.0.113.2/32 via 192.168.100.1 src 198.51.100.7");
    assert_eq!(connect(&one, "203.0.113.2:7000", &world, "0.0.0.0:7000"), None);
    // It was on before us, as far as we know: it stays so.
    ip("link del guest10");
    ip("link del guest11");
    host.apply(&Objects::new());
    assert_eq!(setting("ipv4/ip_forward"), "1");
}

#[test]
fn drift_is_healed_rule_by_rule_and_wakes_the_agent() {
    private_network();
    let host = Host::new("drift");
    host.apply(&network(nat()));
    let listed = || nft("list table inet vmctl.default.lab");
    let with_handles = || {
        let output = std::process::Command::new("nft").args(["-a", "list", "ruleset"]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let good = listed();
    let mut events = LinkEvents::open().unwrap();
    events.drain().unwrap();
    let drifts = [
        "insert rule inet vmctl.default.lab forward accept comment \"rogue\"",
        "add rule inet vmctl.default.lab postrouting counter",
        "flush chain inet vmctl.default.lab prerouting",
        "add set inet vmctl.default.lab evil { type ipv4_addr; }",
        "add chain inet vmctl.default.lab more { type filter hook input priority 0; policy drop; }",
        "delete table inet vmctl.default.lab",
        "add chain inet vmctl.default.lab forward { policy drop; }",
    ];
    for drift in drifts {
        let handles = with_handles();
        nft(drift);
        assert!(events.drain().unwrap().relevant, "{drift}");
        let shown = host.apply(&network(nat()));
        assert!(shown.contains("nftables"), "{shown}");
        assert_eq!(listed(), good, "{drift}\n{shown}");
        if drift.starts_with("insert") || drift.contains("policy drop; }") && drift.contains("forward") {
            // Nothing but the rogue rule was written.
            assert_eq!(with_handles(), handles);
        }
        events.drain().unwrap();
    }
    nft("flush chain inet vmctl.default.lab prerouting");
    assert!(!nft_changes(|| drop(host.apply(&network(nat())))).is_empty());
    assert_eq!(nft_changes(|| drop(host.apply(&network(nat())))), Vec::<String>::new());
    events.drain().unwrap();
    // Others' tables wake nobody; forwarding does.
    nft("add table ip others");
    assert!(!events.drain().unwrap().relevant);
    std::fs::write("/proc/sys/net/ipv4/ip_forward", "0").unwrap();
    assert!(events.drain().unwrap().relevant);
    host.apply(&network(nat()));
    assert_eq!(setting("ipv4/ip_forward"), "1");
}

/// What `nft monitor` says that was changed while `f` ran.
fn nft_changes(f: impl FnOnce()) -> Vec<String> {
    let mut monitor = Command::new("stdbuf")
        .args(["-oL", "nft", "monitor"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("stdbuf (coreutils)");
    let output = BufReader::new(monitor.stdout.take().unwrap());
    let (said, hears) = std::sync::mpsc::channel();
    let reader =
        std::thread::spawn(move || output.lines().map_while(Result::ok).all(|line| said.send(line).is_ok()));
    let deadline = Instant::now() + Duration::from_secs(20);
    // A stranger's change: heard, so that it is known to listen.
    let marker = |name: &str| nft(&format!("add table ip {name}; delete table ip {name}"));
    while hears.recv_timeout(Duration::from_millis(10)).is_err() {
        assert!(Instant::now() < deadline, "nft monitor hears nothing");
        marker("begin");
    }
    f();
    marker("end");
    let mut changes = Vec::new();
    loop {
        let line = hears.recv_timeout(Duration::from_secs(20)).expect("the end is heard");
        if line == "delete table ip end" {
            break;
        }
        changes.push(line);
    }
    monitor.kill().unwrap();
    monitor.wait().unwrap();
    reader.join().unwrap();
    let is_marker = |line: &String| line.ends_with("table ip begin") || line == "add table ip end";
    changes.retain(|line| !line.starts_with('#') && !is_marker(line));
    changes
}

/// What strangers do.
#[derive(Clone, Debug)]
enum Edit {
    Nft(String),
    Ip(String),
    /// To what is ours: to be healed.
    Harm(String),
}

fn edits() -> impl Strategy<Value = Edit> {
    let table = prop::sample::select(vec![
        "ip nat",
        "inet filter",
        "inet vmctl",
        "ip vmctl.default.lab",
        "inet docker",
    ]);
    let foreign = (table, 0..4usize, 1..200u8).prop_map(|(table, which, number)| {
        Edit::Nft(match which {
            0 => format!("add table {table}"),
            1 => format!("add table {table}; add chain {table} c{number}; add rule {table} c{number} counter"),
            2 => format!("add table {table}; add chain {table} pre{number} {{ type filter hook prerouting priority {number}; }}"),
            _ => format!("add table {table}; delete table {table}"),
        })
    });
    let links = (0..5usize, 1..9u8).prop_map(|(which, number)| {
        Edit::Ip(match which {
            0 => format!("link add other{number} type bridge"),
            1 => format!("addr add 10.200.{number}.1/24 dev uplink"),
            2 => format!("route add 10.201.{number}.0/24 via 203.0.113.2"),
            3 => format!("link add pair{number} type veth peer name peer{number}"),
            _ => format!("link set uplink mtu {}", 1400 + u32::from(number)),
        })
    });
    let harm = prop::sample::select(vec![
        "ip link del virbr0",
        "ip addr flush dev virbr0",
        "ip link set virbr0 down",
        "nft delete table inet vmctl.default.lab",
        "nft flush table inet vmctl.default.lab",
        "nft insert rule inet vmctl.default.lab forward accept",
        "sysctl -qw net.ipv4.ip_forward=0",
    ])
    .prop_map(|command| Edit::Harm(command.to_owned()));
    prop_oneof![2 => foreign, 2 => links, 2 => harm]
}

fn specs() -> impl Strategy<Value = Objects> {
    let one = (0..3usize, any::<bool>(), any::<bool>(), any::<bool>());
    let spec = |number: u8, bridge: &str, (mode, v4, v6, forward): (usize, bool, bool, bool)| {
        let name = ["nat", "routed", "isolated"][mode];
        let mut spec = json!({"bridge": bridge, "mode": name});
        if v4 {
            spec["ipv4"] = json!({"address": format!("192.168.{number}.1/24")});
        }
        if v6 {
            spec["ipv6"] = json!({"address": format!("fd00:{number}::1/64")});
        }
        if v4 && forward && mode == 0 {
            spec["portForwards"] =
                json!([{"port": 8000 + u16::from(number), "to": format!("192.168.{number}.9")}]);
        }
        spec
    };
    (prop::option::of(one.clone()), prop::option::of(one), any::<bool>()).prop_map(
        move |(lab, dmz, declared)| {
            let mut all = Objects::new();
            if let Some(lab) = lab {
                all.insert(id("Network/lab"), spec(1, "virbr0", lab));
            }
            if let Some(dmz) = dmz {
                all.insert(id("Network/dmz"), spec(2, "dmz0", dmz));
                if declared {
                    all.insert(id("Bridge/dmz0"), json!({"addresses": ["10.99.0.1/24"]}));
                }
            }
            all
        },
    )
}

/// All that isn't ours, as others see it; without the addresses that a router has by being one.
fn foreign() -> String {
    let ours = |line: &str| ["virbr0", "dmz0"].iter().any(|link| line.contains(link));
    let show = |arguments: &str| -> String {
        ip(arguments)
            .lines()
            .filter(|line| !ours(line) && !line.starts_with("anycast"))
            .map(|line| format!("{line}\n"))
            .collect()
    };
    let mut text = String::new();
    for what in
        ["-o -d link show", "-o addr show", "route show table all", "-6 route show table all", "rule show"]
    {
        text += &show(what);
    }
    for table in nft("list tables").lines() {
        if !table.starts_with("table inet vmctl.default.") {
            text += &nft(&format!("list {table}"));
        }
    }
    // What an address that is still being tried shows changes by itself.
    text.replace(" tentative", "")
}

#[test]
fn what_is_not_ours_stays_as_it_was_to_the_byte() {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|cases| cases.parse().ok()).unwrap_or(12);
    let mut runner = TestRunner::new(Config { cases, failure_persistence: None, ..Config::default() });
    let rounds = prop::collection::vec((specs(), prop::collection::vec(edits(), 0..5)), 1..5);
    runner
        .run(&(rounds, any::<bool>()), |(rounds, forwards)| {
            private_network();
            let host = Host::new("property");
            let _world = world();
            let was = if forwards { "1" } else { "0" };
            std::fs::write("/proc/sys/net/ipv4/ip_forward", was).unwrap();
            std::thread::sleep(Duration::from_millis(50));
            for (objects, edits) in &rounds {
                for edit in edits {
                    // (Some have no effect, for what they are about is not there.)
                    match edit {
                        Edit::Nft(input) => drop(nft(input)),
                        Edit::Ip(arguments) => {
                            let words = arguments.split_whitespace();
                            let _ = std::process::Command::new("ip").args(words).output();
                        }
                        Edit::Harm(command) => {
                            let mut words = command.split_whitespace();
                            let _ = std::process::Command::new(words.next().unwrap()).args(words).output();
                        }
                    }
                }
                let before = foreign();
                host.apply(objects);
                prop_assert_eq!(&before, &foreign(), "{:?}", objects);
            }
            // A second time, nothing is changed: not even to the same.
            let last = &rounds.last().expect("there is one").0;
            prop_assert_eq!(nft_changes(|| drop(host.apply(last))), Vec::<String>::new());
            let before = foreign();
            host.apply(&Objects::new());
            prop_assert_eq!(before, foreign());
            let touched = rounds
                .iter()
                .flat_map(|(_, edits)| edits)
                .any(|edit| matches!(edit, Edit::Harm(command) if command.contains("sysctl")));
            if !touched {
                prop_assert_eq!(setting("ipv4/ip_forward"), was);
            }
            Ok(())
        })
        .unwrap();
}
