//! What must hold between objects, each rule with every breach of it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use super::{Problem, pools};
use crate::kinds::virtual_machine::{default_cid, default_mac, tap_name};
use crate::kinds::volume::Content;
use crate::kinds::{Spec, link_of};
use crate::name::{Kind, LinkName, ObjectId, SetName};

pub(super) type Objects = BTreeMap<ObjectId, Spec>;

pub fn check(set: &SetName, objects: &Objects, unusable: &BTreeSet<ObjectId>, problems: &mut Vec<Problem>) {
    references(objects, unusable, problems);
    host_policies(objects, problems);
    link_names(objects, problems);
    ports(objects, problems);
    vlan_tags(objects, problems);
    vlan_mtus(objects, problems);
    mac_addresses(set, objects, problems);
    pools::check(objects, problems);
    images(objects, problems);
    disks(objects, problems);
    interface_vlans(objects, problems);
    context_ids(set, objects, problems);
    super::networks::check(objects, problems);
}

fn references(objects: &Objects, unusable: &BTreeSet<ObjectId>, problems: &mut Vec<Problem>) {
    for (id, spec) in objects {
        for reference in spec.references() {
            if objects.contains_key(&reference.to) || unusable.contains(&reference.to) {
                continue;
            }
            let to = &reference.to;
            let mut problem = Problem::new(id, reference.pointer, format!("{to} is not declared"));
            let same_kind = objects.keys().filter(|other| other.kind == to.kind);
            let nearest = same_kind
                .clone()
                .map(|other| (strsim::damerau_levenshtein(other.name.as_str(), to.name.as_str()), other))
                .filter(|(distance, other)| *distance <= 1 + other.name.as_str().len() / 4)
                .min();
            problem = match nearest {
                Some((_, other)) => problem.hint(format!("did you mean `{}`?", other.name)),
                None => {
                    let names: Vec<_> = same_kind.take(8).map(|other| other.name.as_str()).collect();
                    if names.is_empty() {
                        problem.hint(format!("no {} is declared; add a manifest for it", to.kind))
                    } else {
                        problem.hint(format!("declared {} objects: {}", to.kind, names.join(", ")))
                    }
                }
            };
            problems.push(problem);
        }
    }
}

/// Two would undo one another's work.
fn host_policies(objects: &Objects, problems: &mut Vec<Problem>) {
    let mut policies = objects.keys().filter(|id| id.kind == Kind::HostPolicy);
    let Some(first) = policies.next() else { return };
    for id in policies {
        problems.push(
            Problem::new(id, "", format!("a host has one policy, and {first} is declared already"))
                .related(first, "", "first declared here")
                .hint("put all of it into one HostPolicy"),
        );
    }
}

/// Where a link's name was settled, for messages.
fn name_pointer(spec: &Spec) -> &'static str {
    match spec {
        Spec::Bridge(bridge) if bridge.interface_name.is_none() => "",
        Spec::Network(network) if network.bridge.is_none() => "",
        Spec::Network(_) => "/bridge",
        _ => "/interfaceName",
    }
}

fn link_names(objects: &Objects, problems: &mut Vec<Problem>) {
    let mut names: BTreeMap<LinkName, (&ObjectId, String)> = BTreeMap::new();
    let mut claim = |name: LinkName, id, pointer: String, problems: &mut Vec<Problem>| match names.get(&name)
    {
        Some((other, at)) => problems.push(
            Problem::new(id, pointer, format!("the interface name {name} is already that of {other}"))
                .related(other, at, "first used here"),
        ),
        None => {
            names.insert(name, (id, pointer));
        }
    };
    for (id, spec) in objects {
        if let Spec::Bridge(bridge) = spec
            && let Err(error) = bridge.link_name(&id.name)
        {
            problems.push(
                Problem::new(id, "", format!("the bridge would be named {error}"))
                    .hint("choose a shorter name with `interfaceName`"),
            );
        }
        if let Spec::Network(network) = spec
            && network.declared_bridge(objects).is_none()
            && let Err(error) = network.own_link(&id.name)
        {
            problems.push(
                Problem::new(id, name_pointer(spec), format!("its bridge would be named {error}"))
                    .hint("choose a shorter name with `bridge`"),
            );
        }
        if let Some(name) = link_of(id, spec, objects) {
            claim(name, id, name_pointer(spec).to_owned(), problems);
        }
        if let Spec::VirtualMachine(vm) = spec {
            for (index, nic) in vm.interfaces.iter().enumerate() {
                claim(tap_name(&id.name, &nic.name), id, format!("/interfaces/{index}"), problems);
            }
        }
    }
}

