//! The YAML form of a HostPolicy.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::HostPolicy as Inner;
use crate::host::snapshot::{BalloonRules, KsmRules, PolicyRules};
use crate::kinds::{Problems, SpecProblem};
use crate::name::ByteSize;

/// What of the host guests may have, and how its memory is run. One for each host.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct HostPolicy {
    /// The most vCPUs of running VMs for each CPU of the host, 0.1 to 1000, with three decimals at most. A VM
    /// that doesn't fit is not started; one that runs is never stopped for it. Default: any number.
    #[schemars(range(min = 0.1, max = 1000))]
    pub cpu_overcommit: Option<f64>,
    /// The most memory of running VMs for each byte that the host has for them, 0.1 to 100: what it has less
    /// `reservedMemory` and less its huge pages, which are never promised twice. Default: any amount.
    #[schemars(range(min = 0.1, max = 100))]
    pub memory_overcommit: Option<f64>,
    /// With `memoryOvercommit`: memory that the host keeps for itself, such as `2Gi`. Default: 0.
    pub reserved_memory: Option<String>,
    /// How many huge pages the host keeps for guests, by size. The number never goes below those in use.
    pub hugepages: Option<HugepageCounts>,
    /// Whether the kernel looks for equal pages of guests that allow it. Default: as it is.
    pub ksm: Option<Ksm>,
    /// Lets the agent take memory back from guests whose `balloon.minMemory` says how far. Default: it
    /// doesn't.
    pub balloon: Option<Balloon>,
}

/// Huge pages by their size.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct HugepageCounts {
    /// Pages of 2 MiB. Default: as many as there are.
    #[serde(rename = "2Mi")]
    pub two_mebibytes: Option<u64>,
    /// Pages of 1 GiB; a host that has run for a while finds few. Default: as many as there are.
    #[serde(rename = "1Gi")]
    pub one_gibibyte: Option<u64>,
}

/// Kernel samepage merging.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Ksm {
    /// Whether it is at work. What it was before comes back when this is declared no more.
    pub run: bool,
    /// Pages that it looks at before each pause, 1 to 1000000. Default: as it is.
    #[schemars(range(min = 1, max = 1000000))]
    pub pages_to_scan: Option<u64>,
}

/// When guests give memory back.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Balloon {
    /// Memory is short below so much that programs could have (`MemAvailable`), such as `2Gi`.
    pub low: String,
    /// Guests get it back above so much; in between nothing changes. More than `low`.
    pub high: String,
    /// Memory is short, too, where programs wait for it this share of the time (PSI, `some avg10`), in per
    /// cent, 1 to 100. Default: 20.
    #[schemars(range(min = 1, max = 100))]
    pub pressure_percent: Option<u32>,
}

impl HostPolicy {
    pub fn decode(self) -> Result<Inner, Vec<SpecProblem>> {
        let mut problems = Problems::default();
        let cpu = self.cpu_overcommit.map(|ratio| thousandths("/cpuOvercommit", ratio, &mut problems));
        let memory =
            self.memory_overcommit.map(|ratio| thousandths("/memoryOvercommit", ratio, &mut problems));
        let reserved = self
            .reserved_memory
            .as_deref()
            .map(|text| problems.take("/reservedMemory", text.parse::<ByteSize>()).unwrap_or(ByteSize(0)).0);
        if reserved.is_some() && memory.is_none() {
            problems.add(
                SpecProblem::new(
                    "/reservedMemory",
                    "`reservedMemory` has a meaning only with `memoryOvercommit`",
                )
                .hint("`memoryOvercommit: 1` promises guests no more memory than there is"),
            );
        }
        let counts = self
            .hugepages
            .iter()
            .flat_map(|counts| [(2 << 20, counts.two_mebibytes), (1 << 30, counts.one_gibibyte)]);
        let rules = PolicyRules {
            cpu_overcommit_thousandths: cpu,
            memory_overcommit_thousandths: memory,
            reserved_bytes: reserved.unwrap_or(0),
            hugepages: counts.filter_map(|(size, count)| Some((size, count?))).collect(),
            ksm: self.ksm.map(|ksm| KsmRules { run: ksm.run, pages_to_scan: ksm.pages_to_scan }),
            balloon: self.balloon.and_then(|balloon| balloon.decode(&mut problems)),
        };
        problems.finish(Some(Inner { rules }))
    }
}

fn thousandths(pointer: &str, ratio: f64, problems: &mut Problems) -> u32 {
    let exact = ratio * 1000.0;
    if (exact - exact.round()).abs() > 1e-6 {
        problems.add(SpecProblem::new(pointer, format!("{ratio} has more than three decimals")));
    }
    // The schema bounds it to 1000.
    exact.round() as u32
}

impl Balloon {
    fn decode(self, problems: &mut Problems) -> Option<BalloonRules> {
        let low = problems.take("/balloon/low", self.low.parse::<ByteSize>());
        let high = problems.take("/balloon/high", self.high.parse::<ByteSize>());
        let (ByteSize(low_bytes), ByteSize(high_bytes)) = (low?, high?);
        if low_bytes >= high_bytes {
            problems.add(
                SpecProblem::new("/balloon/high", format!("{} is not above `low`, {}", self.high, self.low))
                    .hint("the room between the two is what keeps memory from going to and fro"),
            );
        }
        Some(BalloonRules { low_bytes, high_bytes, pressure_percent: self.pressure_percent.unwrap_or(20) })
    }
}
