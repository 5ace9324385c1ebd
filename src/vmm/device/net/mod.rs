//! virtio-net over a tap.
//!
//! For the machine: [`Net::new`] takes the tap's open descriptors (IFF_TAP, IFF_NO_PI and IFF_VNET_HDR;
//! IFF_MULTI_QUEUE, too, if there are several), and [`Net::handle`] gives the control side. Each queue
//! pair has a thread: `nic-<name>`, `nic-<name>-1`… ([`ThreadRole::Net`]). Where descriptors of
//! `/dev/vhost-net` come along, the kernel moves the frames of a running driver, as long as nothing is
//! to be limited.
//!
//! A tap that is down or deleted loses frames, as a cable does when it is pulled, and costs neither
//! the guest nor this process anything else. A deleted tap shows as a link that is down, until
//! [`NetHandle::replace_tap`] gives another.

mod control;
mod kernel;
mod pair;
mod receive;
mod shared;
mod tap;
#[cfg(test)]
mod tests;
mod transmit;
mod vhost;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_ANNOUNCE,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU, VIRTIO_NET_F_STATUS,
};

use self::kernel::Kernel;
use self::pair::{Command, Pair};
use self::shared::{LinkChange, Shared};
use self::tap::Tap;
use super::worker::{Mailbox, ThreadRole, ThreadStart, Worker};
use crate::vmm::config::{Limits, NicConfig, QUEUES_MAX};
use crate::vmm::metrics::NicMetrics;
use crate::vmm::transport::{ActivateError, Activation, ActiveQueue, VirtioDevice};

/// What a thread needs beyond what all workers do.
pub(super) const SYSTEM_CALLS: &[libc::c_long] = &[libc::SYS_ioctl, libc::SYS_readv, libc::SYS_writev];
pub(super) const IOCTLS: &[u64] = &{
    const TAP: [u64; 4] = [tap::TUNSETOFFLOAD, tap::TUNSETVNETHDRSZ, tap::TUNSETQUEUE, tap::TUNSETCARRIER];
    let mut all = [0; TAP.len() + vhost::IOCTLS.len()];
    let (of_tap, of_vhost) = all.split_at_mut(TAP.len());
    of_tap.copy_from_slice(&TAP);
    of_vhost.copy_from_slice(&vhost::IOCTLS);
    all
};

/// Of each queue: receive and transmit of every pair, and the control queue after them.
const QUEUE_SIZE: u16 = 256;

const FEATURES: u64 = 1 << VIRTIO_NET_F_CSUM
    | control::GUEST_OFFLOADS
    | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
    | 1 << VIRTIO_NET_F_CTRL_VQ
    | 1 << VIRTIO_NET_F_GUEST_ANNOUNCE
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
    #[error("NIC {nic}: {pairs} queue pairs, not 1 to {QUEUES_MAX}")]
    Pairs { nic: String, pairs: u16 },
    #[error("NIC {nic} has {pairs} queue pairs, and {passed} descriptors of {what} came for it")]
    Descriptors { nic: String, pairs: u16, passed: usize, what: &'static str },
    #[error("use the tap of NIC {nic}")]
    Tap {
        nic: String,
        #[source]
        source: io::Error,
    },
    #[error("start the threads of NIC {nic}")]
    Start {
        nic: String,
        #[source]
        source: io::Error,
    },
}

/// The open files of a NIC.
#[derive(Debug)]
pub struct NicFiles {
    /// One of the tap for each queue pair.
    pub taps: Vec<OwnedFd>,
    /// One of `/dev/vhost-net` for each, or none.
    pub vhosts: Vec<OwnedFd>,
}

/// The device. Dropping it closes the tap.
pub struct Net {
    /// One for each queue pair.
    workers: Vec<Worker<Command>>,
    handle: NetHandle,
    queue_sizes: Vec<u16>,
    mac_address: [u8; 6],
    mtu: u16,
}

/// The control side of a NIC. It may be used from any thread while the guest runs.
#[derive(Clone)]
pub struct NetHandle {
    nic: Arc<str>,
    shared: Arc<Shared>,
    mailboxes: Arc<[Mailbox<Command>]>,
}

