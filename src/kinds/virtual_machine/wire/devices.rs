//! Disks, NICs and the other devices in the YAML form.

use std::collections::BTreeSet;
use std::net::IpAddr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::super::{
    AccessVlan, Attachment, Disk as InnerDisk, Interface as InnerInterface, TrunkVlans, Vlans as InnerVlans,
};
use super::cloud_init::StaticNetwork;
use super::device_name;
use crate::kinds::{Problems, SpecProblem};
use crate::name::{ByteSize, MacAddress, ObjectName, VlanId};
use crate::vmm::config::{
    BalloonConfig, Bucket, CacheMode, EntropyConfig, Limits as InnerLimits, MEMORY_BYTES_MIN, MachineKind,
};

/// Queues of a disk that declares none: one for each vCPU, so that its requests and their ends stay on
/// that vCPU, to this bound, for each is a thread of the VM process.
const DEFAULT_DISK_QUEUES_MAX: u16 = 4;

/// A disk of the guest.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Disk {
    /// The Volume.
    pub volume: String,
    /// The disk's name in the VM and its serial number in the guest, at most 20 bytes. Default: `disk<index>`.
    pub name: Option<String>,
    /// Default: false.
    pub read_only: Option<bool>,
    /// Where written data may linger. `writeback`: in the host's page cache until the guest flushes.
    /// `direct`: past the host's page cache. `writethrough`: each write is on the disk before the guest
    /// hears of it. `unsafe`: flushes are ignored, for data that a crash of the host may take. Default: writeback;
    /// on a volume of a thin pool direct, so that a full pool holds the guest up and loses nothing.
    pub cache: Option<Cache>,
    /// Queues, 1 to 8. Default: with machine pci one for each vCPU, at most 4; with machine micro 1.
    #[schemars(range(min = 1, max = 8))]
    pub queues: Option<u16>,
    /// The most that it may do; changes live. Default: no limits.
    pub limits: Option<DiskLimits>,
}

/// Where written data may linger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    Writeback,
    Direct,
    Writethrough,
    Unsafe,
}

/// The most that a disk may do.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DiskLimits {
    /// Bytes read and written in a second, a binary quantity such as `50Mi`.
    pub bytes_per_second: Option<String>,
    /// Bytes that may pass at once after a rest. Default: those of one second.
    pub burst_bytes: Option<String>,
    /// Requests in a second, at least 1.
    #[schemars(range(min = 1))]
    pub operations_per_second: Option<u64>,
    /// Requests that may pass at once after a rest, at least 1. Default: those of one second.
    #[schemars(range(min = 1))]
    pub burst_operations: Option<u64>,
}

/// A NIC of the guest.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Interface {
    /// The Bridge that its tap is a port of; changes live. This or `network`.
    pub bridge: Option<String>,
    /// The Network that it is in; changes live. This or `bridge`.
    pub network: Option<String>,
    /// Its IP addresses in its `network`, at most one of each family, without a prefix: DHCP gives them to it (the
    /// IPv6 one where the network has `routerAdvertisements`), and DNS knows the VM's name by them. Default: what DHCP
    /// chooses.
    pub addresses: Option<Vec<String>>,
    /// Whether what the guest sends in its `network` must bear its own MAC and IP addresses, and be neither the
    /// work of a DHCP server nor of a router, nor tagged. A guest with guests, bridges or routes of its own
    /// needs it off; changes live. Default: true with `network`.
    pub anti_spoofing: Option<bool>,
    /// The NIC's name in the VM, at most 20 bytes. Default: `net<index>`.
    pub name: Option<String>,
    /// Its address. Default: made from the set's, the VM's and the NIC's names, and so always the same.
    pub mac_address: Option<String>,
    /// Its VLANs on a bridge with `vlanFiltering`; changes live. Default: the bridge's `defaultPvid`.
    pub vlan: Option<InterfaceVlan>,
    /// Queue pairs, 1 to 8: more than one helps a guest of several vCPUs with many connections. Default: 1.
    #[schemars(range(min = 1, max = 8))]
    pub queues: Option<u16>,
    /// With `cloudInit`: what the guest gives this NIC by itself. Default: it asks by DHCP.
    pub static_network: Option<StaticNetwork>,
    /// Whether the guest sees a carrier, as with a cable that is plugged in; changes live. Default: true.
    pub link_up: Option<bool>,
    /// The most that may pass in each direction; changes live. Default: no limits.
    pub limits: Option<InterfaceLimits>,
}

