//! DHCP, DNS and router advertisements of networks, with a real dnsmasq and real clients.

#[path = "support/net.rs"]
mod net;
#[path = "support/objects.rs"]
mod objects;
#[path = "support/host.rs"]
mod support;

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use net::{Host, Namespace};
use objects::{Objects, id};
use serde_json::json;
use support::{ip, private_network};
use vmctl::host::linux::LinuxHost;
use vmctl::host::snapshot::Service;
use vmctl::host::{Host as _, Step};
use vmctl::kinds::virtual_machine::default_mac;

fn network() -> serde_json::Value {
    json!({
        "bridge": "virbr0",
        "ipv4": {
            "address": "192.168.100.1/24",
            "dhcp": {"start": "192.168.100.100", "end": "192.168.100.199", "options": [{"number": 42, "value": "192.168.100.1"}]},
        },
        "ipv6": {"address": "fd00:100::1/64", "routerAdvertisements": true},
        "dns": {"domain": "lab.internal", "forwarders": []},
    })
}

/// Halted, so that a namespace can stand in for it.
fn vm(kernel: &Path, addresses: serde_json::Value) -> serde_json::Value {
    json!({
        "memory": "64Mi",
        "boot": {"kernel": kernel},
        "runStrategy": "Halted",
        "interfaces": [{"network": "lab", "addresses": addresses}],
    })
}

fn service(host: &Host) -> Service {
    let services = host.linux.snapshot(&Default::default()).services.unwrap();
    services.into_iter().find(|(mark, _)| mark.owner == id("Network/lab")).expect("a service").1
}

/// A guest's end of the wire, with the address of the VM's NIC.
fn guest(name: &str) -> Namespace {
    let guest = Namespace::new();
    guest.join(&format!("{name}-end"), "eth0");
    let mac = default_mac(&"default".parse().unwrap(), &name.parse().unwrap(), "net0");
    guest.run(&format!("ip link set eth0 address {mac}"));
    ip(&format!("link set {name}-end master virbr0"));
    guest
}

/// Asks for an address as guests do, and takes it. Gives what it was told.
fn ask(guest: &Namespace, host: &Host) -> String {
    let script = host.root.join("udhcpc");
    let text = "#!/bin/sh\n[ \"$1\" = bound ] || exit 0\n\
                ip addr add $ip/$mask dev $interface\n\
                [ -z \"$router\" ] || ip route add default via $router\n\
                echo \"ip=$ip router=$router dns=$dns domain=$domain lease=$lease ntp=$ntpsrv\"\n";
    std::fs::write(&script, text).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let told =
        guest.run(&format!("busybox udhcpc -i eth0 -n -q -f -t 5 -T 1 -O ntpsrv -s {}", script.display()));
    told.lines().find(|line| line.starts_with("ip=")).unwrap_or_else(|| panic!("{told}")).to_owned()
}

