//! A vCPU's architecture: what it says it is (CPUID), where it sits, on which processors of the host it
//! runs, and its state at reset and at the kernel's entry. Nothing here runs a vCPU; that is
//! [`crate::vmm::vcpu`]'s.

pub mod affinity;
pub mod cpuid;
pub mod entry;
mod model;
pub mod state;
pub mod statistics;
pub mod topology;

#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// A KVM call that failed, with what it was for.
    #[error("{what}: {source}")]
    Kvm {
        what: &'static str,
        #[source]
        source: kvm_ioctls::Error,
    },
    #[error("this host can't give a guest the CPU model {model}: it lacks: {missing}")]
    Model { model: &'static str, missing: String },
    #[error(
        "a topology of {sockets} sockets with {cores} cores of {threads} threads does not make {vcpus} vCPUs"
    )]
    Topology { sockets: u8, cores: u8, threads: u8, vcpus: u8 },
    #[error("pinning names the host's CPUs for {pinned} vCPUs, and there are {vcpus}")]
    Pinning { pinned: usize, vcpus: u8 },
    #[error("{entries} CPUID leaves are more than KVM takes")]
    CpuidTooLong { entries: usize },
}

/// For `map_err`.
pub(super) fn failed(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> CpuError {
    move |source| CpuError::Kvm { what, source }
}
