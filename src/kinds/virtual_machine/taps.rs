//! The host's end of a NIC: what its tap is to be, beside what is there.

use std::collections::BTreeMap;

use super::compare::Compare;
use crate::host::Step;
use crate::host::snapshot::{Link, LinkKind, PortFacts, VlanFlags, VmDefinition};
use crate::host::step::{LinkChange, NewLink, NewLinkKind};
use crate::kinds::action::{Action, Blocker, Impact};
use crate::kinds::links;
use crate::name::{LinkName, MacAddress, Mark, VlanId};
use crate::vmm::config::NicConfig;

/// The host's end of the wire: the guest's address with a high first byte, so that a bridge that takes the
/// lowest address of its ports never takes this one.
pub(super) fn tap_mac(guest: MacAddress) -> MacAddress {
    let [_, rest @ ..] = guest.0;
    let mut bytes = [0xfe; 6];
    bytes[1..].copy_from_slice(&rest);
    MacAddress(bytes)
}

pub(super) struct Tap<'a> {
    pub name: LinkName,
    nic: &'a NicConfig,
    bridge: &'a LinkName,
    vlans: &'a BTreeMap<VlanId, VlanFlags>,
    mark: Mark,
}

impl<'a> Tap<'a> {
    /// The tap of `nic`, which may be one that runs: where it belongs is the definition's word. `None`:
    /// the definition doesn't have that NIC.
    pub fn of(nic: &'a NicConfig, definition: &'a VmDefinition) -> Option<Self> {
        static NO_VLANS: BTreeMap<VlanId, VlanFlags> = BTreeMap::new();
        let place = definition.config.nics.iter().position(|defined| defined.name == nic.name)?;
        Some(Self {
            name: LinkName::parse(&nic.tap).ok()?,
            nic,
            bridge: definition.bridges.get(place)?,
            // A definition of before there were any has none.
            vlans: definition.vlans.get(place).unwrap_or(&NO_VLANS),
            mark: Mark::part(definition.mark.set.clone(), definition.mark.owner.clone(), nic.name.clone()),
        })
    }

    pub fn bridge(&self) -> &LinkName {
        self.bridge
    }

    pub fn create(&self) -> Step {
        Step::CreateLink(NewLink {
            name: self.name.clone(),
            mark: self.mark.clone(),
            kind: NewLinkKind::Tap { multi_queue: self.is_multi_queue() },
            mtu: Some(self.nic.mtu.into()),
            mac_address: self.nic.mac_address.parse().ok().map(tap_mac),
            master: Some(self.bridge.clone()),
            port: (!self.vlans.is_empty()).then(|| self.port()),
            up: true,
        })
    }

    pub fn delete(&self) -> Step {
        Step::DeleteLink { link: self.name.clone(), mark: self.mark.clone() }
    }

    fn is_multi_queue(&self) -> bool {
        self.nic.queue_pairs > 1
    }

    fn port(&self) -> PortFacts {
        PortFacts { learning: true, unicast_flood: true, vlans: self.vlans.clone(), ..PortFacts::default() }
    }

    pub fn check_ours(&self, link: &Link) -> Result<(), Blocker> {
        if link.mark().as_ref() == Some(&self.mark) && matches!(link.kind, LinkKind::Tap { .. }) {
            return Ok(());
        }
        let tap = &self.name;
        Err(Blocker::new(format!("the link {tap} exists and is not this VM's tap"))
            .hint(format!("remove or rename it (`ip link set {tap} name …`)")))
    }

    /// Makes sure of the tap for a NIC that nothing runs on: what can't be changed is made anew.
    pub fn prepare(&self, action: &mut Action, links: &BTreeMap<LinkName, Link>) -> Result<(), Blocker> {
        let Some(have) = links.get(&self.name) else {
            action.step(self.create());
            return Ok(());
        };
        self.check_ours(have)?;
        let mac = self.nic.mac_address.parse().ok().map(tap_mac);
        let suits = have.kind == LinkKind::Tap { multi_queue: self.is_multi_queue() };
        if !suits || (mac.is_some() && have.mac_address != mac) {
            action.step(self.delete());
            action.step(self.create());
        } else {
            self.adjust(action, have, links);
        }
        Ok(())
    }

