//! Volume groups as pools: what is seen of them, and what can be done to them. Plain data.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::snapshot::Observed;
use super::step::ImageFile;
use crate::name::{LvmName, Mark, ObjectName};

/// Where a pool is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum PoolPlace {
    Directory(PathBuf),
    Lvm(LvmPlace),
}

/// A volume group, or a thin pool in one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LvmPlace {
    pub group: LvmName,
    pub thin_pool: Option<LvmName>,
}

impl PoolPlace {
    /// Where its volumes have their paths.
    pub fn path(&self) -> PathBuf {
        match self {
            Self::Directory(path) => path.clone(),
            Self::Lvm(place) => place.directory(),
        }
    }

    pub fn lvm(&self) -> Option<&LvmPlace> {
        match self {
            Self::Directory(_) => None,
            Self::Lvm(place) => Some(place),
        }
    }
}

impl fmt::Display for PoolPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Directory(path) => write!(f, "directory {}", path.display()),
            Self::Lvm(place) => place.fmt(f),
        }
    }
}

impl LvmPlace {
    pub fn directory(&self) -> PathBuf {
        Path::new("/dev").join(self.group.as_str())
    }

    /// `/dev/<group>/<volume>`, which is how LVM names its devices.
    pub fn device(&self, volume: &str) -> PathBuf {
        self.directory().join(volume)
    }
}

impl fmt::Display for LvmPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.thin_pool {
            Some(pool) => write!(f, "thin pool {}/{pool}", self.group),
            None => write!(f, "volume group {}", self.group),
        }
    }
}

/// What a pool in a volume group has beyond a directory's facts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LvmPool {
    pub place: LvmPlace,
    /// `None`: there is no such volume group.
    pub group: Option<GroupFacts>,
    /// Of the devices in the scope, while there is no volume group.
    pub devices: BTreeMap<PathBuf, Observed<DeviceFacts>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GroupFacts {
    /// Every logical volume is a multiple of it.
    pub extent_bytes: u64,
    /// Room for further logical volumes, and for thin pools to grow.
    pub free_bytes: u64,
    /// Logical volumes of the group that are not this pool's: their names are taken.
    pub other_names: BTreeSet<String>,
    /// Why nothing can be done in it: it lacks a device, is exported, is shared…
    pub unusable: Option<String>,
    pub thin: Option<ThinFacts>,
}