/// VLANs of a NIC: `access`, or `trunk` and perhaps `native`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct InterfaceVlan {
    /// The guest sends and receives untagged frames, which are this VLAN's, 1 to 4094.
    pub access: Option<u64>,
    /// The guest sends and receives tagged frames of these VLANs, each 1 to 4094; a range is a text: `"20-30"`.
    pub trunk: Option<Vec<VlanRange>>,
    /// With `trunk`: the VLAN of untagged frames, 1 to 4094. Default: untagged frames are dropped.
    pub native: Option<u64>,
}

/// A VLAN's id, or several in a row.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum VlanRange {
    Id(u64),
    Range(String),
}

impl VlanRange {
    fn decode(&self) -> Result<std::ops::RangeInclusive<u16>, String> {
        let id = |id: u64| VlanId::new(id).map(VlanId::get).map_err(|error| error.to_string());
        match self {
            Self::Id(one) => id(*one).map(|one| one..=one),
            Self::Range(text) => {
                let wrong = || format!("`{text}` is not a range of VLANs such as 20-30");
                let (first, last) = text.split_once('-').ok_or_else(wrong)?;
                let number = |text: &str| text.trim().parse::<u64>().map_err(|_| wrong());
                let (first, last) = (id(number(first)?)?, id(number(last)?)?);
                if first > last {
                    return Err(format!("`{text}`: a range begins with its lowest VLAN"));
                }
                Ok(first..=last)
            }
        }
    }
}

/// The most that may pass a NIC.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct InterfaceLimits {
    /// From the host to the guest.
    pub receive: Option<DirectionLimits>,
    /// From the guest to the host.
    pub transmit: Option<DirectionLimits>,
}

/// The most that may pass in one direction.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct DirectionLimits {
    /// Bytes in a second, a binary quantity such as `50Mi`.
    pub bytes_per_second: Option<String>,
    /// Bytes that may pass at once after a rest. Default: those of one second.
    pub burst_bytes: Option<String>,
    /// Packets in a second, at least 1.
    #[schemars(range(min = 1))]
    pub packets_per_second: Option<u64>,
    /// Packets that may pass at once after a rest, at least 1. Default: those of one second.
    #[schemars(range(min = 1))]
    pub burst_packets: Option<u64>,
}

/// A memory balloon: memory that the guest gives back while it runs.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Balloon {
    /// What the balloon takes from the guest, a multiple of 4Ki below `memory`; changes live. Default: 0.
    pub target: Option<String>,
    /// How little memory the guest may be left with when the host's is short: the agent fills the balloon up
    /// to that, where the HostPolicy has `balloon`. Default: it doesn't.
    pub min_memory: Option<String>,
    /// Whether the guest tells which pages it doesn't use, for the host to take back. Default: true.
    pub free_page_reporting: Option<bool>,
    /// Whether the balloon gives way before the guest kills a process for want of memory. Default: true.
    pub deflate_on_oom: Option<bool>,
}

/// A vsock device.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Vsock {
    /// The guest's context id, 3 to 4294967294, unique on the host. Default: made from the set's and the
    /// VM's names, and so always the same.
    #[schemars(range(min = 3, max = 4294967294u32))]
    pub cid: Option<u32>,
}

/// The guest's source of random numbers.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Entropy {
    /// The most that the guest may draw. Default: no limit.
    pub limit: Option<EntropyLimit>,
}

/// The most that a guest may draw of random numbers.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct EntropyLimit {
    /// Bytes in a second, a binary quantity such as `64Ki`.
    pub bytes_per_second: String,
    /// Bytes that may pass at once after a rest. Default: those of one second.
    pub burst_bytes: Option<String>,
}