fn resolve(guest: &Namespace, name: &str) -> String {
    let output = guest.command(&format!("busybox nslookup {name} 192.168.100.1")).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// As programs of the host do.
fn resolve_here(name: &str) -> String {
    let output = Command::new("busybox").args(["nslookup", name, "192.168.100.1"]).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn set_up(name: &str) -> (Host, Objects) {
    private_network();
    ip("link set lo up");
    let host = Host::new(name);
    let kernel = host.root.join("kernel");
    std::fs::write(&kernel, [0; 4096]).unwrap();
    let all = [
        (id("Network/lab"), network()),
        // Another one beside it, which gets in nobody's way.
        (id("Network/dmz"), json!({"ipv4": {"address": "10.1.0.1/24", "dhcp": {}}})),
        (id("VirtualMachine/web"), vm(&kernel, json!(["192.168.100.10", "fd00:100::10"]))),
        (id("VirtualMachine/db"), vm(&kernel, json!(["192.168.100.11"]))),
        (id("VirtualMachine/any"), vm(&kernel, json!([]))),
    ];
    (host, all.into())
}

#[test]
fn guests_get_their_addresses_names_and_the_way_out() {
    let (host, all) = set_up("dhcp");
    let world = Namespace::new();
    world.join("uplink", "eth0");
    ip("addr add 203.0.113.1/24 dev uplink");
    world.run("ip addr add 203.0.113.2/24 dev eth0");
    host.apply(&all);
    let (web, any) = (guest("web"), guest("any"));
    let told = ask(&web, &host);
    let expected = "ip=192.168.100.10 router=192.168.100.1 dns=192.168.100.1 domain=lab.internal lease=3600 ntp=192.168.100.1";
    assert_eq!(told, expected);
    // Who has no reservation gets one of the range.
    let told = ask(&any, &host);
    let address: std::net::Ipv4Addr = told.split(['=', ' ']).nth(1).unwrap().parse().unwrap();
    assert!((100..200).contains(&address.octets()[3]), "{told}");
    // By name: a guest that never asked, one that did, and both ways.
    assert!(resolve(&web, "db").contains("192.168.100.11"));
    assert!(resolve(&web, "db.lab.internal").contains("192.168.100.11"));
    assert!(resolve(&any, "web").contains("fd00:100::10"));
    assert!(resolve(&web, "any").contains(&address.to_string()));
    assert!(!resolve(&web, "nobody").contains("Address 1: 192.168"));
    // Out, to a server that knows no way back but the host's address.
    web.run("busybox ping -c 1 -W 5 203.0.113.2");
    // IPv6 by router advertisement, and the gateway answers.
    eventually("no address by router advertisement", || {
        let shown = web.run("ip -6 addr show dev eth0");
        shown.contains("fd00:100:") && !shown.contains("tentative")
    });
    web.run("busybox ping6 -c 1 -W 5 fd00:100::1");
    let leases = service(&host).leases;
    assert_eq!(leases.len(), 2, "{leases:?}");
    let of_web = leases.iter().find(|lease| lease.address.to_string() == "192.168.100.10").unwrap();
    assert_eq!(of_web.host_name.as_deref(), Some("web"));
    // A lease is no difference, and no write of ours.
    assert!(host.diff(&all).is_empty());
    ip("link del web-end");
    ip("link del any-end");
    let pid = service(&host).pid.unwrap();
    host.apply(&Objects::new());
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    assert_eq!(std::fs::read_dir(host.root.join("state/networks")).unwrap().count(), 0);
}

#[test]
fn a_service_is_kept_and_changed_with_as_little_as_it_takes() {
    let (host, mut all) = set_up("service");
    host.apply(&all);
    let first = service(&host).pid.unwrap();
    // It gave up its rights.
    let status = std::fs::read_to_string(format!("/proc/{first}/status")).unwrap();
    let uid = status.lines().find(|line| line.starts_with("Uid:")).unwrap();
    assert!(!uid.split_whitespace().any(|word| word == "0"), "{uid}");

    // Another reservation: the same process, which reads it.
    all.get_mut(&id("VirtualMachine/web")).unwrap()["interfaces"][0]["addresses"] =
        json!(["192.168.100.77", "fd00:100::10"]);
    let shown = host.apply(&all);
    assert!(shown.contains("dnsmasq.reservations"), "{shown}");
    assert_eq!(service(&host).pid, Some(first));
    let web = guest("web");
    assert!(ask(&web, &host).starts_with("ip=192.168.100.77 "));
    assert!(resolve(&web, "web").contains("192.168.100.77"));

    // Another lease time: another process. Leases stay.
    all.get_mut(&id("Network/lab")).unwrap()["ipv4"]["dhcp"]["leaseSeconds"] = json!(600);
    host.apply(&all);
    let second = service(&host).pid.unwrap();
    assert_ne!(second, first);
    assert_eq!(service(&host).leases.len(), 1);

    // Killed: its end is an event, and it is started again.
    let mark = support::mark(vmctl::name::Kind::Network, "lab");
    let watch = host.linux.service_watch(&mark).expect("it runs");
    std::process::Command::new("kill").args(["-9", &second.to_string()]).status().unwrap();
    let mut fds = [rustix::event::PollFd::new(&watch, rustix::event::PollFlags::IN)];
    let timeout = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
    assert_eq!(rustix::event::poll(&mut fds, Some(&timeout)).unwrap(), 1);
    eventually("it is not seen to be gone", || service(&host).pid.is_none());
    assert!(host.apply(&all).contains("dnsmasq  not running → running"));

    // The bridge is made anew: what listened on the old one hears nothing.
    let third = service(&host).pid.unwrap();
    ip("link del virbr0");
    host.apply(&all);
    assert_ne!(service(&host).pid, Some(third));
    ip("link set web-end master virbr0");
    web.run("ip addr flush dev eth0");
    assert!(ask(&web, &host).starts_with("ip=192.168.100.77 "));

    // What is recorded is lost: the process is found all the same, and there is one.
    let pid = service(&host).pid.unwrap();
    let record = host.root.join("state/networks/services/default.lab/service.json");
    std::fs::remove_file(&record).unwrap();
    host.apply(&all);
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
    ip("link del web-end");
    let last = service(&host).pid.unwrap();
    all.get_mut(&id("Network/lab")).unwrap()["ipv4"] = json!({"address": "192.168.100.1/24"});
    all.get_mut(&id("Network/lab")).unwrap()["ipv6"] = json!({"address": "fd00:100::1/64"});
    all.get_mut(&id("Network/lab")).unwrap()["dns"] = json!({"enabled": false});
    host.apply(&all);
    assert!(!Path::new(&format!("/proc/{last}")).exists());
}

/// What changes something that outlives who does it.
const CALLS: &str = "rename,unlink,unlinkat,rmdir,pidfd_send_signal,clone,clone3,vfork";

/// Runs a step as another process, which dies before this call of those, if any. Gives the names of the calls
/// that it made, or was to make, in order; and whether it died.
fn dies_in(step: &Step, host: &Host, before: Option<(&str, usize)>) -> (Vec<String>, bool) {
    let trace = host.root.join("trace");
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "runs_a_step_until_it_is_killed", "--ignored", "--nocapture"])
        .env("VMCTL_STEP", serde_json::to_string(step).unwrap())
        .env("VMCTL_ROOT", &host.root)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // (Held to the end: it may say more.)
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let thread = lines
        .by_ref()
        .map(|line| line.unwrap())
        .find_map(|line| line.split_once("thread ").and_then(|(_, thread)| thread.parse::<u32>().ok()))
        .expect("the child runs");
    // The one thread alone: dnsmasq, which it starts, makes such calls, too.
    let mut tracer = Command::new("strace");
    tracer.arg("-qq").arg("-o").arg(&trace).args([
        "-p",
        &thread.to_string(),
        "-e",
        &format!("trace={CALLS}"),
    ]);
    if let Some((call, number)) = before {
        tracer.args(["-e", &format!("inject={call}:signal=KILL:when={number}")]);
    }
    let mut tracer = tracer.spawn().expect("strace (tests/setup installs it)");
    eventually("nobody traces the child", || {
        let status = std::fs::read_to_string(format!("/proc/{thread}/status")).unwrap();
        !status.contains("TracerPid:\t0\n")
    });
    child.stdin.take().unwrap().write_all(b"go\n").unwrap();
    let status = child.wait().unwrap();
    tracer.wait().unwrap();
    assert!(status.success() || status.signal() == Some(9), "{status}");
    let text = std::fs::read_to_string(trace).unwrap();
    let calls = text.lines().filter_map(|line| line.split_once('(')).map(|(call, _)| call.to_owned());
    (calls.collect(), !status.success())
}

