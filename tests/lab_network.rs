//! Guests in a network: a small one, and a stock Debian that cloud-init sets up. They get the addresses that are theirs,
//! find one another by name, reach a server that knows no way back to them, and pass for nobody else. Every test
//! here runs in the lab (`tests/lab/`), with the disk that `tests/lab/stock` makes.

#[path = "support/in_lab.rs"]
mod in_lab;
#[path = "support/tutorial.rs"]
mod tutorial;

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::time::Duration;

use in_lab::ran_in_lab_with;
use tutorial::*;

/// (In labs that emulate both CPUs at once 2 of 5 runs lost a guest.)
const LAB: &[&str] = &["--stock", "--memory", "4G", "--timeout", "1200", "--thread", "single"];
/// For a stock system to boot in an emulated machine that is busy.
const BOOT: Duration = Duration::from_secs(400);
const SOURCE: &str = "/scratch/manifests";
const SENDER: &str = include_str!("support/frames/sender.py");
const LISTENER: &str = include_str!("support/frames/listener.py");
/// What a guest's DHCP client does with its answer.
const BOUND: &str = r#"#!/bin/busybox sh
[ "$1" = bound ] || exit 0
/bin/busybox ip addr add $ip/$mask dev $interface
/bin/busybox ip route add default via $router
echo "search $domain
nameserver $dns" >/etc/resolv.conf"#;
/// Tells each client by which address it came.
const SERVER: &str = r#"
import http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(f"you are {self.client_address[0]}\n".encode())
http.server.HTTPServer(("203.0.113.80", 80), Handler).serve_forever()
"#;

fn manifests(sha256: &str, user_data: &str) -> String {
    format!(
        r#"
apiVersion: vmctl.dev/v1alpha1
kind: StoragePool
metadata: {{name: pool}}
spec: {{directory: {{path: /scratch/pool}}}}
---
apiVersion: vmctl.dev/v1alpha1
kind: Image
metadata: {{name: debian}}
spec: {{pool: pool, format: qcow2, sha256: {sha256}, source: {{path: /stock/qcow2}}}}
---
apiVersion: vmctl.dev/v1alpha1
kind: Volume
metadata: {{name: root}}
spec: {{pool: pool, format: qcow2, capacity: 2Gi, source: {{image: debian}}}}
---
apiVersion: vmctl.dev/v1alpha1
kind: Network
metadata: {{name: lab}}
spec:
  bridge: virbr0
  mode: nat
  ipv4: {{address: 192.168.100.1/24, dhcp: {{start: 192.168.100.100, end: 192.168.100.199}}}}
  ipv6: {{address: "fd00:100::1/64", routerAdvertisements: true}}
  dns: {{domain: lab.internal}}
---
apiVersion: vmctl.dev/v1alpha1
kind: VirtualMachine
metadata: {{name: web}}
spec:
  memory: 768Mi
  restartPolicy: Allowed
  boot: {{disk: root, append: cloud-init=enabled}}
  disks: [{{volume: root, name: root}}]
  interfaces: [{{network: lab, addresses: [192.168.100.10, "fd00:100::10"]}}]
  cloudInit:
    hostname: web
    sshAuthorizedKeys: [ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ0m1bq1uY2Zl0hQ3u1n9Vb2J4d6l8sYQpXc5wT7eR0k someone]
    userData: |
{user_data}
---
apiVersion: vmctl.dev/v1alpha1
kind: VirtualMachine
metadata: {{name: db}}
spec:
  memory: 128Mi
  shutdownTimeoutSeconds: 0
  boot: {{kernel: /guest/vmlinux, initrd: /guest/initrd, cmdline: console=ttyS0 quiet tsc=reliable host=db}}
  interfaces: [{{network: lab, addresses: [192.168.100.11, "fd00:100::11"]}}]
"#
    )
}

/// `boots`: grows at each boot. `firsts`: at the first alone.
fn user_data() -> String {
    let text = format!(
        "#cloud-config\nssh_genkeytypes: []\ncloud_config_modules: [runcmd]\ncloud_final_modules: [scripts-user]\nwrite_files:\n- {{path: /root/sender.py, encoding: b64, content: {}}}\n\
         bootcmd:\n- echo boot >>/root/boots\nruncmd:\n- echo first >>/root/firsts\n",
        base64(SENDER)
    );
    text.lines().map(|line| format!("      {line}\n")).collect()
}

fn base64(text: &str) -> String {
    std::fs::write("/tmp/plain", text).unwrap();
    run("base64 -w0 /tmp/plain")
}

fn apply(manifests: &str) {
    std::fs::write(format!("{SOURCE}/all.yaml"), manifests).unwrap();
    run(&format!("vmctl apply -f {SOURCE}"));
    let again = shell(&format!("vmctl diff -f {SOURCE}"));
    assert_eq!(again.status.code(), Some(0), "{}", said(&again));
}

/// A host with an uplink, and behind it a server that has no route back.
fn set_up() -> Server {
    run("blockdev --flushbufs /dev/vdd; mkdir -p /stock && mount -o ro /dev/vdd /stock");
    run(&format!("lab-scratch ext4 /scratch && mkdir -p {SOURCE}"));
    run("ip netns add world && ip link add world0 type veth peer name eth0 netns world");
    run("ip link set world0 up && ip addr add 203.0.113.1/24 dev world0");
    run("ip -n world link set eth0 up && ip -n world addr add 203.0.113.80/24 dev eth0");
    let server =
        Command::new("ip").args(["netns", "exec", "world", "python3", "-c", SERVER]).spawn().unwrap();
    Server(server)
}

