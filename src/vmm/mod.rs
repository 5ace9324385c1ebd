//! The embedded KVM runtime: one process per VM, one thread per vCPU, no async.
//!
//! This room imports nothing from the rest of the crate. The rest of the crate imports only
//! [`config`], [`protocol`] and [`client`]: what a VM is, how one talks to the process that runs it,
//! and how one starts such a process.

pub mod acpi;
pub mod boot;
pub mod bus;
pub mod client;
pub mod conditions;
pub mod config;
pub mod console;
pub mod control;
mod cpu;
pub mod device;
pub mod event;
mod exit;
pub mod gate;
pub mod generation_id;
mod irq;
pub mod launch;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod metrics;
pub mod packet;
pub mod pci;
pub mod power;
pub mod protocol;
pub mod pvpanic;
pub mod sandbox;
pub mod serial;
pub mod supervisor;
pub mod transport;
pub mod vcpu;