fn ports(objects: &Objects, problems: &mut Vec<Problem>) {
    let mut owners: BTreeMap<LinkName, (&ObjectId, String)> = BTreeMap::new();
    for (id, spec) in objects {
        let claims: Vec<(LinkName, String)> = match spec {
            Spec::Bridge(bridge) => bridge
                .ports
                .iter()
                .enumerate()
                .map(|(index, port)| (port.interface.clone(), format!("/ports/{index}/interface")))
                .collect(),
            Spec::Vlan(vlan) if vlan.bridge.is_some() => {
                vec![(vlan.interface_name.clone(), "/bridge".to_owned())]
            }
            _ => Vec::new(),
        };
        for (link, pointer) in claims {
            if let Some((other, at)) = owners.get(&link) {
                problems.push(
                    Problem::new(id, pointer, format!("{link} can't be a port twice: {other} has it too"))
                        .related(other, at, "first used here"),
                );
            } else {
                owners.insert(link, (id, pointer));
            }
        }
    }
    // The bridge would swallow the tagged frames before the VLAN device sees them.
    for (id, spec) in objects {
        let Spec::Vlan(vlan) = spec else { continue };
        if let Some((other, at)) = owners.get(&vlan.parent) {
            problems.push(
                Problem::new(
                    id,
                    "/parent",
                    format!(
                        "{} is a port of a bridge ({other}), so its tagged frames never reach this VLAN",
                        vlan.parent
                    ),
                )
                .related(other, at, "a port here")
                .hint("use `vlanFiltering` on that bridge, or take the port out of it"),
            );
        }
    }
}

fn vlan_tags(objects: &Objects, problems: &mut Vec<Problem>) {
    let mut seen = BTreeMap::new();
    for (id, spec) in objects {
        let Spec::Vlan(vlan) = spec else { continue };
        let protocol = format!("{:?}", vlan.protocol);
        if let Some(other) = seen.insert((&vlan.parent, vlan.id, protocol), id) {
            problems.push(
                Problem::new(id, "/id", format!("VLAN {} on {} is already {other}", vlan.id, vlan.parent))
                    .related(other, "/id", "first used here"),
            );
        }
    }
}

fn vlan_mtus(objects: &Objects, problems: &mut Vec<Problem>) {
    let mtus: BTreeMap<LinkName, (&ObjectId, u32)> = objects
        .iter()
        .filter_map(|(id, spec)| {
            let mtu = match spec {
                Spec::Bridge(bridge) => bridge.mtu,
                Spec::Vlan(vlan) => vlan.mtu?,
                _ => return None,
            };
            Some((link_of(id, spec, objects)?, (id, mtu)))
        })
        .collect();
    for (id, spec) in objects {
        let Spec::Vlan(vlan) = spec else { continue };
        if let (Some(mtu), Some((parent, parent_mtu))) = (vlan.mtu, mtus.get(&vlan.parent))
            && mtu > *parent_mtu
        {
            problems.push(
                Problem::new(
                    id,
                    "/mtu",
                    format!("{mtu} is above the {parent_mtu} of its parent {}", vlan.parent),
                )
                .related(parent, "/mtu", "the parent's"),
            );
        }
    }
}

fn mac_addresses(set: &SetName, objects: &Objects, problems: &mut Vec<Problem>) {
    let mut seen: BTreeMap<_, (&ObjectId, String)> = BTreeMap::new();
    for (id, spec) in objects {
        let Spec::VirtualMachine(vm) = spec else { continue };
        for (index, nic) in vm.interfaces.iter().enumerate() {
            let mac = nic.mac_address.unwrap_or_else(|| default_mac(set, &id.name, &nic.name));
            let pointer = match nic.mac_address {
                Some(_) => format!("/interfaces/{index}/macAddress"),
                None => format!("/interfaces/{index}"),
            };
            if let Some((other, at)) = seen.get(&mac) {
                problems.push(
                    Problem::new(
                        id,
                        pointer,
                        format!("the MAC address {mac} is already that of a NIC of {other}"),
                    )
                    .related(other, at, "first used here"),
                );
            } else {
                seen.insert(mac, (id, pointer));
            }
        }
    }
}