impl Disk {
    pub(super) fn decode(
        self,
        index: usize,
        machine: MachineKind,
        cpus: u8,
        names: &mut BTreeSet<String>,
        problems: &mut Problems,
    ) -> Option<InnerDisk> {
        let pointer = format!("/disks/{index}");
        let name = device_name(self.name, "disk", index, &pointer, names, problems);
        let volume = problems.take(&format!("{pointer}/volume"), ObjectName::parse(&self.volume));
        let cache = self.cache.map(|cache| match cache {
            Cache::Writeback => CacheMode::Writeback,
            Cache::Direct => CacheMode::Direct,
            Cache::Writethrough => CacheMode::Writethrough,
            Cache::Unsafe => CacheMode::Unsafe,
        });
        let queues = self.queues.unwrap_or(match machine {
            MachineKind::Pci => u16::from(cpus).min(DEFAULT_DISK_QUEUES_MAX),
            // Its queues share one interrupt: a second one gains nothing.
            MachineKind::Micro => 1,
        });
        let limits = match self.limits {
            None => InnerLimits::default(),
            Some(limits) => LimitFields {
                bytes: limits.bytes_per_second,
                burst_bytes: limits.burst_bytes,
                operations: limits.operations_per_second,
                burst_operations: limits.burst_operations,
                operations_name: "operationsPerSecond",
                burst_operations_name: "burstOperations",
            }
            .decode(&format!("{pointer}/limits"), problems),
        };
        let read_only = self.read_only.unwrap_or(false);
        Some(InnerDisk { name: name?, volume: volume?, read_only, cache, queues, limits })
    }
}

impl Interface {
    pub(super) fn decode(
        self,
        index: usize,
        has_cloud_init: bool,
        names: &mut BTreeSet<String>,
        problems: &mut Problems,
    ) -> Option<InnerInterface> {
        let pointer = format!("/interfaces/{index}");
        let guest_network =
            super::cloud_init::guest_network(self.static_network, has_cloud_init, &pointer, problems);
        let name = device_name(self.name, "net", index, &pointer, names, problems);
        let attachment = match (&self.bridge, &self.network) {
            (Some(bridge), None) => {
                problems.take(&format!("{pointer}/bridge"), ObjectName::parse(bridge)).map(Attachment::Bridge)
            }
            (None, Some(network)) => problems
                .take(&format!("{pointer}/network"), ObjectName::parse(network))
                .map(Attachment::Network),
            (Some(_), Some(_)) => {
                let message = "`bridge` and `network` are both given; a NIC has one of them";
                problems.add(SpecProblem::new(&pointer, message));
                None
            }
            (None, None) => {
                let message = "neither `bridge` nor `network` is given; a NIC has one of them";
                problems.add(SpecProblem::new(&pointer, message));
                None
            }
        };
        if self.anti_spoofing.is_some() && self.network.is_none() {
            let message = "`antiSpoofing` has a meaning only with `network`";
            problems.add(SpecProblem::new(format!("{pointer}/antiSpoofing"), message));
        }
        let anti_spoofing = self.anti_spoofing.unwrap_or(self.network.is_some());
        let mut addresses = BTreeSet::new();
        for (place, text) in self.addresses.unwrap_or_default().iter().enumerate() {
            let pointer = format!("{pointer}/addresses/{place}");
            let wrong = |_| format!("`{text}` is not an IP address such as 192.168.122.10, without a prefix");
            let Some(address) = problems.take(&pointer, text.parse::<IpAddr>().map_err(wrong)) else {
                continue;
            };
            if self.network.is_none() {
                problems.add(SpecProblem::new(&pointer, "`addresses` has a meaning only with `network`"));
            }
            if addresses.iter().any(|other: &IpAddr| other.is_ipv4() == address.is_ipv4()) {
                problems.add(SpecProblem::new(&pointer, "a NIC has one address of each family at most"));
            }
            addresses.insert(address);
        }
        let mac_address = self
            .mac_address
            .as_deref()
            .map(|text| problems.take(&format!("{pointer}/macAddress"), MacAddress::parse_unicast(text)));
        let vlans = self.vlan.map(|vlan| vlan.decode(&format!("{pointer}/vlan"), problems));
        let limits = self.limits.unwrap_or(InterfaceLimits { receive: None, transmit: None });
        let mut direction = |limits: Option<DirectionLimits>, name: &str| match limits {
            None => InnerLimits::default(),
            Some(limits) => LimitFields {
                bytes: limits.bytes_per_second,
                burst_bytes: limits.burst_bytes,
                operations: limits.packets_per_second,
                burst_operations: limits.burst_packets,
                operations_name: "packetsPerSecond",
                burst_operations_name: "burstPackets",
            }
            .decode(&format!("{pointer}/limits/{name}"), problems),
        };
        let (receive_limits, transmit_limits) =
            (direction(limits.receive, "receive"), direction(limits.transmit, "transmit"));
        let mac_address = match mac_address {
            Some(mac_address) => Some(mac_address?),
            None => None,
        };
        let vlans = match vlans {
            Some(vlans) => Some(vlans?),
            None => None,
        };
        Some(InnerInterface {
            name: name?,
            attachment: attachment?,
            addresses,
            anti_spoofing,
            mac_address,
            vlans,
            queues: self.queues.unwrap_or(1),
            link_up: self.link_up.unwrap_or(true),
            receive_limits,
            transmit_limits,
            guest_network,
        })
    }
}

