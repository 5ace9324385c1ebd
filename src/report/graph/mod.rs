//! What hangs together on a host, as a graph: NIC → VLAN → bridge → network → tap → VM → volume → image → pool.
//!
//! The same graph always gives the same text, byte for byte, so that it can be kept beside the manifests and
//! compared.

mod dot;
mod layout;
mod svg;

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::kinds::virtual_machine::changes::word;
use crate::kinds::virtual_machine::{VirtualMachine, tap_name};
use crate::kinds::volume::Content;
use crate::kinds::{Declared, Spec, link_of};
use crate::name::{Kind, LinkName, ObjectId};

/// What a node is. The order is that of the columns in a drawing, from the wire to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum NodeKind {
    /// An interface of the host that is no object: a physical one, a bond, a veth.
    Nic,
    Vlan,
    Bridge,
    Network,
    Tap,
    VirtualMachine,
    Volume,
    Image,
    Pool,
}

impl NodeKind {
    pub fn of(kind: Kind) -> Option<Self> {
        Some(match kind {
            Kind::HostPolicy => return None,
            Kind::Bridge => Self::Bridge,
            Kind::Vlan => Self::Vlan,
            Kind::Network => Self::Network,
            Kind::StoragePool => Self::Pool,
            Kind::Image => Self::Image,
            Kind::Volume => Self::Volume,
            Kind::VirtualMachine => Self::VirtualMachine,
        })
    }

