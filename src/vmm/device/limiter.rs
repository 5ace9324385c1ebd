//! How much may pass: token buckets over a clock that the caller reads.
//!
//! A bucket fills at its rate up to its burst. A request passes when the bucket holds what it costs,
//! or is full: one that costs more than a full bucket passes too, once the bucket is full, and leaves
//! a debt that the rate pays off before anything else passes. So over any time `t` no more passes than
//! `rate · t + burst`, but for the excess of a single such request, and nothing waits for ever.
//!
//! [`Limiter`] is arithmetic alone. [`SharedLimiter`] is one for several threads, each of which waits
//! with one request at a time: who came first passes first, so that the small requests of one queue
//! can't starve a large one of another.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::vmm::config::{Bucket, Limits};

const NANOS_PER_SECOND: i128 = 1_000_000_000;
/// Who waits behind somebody else looks again after at least this time.
const TURN_WAIT: Duration = Duration::from_millis(1);

/// What a request takes out of the buckets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    pub bytes: u64,
    pub operations: u64,
}

impl Cost {
    /// One request, or one packet.
    pub fn one(bytes: u64) -> Self {
        Self { bytes, operations: 1 }
    }
}

/// One bucket. Its contents are counted in billionths of a token, in which the rate is whole: tokens
/// per second are billionths per nanosecond.
#[derive(Clone, Debug)]
struct TokenBucket {
    per_second: i128,
    burst: i128,
    /// Less than nothing after a request that was larger than the burst.
    level: i128,
    filled_at: Instant,
}

impl TokenBucket {
    fn full(bucket: Bucket, now: Instant) -> Self {
        // What is no limit at all by the configuration's rules would be an endless one here.
        let per_second = i128::from(bucket.per_second.max(1));
        let burst = i128::from(bucket.burst.max(1)) * NANOS_PER_SECOND;
        Self { per_second, burst, level: burst, filled_at: now }
    }

    fn fill(&mut self, now: Instant) {
        // A clock value from before the last one, of another thread, fills nothing.
        let elapsed = now.saturating_duration_since(self.filled_at);
        // Less than 2^94 nanoseconds, which the product with a rate may exceed: it saturates.
        let gained = (elapsed.as_nanos() as i128).saturating_mul(self.per_second);
        self.level = self.level.saturating_add(gained).min(self.burst);
        self.filled_at = self.filled_at.max(now);
    }

    /// How long after the last filling this many tokens may pass; nothing means: now.
    fn wait(&self, tokens: u64) -> Duration {
        let needed = (i128::from(tokens) * NANOS_PER_SECOND).min(self.burst);
        let missing = (needed - self.level).max(0);
        let nanos = missing / self.per_second + i128::from(missing % self.per_second != 0);
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }

    fn take(&mut self, tokens: u64) {
        self.level = self.level.saturating_sub(i128::from(tokens) * NANOS_PER_SECOND);
    }
}

/// The buckets of [`Limits`].
#[derive(Clone, Debug)]
pub struct Limiter {
    bandwidth: Option<TokenBucket>,
    operations: Option<TokenBucket>,
}

impl Limiter {
    /// Full buckets.
    pub fn new(limits: Limits, now: Instant) -> Self {
        let full = |bucket: Option<Bucket>| bucket.map(|bucket| TokenBucket::full(bucket, now));
        Self { bandwidth: full(limits.bandwidth), operations: full(limits.operations) }
    }

    /// Other limits from now on. A bucket keeps what it holds, as far as that fits; debts are forgotten,
    /// for they were made at another rate.
    pub fn set(&mut self, limits: Limits, now: Instant) {
        let old = std::mem::replace(self, Self::new(limits, now));
        let keep = |old: Option<TokenBucket>, new: &mut Option<TokenBucket>| {
            if let (Some(mut old), Some(new)) = (old, new) {
                old.fill(now);
                new.level = old.level.clamp(0, new.burst);
            }
        };
        keep(old.bandwidth, &mut self.bandwidth);
        keep(old.operations, &mut self.operations);
    }

    pub fn is_unlimited(&self) -> bool {
        self.bandwidth.is_none() && self.operations.is_none()
    }

    /// Takes what the request costs, or nothing: then it may pass after this time at the earliest.
    pub fn take(&mut self, cost: Cost, now: Instant) -> Result<(), Duration> {
        match self.wait(cost, now) {
            Duration::ZERO => {
                if let Some(bucket) = &mut self.bandwidth {
                    bucket.take(cost.bytes);
                }
                if let Some(bucket) = &mut self.operations {
                    bucket.take(cost.operations);
                }
                Ok(())
            }
            wait => Err(wait),
        }
    }