    /// Live differences of a tap that is there, and the steps that mend them.
    pub fn adjust(&self, action: &mut Action, have: &Link, links: &BTreeMap<LinkName, Link>) {
        let field = format!("interfaces[{}]", self.nic.name);
        let moves = have.master.as_ref() != Some(self.bridge);
        let filters = !self.vlans.is_empty()
            || links.get(self.bridge).is_some_and(
                |bridge| matches!(&bridge.kind, LinkKind::Bridge(facts) if facts.vlan_filtering),
            );
        // A new port is in the bridge's default VLAN until it has its own: nothing may pass meanwhile.
        let shut = moves && filters && have.up;
        if shut {
            action.step(links::set(&self.name, LinkChange::Up(false)));
        }
        let bridge_field = format!("{field}.bridge");
        links::compare_master(action, &bridge_field, &self.name, have.master.as_ref(), Some(self.bridge));
        let none = BTreeMap::new();
        let vlans = have.port.as_ref().filter(|_| !moves).map_or(&none, |port| &port.vlans);
        if filters && (moves || vlans != self.vlans) {
            if vlans != self.vlans {
                let [from, to] = [vlans, self.vlans].map(|vlans| Some(links::describe_vlans(vlans)));
                action.differs(format!("{field}.vlan"), from, to, Impact::Live);
            }
            action.step(links::set(&self.name, LinkChange::PortVlans(self.port())));
        }
        let before = action.changes.len();
        links::compare_mtu_and_up(action, &self.name, have, self.nic.mtu.into());
        for change in &mut action.changes[before..] {
            change.field = format!("{field}.{}", change.field);
        }
        if shut {
            action.step(links::set(&self.name, LinkChange::Up(true)));
        }
    }
}

impl<'a> Compare<'a> {
    pub(super) fn links(&self) -> Result<&'a BTreeMap<LinkName, Link>, Blocker> {
        self.context.snapshot.links.as_ref().map_err(Blocker::unseen)
    }

    /// Makes the taps ready for a start, and removes those that nothing uses.
    pub(super) fn prepare_taps(&mut self) {
        let nics = self.definition.config.nics.clone();
        for nic in &nics {
            if let Err(blocker) = self.prepare_tap(nic) {
                if self.links().is_err() {
                    self.action.steps.clear();
                    self.action.block(blocker);
                    return;
                }
                self.action.block(blocker);
            }
        }
        self.remove_taps(|tap| !nics.iter().any(|nic| nic.tap == tap.as_str()));
    }

    pub(super) fn prepare_tap(&mut self, nic: &NicConfig) -> Result<(), Blocker> {
        let links = self.links()?;
        match Tap::of(nic, &self.definition) {
            Some(tap) => tap.prepare(&mut self.action, links),
            None => Ok(()),
        }
    }

    /// Makes the taps of a running guest what they should be.
    pub(super) fn keep_taps(&mut self, nics: &[&NicConfig]) -> Result<(), Blocker> {
        let links = self.links()?;
        for nic in nics {
            let Some(tap) = Tap::of(nic, &self.definition) else { continue };
            let Some(have) = links.get(&tap.name) else {
                let field = format!("interfaces[{}].tap", nic.name);
                self.action.differs(field, None, Some(tap.name.to_string()), Impact::Live);
                self.action.step(tap.create());
                self.action.step(Step::ReplaceTap {
                    vm: self.id.name.clone(),
                    mark: self.mark.clone(),
                    nic: nic.name.clone(),
                    tap: tap.name,
                });
                continue;
            };
            match tap.check_ours(have) {
                Ok(()) => tap.adjust(&mut self.action, have, links),
                Err(blocker) => {
                    self.action.block(blocker);
                }
            }
        }
        Ok(())
    }
}
