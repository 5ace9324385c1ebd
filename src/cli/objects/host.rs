//! What is true of the host as a whole now: what it has, what of it is promised, and what may be.

use serde::Serialize;

use crate::host::snapshot::{BalloonRules, HostFacts, Ksm, PolicyRules, Previous, Snapshot};
use crate::kinds::host_policy::capacity::{Capacity, promised, ratio};
use crate::name::ByteSize;
use crate::report::units::size;

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HostStatus {
    pub cpus: u32,
    /// Of VMs that run.
    pub promised_vcpus: u64,
    /// vCPUs for each CPU, and the most that the policy allows.
    pub cpu_overcommit: String,
    pub cpu_overcommit_max: Option<String>,
    pub memory_bytes: u64,
    pub available_bytes: u64,
    pub reserved_bytes: u64,
    /// For guests: all but what is reserved and what is in huge pages.
    pub usable_bytes: u64,
    pub promised_bytes: u64,
    pub memory_overcommit: String,
    pub memory_overcommit_max: Option<String>,
    pub hugepages: Vec<PagesStatus>,
    pub ksm: Option<Ksm>,
    /// Share of the last ten seconds in which programs waited for memory, in hundredths of a per cent.
    pub pressure: Option<u32>,
    pub balloon: Option<BalloonRules>,
    pub running_vms: usize,
    /// What settings were before the policy changed them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub previous: Vec<Previous>,
}

#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PagesStatus {
    pub size: String,
    pub total: u64,
    pub free: u64,
    /// By the policy.
    pub declared: Option<u64>,
    /// To VMs that run.
    pub promised: u64,
}

/// With the recorded policy, if there is one.
pub fn status(host: &HostFacts, snapshot: &Snapshot) -> HostStatus {
    let no_rules = PolicyRules::default();
    let rules = host.policy.as_ref().map_or(&no_rules, |policy| &policy.rules);
    let capacity = Capacity::of(host, rules);
    let (taken, running_vms) = promised(snapshot);
    let share = |part: u64, whole: u64| format!("{:.2}", part as f64 / whole.max(1) as f64);
    HostStatus {
        cpus: host.cpus,
        promised_vcpus: taken.vcpus,
        cpu_overcommit: share(taken.vcpus, host.cpus.into()),
        cpu_overcommit_max: rules.cpu_overcommit_thousandths.map(ratio),
        memory_bytes: host.memory_bytes,
        available_bytes: host.available_bytes,
        reserved_bytes: rules.reserved_bytes,
        usable_bytes: capacity.usable_bytes,
        promised_bytes: taken.memory_bytes,
        memory_overcommit: share(taken.memory_bytes, capacity.usable_bytes),
        memory_overcommit_max: rules.memory_overcommit_thousandths.map(ratio),
        hugepages: host
            .hugepages
            .iter()
            .map(|(page, pages)| PagesStatus {
                size: ByteSize(*page).to_string(),
                total: pages.total,
                free: pages.free,
                declared: rules.hugepages.get(page).copied(),
                promised: taken.pages(*page),
            })
            .collect(),
        ksm: host.ksm,
        pressure: host.pressure,
        balloon: rules.balloon,
        running_vms,
        previous: host.policy.as_ref().map_or(Vec::new(), |policy| policy.previous.clone()),
    }
}

impl HostStatus {
    /// `3 vCPUs on 2 CPUs (1.50, at most 4)`
    pub fn cpu_text(&self) -> String {
        let most = at_most(&self.cpu_overcommit_max);
        let plural = |count: u64, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
        let (vcpus, cpus) = (plural(self.promised_vcpus, "vCPU"), plural(self.cpus.into(), "CPU"));
        format!("{vcpus} on {cpus} ({}{most})", self.cpu_overcommit)
    }

    pub fn memory_text(&self) -> String {
        let most = at_most(&self.memory_overcommit_max);
        let (promised, usable) = (size(self.promised_bytes), size(self.usable_bytes));
        format!("{promised} promised of {usable} for guests ({}{most})", self.memory_overcommit)
    }

    pub fn pages_text(&self) -> String {
        let pages = self.hugepages.iter().filter(|pages| pages.total > 0 || pages.declared.is_some());
        let shown = pages.map(|pages| format!("{}/{} of {} free", pages.free, pages.total, pages.size));
        let shown: Vec<String> = shown.collect();
        if shown.is_empty() { "none".to_owned() } else { shown.join(", ") }
    }

    pub fn ksm_text(&self) -> String {
        match self.ksm {
            None => "not in this kernel".to_owned(),
            Some(ksm) if ksm.run == 1 => format!("on, saves {}", size(ksm.saved_bytes)),
            Some(_) => "off".to_owned(),
        }
    }
}

fn at_most(ratio: &Option<String>) -> String {
    ratio.as_ref().map(|ratio| format!(", at most {ratio}")).unwrap_or_default()
}
