//! The embedded KVM runtime: one process per VM, one thread per vCPU, no async.
//!
//! This room imports nothing from the rest of the crate. The rest of the crate imports only
//! [`config`] and [`protocol`]: what a VM is, and how one talks to the process that runs it.

pub mod config;
pub mod protocol;
