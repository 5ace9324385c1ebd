//! What a guest may say that it is: the network's table in the bridge family, in front of its bridge.
//!
//! One rule leads each NIC's frames to the chain of that NIC, however many there are. What a guest has to
//! itself, it alone may use: its MAC address, the addresses that its VM declares. A guest that declares none may
//! use any of the network's but the gateway's.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};

use serde_json::{Value, json};

use super::rules::{base, compare, is, rule, within};
use super::{Network, gateway_mac};
use crate::host::snapshot::{Chain, IpFamily, Rule, Table};
use crate::kinds::virtual_machine::{Attachment, Interface, Vlans, default_mac, tap_name};
use crate::kinds::{Declared, Spec};
use crate::name::{IpPrefix, MacAddress, ObjectId};

/// Before the bridge's own DHCP, and before anything that others filter.
const PRIORITY: i64 = -300;

/// `None`: no NIC is guarded.
pub fn table(id: &ObjectId, network: &Network, declared: &Declared) -> Option<Table> {
    let gateway = link_local(gateway_mac(&declared.set, &id.name));
    let mut chains = BTreeMap::new();
    let mut ways = Vec::new();
    for (vm, spec) in &declared.objects {
        let Spec::VirtualMachine(spec) = spec else { continue };
        let is_in =
            |nic: &&Interface| matches!(&nic.attachment, Attachment::Network(name) if *name == id.name);
        for nic in spec.interfaces.iter().filter(is_in).filter(|nic| nic.anti_spoofing) {
            let tap = tap_name(&vm.name, &nic.name);
            let mac = nic.mac_address.unwrap_or_else(|| default_mac(&declared.set, &vm.name, &nic.name));
            let chain = format!("nic-{tap}");
            ways.push(json!([tap.as_str(), {"jump": {"target": chain}}]));
            chains.insert(chain, Chain { base: None, rules: nic_rules(nic, mac, network, gateway) });
        }
    }
    if ways.is_empty() {
        return None;
    }
    let ways = json!({"vmap": {"key": {"meta": {"key": "iifname"}}, "data": {"set": ways}}});
    let lead = vec![rule("each NIC's own", vec![ways])];
    chains.insert("prerouting".to_owned(), base("filter", "prerouting", PRIORITY, lead));
    Some(Table { chains, ..Table::default() })
}

fn payload(protocol: &str, field: &str) -> Value {
    json!({"payload": {"protocol": protocol, "field": field}})
}

fn drop_rule(comment: &str, mut expr: Vec<Value>) -> Rule {
    expr.push(json!({"drop": null}));
    rule(comment, expr)
}

/// Of an interface that makes itself one of its MAC address (EUI-64), as a bridge does.
fn link_local(mac: MacAddress) -> Ipv6Addr {
    let [a, b, c, d, e, f] = mac.0.map(u16::from);
    Ipv6Addr::new(0xfe80, 0, 0, 0, (a ^ 2) << 8 | b, c << 8 | 0xff, 0xfe00 | d, e << 8 | f)
}

fn nic_rules(nic: &Interface, mac: MacAddress, network: &Network, gateway: Ipv6Addr) -> Vec<Rule> {
    let not = |left, right| compare("!=", left, right);
    let mut rules =
        vec![drop_rule("MAC address", vec![not(payload("ether", "saddr"), json!(mac.to_string()))])];
    if matches!(nic.vlans, Some(Vlans::Trunk(_))) {
        // What is in its tagged frames is another network's business.
        return rules;
    }
    let tags = json!({"set": ["8021q", "8021ad"]});
    rules.push(drop_rule("tagged frames", vec![is(payload("ether", "type"), tags)]));
    rules.push(drop_rule("DHCP server", vec![is(payload("udp", "sport"), json!({"set": [67, 547]}))]));
    let router = json!({"set": ["nd-router-advert", "nd-redirect"]});
    rules.push(drop_rule("router advertisements", vec![is(payload("icmpv6", "type"), router)]));
    rules
        .push(drop_rule("ARP MAC address", vec![not(payload("arp", "saddr ether"), json!(mac.to_string()))]));
    ipv4(nic, network, &mut rules);
    ipv6(nic, network, gateway, &mut rules);
    rules
}

