//! A vCPU's architecture: what it says it is (CPUID), and its state at reset and at the kernel's entry.
//! Nothing here runs a vCPU; that is [`crate::vmm::vcpu`]'s.

pub mod cpuid;
pub mod entry;
pub mod state;
pub mod statistics;

/// A KVM call that failed, with what it was for.
#[derive(Debug, thiserror::Error)]
#[error("{what}: {source}")]
pub struct CpuError {
    pub what: &'static str,
    #[source]
    pub source: kvm_ioctls::Error,
}

/// For `map_err`.
pub(super) fn failed(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> CpuError {
    move |source| CpuError { what, source }
}
