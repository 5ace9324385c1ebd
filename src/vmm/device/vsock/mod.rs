//! virtio-vsock (virtio 1.2, section 5.10): streams between the guest and Unix sockets of the host.
//!
//! For the machine: [`Vsock::new`] takes the bound listening socket and the directory of the guest's
//! own connections (see [`host`]). The thread is named `vsock` ([`ThreadRole::Vsock`]).
//!
//! What a guest has in flight is bounded: connections, refusals, and a buffer for each connection, of
//! whose room it is told. It is refused (RST) what makes no sense, and a connection on which it breaks the
//! rules ends.

mod connection;
mod host;
mod packet;
mod service;
mod table;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;

use self::host::Host;
use self::service::{Never, VsockService};
use super::worker::{ThreadRole, ThreadStart, Worker};
use crate::vmm::config::VsockConfig;
use crate::vmm::metrics::VsockCounters;
use crate::vmm::transport::{ActivateError, Activation, VirtioDevice};

/// What the thread needs beyond what all workers do. Sockets are Unix sockets alone: the process's
/// filter sees to that.
pub(super) const SYSTEM_CALLS: &[libc::c_long] = &[
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_sendto,
    libc::SYS_shutdown,
    libc::SYS_socket,
    libc::SYS_writev,
];

/// Receive, transmit, events.
const QUEUE_SIZES: &[u16] = &[128, 128, 8];

/// What the device reaches the host with.
#[derive(Debug)]
pub struct VsockFiles {
    /// A bound, not yet listening, Unix stream socket.
    pub listener: OwnedFd,
    /// Where a guest's connection to port P finds `vsock_<P>`. A path alone (O_PATH) is enough.
    pub directory: OwnedFd,
}

/// The device. Dropping it closes all connections.
pub struct Vsock {
    worker: Worker<Never>,
    guest_cid: u64,
    counters: Arc<VsockCounters>,
}

impl Vsock {
    pub fn new(config: VsockConfig, files: VsockFiles, hook: &ThreadStart) -> io::Result<Self> {
        let guest_cid = u64::from(config.cid);
        let counters = Arc::new(VsockCounters::default());
        let service = VsockService::new(guest_cid, Host::new(files.listener)?, counters.clone());
        // First the directory, for the filter forbids to change it.
        let (hook, directory) = (hook.clone(), files.directory);
        let enter: ThreadStart = Arc::new(move |role| host::enter(&directory).and_then(|()| hook(role)));
        let worker = Worker::spawn("vsock".into(), ThreadRole::Vsock, &enter, service)?;
        Ok(Self { worker, guest_cid, counters })
    }

    pub fn counters(&self) -> Arc<VsockCounters> {
        self.counters.clone()
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    /// Streams need none.
    fn features(&self) -> u64 {
        0
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_space(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.worker.start(activation)
    }

    fn reset(&mut self) {
        self.worker.stop();
    }
}
