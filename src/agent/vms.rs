//! What wakes the agent for VMs: the ends of their processes, and what these tell of themselves meanwhile.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd as _, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::host::linux::LinuxHost;
use crate::name::{Kind, ObjectId, ObjectName};
use crate::vmm::client::Watch;
use crate::vmm::protocol::{Condition, ConditionKind, Event};

/// Events taken from one VM at once: a guest may make them faster than they are read.
const EVENTS_MAX: usize = 64;

/// The VMs that run, as far as they are watched.
#[derive(Default)]
pub struct Vms {
    watched: BTreeMap<ObjectName, Watched>,
}

struct Watched {
    /// Readable when the process ends.
    process: OwnedFd,
    /// `None`: it didn't let us, or dropped us. The next look tries again.
    events: Option<Watch>,
    /// What has been told of: a condition that lasts is news once.
    told: BTreeSet<(String, Option<String>)>,
}

/// What a VM's process has told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    Ended,
    Condition(Condition),
    Over {
        kind: ConditionKind,
        device: Option<String>,
    },
    /// The guest has let go of a device.
    Unplugged {
        device: String,
    },
}

impl Vms {
    /// Watches these VMs where they run, and no others. What a newly watched one suffers from is told too.
    pub fn refresh(&mut self, host: &LinuxHost, names: &BTreeSet<&ObjectName>) -> Vec<(ObjectName, Heard)> {
        self.watched.retain(|name, _| names.contains(name));
        let mut heard = Vec::new();
        for &name in names {
            if !self.watched.contains_key(name) {
                let Ok(Some(process)) = host.vm_watch(name) else { continue };
                let watched = Watched { process, events: None, told: BTreeSet::new() };
                self.watched.insert(name.clone(), watched);
            }
            let Some(watched) = self.watched.get_mut(name).filter(|watched| watched.events.is_none()) else {
                continue;
            };
            // First the stream, then the state: nothing falls between them.
            watched.events = host.vm_events(name).ok().flatten();
            let conditions = host.vm_conditions(name).unwrap_or_default();
            let news =
                conditions.into_iter().filter_map(|condition| watched.hear(Event::Condition(condition)));
            heard.extend(news.map(|news| (name.clone(), news)));
        }
        heard
    }

    /// Everything that was told since, and forgets VMs that have ended.
    pub fn drain(&mut self) -> Vec<(ObjectName, Heard)> {
        let mut heard = Vec::new();
        self.watched.retain(|name, watched| {
            heard.extend(watched.drain().into_iter().map(|news| (name.clone(), news)));
            let runs = !is_readable(&watched.process);
            if !runs {
                heard.push((name.clone(), Heard::Ended));
            }
            runs
        });
        heard
    }

    pub fn poll_fds(&self) -> impl Iterator<Item = PollFd<'_>> {
        self.watched.values().flat_map(|watched| {
            let events =
                watched.events.as_ref().map(|events| PollFd::from_borrowed_fd(events.as_fd(), PollFlags::IN));
            std::iter::once(PollFd::new(&watched.process, PollFlags::IN)).chain(events)
        })
    }
}

impl super::Agent<'_> {
    /// Takes in what VMs have told. True: the host is to be looked at.
    pub(super) fn hear(&mut self, heard: Vec<(ObjectName, Heard)>) -> bool {
        let mut due = false;
        for (name, news) in heard {
            let id = ObjectId::new(Kind::VirtualMachine, name);
            match news {
                Heard::Ended => due = true,
                Heard::Condition(condition) => {
                    self.log.say(&format!("! {id}: {:?}: {}", condition.kind, condition.message));
                }
                Heard::Over { kind, device } => {
                    let device = device.map(|device| format!(" of {device}")).unwrap_or_default();
                    self.log.say(&format!("{id}: {kind:?}{device} is over"));
                }
                Heard::Unplugged { device } => {
                    self.log.say(&format!("{id}: the guest has let go of {device}"));
                    // What waited for it need not wait for the next try.
                    self.backoff.succeeded(&id);
                    due = true;
                }
            }
        }
        due
    }
}

impl Watched {
    fn drain(&mut self) -> Vec<Heard> {
        let mut heard = Vec::new();
        for _ in 0..EVENTS_MAX {
            let Some(events) = &self.events else { break };
            match events.next(Duration::ZERO) {
                Ok(Some(event)) => heard.extend(self.hear(event)),
                Ok(None) => break,
                // Its end, or we read too slowly: either way the next look finds out.
                Err(_) => self.events = None,
            }
        }
        heard
    }

    fn hear(&mut self, event: Event) -> Option<Heard> {
        match event {
            Event::Condition(condition) => {
                let key = (format!("{:?}", condition.kind), condition.device.clone());
                self.told.insert(key).then_some(Heard::Condition(condition))
            }
            Event::Cleared { kind, device } => {
                self.told.remove(&(format!("{kind:?}"), device.clone()));
                Some(Heard::Over { kind, device })
            }
            Event::DeviceRemoved { device } => Some(Heard::Unplugged { device }),
            Event::Phase(_) | Event::Rebooted | Event::DeviceAdded { .. } | Event::Exit(_) => None,
        }
    }
}

fn is_readable(fd: &OwnedFd) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    matches!(poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&now)), Ok(1..))
}
