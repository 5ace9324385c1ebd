//! What the threads of one NIC, its registers and its control side share.

use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};

use virtio_bindings::virtio_net::{VIRTIO_NET_S_ANNOUNCE, VIRTIO_NET_S_LINK_UP};

use crate::vmm::config::NicConfig;
use crate::vmm::device::limiter::SharedLimiter;
use crate::vmm::metrics::NicCounters;

pub(super) struct Shared {
    pub link: Link,
    /// From the host to the guest.
    pub receive_limiter: SharedLimiter,
    pub transmit_limiter: SharedLimiter,
    pub counters: NicCounters,
    /// The features that say which offloads the taps are to have: those that were negotiated, until the
    /// driver changes its mind through the control queue.
    pub offloads: AtomicU64,
    /// Pairs whose queues the driver has set up.
    pub pairs_ready: AtomicU16,
}

impl Shared {
    pub fn new(config: &NicConfig) -> Self {
        Self {
            link: Link::new(config.link_up),
            receive_limiter: SharedLimiter::new(config.receive_limits),
            transmit_limiter: SharedLimiter::new(config.transmit_limits),
            counters: NicCounters::default(),
            offloads: AtomicU64::new(0),
            pairs_ready: AtomicU16::new(0),
        }
    }
}

/// The carrier: it is there when the cable is plugged in and there is something at its other end.
pub(super) struct Link {
    plugged_in: AtomicBool,
    tap_gone: AtomicBool,
    /// The driver is asked to tell the network where it is, and has not answered yet.
    announce: AtomicBool,
}

/// What [`Link`]'s changes have for the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LinkChange {
    None,
    Tell,
}

impl Link {
    fn new(plugged_in: bool) -> Self {
        Self {
            plugged_in: AtomicBool::new(plugged_in),
            tap_gone: AtomicBool::new(false),
            announce: AtomicBool::new(false),
        }
    }

    pub fn is_plugged_in(&self) -> bool {
        self.plugged_in.load(Ordering::Acquire)
    }

    fn is_up(&self) -> bool {
        self.is_plugged_in() && !self.tap_gone.load(Ordering::Acquire)
    }

    /// The field `status` of the configuration space.
    pub fn status(&self) -> u16 {
        let up = if self.is_up() { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        up | if self.announce.load(Ordering::Acquire) { VIRTIO_NET_S_ANNOUNCE as u16 } else { 0 }
    }

    pub fn set_plugged_in(&self, plugged_in: bool) -> LinkChange {
        self.change(|| self.plugged_in.store(plugged_in, Ordering::Release))
    }

    pub fn set_tap_gone(&self, gone: bool) -> LinkChange {
        self.change(|| self.tap_gone.store(gone, Ordering::Release))
    }

    fn change(&self, change: impl FnOnce()) -> LinkChange {
        let before = self.is_up();
        change();
        if before == self.is_up() { LinkChange::None } else { LinkChange::Tell }
    }

    /// Asks for an announcement, where there is a network to hear it.
    pub fn announce(&self) -> LinkChange {
        if !self.is_up() {
            return LinkChange::None;
        }
        self.announce.store(true, Ordering::Release);
        LinkChange::Tell
    }

    pub fn announced(&self) {
        self.announce.store(false, Ordering::Release);
    }
}
