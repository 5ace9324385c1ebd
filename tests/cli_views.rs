//! The views: lists as virsh shows them, on a VM that runs, and graphs, read back by parsers.

#[path = "support/guest.rs"]
#[allow(dead_code, reason = "other tests use the rest of it")]
mod guest;
#[path = "support/cli.rs"]
mod support;

use std::collections::{BTreeMap, BTreeSet};

use support::*;

const MANIFESTS: &str = "\
apiVersion: vmctl.dev/v1alpha1
kind: Bridge
metadata: {name: br0}
spec: {ports: [{interface: uplink0}]}
---
apiVersion: vmctl.dev/v1alpha1
kind: StoragePool
metadata: {name: default}
spec: {directory: {path: '@/pool & <\"other\"> things'}}
---
apiVersion: vmctl.dev/v1alpha1
kind: Volume
metadata: {name: root}
spec: {pool: default, format: qcow2, capacity: 20Mi}
---
apiVersion: vmctl.dev/v1alpha1
kind: Volume
metadata: {name: spare}
spec: {pool: default, format: raw, capacity: 1Mi}
---
apiVersion: vmctl.dev/v1alpha1
kind: VirtualMachine
metadata: {name: web}
spec:
  memory: 32Mi
  boot: {kernel: @/kernel}
  disks: [{volume: root}]
  interfaces: [{bridge: br0, macAddress: '52:54:00:00:00:01'}]
---
apiVersion: vmctl.dev/v1alpha1
kind: VirtualMachine
metadata: {name: db}
spec: {memory: 32Mi, boot: {kernel: @/kernel}, runStrategy: Halted}
";

/// Only declared: this kernel need not know VLANs.
const VLANS: &str = "\
---
apiVersion: vmctl.dev/v1alpha1
kind: Vlan
metadata: {name: eth0-10}
spec: {parent: eth0, id: 10, bridge: br10}
---
apiVersion: vmctl.dev/v1alpha1
kind: Bridge
metadata: {name: br10}
spec: {}
---
apiVersion: vmctl.dev/v1alpha1
kind: Image
metadata: {name: base}
spec: {pool: default, source: {path: @/base.qcow2}, format: qcow2,
  sha256: e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855}
---
apiVersion: vmctl.dev/v1alpha1
kind: Volume
metadata: {name: overlay}
spec: {pool: default, format: qcow2, capacity: 1Gi, backing: {image: base}}
";

fn running() -> Ground {
    let ground = Ground::new();
    std::fs::write(ground.path("kernel"), guest::kernel()).unwrap();
    ground.write("a.yaml", MANIFESTS);
    shell("ip link add uplink0 type veth peer name far0 && ip link set uplink0 up");
    ground.expect(0, "apply -f a.yaml --wait --timeout 60s");
    ground
}