struct Server(std::process::Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The stock guest at its prompt.
fn log_in(host: &Tutorial) -> Guest {
    let mut guest = host.console("web");
    guest.wait_for_within(" login: ", BOOT);
    guest.type_in("root");
    guest.wait_for("Password: ");
    guest.type_in("stock");
    guest.wait_for("~# ");
    // Its own words on its console would come between others'.
    guest.succeeds("dmesg -n 1");
    guest
}

fn set_up_by_cloud_init(guest: &mut Guest) {
    until("cloud-init is done", BOOT, || {
        let (_, status) = guest.run("sleep 2; cloud-init status --long");
        assert!(!status.contains("error"), "{status}");
        status.contains("status: done").then_some(())
    });
}

/// What a guest's interface makes of its MAC address.
fn link_local(guest: &mut Guest, link: &str) -> String {
    let shown = guest.succeeds(&format!("ip -6 addr show dev {link} scope link"));
    let address =
        shown.split_whitespace().find(|word| word.starts_with("fe80::")).expect("a link-local address");
    address.split('/').next().unwrap().to_owned()
}

#[test]
fn guests_in_a_network_are_who_they_are_and_find_one_another() {
    if ran_in_lab_with(LAB) {
        return;
    }
    let _server = set_up();
    let sha256 = run("sha256sum /stock/qcow2").split_whitespace().next().unwrap().to_owned();
    apply(&manifests(&sha256, &user_data()));
    let host = Tutorial { source: SOURCE.into(), state: "/var/lib/vmctl".into(), run: "/run/vmctl".into() };

    // The small guest: its reserved address by DHCP, the gateway's names, the world under the host's address.
    let mut db = host.guest("db");
    db.succeeds("mkdir -p /etc");
    for line in BOUND.lines() {
        db.succeeds(&format!("echo '{line}' >>/bound"));
    }
    db.succeeds("chmod 755 /bound && ip link set eth0 up && udhcpc -i eth0 -n -q -f -t 10 -T 2 -s /bound");
    assert!(db.succeeds("ip -4 addr show dev eth0").contains("192.168.100.11/24"));
    assert!(db.succeeds("nslookup -type=a web.lab.internal").contains("192.168.100.10"));
    assert!(db.succeeds("nslookup -type=aaaa web.lab.internal").contains("fd00:100::10"));
    assert_eq!(db.succeeds("wget -qO- http://203.0.113.80/"), "you are 203.0.113.1");
    // An address by router advertisement.
    db.succeeds(
        "for n in $(seq 60); do ip addr show dev eth0 | grep -q 'inet6 fd00:100:' && break; sleep 1; done",
    );
    db.succeeds("ping -6 -c 1 -W 10 fd00:100::1");

    // The stock one, by its own network manager, as cloud-init set it up.
    let mut web = log_in(&host);
    set_up_by_cloud_init(&mut web);
    assert_eq!(web.succeeds("hostname"), "web");
    assert!(
        web.succeeds("cat /home/debian/.ssh/authorized_keys /root/.ssh/authorized_keys").contains(" someone")
    );
    assert_eq!(web.succeeds("cat /root/boots /root/firsts"), "boot\nfirst");
    assert!(
        web.succeeds("df -m / | tail -1").split_whitespace().nth(1).unwrap().parse::<u32>().unwrap() > 1600
    );
    let link = web.succeeds("ls /sys/class/net | grep -v lo");
    let addresses = web.succeeds(&format!("ip -br addr show dev {link}"));
    for address in ["192.168.100.10/24", "fd00:100::10/128"] {
        assert!(addresses.contains(address), "{addresses}");
    }
    assert!(web.succeeds("getent ahostsv4 db.lab.internal").starts_with("192.168.100.11"));
    let fetch =
        "import urllib.request; print(urllib.request.urlopen('http://203.0.113.80/').read().decode())";
    assert_eq!(web.succeeds(&format!("python3 -c \"{fetch}\"")), "you are 203.0.113.1");
    db.succeeds("ping -6 -c 1 -W 10 fd00:100::10 && ping -c 1 -W 10 192.168.100.10");
    let leases = run("vmctl get leases");
    for lease in ["192.168.100.10", "192.168.100.11", "fd00:100::10"] {
        assert!(leases.contains(lease), "{leases}");
    }

    // Whatever it says, its neighbour hears who it is.
    let mut listener = Command::new("python3")
        .args(["-c", LISTENER, "db.net0", "15"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let neighbour = link_local(&mut db, "eth0");
    web.succeeds(&format!("python3 /root/sender.py $(cat /sys/class/net/{link}/address) {link} {neighbour}"));
    let mut heard = String::new();
    std::io::Read::read_to_string(&mut listener.stdout.take().unwrap(), &mut heard).unwrap();
    assert!(listener.wait().unwrap().success());
    let heard: BTreeSet<&str> = heard.split_whitespace().filter(|word| *word != "ready").collect();
    let good = ["good-arp", "good-dhcp", "good-ipv4", "good-ll", "good-nd", "good-probe"];
    assert_eq!(heard, BTreeSet::from(good));

    run("vmctl stop web");
    run("qemu-img check -q /scratch/pool/root.qcow2");
}