impl InterfaceVlan {
    fn decode(self, pointer: &str, problems: &mut Problems) -> Option<InnerVlans> {
        let id = |field: &str, value: u64, problems: &mut Problems| {
            problems.take(&format!("{pointer}/{field}"), VlanId::new(value))
        };
        match (self.access, self.trunk) {
            (Some(access), None) => {
                let vlan = id("access", access, problems);
                if self.native.is_some() {
                    let message = "`native` has a meaning only with `trunk`";
                    problems.add(SpecProblem::new(format!("{pointer}/native"), message));
                }
                Some(InnerVlans::Access(AccessVlan { access: vlan? }))
            }
            (None, Some(trunk)) => {
                let native = self.native.map(|native| id("native", native, problems));
                let count = trunk.len();
                let mut tagged = BTreeSet::new();
                for (index, vlans) in trunk.into_iter().enumerate() {
                    let range = problems.take(&format!("{pointer}/trunk/{index}"), vlans.decode());
                    tagged.extend(range.into_iter().flatten().filter_map(|id| VlanId::new(id.into()).ok()));
                }
                let native = match native {
                    Some(native) => Some(native?),
                    None => None,
                };
                if tagged.is_empty() && count == 0 {
                    let problem =
                        SpecProblem::new(format!("{pointer}/trunk"), "a trunk carries a VLAN at least");
                    problems.add(problem.hint("`access: ID` is for a guest that knows of no VLAN"));
                }
                if let Some(native) = native.filter(|native| tagged.contains(native)) {
                    let message = format!("VLAN {native} can't be tagged and untagged at once");
                    problems.add(SpecProblem::new(format!("{pointer}/native"), message));
                }
                Some(InnerVlans::Trunk(TrunkVlans { trunk: tagged, native }))
            }
            (Some(_), Some(_)) => {
                let message = "`access` and `trunk` are both given; a NIC has one of them";
                problems.add(SpecProblem::new(pointer, message));
                None
            }
            (None, None) => {
                let message = "neither `access` nor `trunk` is given; a NIC has one of them";
                problems.add(SpecProblem::new(pointer, message));
                None
            }
        }
    }
}

