//! What may pass: a network's nftables table.
//!
//! Expressions are spelled as `nft -j list` prints them, or the next plan would see a difference. A verdict
//! of ours never overrules a drop in somebody else's table, for every base chain has its say.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::{Value, json};

use super::{Mode, Network, PortForward};
use crate::host::snapshot::{BaseChain, Chain, IpFamily, Rule, Table, normalise};
use crate::name::{IpPrefix, LinkName};

/// The table of a network whose bridge is `bridge`.
pub fn table(network: &Network, bridge: &LinkName) -> Table {
    let mut chains =
        BTreeMap::from([("forward".to_owned(), base("filter", "forward", 0, forward(network, bridge)))]);
    if network.mode == Mode::Nat {
        chains
            .insert("postrouting".to_owned(), base("nat", "postrouting", 100, postrouting(network, bridge)));
        if !network.port_forwards.is_empty() {
            let rules =
                |local| network.port_forwards.iter().map(|forward| port_forward(forward, local)).collect();
            chains.insert("prerouting".to_owned(), base("nat", "prerouting", -100, rules(false)));
            // What the host's own programs send doesn't come in.
            chains.insert("output".to_owned(), base("nat", "output", -100, rules(true)));
        }
    }
    Table { chains, ..Table::default() }
}

pub(super) fn base(kind: &str, hook: &str, priority: i64, rules: Vec<Rule>) -> Chain {
    let base =
        BaseChain { kind: kind.to_owned(), hook: hook.to_owned(), priority, policy: "accept".to_owned() };
    Chain { base: Some(base), rules }
}

pub(super) fn rule(comment: impl Into<String>, mut expr: Vec<Value>) -> Rule {
    expr.iter_mut().for_each(normalise);
    Rule { comment: comment.into(), expr }
}

pub(super) fn is(left: Value, right: Value) -> Value {
    compare("==", left, right)
}

pub(super) fn compare(op: &str, left: Value, right: Value) -> Value {
    json!({"match": {"op": op, "left": left, "right": right}})
}

fn meta(key: &str, link: &LinkName) -> Value {
    is(json!({"meta": {"key": key}}), json!(link.as_str()))
}

fn protocol(address: IpAddr) -> &'static str {
    if address.is_ipv4() { "ip" } else { "ip6" }
}

fn field(prefix: IpPrefix, field: &str) -> Value {
    json!({"payload": {"protocol": protocol(prefix.address), "field": field}})
}

pub(super) fn within(prefix: IpPrefix) -> Value {
    let network = prefix.network();
    json!({"prefix": {"addr": network.address.to_string(), "len": network.prefix_len}})
}

/// What packets between the bridge and other links may pass.
fn forward(network: &Network, bridge: &LinkName) -> Vec<Rule> {
    let (from, to) = (meta("iifname", bridge), meta("oifname", bridge));
    let accept = || json!({"accept": null});
    let reject = || json!({"reject": {"type": "icmpx", "expr": "admin-prohibited"}});
    let mut rules = vec![rule("among guests", vec![from.clone(), to.clone(), accept()])];
    if network.mode == Mode::Nat {
        let ct = |key: &str, right| compare("in", json!({"ct": {"key": key}}), right);
        let known = ct("state", json!(["established", "related"]));
        rules.push(rule("answers to guests", vec![to.clone(), known, accept()]));
        if !network.port_forwards.is_empty() {
            rules.push(rule("port forwards", vec![to.clone(), ct("status", json!("dnat")), accept()]));
        }
    }
    for (family, subnet) in &network.subnets {
        let prefix = subnet.address;
        let routed = network.mode == Mode::Routed || (network.mode == Mode::Nat && !subnet.nat);
        if network.mode != Mode::Isolated {
            let source = is(field(prefix, "saddr"), within(prefix));
            rules.push(rule(format!("{family} from guests"), vec![from.clone(), source, accept()]));
        }
        if routed {
            let target = is(field(prefix, "daddr"), within(prefix));
            rules.push(rule(format!("{family} to guests"), vec![to.clone(), target, accept()]));
        }
    }
    rules.push(rule("nothing else from guests", vec![from, reject()]));
    rules.push(rule("nothing else to guests", vec![to, reject()]));
    rules
}

fn postrouting(network: &Network, bridge: &LinkName) -> Vec<Rule> {
    let mut rules = Vec::new();
    for (family, subnet) in network.subnets.iter().filter(|(_, subnet)| subnet.nat) {
        let prefix = subnet.address;
        let source = is(field(prefix, "saddr"), within(prefix));
        let forwards = |forward: &PortForward| IpFamily::of(forward.to) == *family;
        if network.port_forwards.iter().any(forwards) {
            // A guest that goes by the host's port to a guest: the answer must come back by the host.
            let dnat = compare("in", json!({"ct": {"key": "status"}}), json!("dnat"));
            let back = vec![meta("oifname", bridge), source.clone(), dnat, json!({"masquerade": null})];
            rules.push(rule(format!("{family} port forwards among guests"), back));
        }
        if *family == IpFamily::Ipv4 {
            // To many at once: it never leaves the link, and guests must see who speaks.
            let many = json!({"set": [{"prefix": {"addr": "224.0.0.0", "len": 24}}, "255.255.255.255"]});
            let expr = vec![source.clone(), is(field(prefix, "daddr"), many), json!({"return": null})];
            rules.push(rule("IPv4 multicast and broadcast", expr));
        }
        let elsewhere = compare("!=", field(prefix, "daddr"), within(prefix));
        rules
            .push(rule(format!("{family} masquerade"), vec![source, elsewhere, json!({"masquerade": null})]));
    }
    rules
}

/// `local`: for what the host's own programs send.
fn port_forward(forward: &PortForward, local: bool) -> Rule {
    let (family, transport) = (protocol(forward.to), forward.protocol.as_str());
    let daddr = json!({"payload": {"protocol": family, "field": "daddr"}});
    let mut expr = Vec::new();
    match forward.address {
        Some(address) => expr.push(is(daddr, json!(address.to_string()))),
        None => {
            if local {
                // What goes to the loopback can't leave it.
                let loopback = match forward.to {
                    IpAddr::V4(_) => json!({"prefix": {"addr": "127.0.0.0", "len": 8}}),
                    IpAddr::V6(_) => json!("::1"),
                };
                expr.push(compare("!=", daddr, loopback));
            } else {
                let version = if forward.to.is_ipv4() { "ipv4" } else { "ipv6" };
                expr.push(is(json!({"meta": {"key": "nfproto"}}), json!(version)));
            }
            expr.push(is(json!({"fib": {"result": "type", "flags": ["daddr"]}}), json!("local")));
        }
    }
    let port = json!({"payload": {"protocol": transport, "field": "dport"}});
    expr.push(is(port, json!(forward.port)));
    let to = json!({"family": family, "addr": forward.to.to_string(), "port": forward.to_port});
    expr.push(json!({"dnat": to}));
    let listens = forward.address.map(|address| format!("{address} ")).unwrap_or_default();
    rule(format!("{listens}{transport} {} to {} {}", forward.port, forward.to, forward.to_port), expr)
}