#[test]
#[ignore = "is started by the next test"]
fn runs_a_step_until_it_is_killed() {
    let root = PathBuf::from(std::env::var_os("VMCTL_ROOT").expect("who kills it"));
    let step: Step = serde_json::from_str(&std::env::var("VMCTL_STEP").unwrap()).unwrap();
    let host = LinuxHost::new(root.join("state"), root.join("run"), "/nonexistent/vmctl-vmm");
    println!("thread {}", rustix::thread::gettid().as_raw_pid());
    std::io::stdin().read_line(&mut String::new()).unwrap();
    host.run(&[&step]).remove(0).unwrap();
}

#[test]
fn death_at_any_point_of_a_services_steps_converges() {
    private_network();
    ip("link set lo up");
    let host = Host::new("death");
    let kernel = host.root.join("kernel");
    std::fs::write(&kernel, [0; 4096]).unwrap();
    let lab = |address: &str, lease_seconds: u32| -> Objects {
        let dhcp = json!({"leaseSeconds": lease_seconds});
        let network = json!({
            "bridge": "virbr0",
            "ipv4": {"address": "192.168.100.1/24", "dhcp": dhcp},
            "dns": {"forwarders": []},
        });
        [(id("Network/lab"), network), (id("VirtualMachine/web"), vm(&kernel, json!([address])))].into()
    };
    let bare =
        json!({"bridge": "virbr0", "ipv4": {"address": "192.168.100.1/24"}, "dns": {"enabled": false}});
    let none: Objects = [(id("Network/lab"), bare)].into();
    let (first, names, settings) =
        (lab("192.168.100.10", 600), lab("192.168.100.77", 600), lab("192.168.100.77", 900));
    let services = host.root.join("state/networks/services");
    // What was, what it was killed on the way to, and what is wanted then.
    let ways = [
        (&none, &first, &first),
        (&none, &first, &none),
        (&first, &names, &first),
        (&first, &settings, &first),
        (&first, &none, &none),
        (&first, &none, &first),
    ];
    for (was, to, then) in ways {
        let dies = |before| {
            host.apply(was);
            let plan = host.diff(to);
            let mut steps = plan.steps().map(|(_, step)| step);
            let is_service =
                |step: &&Step| matches!(step, Step::SetService { .. } | Step::RemoveService { .. });
            dies_in(steps.find(is_service).expect("the service changes"), &host, before)
        };
        let (calls, _) = dies(None);
        let mut deaths = 0;
        for (index, call) in calls.iter().enumerate() {
            let number = calls[..=index].iter().filter(|other| *other == call).count();
            deaths += usize::from(dies(Some((call.as_str(), number))).1);
            host.apply(then);
            let when = format!("killed before {call} {number} of {calls:?}");
            let wanted = if then == &none { 0 } else { 1 };
            let argument = format!("conf-file={}/default.lab/dnsmasq.conf", services.display());
            let running = Command::new("pgrep").args(["-cf", &argument]).output().unwrap().stdout;
            assert_eq!(String::from_utf8_lossy(&running).trim(), wanted.to_string(), "{when}");
            let left = std::fs::read_dir(&services).into_iter().flatten().count();
            assert_eq!(left, wanted, "{when}");
            if wanted == 1 {
                // (It may be about to read its names.)
                eventually(&when, || resolve_here("web").contains("192.168.100.10\n"));
            }
        }
        assert!(deaths >= 2, "{deaths} of {calls:?}");
    }
}