    /// In a drawing, and its class in an SVG.
    pub fn word(self) -> &'static str {
        match self {
            Self::Nic => "NIC",
            Self::Vlan => "VLAN",
            Self::Bridge => "bridge",
            Self::Network => "network",
            Self::Tap => "tap",
            Self::VirtualMachine => "VM",
            Self::Volume => "volume",
            Self::Image => "image",
            Self::Pool => "pool",
        }
    }

    /// Fill and line.
    fn colours(self) -> (&'static str, &'static str) {
        match self {
            Self::Nic => ("#eceff1", "#546e7a"),
            Self::Vlan => ("#ede7f6", "#5e35b1"),
            Self::Bridge => ("#e3f2fd", "#1565c0"),
            Self::Network => ("#e8eaf6", "#303f9f"),
            Self::Tap => ("#e0f2f1", "#00796b"),
            Self::VirtualMachine => ("#e8f5e9", "#2e7d32"),
            Self::Volume => ("#fff8e1", "#b26a00"),
            Self::Image => ("#fbe9e7", "#bf360c"),
            Self::Pool => ("#efebe9", "#5d4037"),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Node {
    pub kind: NodeKind,
    pub name: String,
    /// What there is to know of it, a line each.
    pub details: Vec<String>,
    /// It doesn't run, is down, or is not there.
    pub off: bool,
}

/// Nodes by id (`VirtualMachine/web`, `NIC/eth0`, `tap/web.net0`), edges from the wire towards the disk.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Graph {
    pub nodes: BTreeMap<String, Node>,
    pub edges: BTreeSet<(String, String)>,
}

impl Graph {
    pub fn node(&mut self, id: &str, kind: NodeKind, name: &str, details: Vec<String>, off: bool) {
        self.nodes.insert(id.to_owned(), Node { kind, name: name.to_owned(), details, off });
    }

    /// A link of the host that is no object of ours; gives its id.
    pub fn foreign(&mut self, link: &LinkName) -> String {
        let id = format!("NIC/{link}");
        if !self.nodes.contains_key(&id) {
            self.node(&id, NodeKind::Nic, link.as_str(), vec!["not vmctl's".to_owned()], false);
        }
        id
    }

    /// Between nodes that are there, at the latest when it is drawn.
    pub fn edge(&mut self, from: impl Into<String>, to: impl Into<String>) {
        self.edges.insert((from.into(), to.into()));
    }

    /// Edges to what is not there are left out: a disk in a pool that nobody registered, for one.
    pub fn finish(mut self) -> Self {
        let nodes = &self.nodes;
        self.edges.retain(|(from, to)| nodes.contains_key(from) && nodes.contains_key(to));
        self
    }

    /// What manifests declare, whatever the host has.
    pub fn of_declared(declared: &Declared) -> Self {
        let mut graph = Self::default();
        let links: BTreeMap<LinkName, &ObjectId> = declared
            .objects
            .iter()
            .filter_map(|(id, spec)| Some((link_of(id, spec, &declared.objects)?, id)))
            .collect();
        for (id, spec) in &declared.objects {
            let Some(kind) = NodeKind::of(id.kind) else { continue };
            let own = id.to_string();
            let (details, off) = describe(spec);
            graph.node(&own, kind, id.name.as_str(), details, off);
            let below = |graph: &mut Self, link: &LinkName| match links.get(link) {
                Some(id) => id.to_string(),
                None => graph.foreign(link),
            };
            let object = |kind, name: &_| ObjectId::new(kind, Clone::clone(name)).to_string();
            match spec {
                Spec::Bridge(bridge) => {
                    for port in &bridge.ports {
                        let port = below(&mut graph, &port.interface);
                        graph.edge(port, &own);
                    }
                }
                Spec::Vlan(vlan) => {
                    let parent = below(&mut graph, &vlan.parent);
                    graph.edge(parent, &own);
                    if let Some(bridge) = &vlan.bridge {
                        graph.edge(&own, object(Kind::Bridge, bridge));
                    }
                }
                Spec::Network(network) => {
                    if let Some(bridge) = network.declared_bridge(&declared.objects) {
                        graph.edge(bridge.to_string(), &own);
                    }
                }
                Spec::HostPolicy(_) | Spec::StoragePool(_) => {}
                Spec::Image(image) => graph.edge(&own, object(Kind::StoragePool, &image.pool)),
                Spec::Volume(volume) => {
                    graph.edge(&own, object(Kind::StoragePool, &volume.pool));
                    if let Content::CopyOf(image) | Content::OverlayOn(image) = &volume.content {
                        graph.edge(&own, object(Kind::Image, image));
                    }
                }
                Spec::VirtualMachine(vm) => graph.declared_devices(id, vm),
            }
        }
        graph.finish()
    }

    fn declared_devices(&mut self, id: &ObjectId, vm: &VirtualMachine) {
        for nic in &vm.interfaces {
            let name = tap_name(&id.name, &nic.name);
            let tap = format!("tap/{name}");
            let mac = nic.mac_address.map(|mac| format!("MAC {mac}"));
            let details = std::iter::once(format!("NIC {}", nic.name)).chain(mac).collect();
            self.node(&tap, NodeKind::Tap, name.as_str(), details, !nic.link_up);
            self.edge(nic.attachment.object().to_string(), &tap);
            self.edge(&tap, id.to_string());
        }
        for disk in &vm.disks {
            self.edge(id.to_string(), ObjectId::new(Kind::Volume, disk.volume.clone()).to_string());
        }
    }

    pub fn dot(&self) -> String {
        dot::text(self)
    }

    pub fn svg(&self) -> String {
        svg::text(self)
    }

    pub fn json(&self) -> serde_json::Value {
        let nodes = self.nodes.iter().map(|(id, node)| {
            serde_json::json!({
                "id": id, "kind": node.kind, "name": node.name, "details": node.details, "off": node.off,
            })
        });
        let edges = self.edges.iter().map(|(from, to)| serde_json::json!({ "from": from, "to": to }));
        serde_json::json!({ "nodes": nodes.collect::<Vec<_>>(), "edges": edges.collect::<Vec<_>>() })
    }
}

/// What is known of a declared object, and whether it is declared not to run.
fn describe(spec: &Spec) -> (Vec<String>, bool) {
    match spec {
        Spec::HostPolicy(_) => (Vec::new(), false),
        Spec::Bridge(bridge) => {
            let mut details = vec![format!("mtu {}", bridge.mtu)];
            details.extend(bridge.addresses.iter().map(ToString::to_string));
            if bridge.settings.vlan_filtering {
                details.push("filters VLANs".to_owned());
            }
            (details, false)
        }
        Spec::Vlan(vlan) => (vec![format!("{}, id {}", vlan.interface_name, vlan.id)], false),
        Spec::Network(network) => {
            let mut details = vec![network.mode.as_str().to_owned()];
            details.extend(network.addresses().iter().map(ToString::to_string));
            (details, false)
        }
        Spec::StoragePool(pool) => (vec![pool.place.path().display().to_string()], false),
        Spec::Image(image) => (vec![word(&image.format), format!("sha256 {}", image.sha256)], false),
        Spec::Volume(volume) => (vec![format!("{} {}", word(&volume.format), volume.capacity)], false),
        Spec::VirtualMachine(vm) => {
            let strategy = word(&vm.run_strategy);
            let is_halted = strategy == "Halted";
            (vec![format!("{} vCPU, {}", vm.cpus, vm.memory), strategy], is_halted)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::layout::layout;
    use super::*;

    fn graph(nodes: &[(&str, NodeKind)], edges: &[(&str, &str)]) -> Graph {
        let mut graph = Graph::default();
        for (id, kind) in nodes {
            graph.node(id, *kind, id, vec![], false);
        }
        for (from, to) in edges {
            graph.edge(*from, *to);
        }
        graph.finish()
    }

    /// Two trees whose names are ordered against their edges.
    fn crossed() -> Graph {
        use NodeKind::*;
        graph(
            &[
                ("a", Bridge),
                ("b", Bridge),
                ("y", Tap),
                ("z", Tap),
                ("v", VirtualMachine),
                ("w", VirtualMachine),
            ],
            &[("a", "z"), ("b", "y"), ("z", "w"), ("y", "v"), ("a", "nothing")],
        )
    }

    #[test]
    fn nodes_of_a_layer_have_room_and_edges_go_right() {
        let graph = crossed();
        assert!(graph.edges.len() == 4, "an edge to what is not there is left out");
        let layout = layout(&graph);
        assert_eq!(layout.layers, 3);
        for (one, (layer, y)) in &layout.nodes {
            for (other, (other_layer, other_y)) in &layout.nodes {
                let apart = (y - other_y).abs() >= 53.0;
                assert!(one == other || layer != other_layer || apart, "{one} and {other}");
            }
        }
        assert!(layout.edges.iter().all(|(_, _, route)| route.windows(2).all(|pair| pair[0].0 < pair[1].0)));
        // Nothing crosses: the order of the bridges is that of their taps and VMs.
        let above = |one: &str, other: &str| layout.nodes[one].1 < layout.nodes[other].1;
        assert_eq!((above("a", "b"), above("a", "b")), (above("z", "y"), above("w", "v")));
    }

    #[test]
    fn an_edge_over_a_layer_has_a_place_in_it() {
        use NodeKind::*;
        let graph = graph(
            &[("volume", Volume), ("image", Image), ("pool", Pool)],
            &[("volume", "image"), ("volume", "pool"), ("image", "pool")],
        );
        let layout = layout(&graph);
        let (_, _, route) = layout.edges.iter().find(|edge| (edge.0, edge.1) == ("volume", "pool")).unwrap();
        assert_eq!(route.len(), 3);
        assert!((route[1].1 - layout.nodes["image"].1).abs() >= 30.0, "it passes the image");
    }

    #[test]
    fn a_circle_and_nothing_at_all_end() {
        use NodeKind::*;
        let circle = graph(&[("a", Bridge), ("b", Vlan)], &[("a", "b"), ("b", "a")]);
        assert_eq!(circle.svg().matches("class=\"node").count(), 2);
        assert!(Graph::default().svg().contains("</svg>") && Graph::default().dot().ends_with("}\n"));
    }
}
