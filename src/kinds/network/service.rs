//! What a network's dnsmasq is given: pure text, the same for the same manifests.

use std::fmt::Write as _;
use std::net::IpAddr;

use super::{Mode, Network};
use crate::host::snapshot::{IpFamily, ServiceConfig};
use crate::kinds::virtual_machine::{Attachment, default_mac};
use crate::kinds::{Declared, Spec};
use crate::name::{LinkName, MacAddress, ObjectId, ObjectName};

/// A declared NIC in the network.
struct Guest<'a> {
    vm: &'a ObjectName,
    mac: MacAddress,
    addresses: Vec<IpAddr>,
}

fn guests<'a>(network: &ObjectName, declared: &'a Declared) -> Vec<Guest<'a>> {
    let vms = declared.objects.iter().filter_map(|(id, spec)| match spec {
        Spec::VirtualMachine(vm) => Some((&id.name, vm)),
        _ => None,
    });
    vms.flat_map(|(name, vm)| vm.interfaces.iter().map(move |nic| (name, nic)))
        .filter(|(_, nic)| matches!(&nic.attachment, Attachment::Network(there) if there == network))
        .map(|(vm, nic)| Guest {
            vm,
            mac: nic.mac_address.unwrap_or_else(|| default_mac(&declared.set, vm, &nic.name)),
            addresses: nic.addresses.iter().copied().collect(),
        })
        .collect()
}

/// `None`: the network needs no service.
pub fn config(
    id: &ObjectId,
    network: &Network,
    bridge: &LinkName,
    declared: &Declared,
) -> Option<ServiceConfig> {
    if !network.has_service() {
        return None;
    }
    let mut reserves_ipv6 = false;
    let (mut hosts, mut names) = (String::new(), String::new());
    for guest in guests(&id.name, declared) {
        // (Writing to a String can't fail.)
        let _ = write!(hosts, "{}", guest.mac);
        for address in &guest.addresses {
            let _ = match address {
                IpAddr::V4(address) => write!(hosts, ",{address}"),
                IpAddr::V6(address) => write!(hosts, ",[{address}]"),
            };
        }
        let _ = writeln!(hosts, ",{}", guest.vm);
        for address in guest.addresses {
            reserves_ipv6 |= address.is_ipv6();
            let _ = writeln!(names, "{address} {}", guest.vm);
        }
    }
    Some(ServiceConfig {
        bridge: bridge.clone(),
        main: main(id, network, bridge, reserves_ipv6),
        hosts,
        names,
    })
}

fn main(id: &ObjectId, network: &Network, bridge: &LinkName, reserves_ipv6: bool) -> String {
    let mut lines = vec![format!("# Written by vmctl for {id}: change the manifest, not this.")];
    // It binds to addresses: with other ones it is another.
    lines.extend(network.addresses().iter().map(|address| format!("# {address}")));
    let mut line = |text: &str| lines.push(text.to_owned());
    for always in ["bind-interfaces", "except-interface=lo", "no-hosts", "quiet-dhcp", "quiet-ra"] {
        line(always);
    }
    line(&format!("interface={bridge}"));
    match &network.dns {
        None => line("port=0"),
        Some(dns) => {
            // What is the network's own business is never asked of others.
            for always in ["domain-needed", "bogus-priv"] {
                line(always);
            }
            if let Some(domain) = &dns.domain {
                line(&format!("domain={domain}"));
                line(&format!("local=/{domain}/"));
                line("expand-hosts");
            }
            if let Some(forwarders) = &dns.forwarders {
                line("no-resolv");
                forwarders.iter().for_each(|server| line(&format!("server={server}")));
            }
        }
    }
    if let (Some(dhcp), Some(subnet)) = (&network.dhcp, network.subnets.get(&IpFamily::Ipv4)) {
        line("dhcp-authoritative");
        line("no-ping");
        let mask = match u32::MAX.checked_shl(32 - u32::from(subnet.address.prefix_len)) {
            Some(mask) => std::net::Ipv4Addr::from(mask),
            None => std::net::Ipv4Addr::UNSPECIFIED,
        };
        line(&format!("dhcp-range={},{},{mask},{}", dhcp.start, dhcp.end, dhcp.lease_seconds));
        if network.mode == Mode::Isolated {
            // There is no way on from here: a guest's other NICs lead there.
            line("dhcp-option=option:router");
        }
        for option in &dhcp.options {
            line(&format!("dhcp-option={},{}", option.number, option.value));
        }
    }
    if let (true, Some(subnet)) = (network.router_advertisements, network.subnets.get(&IpFamily::Ipv6)) {
        let prefix = subnet.address.network();
        line("enable-ra");
        // By DHCPv6 there are the declared addresses alone; the others guests make themselves.
        let how = if reserves_ipv6 { "static,slaac" } else { "ra-only" };
        line(&format!("dhcp-range={},{how},{},3600", prefix.address, prefix.prefix_len));
        if network.mode == Mode::Isolated {
            line(&format!("ra-param={bridge},60,0"));
        }
    }
    lines.join("\n") + "\n"
}
