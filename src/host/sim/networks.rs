//! Tables and forwarding of the simulated host.

use super::State;
use super::apply::{Done, failed};
use crate::host::snapshot::{Capability, Service, ServiceConfig};
use crate::host::{Step, StepError};
use crate::name::LinkName;

impl State {
    pub(super) fn apply_to_network(&mut self, step: &Step) -> Done {
        match step {
            Step::SetTable { id, table } => {
                if self.lacks.contains(&Capability::Nftables) {
                    return Err(StepError::Lacks {
                        what: step.to_string(),
                        capability: Capability::Nftables,
                    });
                }
                let Ok(tables) = &mut self.world.tables else { return failed(step, "no tables") };
                tables.insert(id.clone(), table.clone());
                Ok(())
            }
            Step::DeleteTable { id } => {
                let Ok(tables) = &mut self.world.tables else { return failed(step, "no tables") };
                tables.remove(id);
                Ok(())
            }
            Step::SetService { mark, config } => {
                if self.lacks.contains(&Capability::Dnsmasq) {
                    return Err(StepError::Lacks { what: step.to_string(), capability: Capability::Dnsmasq });
                }
                self.next_pid += 1;
                let new = self.next_pid;
                let bridge = self.link(&config.bridge).map(|_| ());
                let Ok(services) = &mut self.world.services else { return failed(step, "no services") };
                let service = services.entry(mark.clone()).or_default();
                let same = |given: &ServiceConfig| given.main == config.main && given.bridge == config.bridge;
                let goes_on = service.pid.filter(|_| service.config.as_ref().is_some_and(same));
                // What ran is stopped, and then nothing can be started.
                let pid = bridge.is_ok().then(|| goes_on.unwrap_or(new));
                let config = bridge.is_ok().then(|| config.clone());
                *service = Service { config, pid, leases: std::mem::take(&mut service.leases) };
                bridge
            }
            Step::RemoveService { mark } => {
                let Ok(services) = &mut self.world.services else { return failed(step, "no services") };
                services.remove(mark);
                Ok(())
            }
            Step::RequireForwarding { family, mark } => {
                let Ok(forwarding) = &mut self.world.forwarding else { return failed(step, "no settings") };
                let facts = forwarding.entry(*family).or_default();
                if facts.users.is_empty() && facts.on {
                    self.forwards_anyway.insert(*family);
                }
                facts.users.insert(mark.clone());
                facts.on = true;
                Ok(())
            }
            Step::ReleaseForwarding { family, mark } => {
                let Ok(forwarding) = &mut self.world.forwarding else { return failed(step, "no settings") };
                let Some(facts) = forwarding.get_mut(family) else { return Ok(()) };
                if facts.users.remove(mark) && facts.users.is_empty() {
                    facts.on &= self.forwards_anyway.remove(family);
                }
                Ok(())
            }
            _ => failed(step, "not about networks"),
        }
    }

    /// A dnsmasq that listens on a bridge that is no more is as good as none, whatever is made in its place.
    pub(super) fn lose_bridge(&mut self, bridge: &LinkName) {
        let listens =
            |service: &Service| service.config.as_ref().is_some_and(|config| config.bridge == *bridge);
        for service in self.world.services.iter_mut().flat_map(|services| services.values_mut()) {
            if listens(service) {
                service.pid = None;
            }
        }
    }
}
