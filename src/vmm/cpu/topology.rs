//! Where each vCPU sits: in which socket, core and thread. CPUID, the MADT and KVM all go by the APIC
//! ids made here, so that they agree.
//!
//! ```text
//!   APIC id = socket │ core      │ thread       each part as wide as its count needs: with counts that
//!                    │ core_bits │ thread_bits  are no powers of two, some numbers are left out
//! ```

use super::CpuError;
use crate::vmm::config::{CpuConfig, CpuTopology};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    sockets: u8,
    cores: u8,
    threads: u8,
}

/// How many bits hold the numbers below this.
fn bits(count: u8) -> u32 {
    u32::from(count).next_power_of_two().trailing_zeros()
}

impl Topology {
    pub fn new(config: &CpuConfig, vcpus: u8) -> Result<Self, CpuError> {
        let Some(CpuTopology { sockets, cores, threads }) = config.topology else {
            return Ok(Self { sockets: 1, cores: vcpus, threads: 1 });
        };
        let product = u32::from(sockets) * u32::from(cores) * u32::from(threads);
        if product != u32::from(vcpus) {
            return Err(CpuError::Topology { sockets, cores, threads, vcpus });
        }
        Ok(Self { sockets, cores, threads })
    }

    /// Neighbours are threads of one core first, then cores of one socket.
    pub fn apic_id(self, vcpu: u8) -> u8 {
        let (core, thread) = (vcpu / self.threads, vcpu % self.threads);
        let (socket, core) = (core / self.cores, core % self.cores);
        // Sixteen vCPUs at most (see config): the id stays below 64.
        socket << self.package_bits() | core << self.thread_bits() | thread
    }

    pub fn apic_ids(self) -> Vec<u8> {
        (0..self.sockets * self.cores * self.threads).map(|vcpu| self.apic_id(vcpu)).collect()
    }

    pub fn threads_per_core(self) -> u32 {
        self.threads.into()
    }

    pub fn threads_per_package(self) -> u32 {
        u32::from(self.cores) * self.threads_per_core()
    }

    pub fn thread_bits(self) -> u32 {
        bits(self.threads)
    }

    pub fn core_bits(self) -> u32 {
        bits(self.cores)
    }

    /// Of an APIC id, those that number the threads of one package.
    pub fn package_bits(self) -> u32 {
        self.core_bits() + self.thread_bits()
    }
}

#[cfg(test)]
pub(super) fn topology(sockets: u8, cores: u8, threads: u8) -> Topology {
    Topology { sockets, cores, threads }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_product_is_the_number_of_vcpus() {
        let of = |sockets, cores, threads, vcpus| {
            let topology = Some(CpuTopology { sockets, cores, threads });
            Topology::new(&CpuConfig { topology, ..Default::default() }, vcpus)
        };
        assert_eq!(of(2, 3, 2, 12).unwrap(), topology(2, 3, 2));
        for wrong in [of(2, 3, 2, 11), of(0, 1, 1, 1), of(1, 0, 0, 1), of(255, 255, 255, 255)] {
            let error = wrong.unwrap_err().to_string();
            assert!(error.contains("vCPUs"), "{error}");
        }
        assert_eq!(Topology::new(&CpuConfig::default(), 5).unwrap(), topology(1, 5, 1));
    }

    #[test]
    fn ids_are_read_from_their_parts() {
        assert_eq!(topology(1, 5, 1).apic_ids(), [0, 1, 2, 3, 4]);
        assert_eq!(topology(1, 2, 2).apic_ids(), [0, 1, 2, 3]);
        assert_eq!(topology(2, 3, 2).apic_ids(), [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]);
        assert_eq!(topology(3, 1, 1).apic_ids(), [0, 1, 2]);
        assert_eq!(topology(2, 1, 3).apic_ids(), [0, 1, 2, 4, 5, 6]);
    }

    #[test]
    fn ids_differ_and_stay_small() {
        for sockets in 1..=16u8 {
            for cores in 1..=16 / sockets {
                for threads in 1..=16 / (sockets * cores) {
                    let mut ids = topology(sockets, cores, threads).apic_ids();
                    assert!(ids.iter().all(|id| *id < 64));
                    ids.dedup();
                    assert_eq!(ids.len(), usize::from(sockets * cores * threads));
                }
            }
        }
    }
}