#[test]
fn lists_are_shaped_as_those_of_virsh() {
    let ground = running();
    let pid = ground.json(0, "get vm/web -o json")["status"]["pid"].to_string();
    let head = format!(" {:<1$}   Name   State\n", "Id", pid.len());
    let listed = ground.expect(0, "list");
    assert!(listed.out.starts_with(&format!("{head}{}", "-".repeat(pid.len() + 20))), "{}", listed.out);
    listed.says(&format!(" {pid}   web    running\n\n"));
    assert!(!ground.expect(0, "list").out.contains("db"));
    ground.expect(0, "list --all").says("web    running\n").says("   db     shut off\n");
    assert!(!ground.expect(0, "list --inactive").says("shut off").out.contains("web"));
    assert_eq!(ground.expect(0, "list --all -o name").out, "VirtualMachine/db\nVirtualMachine/web\n");
    assert_eq!(ground.json(0, "list -o json")["items"][0]["status"]["phase"], "Running");
    ground.expect(0, "pause web");
    ground.expect(0, "list").says("web    paused");
    ground.expect(0, "resume web");

    assert_eq!(
        ground.expect(0, "domiflist web").out,
        concat!(
            " Interface   Type     Source   Model    MAC\n",
            "-----------------------------------------------------------\n",
            " web.net0    bridge   br0      virtio   52:54:00:00:00:01\n\n"
        )
    );
    assert_eq!(ground.json(0, "domiflist vm/web -o json")["interfaces"][0]["name"], "net0");
    assert_eq!(ground.expect(0, "domiflist web -o name").out, "net0\n");
    ground
        .expect(0, "domblklist web")
        .says(" Target   Source\n")
        .says(" disk0    ")
        .says("things/root.qcow2\n");
    ground
        .expect(0, "domblklist web --details")
        .says(" Type   Device   Target   Source\n")
        .says(" file   disk     disk0    ");
    ground.expect(0, "domblklist web -o yaml").says("disks:").says("format: qcow2");
    ground.expect(3, "domblklist nobody").complains("there is no VirtualMachine/nobody on this host");
    ground.expect(2, "domiflist br/br0").complains("`br/br0` is not a VM");
    ground.expect(3, "domiflist web --set other").complains("of set other");

    ground.expect(0, "vol-list default").says(" Name    Path\n").says(" root    ").says(" spare   ");
    ground.expect(0, "vol-list --details").says("Type   Capacity   Allocation\n").says("file   20Mi");
    ground.expect(3, "vol-list nothing").complains("there is no StoragePool/nothing");
    ground.expect(0, "pool-list").says(" Name      State    Autostart\n").says(" default   active   yes\n");
    ground.expect(0, "pool-list --details").says("Persistent   Capacity   Allocation   Available\n");
    ground.expect(0, "net-list").says(" br0    active   no          no\n");
    shell("ip link set br0 down");
    assert!(!ground.expect(0, "net-list").out.contains("br0"));
    ground.expect(0, "net-list --all").says(" br0    inactive ");
}

type Edges = BTreeSet<(String, String)>;

/// Nodes and edges of a DOT text, each statement checked; the language's own words in the order of the format.
fn read_dot(text: &str) -> (Vec<String>, Edges) {
    let body = text.strip_prefix("digraph vmctl {\n").unwrap().strip_suffix("}\n").unwrap();
    let (mut nodes, mut edges) = (Vec::new(), Edges::new());
    for line in body.lines().map(|line| line.trim().strip_suffix(';').expect("a statement ends in ;")) {
        if !line.starts_with('"') {
            let settings = ["rankdir=", "node [", "edge ["];
            assert!(settings.iter().any(|word| line.starts_with(word)), "{line}");
            continue;
        }
        let (from, rest) = string(line);
        if let Some(rest) = rest.strip_prefix(" -> ") {
            let (to, rest) = string(rest);
            assert_eq!(rest, "");
            assert!(edges.insert((from, to)), "twice: {line}");
            continue;
        }
        nodes.push(from);
        let mut rest = rest.strip_prefix(" [").unwrap().strip_suffix(']').unwrap();
        let mut names = Vec::new();
        while let Some((name, value)) = rest.split_once('=') {
            names.push(name);
            let (value, after) = string(value);
            assert!(name != "tooltip" || value.starts_with(nodes.last().unwrap()), "{line}");
            rest = after.strip_prefix(", ").unwrap_or(after);
        }
        assert!(rest.is_empty() && names.starts_with(&["label", "tooltip", "fillcolor", "color"]), "{line}");
    }
    (nodes, edges)
}

/// A quoted string at the beginning, and what follows it.
fn string(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut chars = text.strip_prefix('"').unwrap_or_else(|| panic!("no string: {text}")).char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '\\' => match chars.next().unwrap().1 {
                'n' => value.push('\n'),
                c => value.push(c),
            },
            '"' => return (value, &text[at + 2..]),
            c => value.push(c),
        }
    }
    panic!("the string does not end: {text}")
}

