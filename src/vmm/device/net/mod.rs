//! virtio-net over a tap.
//!
//! For the machine: [`Net::new`] takes an open tap (IFF_TAP, IFF_NO_PI and IFF_VNET_HDR), and
//! [`Net::handle`] gives the control side. The thread is named `nic-<name>` ([`ThreadRole::Net`]).
//!
//! A tap that is down or deleted loses frames, as a cable does when it is pulled, and costs neither
//! the guest nor this process anything else. A deleted tap shows as a link that is down, until
//! [`NetHandle::replace_tap`] gives another.

mod service;
mod tap;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4,
    VIRTIO_NET_F_GUEST_TSO6, VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP,
};

use self::service::{Command, NetService};
use self::tap::Tap;
use super::worker::{Mailbox, ThreadRole, ThreadStart, Worker};
use crate::vmm::config::NicConfig;
use crate::vmm::transport::{ActivateError, Activation, VirtioDevice};

/// What the thread needs beyond what all workers do.
pub(super) const SYSTEM_CALLS: &[libc::c_long] = &[libc::SYS_ioctl, libc::SYS_writev];
pub(super) const IOCTLS: &[u64] = &[tap::TUNGETIFF, tap::TUNSETOFFLOAD, tap::TUNSETVNETHDRSZ];

/// Receive, transmit.
const QUEUE_SIZES: &[u16] = &[256, 256];

const FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4
    | 1 << VIRTIO_NET_F_GUEST_TSO6
    | 1 << VIRTIO_NET_F_GUEST_ECN
    | 1 << VIRTIO_NET_F_HOST_TSO4
    | 1 << VIRTIO_NET_F_HOST_TSO6
    | 1 << VIRTIO_NET_F_HOST_ECN
    | 1 << VIRTIO_NET_F_MAC
    | 1 << VIRTIO_NET_F_MRG_RXBUF
    | 1 << VIRTIO_NET_F_MTU
    | 1 << VIRTIO_NET_F_STATUS;

#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error("NIC {nic}: {mac_address:?} is not a unicast MAC address")]
    MacAddress { nic: String, mac_address: String },
    #[error("use the tap of NIC {nic}")]
    Tap {
        nic: String,
        #[source]
        source: io::Error,
    },
    #[error("start the thread of NIC {nic}")]
    Start {
        nic: String,
        #[source]
        source: io::Error,
    },
}

/// The device. Dropping it closes the tap.
pub struct Net {
    worker: Worker<Command>,
    handle: NetHandle,
    mac_address: [u8; 6],
    mtu: u16,
    link_up: Arc<AtomicBool>,
}

/// The control side of a NIC. It may be used from any thread while the guest runs.
#[derive(Clone)]
pub struct NetHandle {
    nic: Arc<str>,
    mailbox: Mailbox<Command>,
}

impl Net {
    pub fn new(config: &NicConfig, tap: OwnedFd, hook: &ThreadStart) -> Result<Self, NetError> {
        let nic = || config.name.clone();
        let mac_address = parse_mac_address(&config.mac_address)
            .ok_or_else(|| NetError::MacAddress { nic: nic(), mac_address: config.mac_address.clone() })?;
        let tap = Tap::new(tap).map_err(|source| NetError::Tap { nic: nic(), source })?;
        let link_up = Arc::new(AtomicBool::new(true));
        let service = NetService::new(tap, link_up.clone());
        let worker = Worker::spawn(format!("nic-{}", config.name), ThreadRole::Net, hook, service)
            .map_err(|source| NetError::Start { nic: nic(), source })?;
        let handle = NetHandle { nic: config.name.as_str().into(), mailbox: worker.mailbox() };
        Ok(Self { worker, handle, mac_address, mtu: config.mtu, link_up })
    }

    pub fn handle(&self) -> NetHandle {
        self.handle.clone()
    }

    /// `struct virtio_net_config` (virtio 1.2, section 5.1.4).
    fn config_space(&self) -> [u8; 12] {
        let mut space = [0; 12];
        space[..6].copy_from_slice(&self.mac_address);
        let status = if self.link_up.load(Ordering::Acquire) { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        space[6..8].copy_from_slice(&status.to_le_bytes());
        space[8..10].copy_from_slice(&1u16.to_le_bytes());
        space[10..12].copy_from_slice(&self.mtu.to_le_bytes());
        space
    }
}

fn parse_mac_address(text: &str) -> Option<[u8; 6]> {
    let mut address = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut address {
        let part = parts.next().filter(|part| part.len() == 2 && !part.starts_with('+'))?;
        *byte = u8::from_str_radix(part, 16).ok()?;
    }
    let unicast = address[0] & 1 == 0 && address != [0; 6];
    (parts.next().is_none() && unicast).then_some(address)
}

impl NetHandle {
    /// From now on the NIC uses this tap; the old one is closed. On an error the old one stays.
    pub fn replace_tap(&self, tap: OwnedFd) -> Result<(), NetError> {
        self.mailbox
            .call_briefly(|reply| Command::ReplaceTap { tap, reply })
            .and_then(|result| result)
            .map_err(|source| NetError::Tap { nic: self.nic.to_string(), source })
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_space(&self.config_space(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        self.worker.start(activation)
    }

    fn reset(&mut self) {
        self.worker.stop();
    }
}
