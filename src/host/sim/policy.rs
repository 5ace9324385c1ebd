//! The simulated host's policy and its memory management: the real one's rules, with memory that is never
//! in pieces.

use super::State;
use super::apply::{Done, failed, not_ours};
use crate::host::snapshot::{HostFacts, HostSetting, HugePages, Ksm, Previous, RecordedPolicy};
use crate::host::{Step, StepError};
use crate::name::Mark;
use crate::vmm::config::{PageKind, VmConfig};

/// A host with room enough for what tests declare.
pub(super) fn facts() -> HostFacts {
    let none = HugePages::default();
    HostFacts {
        cpus: 16,
        memory_bytes: 64 << 30,
        available_bytes: 60 << 30,
        pressure: Some(0),
        hugepages: [(2 << 20, none), (1 << 30, none)].into(),
        ksm: Some(Ksm { run: 0, pages_to_scan: 100, saved_bytes: 0 }),
        policy: None,
    }
}

/// The pool that a VM's memory comes from, and how many pages.
pub(super) fn hugepages(config: &VmConfig) -> Option<(u64, u64)> {
    let size = match config.memory.pages {
        PageKind::Small => return None,
        PageKind::Huge2Mi => 2 << 20,
        PageKind::Huge1Gi => 1 << 30,
    };
    Some((size, config.memory_bytes / size))
}

impl State {
    fn host(&mut self) -> Result<&mut HostFacts, StepError> {
        match &mut self.world.host {
            Ok(host) => Ok(host),
            Err(error) => failed("the host", error),
        }
    }

    pub(super) fn apply_to_host(&mut self, step: &Step) -> Done {
        match step {
            Step::RecordHostPolicy { mark, rules } => {
                let host = self.host()?;
                let previous = match host.policy.take() {
                    Some(have) if have.mark.set != mark.set => {
                        host.policy = Some(have);
                        return not_ours(step, "it carries another set's mark");
                    }
                    Some(have) => have.previous,
                    None => Vec::new(),
                };
                host.policy = Some(RecordedPolicy { mark: mark.clone(), rules: (**rules).clone(), previous });
                Ok(())
            }
            Step::SetHostSetting { mark, setting, value } => {
                self.our_policy(step, mark)?;
                let before = self.setting(*setting)?;
                let policy = self.our_policy(step, mark)?;
                if policy.previous(*setting).is_none() {
                    policy.previous.push(Previous { setting: *setting, value: before });
                }
                self.set(*setting, *value)
            }
            Step::RestoreHostSetting { mark, setting } => {
                let Some(previous) = self.our_policy(step, mark)?.previous(*setting) else { return Ok(()) };
                self.set(*setting, previous)?;
                self.our_policy(step, mark)?.previous.retain(|previous| previous.setting != *setting);
                Ok(())
            }
            Step::ForgetHostPolicy { mark } => {
                if self.host()?.policy.is_some() {
                    self.our_policy(step, mark)?;
                    self.host()?.policy = None;
                }
                Ok(())
            }
            other => self.apply_to_vm(other),
        }
    }

    fn our_policy(&mut self, step: &Step, mark: &Mark) -> Result<&mut RecordedPolicy, StepError> {
        match &mut self.host()?.policy {
            Some(policy) if policy.mark == *mark => Ok(policy),
            _ => not_ours(step, "the host's policy carries another mark, or there is none"),
        }
    }

    fn setting(&mut self, setting: HostSetting) -> Result<u64, StepError> {
        let host = self.host()?;
        let found = match setting {
            HostSetting::HugePages { page_bytes } => host.hugepages.get(&page_bytes).map(|pages| pages.total),
            HostSetting::KsmRun => host.ksm.map(|ksm| ksm.run),
            HostSetting::KsmPagesToScan => host.ksm.map(|ksm| ksm.pages_to_scan),
        };
        match found {
            Some(value) => Ok(value),
            None => failed(setting, "no such file"),
        }
    }

    fn set(&mut self, setting: HostSetting, value: u64) -> Done {
        self.setting(setting)?;
        let host = self.host()?;
        match (setting, &mut host.ksm) {
            (HostSetting::HugePages { page_bytes }, _) => {
                let pages = host.hugepages.entry(page_bytes).or_default();
                let in_use = pages.in_use();
                pages.total = value.max(in_use);
                pages.free = pages.total - in_use;
            }
            (HostSetting::KsmRun, Some(ksm)) => ksm.run = value,
            (HostSetting::KsmPagesToScan, Some(ksm)) => ksm.pages_to_scan = value,
            (_, None) => {}
        }
        Ok(())
    }

    /// A VM that starts takes its pages from the pool.
    pub(super) fn take_pages(&mut self, config: &VmConfig) -> Done {
        let Some((size, needed)) = hugepages(config) else { return Ok(()) };
        let pages = self.host()?.hugepages.entry(size).or_default();
        if pages.free < needed {
            return failed(format!("start VM {}", config.name), "there are not enough huge pages");
        }
        pages.free -= needed;
        Ok(())
    }

    /// One that has ended gives them back.
    pub(super) fn give_pages(&mut self, config: &VmConfig) {
        if let Some((size, count)) = hugepages(config)
            && let Ok(host) = &mut self.world.host
        {
            let pages = host.hugepages.entry(size).or_default();
            pages.free = (pages.free + count).min(pages.total);
        }
    }
}