/// The same of an SVG: well-formed by a parser of XML, each node in its place and with a tooltip.
fn read_svg(text: &str) -> (Vec<String>, Edges) {
    let document = roxmltree::Document::parse(text).expect("well-formed XML");
    let root = document.root_element();
    assert_eq!(root.tag_name().namespace(), Some("http://www.w3.org/2000/svg"));
    let size = |name| root.attribute(name).unwrap().parse::<f64>().unwrap();
    let (width, height) = (size("width"), size("height"));
    let title = |node: roxmltree::Node| {
        let title =
            node.children().find(|child| child.has_tag_name((node.tag_name().namespace().unwrap(), "title")));
        title.and_then(|title| title.text()).expect("a title").to_owned()
    };
    let (mut nodes, mut edges, mut places) = (Vec::new(), Edges::new(), Vec::new());
    for node in root.descendants() {
        let class = node.attribute("class").unwrap_or_default();
        if class.starts_with("node ") {
            let id = node.attribute("data-id").unwrap().to_owned();
            assert!(title(node).starts_with(&id));
            let rect = node.descendants().find(|child| child.tag_name().name() == "rect").unwrap();
            let [x, y, w, h] = ["x", "y", "width", "height"]
                .map(|name| rect.attribute(name).unwrap().parse::<f64>().unwrap());
            assert!(x >= 0.0 && y >= 0.0 && x + w <= width && y + h <= height, "{id} is in the drawing");
            let apart =
                |(a, b, c, d): &(f64, f64, f64, f64)| a + c <= x || x + w <= *a || b + d <= y || y + h <= *b;
            assert!(places.iter().all(apart), "{id} is on another one");
            places.push((x, y, w, h));
            nodes.push(id);
        }
        if class == "edge" {
            let title = title(node);
            let (from, to) = title.split_once(" → ").unwrap();
            assert!(node.attribute("d").unwrap().starts_with('M'));
            assert!(edges.insert((from.to_owned(), to.to_owned())), "twice: {title}");
        }
    }
    (nodes, edges)
}

