//! The virtio devices. Each knows its registers, its queues and its backend (a disk image, a tap,
//! the kernel's random source); none knows the transport it sits behind.
//!
//! Every device has one worker thread, made when the device is made. The thread owns the backend for
//! the whole life of the device and sleeps until there is something to do: see [`worker`]. A vCPU
//! thread only sends it messages (activate, reset) and so needs no more than `write`, `read`, `futex`
//! and the allocator's calls for all of virtio.
//!
//! What a guest puts into rings, descriptors and requests is hostile. A request that makes no sense
//! is answered with an error or completed with nothing written; a ring that makes no sense sets
//! DEVICE_NEEDS_RESET. Neither harms more than the guest's own device.

pub mod balloon;
pub mod block;
mod buffers;
pub mod entropy;
pub mod limiter;
pub mod net;
mod queue;
#[cfg(test)]
pub(super) mod testing;
pub mod vsock;
pub mod worker;

pub use worker::{ThreadRole, ThreadStart};

/// Serves a read of a device's configuration space: what lies beyond its end reads as zeroes.
fn read_config_space(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let Some(from) = usize::try_from(offset).ok().and_then(|offset| space.get(offset..)) else { return };
    let len = from.len().min(data.len());
    data[..len].copy_from_slice(&from[..len]);
}