fn images(objects: &Objects, problems: &mut Vec<Problem>) {
    let mut seen = BTreeMap::new();
    for (id, spec) in objects {
        match spec {
            Spec::Image(image) => {
                if let Some(other) = seen.insert((&image.pool, image.cached(Path::new("")).file), id) {
                    problems.push(
                        Problem::new(
                            id,
                            "/sha256",
                            format!("the same content in the same pool is already {other}"),
                        )
                        .related(other, "/sha256", "first used here")
                        .hint("use that Image, or another pool"),
                    );
                }
            }
            Spec::Volume(volume) => {
                let (name, field) = match &volume.content {
                    Content::Blank | Content::SnapshotOf(_) => continue,
                    Content::CopyOf(name) => (name, "source"),
                    Content::OverlayOn(name) => (name, "backing"),
                };
                let image_id = ObjectId::new(Kind::Image, name.clone());
                if let Some(Spec::Image(image)) = objects.get(&image_id)
                    && image.pool != volume.pool
                    && !pools::is_lvm(objects, &volume.pool)
                {
                    problems.push(
                        Problem::new(
                            id,
                            format!("/{field}/image"),
                            format!(
                                "Image/{name} is in pool {}, this volume in pool {}",
                                image.pool, volume.pool
                            ),
                        )
                        .related(&image_id, "/pool", "the image's pool")
                        .hint("a volume and its image live in one pool"),
                    );
                }
            }
            _ => {}
        }
    }
}

/// One writer, or any number of readers.
fn disks(objects: &Objects, problems: &mut Vec<Problem>) {
    let mut users: BTreeMap<_, Vec<(&ObjectId, String, bool)>> = BTreeMap::new();
    for (id, spec) in objects {
        let Spec::VirtualMachine(vm) = spec else { continue };
        for (index, disk) in vm.disks.iter().enumerate() {
            let user = (id, format!("/disks/{index}/volume"), disk.read_only);
            users.entry(&disk.volume).or_default().push(user);
        }
    }
    for (volume, users) in users {
        if users.len() < 2 || users.iter().all(|(_, _, read_only)| *read_only) {
            continue;
        }
        let (first, at, _) = &users[0];
        for (id, pointer, _) in &users[1..] {
            problems.push(
                Problem::new(id, pointer.clone(), format!("Volume/{volume} is already a disk of {first}"))
                    .related(first, at, "first used here")
                    .hint("a volume has one writer; set `readOnly: true` on each of its disks, or make a volume for each"),
            );
        }
    }
}

/// A bridge that doesn't filter lets every frame through: a NIC's VLANs would be nothing but words.
fn interface_vlans(objects: &Objects, problems: &mut Vec<Problem>) {
    for (id, spec) in objects {
        let Spec::VirtualMachine(vm) = spec else { continue };
        for (index, nic) in vm.interfaces.iter().enumerate().filter(|(_, nic)| nic.vlans.is_some()) {
            let pointer = format!("/interfaces/{index}/vlan");
            // The Bridge, if it is a declared one.
            let network = nic.attachment.object();
            let bridge_id = match objects.get(&network) {
                Some(Spec::Network(network)) => network.declared_bridge(objects),
                Some(_) => Some(network.clone()),
                None => continue,
            };
            let problem = match bridge_id {
                None => {
                    let message = format!(
                        "`vlan` has no meaning on the bridge of {network}, which doesn't filter VLANs"
                    );
                    Problem::new(id, pointer, message).related(&network, "", "the network").hint(
                        "declare a Bridge with `vlanFiltering: true`, and name it in the network's `bridge`",
                    )
                }
                Some(bridge_id) => {
                    let Some(Spec::Bridge(bridge)) = objects.get(&bridge_id) else { continue };
                    if bridge.settings.vlan_filtering {
                        continue;
                    }
                    let message = format!("`vlan` has no meaning on {bridge_id}, which doesn't filter VLANs");
                    Problem::new(id, pointer, message)
                        .related(&bridge_id, "/vlanFiltering", "the bridge")
                        .hint("set `vlanFiltering: true` on the bridge, or use a bridge for each VLAN")
                }
            };
            problems.push(problem);
        }
    }
}

fn context_ids(set: &SetName, objects: &Objects, problems: &mut Vec<Problem>) {
    let mut seen: BTreeMap<u32, (&ObjectId, String)> = BTreeMap::new();
    for (id, spec) in objects {
        let Spec::VirtualMachine(vm) = spec else { continue };
        let Some(vsock) = vm.vsock else { continue };
        let cid = vsock.cid.unwrap_or_else(|| default_cid(set, &id.name));
        let pointer = if vsock.cid.is_some() { "/vsock/cid" } else { "/vsock" };
        if let Some((other, at)) = seen.get(&cid) {
            problems.push(
                Problem::new(id, pointer, format!("the vsock context id {cid} is already that of {other}"))
                    .related(other, at, "first used here"),
            );
        } else {
            seen.insert(cid, (id, pointer.to_owned()));
        }
    }
}
