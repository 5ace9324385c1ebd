//! Networks' services that run, so that the end of one is an event.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::host::linux::LinuxHost;
use crate::name::{Kind, Mark};
use crate::resolve::Desired;

#[derive(Default)]
pub struct Services {
    /// Readable when the process ends.
    watched: Vec<OwnedFd>,
}

impl Services {
    pub fn refresh(&mut self, host: &LinuxHost, desired: &Desired) {
        let set = &desired.declared.set;
        let networks = desired.order.iter().filter(|id| id.kind == Kind::Network);
        self.watched =
            networks.filter_map(|id| host.service_watch(&Mark::new(set.clone(), id.clone()))).collect();
    }

    pub fn fds(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.watched.iter().map(AsFd::as_fd)
    }

    /// True: one has ended. It is told once.
    pub fn drain(&mut self) -> bool {
        let before = self.watched.len();
        self.watched.retain(|fd| {
            let mut fds = [PollFd::new(fd, PollFlags::IN)];
            poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready == 0)
        });
        self.watched.len() < before
    }
}
