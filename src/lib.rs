//! vmctl: manifests to running virtual machines on a Linux KVM host, and kept so.
//!
//! The map and the invariants are in `ARCHITECTURE.md`.

pub mod adopt;
pub mod agent;
pub mod cli;
pub mod execute;
pub mod host;
pub mod kinds;
pub mod load;
pub mod name;
pub mod pipeline;
pub mod plan;
pub mod report;
pub mod resolve;
pub mod vmm;
