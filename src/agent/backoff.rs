//! How long to leave an object alone after it failed: 200 ms, doubling to 60 s, with jitter so that many
//! don't come back at once. Reset by success or by a new declaration.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::name::ObjectId;

const FIRST: Duration = Duration::from_millis(200);
const LONGEST: Duration = Duration::from_secs(60);
/// A VM that ends so soon after it was started has failed to run, whatever the start said.
pub const STEADY: Duration = Duration::from_secs(10);
/// So many repairs of an object may come in a burst, and then one in each [`REPAIR_EVERY`]. Who needs more
/// is in a fight with somebody.
const REPAIRS_BURST: f64 = 60.0;
const REPAIR_EVERY: Duration = Duration::from_secs(1);

#[derive(Debug)]
struct Entry {
    failures: u32,
    until: Instant,
}

/// The objects that failed lately.
#[derive(Debug, Default)]
pub struct Backoff {
    entries: BTreeMap<ObjectId, Entry>,
    /// How many more repairs each object has to its credit, and as of when.
    credit: BTreeMap<ObjectId, (f64, Instant)>,
}

impl Backoff {
    pub fn failed(&mut self, object: &ObjectId, now: Instant) -> Duration {
        let failures = self.entries.get(object).map_or(0, |entry| entry.failures) + 1;
        let delay = delay(object, failures);
        self.entries.insert(object.clone(), Entry { failures, until: now + delay });
        delay
    }

    /// It was repaired. How long to leave it alone now, because somebody else changes it back all the time.
    pub fn repaired(&mut self, object: &ObjectId, now: Instant) -> Option<Duration> {
        let (credit, since) = self.credit.get(object).copied().unwrap_or((REPAIRS_BURST, now));
        let earned = (now - since).div_duration_f64(REPAIR_EVERY);
        let credit = (credit + earned).min(REPAIRS_BURST);
        self.credit.insert(object.clone(), ((credit - 1.0).max(0.0), now));
        if credit < 1.0 {
            return Some(self.failed(object, now));
        }
        self.succeeded(object);
        None
    }

    pub fn succeeded(&mut self, object: &ObjectId) {
        self.entries.remove(object);
    }

    pub fn reset(&mut self) {
        self.entries.clear();
        self.credit.clear();
    }

    /// Those to be left alone now.
    pub fn held(&self, now: Instant) -> BTreeSet<ObjectId> {
        self.entries.iter().filter(|(_, entry)| entry.until > now).map(|(id, _)| id.clone()).collect()
    }

    /// When the next of them is due.
    pub fn next_due(&self, now: Instant) -> Option<Instant> {
        self.entries.values().map(|entry| entry.until).filter(|until| *until > now).min()
    }
}

/// Between three quarters and five quarters of the doubled delay, the same for the same object and count.
fn delay(object: &ObjectId, failures: u32) -> Duration {
    let doubled = FIRST.saturating_mul(1 << (failures - 1).min(16)).min(LONGEST);
    let seed =
        object.to_string().bytes().fold(failures, |seed, byte| seed.wrapping_mul(31) ^ u32::from(byte));
    let jitter = f64::from(seed % 1000) / 2000.0;
    doubled.mul_f64(0.75 + jitter).min(LONGEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_to_a_minute_and_starts_anew_after_success() {
        let id: ObjectId = "VirtualMachine/web".parse().unwrap();
        let now = Instant::now();
        let mut backoff = Backoff::default();
        let delays: Vec<Duration> = (0..12).map(|_| backoff.failed(&id, now)).collect();
        assert!(delays[0] >= FIRST.mul_f64(0.75) && delays[0] <= FIRST.mul_f64(1.25));
        assert!(delays.iter().all(|delay| *delay <= LONGEST));
        assert!(delays[11] >= LONGEST.mul_f64(0.75));
        assert!(backoff.held(now).contains(&id));
        assert!(backoff.held(now + LONGEST * 2).is_empty());
        backoff.succeeded(&id);
        assert!(backoff.held(now).is_empty());
        assert!(backoff.failed(&id, now) <= FIRST.mul_f64(1.25));
    }

    #[test]
    fn a_fight_slows_down_and_repairs_now_and_then_do_not() {
        let id: ObjectId = "Bridge/br0".parse().unwrap();
        let mut now = Instant::now();
        let mut backoff = Backoff::default();
        for _ in 0..1000 {
            now += REPAIR_EVERY;
            assert_eq!(backoff.repaired(&id, now), None);
        }
        let mut repairs = 0;
        let end = now + Duration::from_secs(600);
        while now < end {
            repairs += 1;
            now += Duration::from_millis(20) + backoff.repaired(&id, now).unwrap_or_default();
        }
        assert!((100..2000).contains(&repairs), "{repairs} repairs in ten minutes");
    }
}
