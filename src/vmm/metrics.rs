//! What a VM process counts. Counters are plain atomics that their threads add to; reading them stops
//! nobody.

use serde::{Deserialize, Serialize};

/// Everything that is counted, at one instant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metrics {
    /// Since the process started its vCPUs.
    pub uptime_ms: u64,
}
