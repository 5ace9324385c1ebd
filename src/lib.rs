//! vmctl: turns a directory of YAML manifests into running virtual machines, and keeps them so.

pub mod vmm;
