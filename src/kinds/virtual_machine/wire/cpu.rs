//! vCPUs and memory in the YAML form.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::host::snapshot::CpuShare;
use crate::kinds::{Problems, SpecProblem};
use crate::name::ByteSize;
use crate::vmm::config::{
    CpuConfig, CpuModel, CpuTopology, MemoryConfig, PageKind, TransparentHugepages as InnerThp,
};

/// The highest number of a host's CPU: what Linux is built for at most.
const HOST_CPU_MAX: u16 = 8191;

/// As the kernel has it.
const WEIGHT_MAX: u16 = 10_000;

/// What the vCPUs look like, and their part of the host's CPUs.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Cpu {
    /// What the guest sees of the processor. `host`: all that this host and KVM can do. `x86-64-v2` and
    /// `x86-64-v3`: that level of the x86-64 psABI and nothing above it, the same on every host that has it.
    /// Default: host.
    pub model: Option<Model>,
    /// How the vCPUs are grouped; sockets × cores × threads is `cpus`. Default: one socket, a thread a core.
    pub topology: Option<Topology>,
    /// For each vCPU the host's CPUs that it may run on, such as `"2"` or `"0-3,8"`: as many as `cpus`.
    /// Default: all.
    pub pinning: Option<Vec<String>>,
    /// The VM's part of the host's CPUs when they are short, against other VMs: 1 to 10000. Default: 100.
    #[schemars(range(min = 1, max = 10000))]
    pub weight: Option<u16>,
    /// The most CPU time that it gets, in percent of one of the host's CPUs: 150 is one and a half. Default:
    /// no limit.
    #[schemars(range(min = 1))]
    pub quota_percent: Option<u16>,
}

/// What a guest sees of the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Model {
    #[serde(rename = "host")]
    Host,
    #[serde(rename = "x86-64-v2")]
    X86_64V2,
    #[serde(rename = "x86-64-v3")]
    X86_64V3,
}

/// How vCPUs are grouped.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Topology {
    /// 1 to 16. Default: 1.
    #[schemars(range(min = 1, max = 16))]
    pub sockets: Option<u8>,
    /// Of each socket, 1 to 16. Default: 1.
    #[schemars(range(min = 1, max = 16))]
    pub cores: Option<u8>,
    /// Of each core, 1 or 2. Default: 1.
    #[schemars(range(min = 1, max = 2))]
    pub threads: Option<u8>,
}

/// What guest memory is made of on the host.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct MemoryBacking {
    /// The size of pages from the host's reserved pool of hugetlbfs pages; `memory` is a multiple of it.
    /// Default: none, ordinary pages.
    pub hugepages: Option<Hugepages>,
    /// Whether equal pages of this guest and others may be shared (KSM). Default: false.
    pub ksm: Option<bool>,
    /// Whether ordinary pages are joined to huge ones. `host`: as the host's setting says. Default: host.
    pub transparent_hugepages: Option<TransparentHugepages>,
}

/// The size of reserved pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Hugepages {
    #[serde(rename = "2Mi")]
    Size2Mi,
    #[serde(rename = "1Gi")]
    Size1Gi,
}

/// Whether ordinary pages are joined to huge ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum TransparentHugepages {
    Host,
    Always,
    Never,
}

impl Cpu {
    pub(super) fn decode(self, cpus: u8, problems: &mut Problems) -> (CpuConfig, CpuShare) {
        let model = match self.model {
            None | Some(Model::Host) => CpuModel::Host,
            Some(Model::X86_64V2) => CpuModel::X86_64V2,
            Some(Model::X86_64V3) => CpuModel::X86_64V3,
        };
        let topology = self.topology.map(|topology| topology.decode(cpus, problems));
        let pinning = self.pinning.unwrap_or_default();
        if !pinning.is_empty() && pinning.len() != usize::from(cpus) {
            problems.add(SpecProblem::new(
                "/cpu/pinning",
                format!("{} entries; it has one for each of the {cpus} vCPUs", pinning.len()),
            ));
        }
        let one = |(index, text): (usize, &String)| {
            problems.take(&format!("/cpu/pinning/{index}"), parse_cpu_list(text)).unwrap_or_default()
        };
        let pinning = pinning.iter().enumerate().map(one).collect();
        let weight = self.weight.unwrap_or(CpuShare::default().weight);
        if !(1..=WEIGHT_MAX).contains(&weight) {
            problems.add(SpecProblem::new("/cpu/weight", format!("{weight}; it is 1 to {WEIGHT_MAX}")));
        }
        if self.quota_percent == Some(0) {
            problems.add(SpecProblem::new("/cpu/quotaPercent", "0; it is 1 or more, or not given"));
        }
        let share = CpuShare { weight, quota_percent: self.quota_percent };
        (CpuConfig { model, topology, pinning }, share)
    }
}

