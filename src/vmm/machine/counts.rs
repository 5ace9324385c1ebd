//! A reading of everything that the machine's parts count.

use super::Machine;
use crate::vmm::metrics::{Metrics, ProcessMetrics};
use crate::vmm::vcpu::{self, VcpuHandle};

impl Machine {
    /// What was counted so far. No vCPU is stopped, no device asked.
    pub fn metrics(&self) -> Metrics {
        let mut metrics = Metrics {
            vcpus: self.vcpus.iter().map(VcpuHandle::metrics).collect(),
            disks: self.disks.iter().map(|disk| (disk.name.clone(), disk.handle.metrics())).collect(),
            nics: self.nics.iter().map(|nic| (nic.name.clone(), nic.handle.metrics())).collect(),
            process: ProcessMetrics {
                guest_bytes: self.memory_bytes,
                run_us: vcpu::clock_us(libc::CLOCK_PROCESS_CPUTIME_ID),
            },
            ..Default::default()
        };
        self.fixed.count(&mut metrics);
        metrics
    }
}
