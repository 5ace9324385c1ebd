//! What the host has for guests, and what of it is promised: the arithmetic of overcommitment.

use std::collections::BTreeMap;

use crate::host::snapshot::{HostFacts, PolicyRules, Snapshot, Vm};
use crate::vmm::config::{PageKind, VmConfig};

/// What a VM takes, or all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Amount {
    pub vcpus: u64,
    /// Of ordinary pages.
    pub memory_bytes: u64,
    /// Huge pages by their size in bytes.
    pub hugepages: BTreeMap<u64, u64>,
}

impl Amount {
    pub fn of(config: &VmConfig) -> Self {
        let mut amount = Self { vcpus: config.vcpus.into(), ..Self::default() };
        match page_bytes(config.memory.pages) {
            None => amount.memory_bytes = config.memory_bytes,
            Some(size) => drop(amount.hugepages.insert(size, config.memory_bytes / size)),
        }
        amount
    }

    pub fn add(&mut self, other: &Self) {
        self.vcpus += other.vcpus;
        self.memory_bytes += other.memory_bytes;
        for (size, pages) in &other.hugepages {
            *self.hugepages.entry(*size).or_default() += pages;
        }
    }

    pub fn remove(&mut self, other: &Self) {
        self.vcpus = self.vcpus.saturating_sub(other.vcpus);
        self.memory_bytes = self.memory_bytes.saturating_sub(other.memory_bytes);
        for (size, pages) in &other.hugepages {
            let have = self.hugepages.entry(*size).or_default();
            *have = have.saturating_sub(*pages);
        }
    }

    pub fn pages(&self, size: u64) -> u64 {
        self.hugepages.get(&size).copied().unwrap_or(0)
    }
}

/// `None`: ordinary pages.
fn page_bytes(pages: PageKind) -> Option<u64> {
    match pages {
        PageKind::Small => None,
        PageKind::Huge2Mi => Some(2 << 20),
        PageKind::Huge1Gi => Some(1 << 30),
    }
}

/// What VMs may have, by a policy. `None`: as much as they want.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Capacity {
    pub vcpus: Option<u64>,
    /// What guests' ordinary pages can be on.
    pub usable_bytes: u64,
    pub memory_bytes: Option<u64>,
    /// Of the sizes that the policy counts.
    pub hugepages: BTreeMap<u64, u64>,
}

impl Capacity {
    pub fn of(host: &HostFacts, rules: &PolicyRules) -> Self {
        let mut huge: BTreeMap<u64, u64> =
            host.hugepages.iter().map(|(size, pages)| (*size, pages.total)).collect();
        // What is declared is or will be there; what is in use above that stays until it is free.
        for (size, count) in &rules.hugepages {
            let in_use = host.hugepages.get(size).map_or(0, |pages| pages.in_use());
            huge.insert(*size, (*count).max(in_use));
        }
        let in_pools: u64 = huge.iter().map(|(size, pages)| size.saturating_mul(*pages)).sum();
        let usable_bytes = host.memory_bytes.saturating_sub(rules.reserved_bytes).saturating_sub(in_pools);
        let times = |amount: u64, thousandths: u32| {
            u64::try_from(u128::from(amount) * u128::from(thousandths) / 1000).unwrap_or(u64::MAX)
        };
        Self {
            vcpus: rules.cpu_overcommit_thousandths.map(|ratio| times(host.cpus.into(), ratio)),
            usable_bytes,
            memory_bytes: rules.memory_overcommit_thousandths.map(|ratio| times(usable_bytes, ratio)),
            hugepages: rules.hugepages.clone(),
        }
    }
}

/// What a VM has taken: what its process runs with, or should run with where it can't be asked.
pub fn taken(vm: &Vm) -> Option<Amount> {
    let defined = || vm.definition.as_ref().map(|definition| &definition.config);
    match vm.process.as_ref()? {
        Ok(process) => Some(Amount::of(&process.config)),
        Err(_) => defined().map(Amount::of),
    }
}

/// What all VMs that run have taken, and how many they are.
pub fn promised(snapshot: &Snapshot) -> (Amount, usize) {
    let (mut all, mut count) = (Amount::default(), 0);
    for vm in snapshot.vms.iter().flat_map(|vms| vms.values()) {
        if let Some(amount) = taken(vm) {
            all.add(&amount);
            count += 1;
        }
    }
    (all, count)
}

/// `1.5`, of thousandths.
pub fn ratio(thousandths: u32) -> String {
    let text = format!("{}.{:03}", thousandths / 1000, thousandths % 1000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}
