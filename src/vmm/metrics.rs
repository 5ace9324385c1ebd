//! What a VM process counts. The live side ([`Counter`], [`Gauge`], [`LatencyHistogram`] and the structs
//! made of them) is plain atomics that their threads add to; reading them stops nobody. The other side
//! ([`Metrics`]) is what was read, to be sent and shown.
//!
//! Counters only grow, from the process's start, through resets of the guest too: who wants rates takes
//! the difference of two readings. Values of one reading may be apart by what happened meanwhile.
//!
//! A newer `vmctl` reads an older process: what that didn't count is zero.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A number that grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, more: u64) {
        // Relaxed: nothing is published by a count.
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    pub fn increment(&self) {
        self.add(1);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// A number that comes and goes.
#[derive(Debug, Default)]
pub struct Gauge(AtomicU64);

impl Gauge {
    pub fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// Who takes has added before.
    pub fn subtract(&self, less: u64) {
        self.0.fetch_sub(less, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Each power of two is cut into this many buckets: an estimate is off by a quarter at most.
const STEPS: usize = 1 << STEP_BITS;
const STEP_BITS: u32 = 2;
/// From 16.8 s on all is one bucket.
const OCTAVES_END: u32 = 24;
const BUCKETS: usize = STEPS + (OCTAVES_END - STEP_BITS) as usize * STEPS + 1;

/// The bucket of a time in microseconds. Below [`STEPS`] each microsecond has its own.
fn bucket(us: u64) -> usize {
    let Some(octave) = us.checked_ilog2().filter(|octave| *octave >= STEP_BITS) else { return us as usize };
    if octave >= OCTAVES_END {
        return BUCKETS - 1;
    }
    let step = (us >> (octave - STEP_BITS)) as usize & (STEPS - 1);
    (octave - STEP_BITS + 1) as usize * STEPS + step
}

/// The shortest time of a bucket, in microseconds.
fn bucket_start(bucket: usize) -> u64 {
    if bucket < STEPS {
        return bucket as u64;
    }
    let bucket = bucket.min(BUCKETS - 1);
    let shift = (bucket / STEPS - 1) as u32;
    ((STEPS + bucket % STEPS) as u64) << shift
}

/// How long things took, in buckets that widen with the time. To record costs two relaxed additions,
/// and rarely a new maximum.
#[derive(Debug)]
pub struct LatencyHistogram {
    buckets: [AtomicU64; BUCKETS],
    total_us: AtomicU64,
    longest_us: AtomicU64,
}

impl Default for LatencyHistogram {
    fn default() -> Self {
        Self {
            buckets: [const { AtomicU64::new(0) }; BUCKETS],
            total_us: AtomicU64::new(0),
            longest_us: AtomicU64::new(0),
        }
    }
}

impl LatencyHistogram {
    pub fn record(&self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.buckets[bucket(us)].fetch_add(1, Ordering::Relaxed);
        self.total_us.fetch_add(us, Ordering::Relaxed);
        if us > self.longest_us.load(Ordering::Relaxed) {
            self.longest_us.fetch_max(us, Ordering::Relaxed);
        }
    }
}

/// What a [`LatencyHistogram`] held.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Latency {
    /// How many buckets without a count precede those of `counts`.
    first: usize,
    counts: Vec<u64>,
    pub total_us: u64,
    pub longest_us: u64,
}

impl Latency {
    fn of(counts: &[u64], total_us: u64, longest_us: u64) -> Self {
        let first = counts.iter().position(|count| *count > 0).unwrap_or(0);
        let end = counts.iter().rposition(|count| *count > 0).map_or(first, |last| last + 1);
        Self { first, counts: counts[first..end].to_vec(), total_us, longest_us }
    }

    /// A process that we don't trust may have written what was read: what lies beyond the buckets is
    /// left out.
    fn dense(&self) -> [u64; BUCKETS] {
        let mut dense = [0; BUCKETS];
        for (bucket, count) in dense.iter_mut().skip(self.first).zip(&self.counts) {
            *bucket = *count;
        }
        dense
    }

    /// How many times were recorded.
    pub fn count(&self) -> u64 {
        self.counts.iter().fold(0, |sum, count| sum.saturating_add(*count))
    }

    pub fn mean_us(&self) -> Option<u64> {
        self.total_us.checked_div(self.count())
    }

    /// The time within which this part of all stayed, in microseconds: `percentile_us(99)`. `None`:
    /// nothing was recorded.
    pub fn percentile_us(&self, percent: u8) -> Option<u64> {
        let count = self.count();
        if count == 0 {
            return None;
        }
        let dense = self.dense();
        // Rounded up: of two, the median is the first and the 99th percentile the second.
        let rank = (u128::from(count) * u128::from(percent)).div_ceil(100).max(1);
        let mut below = 0u128;
        for (bucket, inside) in dense.iter().map(|count| u128::from(*count)).enumerate() {
            if below + inside >= rank {
                let start = bucket_start(bucket);
                let end = if bucket + 1 == BUCKETS { self.longest_us } else { bucket_start(bucket + 1) };
                let width = end.saturating_sub(start);
                // As if the times lay evenly in their bucket.
                let into = u128::from(width) * (rank - below) / inside;
                return Some((start + into as u64).min(self.longest_us));
            }
            below += inside;
        }
        Some(self.longest_us)
    }

    /// What came between an earlier reading and this one. The longest time of those in between isn't
    /// known exactly: it is the end of the last bucket with a count.
    pub fn since(&self, earlier: &Self) -> Self {
        let mut counts = self.dense();
        for (count, before) in counts.iter_mut().zip(earlier.dense()) {
            *count = count.saturating_sub(before);
        }
        let longest = counts.iter().rposition(|count| *count > 0).map_or(0, |last| match last + 1 {
            BUCKETS => self.longest_us,
            end => bucket_start(end).min(self.longest_us),
        });
        Self::of(&counts, self.total_us.saturating_sub(earlier.total_us), longest)
    }
}

/// The live side of something that is counted.
pub trait Count {
    type Reading: Reading;

    fn read(&self) -> Self::Reading;
}

/// The reading of something that is counted.
pub trait Reading {
    /// Several queues of one device, each with counts of its own, become one.
    fn merge(&mut self, other: &Self);
}

impl Reading for u64 {
    fn merge(&mut self, other: &Self) {
        *self = self.saturating_add(*other);
    }
}

impl Reading for Latency {
    fn merge(&mut self, other: &Self) {
        let mut counts = self.dense();
        for (count, more) in counts.iter_mut().zip(other.dense()) {
            *count = count.saturating_add(more);
        }
        let total_us = self.total_us.saturating_add(other.total_us);
        *self = Self::of(&counts, total_us, self.longest_us.max(other.longest_us));
    }
}

impl Count for Counter {
    type Reading = u64;

    fn read(&self) -> u64 {
        self.get()
    }
}

impl Count for Gauge {
    type Reading = u64;

    fn read(&self) -> u64 {
        self.get()
    }
}

impl Count for LatencyHistogram {
    type Reading = Latency;

    fn read(&self) -> Latency {
        let counts = self.buckets.each_ref().map(|bucket| bucket.load(Ordering::Relaxed));
        let value = |of: &AtomicU64| of.load(Ordering::Relaxed);
        Latency::of(&counts, value(&self.total_us), value(&self.longest_us))
    }
}

/// Makes of one list of fields the live struct, its reading, and how one comes from the other.
macro_rules! counted {
    ($(#[$about:meta])* $live:ident => $reading:ident {
        $($(#[$doc:meta])* $field:ident: $count:ty,)*
    }) => {
        $(#[$about])*
        #[derive(Debug, Default)]
        pub struct $live {
            $($(#[$doc])* pub $field: $count,)*
        }

        impl $live {
            pub fn snapshot(&self) -> $reading {
                $reading { $($field: self.$field.read(),)* }
            }
        }

        $(#[$about])*
        #[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(default)]
        pub struct $reading {
            $($(#[$doc])* pub $field: <$count as Count>::Reading,)*
        }

        impl $reading {
            /// Adds what another thread counted for the same device.
            pub fn merge(&mut self, other: &Self) {
                $(self.$field.merge(&other.$field);)*
            }
        }
    };
}

counted! {
    /// Why a vCPU came out of KVM, as its thread sees it. What KVM handles inside is in [`KvmCounts`].
    VcpuExitCounters => VcpuExits {
        port_reads: Counter,
        port_writes: Counter,
        mmio_reads: Counter,
        mmio_writes: Counter,
        /// Only without an interrupt controller in the kernel.
        halts: Counter,
        interrupt_windows: Counter,
        /// By a signal: a kick.
        interrupted: Counter,
        /// A page of guest memory or a start-up message was waited for.
        again: Counter,
        /// Shutdowns, system events, and what ends the VM.
        others: Counter,
    }
}

counted! {
    /// A disk: what its worker (or each of its queues) did.
    DiskCounters => DiskMetrics {
        reads: Counter,
        read_bytes: Counter,
        writes: Counter,
        written_bytes: Counter,
        flushes: Counter,
        /// Discards and write-zeroes.
        discards: Counter,
        discarded_bytes: Counter,
        /// Requests that were answered with an error, each of the guest's own making or the storage's.
        errors: Counter,
        /// Requests taken from the queue and not answered yet.
        in_flight: Gauge,
        /// Times that the queue was left alone because a limit was reached.
        throttled: Counter,
        /// Notifications by the guest.
        notifications: Counter,
        /// Interrupts for the guest.
        interrupts: Counter,
        read_latency: LatencyHistogram,
        write_latency: LatencyHistogram,
        flush_latency: LatencyHistogram,
    }
}

counted! {
    /// A NIC, from the guest's side: it receives what the host sends.
    NicCounters => NicMetrics {
        received_packets: Counter,
        received_bytes: Counter,
        /// Frames for which the guest had no (or no good) buffer.
        received_dropped: Counter,
        sent_packets: Counter,
        sent_bytes: Counter,
        /// Frames that the tap refused, or that were malformed.
        sent_dropped: Counter,
        /// Errors of the tap.
        tap_errors: Counter,
        receive_throttled: Counter,
        transmit_throttled: Counter,
        /// Queue pairs whose frames the host's kernel moves (vhost). What it moves is counted by the tap,
        /// and not here.
        kernel_pairs: Gauge,
        /// Notifications by the guest.
        notifications: Counter,
        /// Interrupts for the guest.
        interrupts: Counter,
    }
}

counted! {
    /// The balloon and what the guest says of its memory.
    BalloonCounters => BalloonMetrics {
        /// What the balloon is to hold.
        target_bytes: Gauge,
        /// What it holds.
        actual_bytes: Gauge,
        /// Given back by free page reporting, all together.
        reported_bytes: Counter,
        /// Ranges that the guest named and that couldn't be given back.
        errors: Counter,
        /// Of the guest's statistics; zero until it has told.
        free_bytes: Gauge,
        available_bytes: Gauge,
        total_bytes: Gauge,
        disk_caches_bytes: Gauge,
        swapped_in_bytes: Gauge,
        swapped_out_bytes: Gauge,
        major_faults: Gauge,
        minor_faults: Gauge,
        /// When the guest last told, in milliseconds of the process's uptime; 0: never.
        told_at_ms: Gauge,
    }
}

counted! {
    /// virtio-vsock.
    VsockCounters => VsockMetrics {
        /// Open now.
        connections: Gauge,
        opened: Counter,
        refused: Counter,
        received_bytes: Counter,
        sent_bytes: Counter,
        /// Packets that were malformed or belonged to no connection.
        bad_packets: Counter,
    }
}

counted! {
    /// virtio-rng.
    EntropyCounters => EntropyMetrics {
        requests: Counter,
        bytes: Counter,
        throttled: Counter,
        errors: Counter,
    }
}

/// Everything that is counted, at one instant.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Metrics {
    /// Since the process started its vCPUs.
    pub uptime_ms: u64,
    /// In their order.
    pub vcpus: Vec<VcpuMetrics>,
    /// By name.
    pub disks: BTreeMap<String, DiskMetrics>,
    /// By name.
    pub nics: BTreeMap<String, NicMetrics>,
    pub balloon: Option<BalloonMetrics>,
    pub vsock: Option<VsockMetrics>,
    pub entropy: EntropyMetrics,
    pub process: ProcessMetrics,
}

/// One vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct VcpuMetrics {
    /// Processor time of its thread, the guest's and our own. How long the thread waited for a processor
    /// is known outside alone (`/proc/PID/task/*/schedstat`, of the thread of this name).
    pub run_us: u64,
    pub exits: VcpuExits,
    /// `None`: this host's KVM has no binary statistics (before Linux 5.14).
    pub kvm: Option<KvmCounts>,
}

/// KVM's own counts of a vCPU, of those that its kernel has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct KvmCounts {
    /// All exits, most of which the kernel handles itself.
    pub exits: u64,
    pub halt_exits: u64,
    pub halt_wait_ns: u64,
    pub interrupt_exits: u64,
    pub interrupt_injections: u64,
}

/// The VM process beside its guest.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ProcessMetrics {
    /// Size of the guest's memory.
    pub guest_bytes: u64,
    /// Processor time of all threads.
    pub run_us: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::config::{DEVICES_MAX, VCPUS_MAX};
    use crate::vmm::protocol::{PACKET_BYTES_MAX, Response};
    use proptest::prelude::*;

    fn recorded(times_us: &[u64]) -> Latency {
        let histogram = LatencyHistogram::default();
        for us in times_us {
            histogram.record(Duration::from_micros(*us));
        }
        histogram.read()
    }

    #[test]
    fn buckets_follow_one_another_without_a_gap() {
        for bucket_number in 0..BUCKETS {
            let start = bucket_start(bucket_number);
            assert_eq!(bucket(start), bucket_number);
            if bucket_number > 0 {
                assert_eq!(bucket(start - 1), bucket_number - 1);
            }
        }
        assert_eq!(bucket(u64::MAX), BUCKETS - 1);
        assert_eq!(bucket_start(BUCKETS - 1), 1 << OCTAVES_END);
    }

    #[test]
    fn percentiles_of_nothing_one_and_two() {
        assert_eq!(recorded(&[]).percentile_us(99), None);
        let one = recorded(&[700]);
        assert_eq!(
            (one.percentile_us(0), one.percentile_us(50), one.percentile_us(99)),
            (Some(700), Some(700), Some(700))
        );
        let two = recorded(&[10, 60_000_000]);
        assert_eq!((two.count(), two.mean_us()), (2, Some(30_000_005)));
        assert!((10..=12).contains(&two.percentile_us(50).unwrap()));
        assert_eq!(two.percentile_us(99), Some(60_000_000));
    }

    proptest! {
        #[test]
        fn percentiles_are_near_the_truth(times in prop::collection::vec(0u64..16_000_000, 1..200), percent in 1u8..=100) {
            let latency = recorded(&times);
            let mut sorted = times.clone();
            sorted.sort_unstable();
            let truth = sorted[(sorted.len() * usize::from(percent)).div_ceil(100) - 1];
            let estimate = latency.percentile_us(percent).unwrap();
            // Both lie in one bucket, which is a quarter of its start wide.
            prop_assert!(estimate.abs_diff(truth) <= truth / STEPS as u64 + 1, "{estimate} for {truth}");
            prop_assert!(estimate <= *sorted.last().unwrap());
        }

        #[test]
        fn to_merge_is_to_record_all(one in prop::collection::vec(any::<u32>(), 0..50), two in prop::collection::vec(any::<u32>(), 0..50)) {
            let us = |times: &[u32]| times.iter().copied().map(u64::from).collect::<Vec<_>>();
            let mut merged = recorded(&us(&one));
            merged.merge(&recorded(&us(&two)));
            let both = recorded(&us(&[one.clone(), two.clone()].concat()));
            prop_assert_eq!(&merged, &both);
            let later = both.since(&recorded(&us(&one)));
            prop_assert_eq!(later.counts, recorded(&us(&two)).counts);
        }
    }

    #[test]
    fn what_an_older_process_does_not_count_is_zero() {
        let metrics: Metrics =
            serde_json::from_str(r#"{"uptime_ms": 5, "disks": {"root": {"reads": 3}}}"#).unwrap();
        assert_eq!(metrics.disks["root"], DiskMetrics { reads: 3, ..Default::default() });
        assert_eq!(metrics.vcpus, []);
    }

    #[test]
    fn nonsense_from_a_process_is_no_panic() {
        let latency: Latency =
            serde_json::from_str(r#"{"first": 18446744073709551615, "counts": [1, 18446744073709551615]}"#)
                .unwrap();
        assert_eq!(latency.percentile_us(99), Some(0));
        let latency: Latency = serde_json::from_str(&format!(
            r#"{{"first": 90, "counts": [{}1]}}"#,
            "18446744073709551615,".repeat(200)
        ))
        .unwrap();
        let mut twice = latency.clone();
        twice.merge(&latency);
        twice.since(&latency).percentile_us(50);
    }

    /// The largest machine, with more in every bucket than ten years of ten million requests a second
    /// would leave there, still fits into a packet.
    #[test]
    fn the_largest_reading_fits_into_a_packet() {
        const MANY: u64 = 34_000_000_000_000;
        let latency =
            Latency { first: 0, counts: vec![MANY; BUCKETS], total_us: u64::MAX, longest_us: u64::MAX };
        let disk = DiskMetrics {
            read_bytes: u64::MAX,
            written_bytes: u64::MAX,
            read_latency: latency.clone(),
            write_latency: latency.clone(),
            flush_latency: latency,
            ..Default::default()
        };
        let many = VcpuMetrics {
            run_us: u64::MAX,
            exits: VcpuExits { port_reads: u64::MAX, mmio_reads: u64::MAX, ..Default::default() },
            kvm: Some(KvmCounts { exits: u64::MAX, ..Default::default() }),
        };
        let metrics = Metrics {
            vcpus: vec![many; VCPUS_MAX.into()],
            disks: (0..DEVICES_MAX).map(|number| (format!("disk-{number:058}"), disk.clone())).collect(),
            balloon: Some(BalloonMetrics::default()),
            vsock: Some(VsockMetrics::default()),
            ..Default::default()
        };
        let packet = serde_json::to_vec(&Response::Metrics(Box::new(metrics))).unwrap();
        assert!(packet.len() <= PACKET_BYTES_MAX, "{} bytes", packet.len());
    }
}