impl Net {
    pub fn new(config: &NicConfig, files: NicFiles, hook: &ThreadStart) -> Result<Self, NetError> {
        let nic = || config.name.clone();
        let mac_address = parse_mac_address(&config.mac_address)
            .ok_or_else(|| NetError::MacAddress { nic: nic(), mac_address: config.mac_address.clone() })?;
        let pairs = config.queue_pairs;
        if !(1..=QUEUES_MAX).contains(&pairs) {
            return Err(NetError::Pairs { nic: nic(), pairs });
        }
        let count = usize::from(pairs);
        let taps = check_taps(&config.name, pairs, files.taps)?;
        if !files.vhosts.is_empty() && files.vhosts.len() != count {
            let passed = files.vhosts.len();
            return Err(NetError::Descriptors { nic: nic(), pairs, passed, what: "/dev/vhost-net" });
        }
        let shared = Arc::new(Shared::new(config));
        let workers = start_workers(config, taps, files.vhosts, &shared, hook)
            .map_err(|source| NetError::Start { nic: nic(), source })?;
        let mailboxes = workers.iter().map(Worker::mailbox).collect();
        let handle = NetHandle { nic: config.name.as_str().into(), shared, mailboxes };
        let queue_sizes = vec![QUEUE_SIZE; 2 * count + 1];
        Ok(Self { workers, handle, queue_sizes, mac_address, mtu: config.mtu })
    }

    pub fn handle(&self) -> NetHandle {
        self.handle.clone()
    }

    /// `struct virtio_net_config` (virtio 1.2, section 5.1.4).
    fn config_space(&self) -> [u8; 12] {
        let mut space = [0; 12];
        space[..6].copy_from_slice(&self.mac_address);
        space[6..8].copy_from_slice(&self.handle.shared.link.status().to_le_bytes());
        space[8..10].copy_from_slice(&(self.workers.len() as u16).to_le_bytes());
        space[10..12].copy_from_slice(&self.mtu.to_le_bytes());
        space
    }
}

fn check_taps(nic: &str, pairs: u16, taps: Vec<OwnedFd>) -> Result<Vec<Tap>, NetError> {
    if taps.len() != usize::from(pairs) {
        return Err(NetError::Descriptors { nic: nic.into(), pairs, passed: taps.len(), what: "its tap" });
    }
    let check = |tap| Tap::new(tap, pairs > 1).map_err(|source| NetError::Tap { nic: nic.into(), source });
    taps.into_iter().map(check).collect()
}