#[track_caller]
fn check(ground: &Ground, what: &str, nodes: &[&str], edges: &[(&str, &str)]) {
    let expected: Edges = edges.iter().map(|(from, to)| ((*from).to_owned(), (*to).to_owned())).collect();
    let [dot, svg] = ["dot", "svg"].map(|format| {
        let text = ground.expect(0, &format!("graph {what} -o {format}")).out;
        assert_eq!(text, ground.expect(0, &format!("graph {what} -o {format}")).out, "the same again");
        text
    });
    for (mut found, found_edges) in [read_dot(&dot), read_svg(&svg)] {
        found.sort();
        assert_eq!(found, nodes, "each node once");
        assert_eq!(found_edges, expected);
    }
    let json = ground.json(0, &format!("graph {what} -o json"));
    let kinds: BTreeMap<&str, &str> = json["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|node| (node["id"].as_str().unwrap(), node["kind"].as_str().unwrap()))
        .collect();
    assert_eq!(kinds.keys().copied().collect::<Vec<_>>(), nodes);
    assert_eq!(json["edges"].as_array().unwrap().len(), edges.len());
    assert_eq!(kinds["VirtualMachine/web"], "virtualMachine");
}

#[test]
fn graphs_hold_every_object_once_with_what_it_hangs_on() {
    let ground = running();
    let common = [
        ("Bridge/br0", "tap/web.net0"),
        ("NIC/uplink0", "Bridge/br0"),
        ("VirtualMachine/web", "Volume/root"),
        ("Volume/root", "StoragePool/default"),
        ("Volume/spare", "StoragePool/default"),
        ("tap/web.net0", "VirtualMachine/web"),
    ];
    let nodes = [
        "Bridge/br0",
        "NIC/uplink0",
        "StoragePool/default",
        "VirtualMachine/db",
        "VirtualMachine/web",
        "Volume/root",
        "Volume/spare",
        "tap/web.net0",
    ];
    check(&ground, "", &nodes, &common);
    let svg = ground.expect(0, "graph -o svg").says("Running").out;
    assert_eq!(svg.matches("stroke-dasharray").count(), 1, "the halted one");
    check(&ground, "-f a.yaml", &nodes, &common);

    ground.write("vlans.yaml", VLANS);
    let mut nodes = nodes.to_vec();
    nodes.extend(["Bridge/br10", "Image/base", "NIC/eth0", "Vlan/eth0-10", "Volume/overlay"]);
    nodes.sort();
    let mut edges = common.to_vec();
    edges.extend([
        ("NIC/eth0", "Vlan/eth0-10"),
        ("Vlan/eth0-10", "Bridge/br10"),
        ("Volume/overlay", "Image/base"),
        ("Volume/overlay", "StoragePool/default"),
        ("Image/base", "StoragePool/default"),
    ]);
    check(&ground, "-f a.yaml -f vlans.yaml", &nodes, &edges);
    ground.expect(2, "graph -f nothing.yaml").complains("nothing.yaml");
}

/// Nothing of the machine's own is changed: such a policy sets nothing.
#[test]
fn a_policy_is_shown_and_obeyed() {
    let ground = running();
    ground.expect(0, "get host").complains("none").says("1 vCPU on ").says("32Mi promised of ");
    let policy = |cpus: &str| {
        ground.write(
            "policy.yaml",
            &format!(
                "{{apiVersion: vmctl.dev/v1alpha1, kind: HostPolicy, metadata: {{name: host}}, \
                 spec: {{cpuOvercommit: {cpus}, memoryOvercommit: 2, reservedMemory: 64Mi}}}}\n"
            ),
        );
    };
    policy("1000");
    ground.expect(0, "apply -f policy.yaml").says("HostPolicy/host created");
    ground.expect(0, "diff -f policy.yaml").says("No differences");
    let host = ground.json(0, "get host/host -o json")["status"].take();
    assert_eq!((host["promisedVcpus"].as_u64(), host["promisedBytes"].as_u64()), (Some(1), Some(32 << 20)));
    assert_eq!(
        (host["cpuOvercommitMax"].as_str(), host["memoryOvercommitMax"].as_str()),
        (Some("1000"), Some("2"))
    );
    assert_eq!(host["runningVms"], 1);
    let (memory, usable) = (host["memoryBytes"].as_u64().unwrap(), host["usableBytes"].as_u64().unwrap());
    assert!(usable <= memory - (64 << 20), "{usable} of {memory}");
    ground.expect(0, "get host -o wide").says("CPU-RATIO").says("/1000").says("64Mi");
    ground.expect(0, "describe host").says("at most 1000").says("Reserved:       64Mi");
    ground.vmctl("check").says("1 vCPU on ").says("32Mi promised of ");

    // None has room for another, and the one that runs goes on.
    policy("0.1");
    ground.expect(0, "apply -f policy.yaml");
    let more = MANIFESTS.replace("runStrategy: Halted", "cpus: 16");
    ground.write("more.yaml", &more);
    ground
        .expect(3, "apply -f more.yaml")
        .says("VirtualMachine/db")
        .says("its 16 vCPUs don't fit: 1 of ")
        .says("are taken by web (cpuOvercommit 0.1)");
    ground.expect(0, "list").says("web    running");
    // Nor does one that is started by its name.
    ground.expect(0, "apply -f a.yaml");
    ground.write("manual.yaml", &MANIFESTS.replace("Halted", "Manual"));
    ground.expect(0, "apply -f manual.yaml");
    ground.expect(3, "start db").says("its 1 vCPU doesn't fit: 1 of ");
    ground.expect(0, "delete host/host").says("HostPolicy/host deleted");
    ground.expect(0, "start db").says("VirtualMachine/db");
    ground.expect(0, "list").says("db     running");
}
