//! What is true of a network now.

use std::net::IpAddr;

use serde::Serialize;

use super::{Finder, LinkStatus, Status, link_status};
use crate::host::snapshot::{self, Family, Link, Table, TableId};
use crate::name::{LinkName, MacAddress, Mark};

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct NetworkStatus {
    pub bridge: Option<LinkName>,
    /// The bridge, if it is there.
    pub link: Option<LinkStatus>,
    pub ports: Vec<LinkName>,
    /// Guests go out under the host's address.
    pub nat: bool,
    /// What it holds forwarding on for: `IPv4`, `IPv6`.
    pub forwarding: Vec<String>,
    /// `tcp 8080 to 192.168.100.10 80`
    pub port_forwards: Vec<String>,
    /// DHCP, DNS and router advertisements. `None`: it has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<ServiceStatus>,
    pub leases: Vec<Lease>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceStatus {
    pub running: bool,
    pub pid: Option<i32>,
}

/// An address that a guest has for a time.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Lease {
    pub address: IpAddr,
    pub mac_address: Option<MacAddress>,
    pub host_name: Option<String>,
    /// `None`: never.
    pub expires_unix_seconds: Option<u64>,
}

impl From<&snapshot::Lease> for Lease {
    fn from(lease: &snapshot::Lease) -> Self {
        Self {
            address: lease.address,
            mac_address: lease.mac_address,
            host_name: lease.host_name.clone(),
            expires_unix_seconds: Some(lease.expires_unix_seconds).filter(|at| *at != 0),
        }
    }
}

impl Finder<'_> {
    /// A network is where its table is; its bridge may be a Bridge's.
    pub(super) fn networks(&mut self) {
        let (tables, links) = match (&self.snapshot.tables, &self.snapshot.links) {
            (Ok(tables), Ok(links)) => (tables, links),
            (Err(error), _) => return self.unseen.push(error.clone()),
            // Said already.
            (_, Err(_)) => return,
        };
        let services = match &self.snapshot.services {
            Ok(services) => services,
            Err(error) => return self.unseen.push(error.clone()),
        };
        for (id, table) in tables.iter().filter(|(id, _)| id.family == Family::Inet) {
            let service = services.get(&id.owner);
            let bridge = bridge(table);
            let link = bridge.as_ref().and_then(|bridge| Some((bridge, links.get(bridge)?)));
            let is_port = |link: &Link| bridge.is_some() && link.master == bridge;
            let status = NetworkStatus {
                link: link.map(|(name, link)| link_status(name, link)),
                ports: links.iter().filter(|(_, link)| is_port(link)).map(|(name, _)| name.clone()).collect(),
                nat: table.chains.get("postrouting").is_some_and(|chain| !chain.rules.is_empty()),
                forwarding: self.forwarding(&id.owner),
                port_forwards: port_forwards(table),
                service: service
                    .map(|service| ServiceStatus { running: service.pid.is_some(), pid: service.pid }),
                leases: service
                    .map(|service| service.leases.iter().map(Lease::from).collect())
                    .unwrap_or_default(),
                bridge,
            };
            let TableId { owner, .. } = id.clone();
            self.found(owner, Status::Network(status));
        }
    }

    fn forwarding(&self, mark: &Mark) -> Vec<String> {
        let families = self.snapshot.forwarding.iter().flatten();
        let held = families.filter(|(_, facts)| facts.users.contains(mark));
        held.map(|(family, facts)| format!("{family}{}", if facts.on { "" } else { " (off)" })).collect()
    }
}

/// The link that its rules are about.
fn bridge(table: &Table) -> Option<LinkName> {
    let first = table.chains.get("forward")?.rules.first()?.expr.first()?;
    LinkName::parse(first.pointer("/match/right")?.as_str()?).ok()
}

fn port_forwards(table: &Table) -> Vec<String> {
    let rules = table.chains.get("prerouting").map(|chain| &chain.rules[..]).unwrap_or_default();
    rules.iter().map(|rule| rule.comment.clone()).collect()
}
