//! The host as a whole: what it has to give to VMs, the settings of its memory management, and the policy
//! that was recorded for it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::name::Mark;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostFacts {
    /// CPUs that are online.
    pub cpus: u32,
    pub memory_bytes: u64,
    /// What programs could have without swapping. Changes all the time.
    pub available_bytes: u64,
    /// The share of the last ten seconds in which some program waited for memory, in hundredths of a per
    /// cent. `None`: this kernel doesn't measure it (PSI).
    pub pressure: Option<u32>,
    /// The pools of huge pages, by the size of a page in bytes.
    pub hugepages: BTreeMap<u64, HugePages>,
    /// `None`: this kernel has no KSM.
    pub ksm: Option<Ksm>,
    /// What `apply` left in the state directory.
    pub policy: Option<RecordedPolicy>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HugePages {
    /// Of the pool, without those that the kernel adds by itself (surplus).
    pub total: u64,
    /// Nobody has them: neither in use nor promised to somebody.
    pub free: u64,
}

impl HugePages {
    pub fn in_use(self) -> u64 {
        self.total.saturating_sub(self.free)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Ksm {
    /// 0: stopped. 1: at work. 2: stopped, and what was merged is apart again.
    pub run: u64,
    pub pages_to_scan: u64,
    /// Bytes that guests don't take because of it.
    pub saved_bytes: u64,
}

/// A policy on the host. Carries a mark as links and files do, in the state directory: what it is about
/// (`/sys`) can't carry one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RecordedPolicy {
    pub mark: Mark,
    pub rules: PolicyRules,
    /// Of each setting that was changed: what it was before, in this boot.
    pub previous: Vec<Previous>,
}

impl RecordedPolicy {
    pub fn previous(&self, setting: HostSetting) -> Option<u64> {
        self.previous.iter().find(|previous| previous.setting == setting).map(|previous| previous.value)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Previous {
    pub setting: HostSetting,
    pub value: u64,
}

/// A setting of the host's memory management that a policy may change.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", rename_all_fields = "camelCase")]
pub enum HostSetting {
    /// How many pages of this size the host keeps for guests.
    HugePages {
        page_bytes: u64,
    },
    KsmRun,
    KsmPagesToScan,
}

impl std::fmt::Display for HostSetting {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::HugePages { page_bytes } => {
                write!(f, "hugepages.{}", crate::name::ByteSize(*page_bytes))
            }
            Self::KsmRun => f.write_str("ksm.run"),
            Self::KsmPagesToScan => f.write_str("ksm.pagesToScan"),
        }
    }
}

/// What a policy says, in whole numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PolicyRules {
    /// vCPUs for each CPU, in thousandths. `None`: any number.
    pub cpu_overcommit_thousandths: Option<u32>,
    /// Guest memory for each byte of the host's, in thousandths. `None`: any amount.
    pub memory_overcommit_thousandths: Option<u32>,
    /// Of the host's memory: not for guests.
    pub reserved_bytes: u64,
    /// Pages by their size in bytes.
    pub hugepages: BTreeMap<u64, u64>,
    pub ksm: Option<KsmRules>,
    pub balloon: Option<BalloonRules>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KsmRules {
    pub run: bool,
    /// `None`: as it is.
    pub pages_to_scan: Option<u64>,
}

/// When guests give memory back, and when they get it again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BalloonRules {
    /// Below so many available bytes memory is short.
    pub low_bytes: u64,
    /// Above so many it is plentiful. In between nothing changes.
    pub high_bytes: u64,
    /// Memory is short, too, where programs wait for it this share of the time.
    pub pressure_percent: u32,
}