impl Topology {
    fn decode(self, cpus: u8, problems: &mut Problems) -> CpuTopology {
        let [sockets, cores, threads] =
            [self.sockets, self.cores, self.threads].map(|count| count.unwrap_or(1));
        let product = u32::from(sockets) * u32::from(cores) * u32::from(threads);
        if product != u32::from(cpus) {
            problems.add(SpecProblem::new(
                "/cpu/topology",
                format!("{sockets} sockets × {cores} cores × {threads} threads are {product}, and `cpus` is {cpus}"),
            ));
        }
        CpuTopology { sockets, cores, threads }
    }
}

impl MemoryBacking {
    pub(super) fn decode(self, memory: Option<ByteSize>, problems: &mut Problems) -> MemoryConfig {
        let ksm = self.ksm.unwrap_or(false);
        let (pages, page_bytes) = match self.hugepages {
            None => (PageKind::Small, 4 << 10),
            Some(Hugepages::Size2Mi) => (PageKind::Huge2Mi, 2 << 20),
            Some(Hugepages::Size1Gi) => (PageKind::Huge1Gi, 1 << 30),
        };
        if let Some(ByteSize(bytes)) = memory
            && !bytes.is_multiple_of(page_bytes)
        {
            problems.add(SpecProblem::new(
                "/memoryBacking/hugepages",
                format!("memory {} is not made of pages of {}", ByteSize(bytes), ByteSize(page_bytes)),
            ));
        }
        if pages != PageKind::Small {
            if ksm {
                let message = "KSM shares ordinary pages only; `hugepages` are never shared";
                problems.add(SpecProblem::new("/memoryBacking/ksm", message));
            }
            if self.transparent_hugepages.is_some() {
                let message = "it has a meaning for ordinary pages only, not with `hugepages`";
                problems.add(SpecProblem::new("/memoryBacking/transparentHugepages", message));
            }
        }
        let transparent_hugepages = match self.transparent_hugepages {
            None | Some(TransparentHugepages::Host) => InnerThp::Host,
            Some(TransparentHugepages::Always) => InnerThp::Always,
            Some(TransparentHugepages::Never) => InnerThp::Never,
        };
        MemoryConfig { pages, ksm, transparent_hugepages }
    }
}

/// `0-3,8`, as the kernel writes sets of CPUs. Sorted, each once.
fn parse_cpu_list(text: &str) -> Result<Vec<u16>, String> {
    let wrong = || format!("`{text}` is not a list of the host's CPUs such as 2 or 0-3,8");
    let number = |text: &str| -> Result<u16, String> {
        let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        let number = if digits { text.parse().ok() } else { None };
        number.filter(|number| *number <= HOST_CPU_MAX).ok_or_else(wrong)
    };
    let mut cpus = std::collections::BTreeSet::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last {
            return Err(wrong());
        }
        cpus.extend(first..=last);
    }
    Ok(cpus.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cpus_are_read_as_the_kernel_writes_them() {
        assert_eq!(parse_cpu_list("2"), Ok(vec![2]));
        assert_eq!(parse_cpu_list("8,0-2,1"), Ok(vec![0, 1, 2, 8]));
        for text in ["", "a", "1-", "-1", "2-1", "1,,2", "0-99999", "+1", " 1", "1.5"] {
            assert!(parse_cpu_list(text).is_err(), "{text}");
        }
    }
}
