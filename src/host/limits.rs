//! What a VM's process may use at most, beside its part of the CPUs. Pure: the host measures and sets, here
//! is what there should be.

use serde::{Deserialize, Serialize};

use crate::vmm::config::VmConfig;

/// More threads than a full machine has, KVM's and vhost's own included.
const THREADS_MAX: u64 = 512;
/// Of the VM process itself, and what the kernel keeps for it.
pub const MEMORY_OVERHEAD_BYTES: u64 = 128 << 20;
/// Of the guest's memory: its page tables, those of nested paging, KVM's bookkeeping.
const MEMORY_OVERHEAD_PART: u64 = 8;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessLimits {
    /// `None`: no limit.
    pub memory_bytes: Option<u64>,
    /// `None`: no limit.
    pub threads: Option<u64>,
}

impl ProcessLimits {
    /// The memory's limit is there to hold up a process that runs away, not to press. The page cache of its
    /// disks is charged to it as well. That never kills it, for the kernel drops or writes back such pages
    /// first, and within these bounds there is room for a working set of them. But the pages of a file that
    /// lies in memory (tmpfs) can't be dropped: with such files there is no limit.
    pub fn of(config: &VmConfig, files_in_memory: bool) -> Self {
        let guest = config.memory_bytes;
        let most = guest + guest / MEMORY_OVERHEAD_PART + MEMORY_OVERHEAD_BYTES;
        Self { memory_bytes: (!files_in_memory).then_some(most), threads: Some(THREADS_MAX) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::config::BootConfig;

    #[test]
    fn there_is_room_beside_the_guest_and_no_limit_where_the_disk_is_memory() {
        let config = VmConfig::new("web", "mark", 1 << 30, BootConfig::kernel("k", None, ""));
        let most = (1 << 30) + (128 << 20) + (128 << 20);
        assert_eq!(ProcessLimits::of(&config, false).memory_bytes, Some(most));
        assert_eq!(ProcessLimits::of(&config, true).memory_bytes, None);
    }
}
