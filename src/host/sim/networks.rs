//! Tables and forwarding of the simulated host.

use super::State;
use super::apply::{Done, failed};
use crate::host::snapshot::{Capability, Service};
use crate::host::{Step, StepError};

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
                self.link(&config.bridge)?;
                self.next_pid += 1;
                let new = self.next_pid;
                let Ok(services) = &mut self.world.services else { return failed(step, "no services") };
                let have = services.get(mark);
                let goes_on = have.filter(|have| have.config.main == config.main).and_then(|have| have.pid);
                let leases = have.map(|have| have.leases.clone()).unwrap_or_default();
                let pid = Some(goes_on.unwrap_or(new));
                services.insert(mark.clone(), Service { config: config.clone(), pid, leases });
                Ok(())
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
}
