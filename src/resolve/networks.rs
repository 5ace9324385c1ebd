//! What must hold between networks.

use std::collections::BTreeMap;

use super::Problem;
use super::rules::Objects;
use crate::kinds::Spec;
use crate::kinds::network::Network;
use crate::name::ObjectId;

pub fn check(objects: &Objects, problems: &mut Vec<Problem>) {
    let networks: Vec<(&ObjectId, &Network)> = objects
        .iter()
        .filter_map(|(id, spec)| match spec {
            Spec::Network(network) => Some((id, network)),
            _ => None,
        })
        .collect();
    subnets(&networks, problems);
    port_forwards(&networks, problems);
    addresses(objects, problems);
}

/// The host could not tell where an address is that lies in two of them.
fn subnets(networks: &[(&ObjectId, &Network)], problems: &mut Vec<Problem>) {
    for (index, (id, network)) in networks.iter().enumerate() {
        for (family, subnet) in &network.subnets {
            let twice = networks[..index].iter().find_map(|(other, there)| {
                let there = there.subnets.get(family)?;
                there.address.overlaps(subnet.address).then_some((*other, there.address))
            });
            if let Some((other, there)) = twice {
                let field = format!("/{}/address", family.to_string().to_lowercase());
                let message = format!("{} overlaps {} of {other}", subnet.address.network(), there.network());
                problems.push(Problem::new(id, field.clone(), message).related(
                    other,
                    &field,
                    "first used here",
                ));
            }
        }
    }
}

fn port_forwards(networks: &[(&ObjectId, &Network)], problems: &mut Vec<Problem>) {
    let mut seen: BTreeMap<_, Vec<(&ObjectId, String, Option<std::net::IpAddr>)>> = BTreeMap::new();
    for (id, network) in networks {
        for (index, forward) in network.port_forwards.iter().enumerate() {
            let pointer = format!("/portForwards/{index}");
            let key = (forward.protocol, forward.port, forward.to.is_ipv4());
            let others = seen.entry(key).or_default();
            let clash = others.iter().find(|(_, _, address)| {
                *address == forward.address || address.is_none() || forward.address.is_none()
            });
            if let Some((other, at, _)) = clash {
                let message =
                    format!("{} port {} is forwarded twice", forward.protocol.as_str(), forward.port);
                problems.push(Problem::new(id, pointer.clone(), message).related(
                    other,
                    at,
                    "first used here",
                ));
            }
            others.push((id, pointer, forward.address));
        }
    }
}

/// What NICs say that their addresses are.
fn addresses(objects: &Objects, problems: &mut Vec<Problem>) {
    let mut seen: BTreeMap<(ObjectId, std::net::IpAddr), (&ObjectId, String)> = BTreeMap::new();
    for (id, spec) in objects {
        let Spec::VirtualMachine(vm) = spec else { continue };
        for (index, nic) in vm.interfaces.iter().enumerate() {
            let network_id = nic.attachment.object();
            let Some(Spec::Network(network)) = objects.get(&network_id) else { continue };
            let pointer = format!("/interfaces/{index}/addresses");
            for address in &nic.addresses {
                let subnets = network.addresses();
                let subnet = subnets.iter().find(|subnet| subnet.contains(*address));
                let taken = subnet
                    .is_some_and(|subnet| subnet.address == *address || subnet.network().address == *address);
                if subnet.is_none() || taken {
                    let texts: Vec<String> =
                        subnets.iter().map(|subnet| subnet.network().to_string()).collect();
                    let message = match taken {
                        true => format!("{address} is the gateway's or the network's own"),
                        false => format!("{address} is not in {network_id}"),
                    };
                    problems.push(
                        Problem::new(id, &pointer, message)
                            .related(&network_id, "", "the network")
                            .hint(format!("the network has {}", texts.join(" and "))),
                    );
                }
                let key = (network_id.clone(), *address);
                if let Some((other, at)) = seen.get(&key) {
                    let message = format!("{address} is already that of a NIC of {other}");
                    problems.push(Problem::new(id, &pointer, message).related(other, at, "first used here"));
                } else {
                    seen.insert(key, (id, pointer.clone()));
                }
            }
        }
    }
}
