//! What a guest may say that it is: the network's table in the bridge family, in front of its bridge.
//!
//! A map leads each NIC's frames to the chain of that NIC, however many there are. What a guest has to itself, it
//! alone may use: its MAC address, the addresses that its VM declares, and those that its interface makes of the MAC
//! address. A guest that declares none may use any of the network's that is nobody's. NICs and addresses
//! that come and go are elements, so that what stays is not touched.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};

use serde_json::{Value, json};

use super::Network;
use super::rules::{base, compare, is, rule, within};
use crate::host::snapshot::{Chain, IpFamily, Rule, Set, Table};
use crate::kinds::virtual_machine::{Attachment, Interface, Vlans, default_mac, tap_name};
use crate::kinds::{Declared, Spec};
use crate::name::{MacAddress, ObjectId};

/// Before the bridge's own DHCP, and before anything that others filter.
const PRIORITY: i64 = -300;
/// The chain of neighbour advertisements about somebody's address.
const NEIGHBOURS: &str = "neighbours";

/// A NIC in the network.
struct Nic<'a> {
    interface: &'a Interface,
    tap: String,
    mac: MacAddress,
}

impl Nic<'_> {
    fn address(&self, family: IpFamily) -> Option<IpAddr> {
        self.interface.addresses.iter().copied().find(|address| IpFamily::of(*address) == family)
    }
}

/// `gateway`: its bridge's MAC address, if that is declared; else nobody knows which link-local address is the
/// router's. `None`: no NIC is guarded.
pub fn table(
    id: &ObjectId,
    network: &Network,
    gateway: Option<MacAddress>,
    declared: &Declared,
) -> Option<Table> {
    let vms = declared.objects.iter().filter_map(|(id, spec)| match spec {
        Spec::VirtualMachine(vm) => Some((&id.name, vm)),
        _ => None,
    });
    let nics: Vec<Nic> = vms
        .flat_map(|(vm, spec)| spec.interfaces.iter().map(move |nic| (vm, nic)))
        .filter(|(_, nic)| matches!(&nic.attachment, Attachment::Network(name) if *name == id.name))
        .map(|(vm, interface)| Nic {
            interface,
            tap: tap_name(vm, &interface.name).to_string(),
            mac: interface.mac_address.unwrap_or_else(|| default_mac(&declared.set, vm, &interface.name)),
        })
        .collect();
    let guarded = || nics.iter().filter(|nic| nic.interface.anti_spoofing);
    guarded().next()?;

    // The gateway's and every NIC's: those that are declared, and those that an interface makes itself.
    let taken = |family| {
        let gateway = network.subnets.get(&family).map(|subnet| subnet.address.address);
        gateway.into_iter().chain(nics.iter().filter_map(move |nic| nic.address(family)))
    };
    let made = nics.iter().map(|nic| nic.mac).chain(gateway).flat_map(|mac| made_of(mac, network));
    let ipv6: BTreeSet<IpAddr> = taken(IpFamily::Ipv6).chain(made).collect();
    let text = |address: IpAddr| address.to_string();
    let sets = [
        ("ipv4", Set::new("ipv4_addr", taken(IpFamily::Ipv4).map(text))),
        ("ipv6", Set::new("ipv6_addr", ipv6.iter().copied().map(text))),
    ];
    let chain = |nic: &Nic| format!("nic-{}", nic.tap);
    let way = |nic: &Nic| (nic.tap.clone(), json!({"jump": {"target": chain(nic)}}));
    let ways =
        Set { map: Some("verdict".into()), elements: guarded().map(way).collect(), ..Set::new("ifname", []) };
    let sets = sets.into_iter().chain([("nics", ways)]).map(|(name, set)| (name.to_owned(), set)).collect();

    let lead = json!({"vmap": {"key": {"meta": {"key": "iifname"}}, "data": "@nics"}});
    let lead = base("filter", "prerouting", PRIORITY, vec![rule("each NIC's own", vec![lead])]);
    let neighbours = ipv6.iter().map(|address| drop_rule("neighbour is another", advertises(*address, 128)));
    let neighbours = Chain { base: None, rules: neighbours.collect() };
    let mut chains: BTreeMap<String, Chain> =
        guarded().map(|nic| (chain(nic), Chain { base: None, rules: nic_rules(nic, network) })).collect();
    chains.extend([("prerouting".to_owned(), lead), (NEIGHBOURS.to_owned(), neighbours)]);
    Some(Table { chains, sets, ..Table::default() })
}

fn payload(protocol: &str, field: &str) -> Value {
    json!({"payload": {"protocol": protocol, "field": field}})
}

fn drop_rule(comment: &str, mut expr: Vec<Value>) -> Rule {
    expr.push(json!({"drop": null}));
    rule(comment, expr)
}