impl Balloon {
    pub(super) fn decode(
        self,
        memory: Option<ByteSize>,
        problems: &mut Problems,
    ) -> (BalloonConfig, Option<ByteSize>) {
        let least = self.min_memory.as_deref().and_then(|text| least(text, memory, problems));
        let target = match &self.target {
            Some(text) => problems.take("/balloon/target", text.parse::<ByteSize>()),
            None => None,
        };
        let ByteSize(target_bytes) = target.unwrap_or(ByteSize(0));
        if !target_bytes.is_multiple_of(4 << 10) {
            problems.add(SpecProblem::new(
                "/balloon/target",
                format!("{} is not a multiple of 4Ki, a page", ByteSize(target_bytes)),
            ));
        }
        if let Some(memory) = memory.filter(|memory| target_bytes >= memory.0) {
            problems.add(SpecProblem::new(
                "/balloon/target",
                format!("{} leaves nothing of the guest's {memory}", ByteSize(target_bytes)),
            ));
        }
        let balloon = BalloonConfig {
            target_bytes,
            free_page_reporting: self.free_page_reporting.unwrap_or(true),
            deflate_on_oom: self.deflate_on_oom.unwrap_or(true),
        };
        (balloon, least)
    }
}

/// What a guest keeps at least.
fn least(text: &str, memory: Option<ByteSize>, problems: &mut Problems) -> Option<ByteSize> {
    let least = problems.take("/balloon/minMemory", text.parse::<ByteSize>())?;
    if least.0 < MEMORY_BYTES_MIN || memory.is_some_and(|memory| least > memory) {
        problems.add(SpecProblem::new(
            "/balloon/minMemory",
            format!(
                "`{text}`: what a guest keeps is {} at least and `memory` at most",
                ByteSize(MEMORY_BYTES_MIN)
            ),
        ));
    }
    Some(least)
}

impl Vsock {
    pub(super) fn decode(self) -> super::super::Vsock {
        super::super::Vsock { cid: self.cid }
    }
}

impl Entropy {
    pub(super) fn decode(self, problems: &mut Problems) -> EntropyConfig {
        let Some(limit) = self.limit else { return EntropyConfig::default() };
        let limits = LimitFields {
            bytes: Some(limit.bytes_per_second),
            burst_bytes: limit.burst_bytes,
            operations: None,
            burst_operations: None,
            operations_name: "",
            burst_operations_name: "",
        };
        EntropyConfig { limit: limits.decode("/entropy/limit", problems).bandwidth }
    }
}

/// Rates and bursts as they are declared, under whatever names.
struct LimitFields {
    bytes: Option<String>,
    burst_bytes: Option<String>,
    operations: Option<u64>,
    burst_operations: Option<u64>,
    operations_name: &'static str,
    burst_operations_name: &'static str,
}

impl LimitFields {
    fn decode(self, pointer: &str, problems: &mut Problems) -> InnerLimits {
        let mut size = |field: &str, text: Option<String>| -> Option<u64> {
            let pointer = format!("{pointer}/{field}");
            let ByteSize(bytes) = problems.take(&pointer, text?.parse::<ByteSize>())?;
            if bytes == 0 {
                let problem = SpecProblem::new(pointer, "nothing would ever pass");
                problems.add(problem.hint("leave the field out for no limit"));
            }
            Some(bytes)
        };
        let burst_without_rate = [
            (self.burst_bytes.is_some() && self.bytes.is_none(), "burstBytes", "bytesPerSecond"),
            (
                self.burst_operations.is_some() && self.operations.is_none(),
                self.burst_operations_name,
                self.operations_name,
            ),
        ];
        let (bytes, burst_bytes) = (size("bytesPerSecond", self.bytes), size("burstBytes", self.burst_bytes));
        for (_, burst, rate) in burst_without_rate.into_iter().filter(|(is_so, ..)| *is_so) {
            let message = format!("`{burst}` has a meaning only with `{rate}`");
            problems.add(SpecProblem::new(format!("{pointer}/{burst}"), message));
        }
        let bucket = |rate: Option<u64>, burst: Option<u64>| {
            rate.map(|per_second| Bucket { per_second, burst: burst.unwrap_or(per_second) })
        };
        InnerLimits {
            bandwidth: bucket(bytes, burst_bytes),
            operations: bucket(self.operations, self.burst_operations),
        }
    }
}