impl GroupFacts {
    /// The size that a logical volume of at least so many bytes has.
    pub fn round_up(&self, bytes: u64) -> u64 {
        bytes.checked_next_multiple_of(self.extent_bytes.max(1)).unwrap_or(u64::MAX)
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThinFacts {
    /// In hundredths of a per cent.
    pub data_used: u32,
    pub metadata_used: u32,
    /// New blocks read as zeroes.
    pub zeroes: bool,
    /// Why it takes no more: out of data space, metadata read-only, failed.
    pub failing: Option<String>,
}

impl ThinFacts {
    /// Beyond this it is nearly full: in hundredths of a per cent, of data or metadata.
    pub const NEARLY_FULL: u32 = 8_000;

    /// The condition `PoolNearlyFull` in words, where it holds.
    pub fn nearly_full(&self) -> Option<String> {
        let part = |used: u32, of: &str| {
            (used >= Self::NEARLY_FULL).then(|| format!("{}.{:02} % of its {of}", used / 100, used % 100))
        };
        let parts: Vec<String> = [part(self.data_used, "data space"), part(self.metadata_used, "metadata")]
            .into_iter()
            .flatten()
            .collect();
        (!parts.is_empty()).then(|| format!("{} in use", parts.join(" and ")))
    }
}

/// A block device that a volume group may be made on, or why it may not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceFacts {
    pub size_bytes: u64,
    /// What is on it or uses it: a mount, partitions, another device.
    pub in_use: Option<String>,
    /// Signatures of file systems, partition tables and the like, by name.
    pub signatures: Vec<String>,
    /// Its first MiB holds nothing but zeroes.
    pub starts_empty: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LvmStep {
    /// Makes what is missing of the volume group and its thin pool, marks it and registers the pool.
    CreatePool(NewLvmPool),
    /// Takes the mark and the registration away; the group and its volumes stay.
    ForgetPool { name: ObjectName, place: LvmPlace, mark: Mark },
    /// Makes a logical volume, marked as half made until its content is whole.
    Create(NewLogicalVolume),
    /// Never shrinks. What is new reads as zeroes.
    Grow { place: LvmPlace, volume: ObjectName, capacity_bytes: u64, mark: Mark },
    /// Gives a logical volume its device.
    Activate { place: LvmPlace, volume: ObjectName, mark: Mark },
    /// Records what removal may do.
    SetReclaim { place: LvmPlace, volume: ObjectName, mark: Mark, delete: bool },
    /// Marks an unmarked (or retained) logical volume that already is what is declared.
    Adopt { place: LvmPlace, volume: ObjectName, mark: Mark, reclaim_delete: bool },
    /// Turns the mark into a `retained` one; the data stays.
    Retain { place: LvmPlace, volume: ObjectName, mark: Mark },
    /// For good: a volume group has no trash. `half_made`: there is nothing in it to lose, and one that turns
    /// out to be whole stays.
    Remove { place: LvmPlace, volume: ObjectName, mark: Mark, half_made: bool },
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewLvmPool {
    pub name: ObjectName,
    pub place: LvmPlace,
    /// Blank devices to make the group on. Empty: the group must be there.
    pub devices: Vec<PathBuf>,
    /// The thin pool's size, if it is to be made.
    pub thin_pool_bytes: Option<u64>,
    pub mark: Mark,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewLogicalVolume {
    pub place: LvmPlace,
    pub volume: ObjectName,
    /// Rounded up to the group's extents when it is made.
    pub capacity_bytes: u64,
    pub content: LogicalContent,
    pub mark: Mark,
    pub reclaim_delete: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LogicalContent {
    /// Zeroes.
    Blank,
    CopyOf(ImageFile),
    /// A thin snapshot of a volume in the same thin pool.
    SnapshotOf(ObjectName),
}

impl LvmStep {
    /// Whether what it does can't be undone.
    pub fn loses_data(&self) -> bool {
        matches!(self, Self::Remove { half_made: false, .. })
    }

    /// Whether it writes over a whole device.
    pub fn takes_devices(&self) -> bool {
        matches!(self, Self::CreatePool(new) if !new.devices.is_empty())
    }
}

impl fmt::Display for LvmStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let of = |place: &LvmPlace, volume: &ObjectName| format!("{}/{volume}", place.group);
        match self {
            Self::CreatePool(new) if new.devices.is_empty() => write!(f, "make the {} a pool", new.place),
            Self::CreatePool(new) => {
                let devices: Vec<String> =
                    new.devices.iter().map(|path| path.display().to_string()).collect();
                write!(f, "make the volume group {} on {}", new.place.group, devices.join(", "))
            }
            Self::ForgetPool { place, .. } => write!(f, "forget the pool in the {place}"),
            Self::Create(new) => write!(f, "create {}", of(&new.place, &new.volume)),
            Self::Grow { place, volume, .. } => write!(f, "grow {}", of(place, volume)),
            Self::Activate { place, volume, .. } => write!(f, "activate {}", of(place, volume)),
            Self::SetReclaim { place, volume, .. } => {
                write!(f, "set the reclaim policy of {}", of(place, volume))
            }
            Self::Adopt { place, volume, .. } => write!(f, "adopt {}", of(place, volume)),
            Self::Retain { place, volume, .. } => write!(f, "let go of {}", of(place, volume)),
            Self::Remove { place, volume, .. } => write!(f, "remove {} for good", of(place, volume)),
        }
    }
}