/// The IPv6 addresses that an interface makes itself of its MAC address (EUI-64, RFC 4291 appendix A).
fn made_of(mac: MacAddress, network: &Network) -> Vec<IpAddr> {
    let [a, b, c, d, e, f] = mac.0.map(u128::from);
    let interface = (a ^ 2) << 56 | b << 48 | c << 40 | 0xff_fe00_0000 | d << 16 | e << 8 | f;
    let subnet = network.subnets.get(&IpFamily::Ipv6).filter(|_| network.router_advertisements);
    let subnet = subnet.and_then(|subnet| match subnet.address.network().address {
        IpAddr::V6(prefix) => Some(prefix.to_bits()),
        IpAddr::V4(_) => None,
    });
    let prefixes = [0xfe80 << 112].into_iter().chain(subnet);
    prefixes.map(|prefix| IpAddr::V6(Ipv6Addr::from_bits(prefix | interface))).collect()
}

fn nic_rules(nic: &Nic, network: &Network) -> Vec<Rule> {
    let not = |left, right| compare("!=", left, right);
    let mac = || json!(nic.mac.to_string());
    let mut rules = vec![drop_rule("MAC address", vec![not(payload("ether", "saddr"), mac())])];
    if matches!(nic.interface.vlans, Some(Vlans::Trunk(_))) {
        // What is in its tagged frames is another network's business.
        return rules;
    }
    let tags = json!({"set": ["8021q", "8021ad"]});
    rules.push(drop_rule("tagged frames", vec![is(payload("ether", "type"), tags)]));
    rules.push(drop_rule("DHCP server", vec![is(payload("udp", "sport"), json!({"set": [67, 547]}))]));
    let router = json!({"set": ["nd-router-advert", "nd-redirect"]});
    rules.push(drop_rule("router advertisements", vec![is(payload("icmpv6", "type"), router)]));
    rules.push(drop_rule("ARP MAC address", vec![not(payload("arp", "saddr ether"), mac())]));
    ipv4(nic, network, &mut rules);
    ipv6(nic, network, &mut rules);
    rules
}

fn ipv4(nic: &Nic, network: &Network, rules: &mut Vec<Rule>) {
    let own = nic.address(IpFamily::Ipv4);
    let subnet = network.subnets.get(&IpFamily::Ipv4).map(|subnet| subnet.address);
    // Who has no address yet asks with none.
    let allowed = match (own, subnet) {
        (Some(own), _) => json!({"set": ["0.0.0.0", own.to_string()]}),
        (None, Some(subnet)) => json!({"set": ["0.0.0.0", within(subnet)]}),
        (None, None) => return,
    };
    for (comment, field) in
        [("ARP address", payload("arp", "saddr ip")), ("IPv4 address", payload("ip", "saddr"))]
    {
        if own.is_none() {
            rules.push(drop_rule(&format!("{comment} of another"), vec![is(field.clone(), json!("@ipv4"))]));
        }
        rules.push(drop_rule(comment, vec![compare("!=", field, allowed.clone())]));
    }
}

fn ipv6(nic: &Nic, network: &Network, rules: &mut Vec<Rule>) {
    let own = nic.address(IpFamily::Ipv6);
    let subnet = network.subnets.get(&IpFamily::Ipv6).map(|subnet| subnet.address);
    let itself: Vec<IpAddr> = own.into_iter().chain(made_of(nic.mac, network)).collect();
    let source = || payload("ip6", "saddr");
    let itselves: Vec<String> = itself.iter().map(IpAddr::to_string).collect();
    let another = vec![compare("!=", source(), json!({"set": itselves})), is(source(), json!("@ipv6"))];
    rules.push(drop_rule("IPv6 address of another", another));
    // Beside the declared one a guest makes itself others where a router tells it the network.
    let free = own.is_none() || network.router_advertisements;
    let link_local = json!({"prefix": {"addr": "fe80::", "len": 10}});
    let others = own.map(|own| json!(own.to_string()));
    let others = if free { subnet.map(within) } else { others };
    let allowed: Vec<Value> = [json!("::"), link_local].into_iter().chain(others).collect();
    rules.push(drop_rule("IPv6 address", vec![compare("!=", source(), json!({"set": allowed}))]));
    // Neighbour discovery: what it says that it has. (Not every `nft` knows the field by name.)
    for address in itself {
        let mut stays = advertises(address, 128);
        stays.push(json!({"return": null}));
        rules.push(rule("neighbour is itself", stays));
    }
    rules.push(rule(
        "neighbours",
        vec![
            is(payload("icmpv6", "type"), json!("nd-neighbor-advert")),
            json!({"jump": {"target": NEIGHBOURS}}),
        ],
    ));
    if let (Some(subnet), false) = (subnet, free) {
        let whole = subnet.prefix_len / 32 * 32;
        rules.push(drop_rule("neighbour is another", advertises(subnet.network().address, whole)));
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
