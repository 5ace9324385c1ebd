//! `vmctl graph`: what hangs together, from the wire to the disk.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use clap::{Args, ValueEnum};

use super::args::{SetArg, SourceArgs};
use super::error::{CliError, Result};
use super::exit::Exit;
use super::get::table::format_name;
use super::objects::{Object, Status, VmStatus, objects};
use super::session::Session;
use crate::host::{Host, Scope};
use crate::name::{LinkName, ObjectId, ObjectName, SetName};
use crate::report::graph::{Graph, NodeKind};
use crate::report::units::size;

/// Draw what hangs together: NIC, VLAN, bridge, tap, VM, volume, image, pool
///
/// Without manifests: what vmctl has on this host, as it is now, of all sets; what is down or doesn't run has a
/// dashed line. With manifests: what they declare; the host is not looked at.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  vmctl graph -o svg > host.svg
  vmctl graph -f manifests/ -o svg > declared.svg
  vmctl graph | dot -Tpng > host.png
  vmctl graph -o json | jq '.edges[]'")]
pub struct Command {
    #[command(flatten)]
    source: SourceArgs,
    #[command(flatten)]
    set: SetArg,
    /// How to print it
    #[arg(short, long, value_name = "FORMAT", default_value = "dot")]
    pub output: Format,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// The language of Graphviz
    #[default]
    Dot,
    /// A drawing for browsers
    Svg,
    Json,
}

impl Command {
    pub fn run(self, session: &Session) -> Result {
        let (graph, exit) = if self.source.filename.is_empty() {
            let snapshot = session.host().snapshot(&Scope::default());
            let (objects, unseen) = objects(&snapshot, None);
            for error in &unseen {
                session.out.error(&CliError::failed(format!("could not look: {error}")));
            }
            (of_objects(&objects), if unseen.is_empty() { Exit::Ok } else { Exit::Failed })
        } else {
            let declaration = session.declare(&self.set.set, &self.source)?;
            (Graph::of_declared(&declaration.desired.declared), Exit::Ok)
        };
        match self.output {
            Format::Dot => session.out.print(&graph.dot()),
            Format::Svg => session.out.print(&graph.svg()),
            Format::Json => session.out.json(&graph.json())?,
        }
        Ok(exit)
    }
}

/// Finds the nodes' ids: `Kind/name`, with the set in front where there are several.
struct Ids<'a> {
    several_sets: bool,
    links: BTreeMap<&'a LinkName, String>,
    pools: BTreeMap<&'a ObjectName, String>,
    files: BTreeMap<&'a Path, String>,
}

impl Ids<'_> {
    fn of(&self, set: &SetName, id: &ObjectId) -> String {
        if self.several_sets { format!("{set}:{id}") } else { id.to_string() }
    }
}

fn of_objects(objects: &[Object]) -> Graph {
    let sets: BTreeSet<&SetName> = objects.iter().map(|object| &object.set).collect();
    let mut ids = Ids {
        several_sets: sets.len() > 1,
        links: BTreeMap::new(),
        pools: BTreeMap::new(),
        files: BTreeMap::new(),
    };
    for object in objects {
        let id = ids.of(&object.set, &object.id);
        match &object.status {
            Status::Bridge(bridge) => {
                ids.links.insert(&bridge.link.interface, id);
            }
            Status::Vlan(vlan) => {
                ids.links.insert(&vlan.link.interface, id);
            }
            Status::Network(network) => {
                if let Some(bridge) = &network.bridge {
                    // A declared Bridge is there before, and stays what its taps are on.
                    ids.links.entry(bridge).or_insert(id);
                }
            }
            Status::StoragePool(_) => {
                ids.pools.insert(&object.id.name, id);
            }
            Status::Image(image) => {
                ids.files.insert(&image.path, id);
            }
            Status::Volume(volume) => {
                ids.files.insert(&volume.path, id);
            }
            Status::HostPolicy(_) | Status::VirtualMachine(_) => {}
        }
    }
    let taps: BTreeSet<&str> = objects
        .iter()
        .filter_map(|object| match &object.status {
            Status::VirtualMachine(vm) => Some(vm.interfaces.iter().map(|nic| nic.tap.as_str())),
            _ => None,
        })
        .flatten()
        .collect();
    let mut graph = Graph::default();
    for object in objects {
        let own = ids.of(&object.set, &object.id);
        let Some(kind) = NodeKind::of(object.id.kind) else { continue };
        let (details, off) = describe(&object.status);
        graph.node(&own, kind, object.id.name.as_str(), details, off);
        match &object.status {
            Status::Bridge(bridge) => {
                for port in bridge.ports.iter().filter(|port| !taps.contains(port.as_str())) {
                    let port = ids.links.get(port).cloned().unwrap_or_else(|| graph.foreign(port));
                    graph.edge(port, &own);
                }
            }
            Status::Vlan(vlan) => {
                if let Some(parent) = &vlan.parent {
                    let parent = ids.links.get(parent).cloned().unwrap_or_else(|| graph.foreign(parent));
                    graph.edge(parent, &own);
                }
            }
            Status::Network(network) => {
                let bridge = network.bridge.as_ref().and_then(|bridge| ids.links.get(bridge));
                if let Some(bridge) = bridge.filter(|bridge| **bridge != own) {
                    graph.edge(bridge, &own);
                }
            }
            Status::HostPolicy(_) | Status::StoragePool(_) => {}
            Status::Image(image) => graph.edge(&own, pool_id(&ids, &image.pool)),
            Status::Volume(volume) => {
                graph.edge(&own, pool_id(&ids, &volume.pool));
                if let Some(image) = volume.backing.as_deref().and_then(|path| ids.files.get(path)) {
                    graph.edge(&own, image);
                }
            }
            Status::VirtualMachine(vm) => devices(&mut graph, &ids, &own, vm),
        }
    }
    graph.finish()
}

