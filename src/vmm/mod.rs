//! The embedded KVM runtime: one process per VM, one thread per vCPU, no async.
//!
//! This room imports nothing from the rest of the crate. The rest of the crate imports only
//! [`config`], [`protocol`] and [`client`]: what a VM is, how one talks to the process that runs it,
//! and how one starts such a process.

pub mod bus;
pub mod client;
pub mod config;
pub mod memory;
pub mod packet;
pub mod protocol;
pub mod transport;