    /// How long until the request may pass if nothing else does before.
    pub fn wait(&mut self, cost: Cost, now: Instant) -> Duration {
        let wait = |bucket: &mut Option<TokenBucket>, tokens| {
            bucket.as_mut().map_or(Duration::ZERO, |bucket| {
                bucket.fill(now);
                bucket.wait(tokens)
            })
        };
        wait(&mut self.bandwidth, cost.bytes).max(wait(&mut self.operations, cost.operations))
    }
}

/// One limiter for several threads.
#[derive(Debug)]
pub struct SharedLimiter {
    /// Without limits nobody need take the lock.
    unlimited: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    limiter: Limiter,
    /// Who was refused and has not passed since, by number, with the cost.
    waiting: VecDeque<(usize, Cost)>,
}

impl SharedLimiter {
    pub fn new(limits: Limits) -> Self {
        let limiter = Limiter::new(limits, Instant::now());
        Self {
            unlimited: AtomicBool::new(limiter.is_unlimited()),
            state: Mutex::new(State { limiter, waiting: VecDeque::new() }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing in here panics half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn is_unlimited(&self) -> bool {
        self.unlimited.load(Ordering::Acquire)
    }

    /// Those that wait should be woken: their waits were reckoned at the old rate.
    pub fn set(&self, limits: Limits) {
        let mut state = self.lock();
        state.limiter.set(limits, Instant::now());
        self.unlimited.store(state.limiter.is_unlimited(), Ordering::Release);
    }

    /// As [`Limiter::take`], for the thread of this number: once refused it keeps its place in the line
    /// until it passes or gives up.
    pub fn take(&self, thread: usize, cost: Cost) -> Result<(), Duration> {
        if self.is_unlimited() {
            return Ok(());
        }
        self.lock().take(thread, cost, Instant::now())
    }

    /// The thread's request will never pass (its device was reset).
    pub fn give_up(&self, thread: usize) {
        self.lock().waiting.retain(|(waiting, _)| *waiting != thread);
    }
}

impl State {
    fn take(&mut self, thread: usize, cost: Cost, now: Instant) -> Result<(), Duration> {
        if self.limiter.is_unlimited() {
            self.waiting.clear();
            return Ok(());
        }
        match self.waiting.front().copied() {
            Some((first, its_cost)) if first != thread => {
                if self.waiting.iter().all(|(waiting, _)| *waiting != thread) {
                    self.waiting.push_back((thread, cost));
                }
                Err(self.limiter.wait(its_cost, now).max(TURN_WAIT))
            }
            first => {
                let result = self.limiter.take(cost, now);
                match (result, first) {
                    (Ok(()), Some(_)) => {
                        self.waiting.pop_front();
                    }
                    (Err(_), None) => self.waiting.push_back((thread, cost)),
                    _ => {}
                }
                result
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bucket(per_second: u64, burst: u64) -> Option<Bucket> {
        Some(Bucket { per_second, burst })
    }

    fn bandwidth(per_second: u64, burst: u64) -> Limits {
        Limits { bandwidth: bucket(per_second, burst), operations: None }
    }

    #[test]
    fn a_rest_earns_one_burst_and_no_more() {
        let start = Instant::now();
        let mut limiter = Limiter::new(bandwidth(1000, 500), start);
        assert_eq!(limiter.take(Cost::one(500), start), Ok(()));
        assert_eq!(limiter.take(Cost::one(1), start), Err(Duration::from_millis(1)));
        let later = start + Duration::from_secs(3600);
        assert_eq!(limiter.take(Cost::one(500), later), Ok(()));
        assert_eq!(limiter.take(Cost::one(250), later), Err(Duration::from_millis(250)));
        assert_eq!(limiter.take(Cost::one(250), later + Duration::from_millis(250)), Ok(()));
    }

    #[test]
    fn a_request_larger_than_the_burst_passes_and_leaves_a_debt() {
        let start = Instant::now();
        let mut limiter = Limiter::new(bandwidth(100, 100), start);
        assert_eq!(limiter.take(Cost::one(1000), start), Ok(()));
        // 900 of debt, and then a full bucket for the next of its kind.
        assert_eq!(limiter.take(Cost::one(1), start), Err(Duration::from_millis(9010)));
        assert_eq!(limiter.take(Cost::one(1000), start), Err(Duration::from_secs(10)));
        assert_eq!(limiter.take(Cost::one(1000), start + Duration::from_secs(10)), Ok(()));
    }

    #[test]
    fn both_buckets_must_hold_enough_and_a_refusal_takes_from_neither() {
        let start = Instant::now();
        let limits = Limits { bandwidth: bucket(1000, 1000), operations: bucket(1, 2) };
        let mut limiter = Limiter::new(limits, start);
        assert_eq!(limiter.take(Cost::one(400), start), Ok(()));
        assert_eq!(limiter.take(Cost::one(700), start), Err(Duration::from_millis(100)));
        assert_eq!(limiter.take(Cost::one(400), start), Ok(()));
        assert_eq!(limiter.take(Cost::one(0), start), Err(Duration::from_secs(1)));
    }

    #[test]
    fn new_limits_forgive_debts_and_give_no_second_burst() {
        let start = Instant::now();
        let mut limiter = Limiter::new(bandwidth(1, 1), start);
        limiter.take(Cost::one(1 << 40), start).unwrap();
        limiter.set(bandwidth(1000, 1000), start);
        assert_eq!(limiter.take(Cost::one(1000), start), Err(Duration::from_secs(1)));
        limiter.set(Limits::default(), start);
        assert!(limiter.is_unlimited());
        assert_eq!(limiter.take(Cost::one(u64::MAX), start), Ok(()));
        limiter.set(bandwidth(1000, 1000), start);
        assert_eq!(limiter.take(Cost::one(1000), start), Ok(()));
    }

    #[test]
    fn extremes_neither_overflow_nor_divide_by_nothing() {
        let start = Instant::now();
        let limits = Limits { bandwidth: bucket(u64::MAX, u64::MAX), operations: bucket(0, 0) };
        let mut limiter = Limiter::new(limits, start);
        let cost = Cost { bytes: u64::MAX, operations: u64::MAX };
        assert_eq!(limiter.take(cost, start), Ok(()));
        assert!(limiter.take(cost, start + Duration::from_secs(1 << 33)).is_err());
    }

    #[test]
    fn small_requests_of_one_thread_do_not_starve_a_large_one_of_another() {
        let start = Instant::now();
        let limiter = Limiter::new(bandwidth(1000, 1000), start);
        let mut state = State { limiter, waiting: VecDeque::new() };
        assert_eq!(state.take(0, Cost::one(10), start), Ok(()));
        assert_eq!(state.take(1, Cost::one(1000), start), Err(Duration::from_millis(10)));
        assert_eq!(state.take(0, Cost::one(1), start), Err(Duration::from_millis(10)));
        let later = start + Duration::from_millis(10);
        assert_eq!(state.take(0, Cost::one(1), later), Err(TURN_WAIT));
        assert_eq!(state.take(1, Cost::one(1000), later), Ok(()));
        assert_eq!(state.take(0, Cost::one(1), later), Err(Duration::from_millis(1)));
        assert_eq!(state.take(0, Cost::one(1), later + Duration::from_millis(1)), Ok(()));
        assert!(state.waiting.is_empty());
    }

    #[test]
    fn who_gives_up_holds_nobody_up() {
        let limiter = SharedLimiter::new(bandwidth(1, 100));
        assert_eq!(limiter.take(0, Cost::one(100)), Ok(()));
        assert!(limiter.take(0, Cost::one(100)).is_err());
        assert!(limiter.take(1, Cost::one(1)).is_err());
        limiter.give_up(0);
        assert!(limiter.take(1, Cost::one(1)).unwrap_err() <= Duration::from_secs(1));
        limiter.set(Limits::default());
        assert_eq!(limiter.take(1, Cost::one(1 << 40)), Ok(()));
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Requests that each wait as long as they are told: none is told to wait in vain, and at no
        /// instant has more passed than the rate and the burst allow.
        #[test]
        fn never_more_than_rate_and_burst_and_nobody_waits_for_ever(
            per_second in 1u64..1_000_000,
            burst in 1u64..1_000_000,
            requests in prop::collection::vec((0u64..3_000_000, 0u64..2_000_000_000), 1..100),
        ) {
            let start = Instant::now();
            let mut limiter = Limiter::new(bandwidth(per_second, burst), start);
            let (mut now, mut passed) = (start, 0u128);
            for (bytes, pause_ns) in requests {
                now += Duration::from_nanos(pause_ns);
                if let Err(wait) = limiter.take(Cost::one(bytes), now) {
                    // A moment earlier is too early, else the wait was too long.
                    if let Some(early) = wait.checked_sub(Duration::from_nanos(1)) {
                        prop_assert!(limiter.take(Cost::one(bytes), now + early).is_err());
                    }
                    now += wait;
                    prop_assert_eq!(limiter.take(Cost::one(bytes), now), Ok(()));
                }
                let allowed = (now - start).as_nanos() * u128::from(per_second) / 1_000_000_000;
                prop_assert!(passed + u128::from(bytes.min(burst)) <= allowed + u128::from(burst));
                passed += u128::from(bytes);
            }
        }
    }
}
