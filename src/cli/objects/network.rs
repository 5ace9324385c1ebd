//! What is true of a network now.

use serde::Serialize;

use super::{Finder, LinkStatus, Status, link_status};
use crate::host::snapshot::{Link, Table, TableId};
use crate::name::{LinkName, Mark};

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
        for (id, table) in tables {
            let bridge = bridge(table);
            let link = bridge.as_ref().and_then(|bridge| Some((bridge, links.get(bridge)?)));
            let is_port = |link: &Link| bridge.is_some() && link.master == bridge;
            let status = NetworkStatus {
                link: link.map(|(name, link)| link_status(name, link)),
                ports: links.iter().filter(|(_, link)| is_port(link)).map(|(name, _)| name.clone()).collect(),
                nat: table.chains.get("postrouting").is_some_and(|chain| !chain.rules.is_empty()),
                forwarding: self.forwarding(&id.owner),
                port_forwards: port_forwards(table),
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