fn pool_id(ids: &Ids, pool: &ObjectName) -> String {
    ids.pools.get(pool).cloned().unwrap_or_default()
}

fn devices(graph: &mut Graph, ids: &Ids, own: &str, vm: &VmStatus) {
    for nic in &vm.interfaces {
        let tap = format!("tap/{}", nic.tap);
        let mut details = vec![format!("NIC {}", nic.name), format!("MAC {}", nic.mac_address)];
        details.extend(nic.vlans.clone().map(|vlans| format!("VLAN {vlans}")));
        graph.node(&tap, NodeKind::Tap, &nic.tap, details, !nic.up || !nic.link_up);
        if let Some(bridge) = &nic.bridge {
            let bridge = ids.links.get(bridge).cloned().unwrap_or_else(|| graph.foreign(bridge));
            graph.edge(bridge, &tap);
        }
        graph.edge(&tap, own);
    }
    for disk in &vm.disks {
        if let Some(volume) = ids.files.get(Path::new(&disk.path)) {
            graph.edge(own, volume);
        }
    }
}

/// What is true of it now, and whether it is down, missing, or doesn't run.
fn describe(status: &Status) -> (Vec<String>, bool) {
    match status {
        Status::HostPolicy(_) => (Vec::new(), false),
        Status::Bridge(bridge) => {
            let link = &bridge.link;
            let mut details = vec![format!("{}, mtu {}", link.interface, link.mtu)];
            details.extend(link.addresses.iter().cloned());
            if bridge.vlan_filtering {
                details.push("filters VLANs".to_owned());
            }
            (details, !link.up)
        }
        Status::Vlan(vlan) => {
            let id = vlan.vlan_id.map(|id| format!(", id {id}")).unwrap_or_default();
            let mut details = vec![format!("{}{id}", vlan.link.interface)];
            details.extend(vlan.link.addresses.iter().cloned());
            (details, !vlan.link.up)
        }
        Status::Network(network) => {
            let mut details: Vec<String> = network.bridge.iter().map(ToString::to_string).collect();
            details.extend(network.link.iter().flat_map(|link| link.addresses.iter().cloned()));
            (details, !network.link.as_ref().is_some_and(|link| link.up))
        }
        Status::StoragePool(pool) => {
            // (Not what is available: that changes by itself, and the drawing with it.)
            let details =
                vec![pool.path.display().to_string(), format!("{} in all", size(pool.capacity_bytes))];
            (details, !pool.present)
        }
        Status::Image(image) => {
            (vec![format!("{} {}", format_name(image.format), size(image.virtual_size_bytes))], false)
        }
        Status::Volume(volume) => {
            let what = format!("{} {}", format_name(volume.format), size(volume.capacity_bytes));
            let details = vec![what, volume.path.display().to_string()];
            (details, volume.unusable.is_some())
        }
        Status::VirtualMachine(vm) => {
            let what = format!("{} vCPU, {}", vm.cpus, size(vm.memory_bytes));
            let details = vec![vm.phase_and_why(), what];
            (details, matches!(vm.phase, "Stopped" | "Unknown"))
        }
    }
}