/// What a NIC may use of a family: its own address, or what the network has.
fn own(nic: &Interface, network: &Network, family: IpFamily) -> (Option<IpAddr>, Option<IpPrefix>) {
    let declared = nic.addresses.iter().copied().find(|address| IpFamily::of(*address) == family);
    (declared, network.subnets.get(&family).map(|subnet| subnet.address))
}

fn ipv4(nic: &Interface, network: &Network, rules: &mut Vec<Rule>) {
    let (own, subnet) = own(nic, network, IpFamily::Ipv4);
    // Who has no address yet asks with none.
    let allowed = match (own, subnet) {
        (Some(own), _) => json!({"set": ["0.0.0.0", own.to_string()]}),
        (None, Some(subnet)) => json!({"set": ["0.0.0.0", within(subnet)]}),
        (None, None) => return,
    };
    for (comment, field) in
        [("ARP address", payload("arp", "saddr ip")), ("IPv4 address", payload("ip", "saddr"))]
    {
        if let (None, Some(subnet)) = (own, subnet) {
            let gateway = json!(subnet.address.to_string());
            rules.push(drop_rule(&format!("{comment} of the gateway"), vec![is(field.clone(), gateway)]));
        }
        rules.push(drop_rule(comment, vec![compare("!=", field, allowed.clone())]));
    }
}

fn ipv6(nic: &Interface, network: &Network, gateway: Ipv6Addr, rules: &mut Vec<Rule>) {
    let (own, subnet) = own(nic, network, IpFamily::Ipv6);
    let mut gateways = vec![IpAddr::V6(gateway)];
    gateways.extend(subnet.map(|subnet| subnet.address));
    let source = || payload("ip6", "saddr");
    for address in &gateways {
        let is_gateway = is(source(), json!(address.to_string()));
        rules.push(drop_rule("IPv6 address of the gateway", vec![is_gateway]));
    }
    let link_local = json!({"prefix": {"addr": "fe80::", "len": 10}});
    let others = match (own, subnet) {
        (Some(own), _) => Some(json!(own.to_string())),
        (None, subnet) => subnet.map(within),
    };
    let allowed: Vec<Value> = [json!("::"), link_local].into_iter().chain(others).collect();
    rules.push(drop_rule("IPv6 address", vec![compare("!=", source(), json!({"set": allowed}))]));
    // Neighbour discovery: what it says that it has. (Not every `nft` knows the field by name.)
    for address in &gateways {
        rules.push(drop_rule("neighbour is the gateway", advertises(*address, 128)));
    }
    if let Some(own) = own {
        let mut stays = advertises(own, 128);
        stays.push(json!({"return": null}));
        rules.push(rule("neighbour is itself", stays));
        if let Some(subnet) = subnet {
            let whole = subnet.prefix_len / 32 * 32;
            rules.push(drop_rule("neighbour is another", advertises(subnet.network().address, whole)));
        }
    }
}

/// A neighbour advertisement about an address that begins with these bits, a multiple of 32.
fn advertises(address: IpAddr, bits: u8) -> Vec<Value> {
    let IpAddr::V6(address) = address else { return Vec::new() };
    let mut expr = vec![is(payload("icmpv6", "type"), json!("nd-neighbor-advert"))];
    let octets = address.octets();
    for (index, word) in octets.chunks_exact(4).enumerate().take(usize::from(bits / 32)) {
        let place = json!({"payload": {"base": "th", "offset": 64 + 32 * index, "len": 32}});
        expr.push(is(place, json!(word.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)))));
    }
    expr
}