/// In the order of the pairs.
fn start_workers(
    config: &NicConfig,
    taps: Vec<Tap>,
    vhosts: Vec<OwnedFd>,
    shared: &Arc<Shared>,
    hook: &ThreadStart,
) -> io::Result<Vec<Worker<Command>>> {
    let mut vhosts = vhosts.into_iter();
    let mut pairs = Vec::with_capacity(taps.len());
    for (index, tap) in taps.into_iter().enumerate() {
        let kernel = vhosts.next().map(Kernel::new).transpose()?;
        pairs.push(Pair::new(index, tap, kernel, shared.clone()));
    }
    let spawn = |name, pair| Worker::spawn(name, ThreadRole::Net, hook, pair);
    let others = pairs.split_off(1).into_iter().enumerate();
    let mut workers = others
        .map(|(index, pair)| spawn(format!("nic-{}-{}", config.name, index + 1), pair))
        .collect::<io::Result<Vec<_>>>()?;
    let mailboxes: Vec<_> = workers.iter().map(Worker::mailbox).collect();
    for mailbox in &mailboxes {
        mailbox.call_briefly(|reply| Command::SetAttached { attached: false, reply })?;
    }
    for first in pairs {
        workers.insert(0, spawn(format!("nic-{}", config.name), first.with_others(mailboxes.clone()))?);
    }
    if !config.link_up {
        let first = workers[0].mailbox();
        first.call_briefly(|reply| Command::LinkChanged { change: LinkChange::None, reply })?;
    }
    Ok(workers)
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
    /// From now on the NIC uses this tap, of which there is a descriptor for each queue pair; the old one
    /// is closed. On an error the old one stays.
    pub fn replace_tap(&self, taps: Vec<OwnedFd>) -> Result<(), NetError> {
        let taps = check_taps(&self.nic, self.mailboxes.len() as u16, taps)?;
        for (mailbox, tap) in self.mailboxes.iter().zip(taps) {
            mailbox
                .call_briefly(|reply| Command::ReplaceTap { tap, reply })
                .and_then(|result| result)
                .map_err(|source| NetError::Tap { nic: self.nic.to_string(), source })?;
        }
        Ok(())
    }

    /// Other limits from now on. With any, this process moves the frames.
    pub fn set_limits(&self, receive: Limits, transmit: Limits) {
        self.shared.receive_limiter.set(receive);
        self.shared.transmit_limiter.set(transmit);
        for mailbox in self.mailboxes.iter() {
            // A thread that has ended limits nothing any more.
            let _ = mailbox.tell(Command::LimitsChanged);
        }
    }

    /// Plugs the cable in, or pulls it. When it returns, no frame passes a pulled one.
    pub fn set_link(&self, up: bool) -> Result<(), NetError> {
        let change = self.shared.link.set_plugged_in(up);
        self.mailboxes
            .iter()
            .try_for_each(|mailbox| mailbox.call_briefly(|reply| Command::LinkChanged { change, reply }))
            .map_err(|source| NetError::Tap { nic: self.nic.to_string(), source })
    }

    pub fn metrics(&self) -> NicMetrics {
        self.shared.counters.snapshot()
    }
}

impl VirtioDevice for Net {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        if self.workers.len() > 1 { FEATURES | 1 << VIRTIO_NET_F_MQ } else { FEATURES }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        super::read_config_space(&self.config_space(), offset, data);
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { memory, queues, interrupt, features } = activation;
        let shared = &self.handle.shared;
        let of_pairs = split_queues(queues, self.workers.len(), features);
        if of_pairs.is_empty() {
            return Err(ActivateError("the receive and the transmit queue must both be ready".into()));
        }
        shared.offloads.store(features, Ordering::Release);
        shared.pairs_ready.store(of_pairs.len() as u16, Ordering::Release);
        // The first last: it may at once be asked to have the others used.
        for (worker, queues) in self.workers.iter().zip(of_pairs).rev() {
            let (memory, interrupt) = (memory.clone(), interrupt.clone());
            worker.start(Activation { memory, queues, interrupt, features })?;
        }
        Ok(())
    }

    fn reset(&mut self) {
        // The first one first: then it asks nothing of the others any more.
        for worker in &self.workers {
            worker.stop();
        }
        self.handle.shared.link.announced();
    }
}

/// The queues of each pair, as far as they are complete, and the control queue with those of the first.
/// A driver that doesn't know of several pairs finds the control queue after the first one.
fn split_queues(queues: Vec<ActiveQueue>, pairs: usize, features: u64) -> Vec<Vec<ActiveQueue>> {
    let pairs = if features & 1 << VIRTIO_NET_F_MQ != 0 { pairs } else { 1 };
    let mut of_pairs: Vec<Vec<ActiveQueue>> = (0..pairs).map(|_| Vec::new()).collect();
    let mut control = None;
    for queue in queues {
        match of_pairs.get_mut(usize::from(queue.index / 2)) {
            Some(pair) => pair.push(queue),
            None if usize::from(queue.index) == 2 * pairs => control = Some(queue),
            None => {}
        }
    }
    let complete = of_pairs.iter().take_while(|pair| pair.len() == 2).count();
    of_pairs.truncate(complete);
    if let (Some(first), Some(control), true) =
        (of_pairs.first_mut(), control, features & 1 << VIRTIO_NET_F_CTRL_VQ != 0)
    {
        first.push(control);
    }
    of_pairs
}
