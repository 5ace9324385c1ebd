//! The YAML form of a StoragePool.

use std::path::{Component, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::StoragePool as Inner;
use crate::host::snapshot::{LvmPlace, PoolPlace};
use crate::kinds::{Problems, SpecProblem};
use crate::name::{ByteSize, LvmName, NameError};

const THIN_POOL_BYTES_MIN: u64 = 16 << 20;

/// A place for volumes and images: one of a directory, a volume group, or a thin pool.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StoragePool {
    /// A directory of the host's file system. Only such a pool can hold images and qcow2 volumes.
    pub directory: Option<Directory>,
    /// An LVM volume group. Each volume is a logical volume, raw and fully allocated.
    pub lvm: Option<Lvm>,
    /// A thin pool in an LVM volume group. Volumes take space as they are written, and can be snapshots of one
    /// another.
    pub lvm_thin: Option<LvmThin>,
}

/// A directory as a pool.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Directory {
    /// An absolute path, such as `/var/lib/vmctl/images`. Made if it is missing; never removed.
    pub path: String,
}

/// A volume group as a pool.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Lvm {
    /// The volume group's name. One that exists is taken as it is; its other volumes are left alone. Never
    /// removed.
    pub volume_group: String,
    /// Block devices that the volume group is made on if there is none, such as `/dev/disk/by-id/…`. Only
    /// blank ones are taken, and only with consent. Default: the group must exist.
    pub devices: Option<Vec<String>>,
}

/// A thin pool as a pool.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct LvmThin {
    /// The volume group's name. One that exists is taken as it is; its other volumes are left alone. Never
    /// removed.
    pub volume_group: String,
    /// The thin pool's name. One that exists is taken as it is. Never removed.
    pub thin_pool: String,
    /// How large the thin pool is made if there is none, such as `100Gi`. Default: it must exist.
    pub size: Option<String>,
    /// Block devices that the volume group is made on if there is none. Only blank ones are taken, and only
    /// with consent. Default: the group must exist.
    pub devices: Option<Vec<String>>,
}

impl StoragePool {
    pub fn decode(self) -> Result<Inner, Vec<SpecProblem>> {
        let mut problems = Problems::default();
        let inner = match (self.directory, self.lvm, self.lvm_thin) {
            (Some(directory), None, None) => {
                let path = problems.take("/directory/path", parse_path(&directory.path));
                path.map(|path| Inner {
                    place: PoolPlace::Directory(path),
                    devices: Vec::new(),
                    thin_pool_size: None,
                })
            }
            (None, Some(lvm), None) => {
                let group = problems.take("/lvm/volumeGroup", LvmName::parse(&lvm.volume_group));
                let devices = devices("/lvm", lvm.devices, &mut problems);
                group.map(|group| Inner {
                    place: PoolPlace::Lvm(LvmPlace { group, thin_pool: None }),
                    devices,
                    thin_pool_size: None,
                })
            }
            (None, None, Some(thin)) => decode_thin(thin, &mut problems),
            _ => {
                problems.add(
                    SpecProblem::new("", "a pool is exactly one of `directory`, `lvm` and `lvmThin`")
                        .hint("keep the one that holds its volumes"),
                );
                None
            }
        };
        problems.finish(inner)
    }
}

fn decode_thin(thin: LvmThin, problems: &mut Problems) -> Option<Inner> {
    let group = problems.take("/lvmThin/volumeGroup", LvmName::parse(&thin.volume_group));
    let thin_pool = problems.take("/lvmThin/thinPool", LvmName::parse(&thin.thin_pool));
    let size = thin.size.map(|size| problems.take("/lvmThin/size", size.parse::<ByteSize>()));
    if let Some(Some(ByteSize(bytes))) = size
        && bytes < THIN_POOL_BYTES_MIN
    {
        problems.add(SpecProblem::new("/lvmThin/size", "a thin pool has at least 16Mi"));
    }
    let devices = devices("/lvmThin", thin.devices, problems);
    if !devices.is_empty() && size.is_none() {
        problems.add(
            SpecProblem::new("/lvmThin/size", "a volume group that is made has no thin pool yet")
                .hint("declare the `size` of the thin pool, less than that of the devices"),
        );
    }
    let place = PoolPlace::Lvm(LvmPlace { group: group?, thin_pool: Some(thin_pool?) });
    Some(Inner { place, devices, thin_pool_size: size.flatten() })
}

fn devices(field: &str, paths: Option<Vec<String>>, problems: &mut Problems) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for (index, text) in paths.unwrap_or_default().iter().enumerate() {
        let pointer = format!("{field}/devices/{index}");
        let Some(path) = problems.take(&pointer, parse_path(text)) else { continue };
        if !path.starts_with("/dev") {
            problems.add(SpecProblem::new(pointer, format!("`{text}` is not in /dev")));
        } else if found.contains(&path) {
            problems.add(SpecProblem::new(pointer, format!("`{text}` is named twice")));
        } else {
            found.push(path);
        }
    }
    found
}

/// An absolute path without `.`, `..` or doubled slashes, so that equal paths are equal texts.
pub(crate) fn parse_path(text: &str) -> Result<PathBuf, NameError> {
    let path = PathBuf::from(text);
    if !path.is_absolute() {
        return Err(NameError(format!("`{text}` is not an absolute path")));
    }
    if text.contains('\0') || text.len() > 4095 {
        return Err(NameError("a path has at most 4095 bytes and no NUL".to_owned()));
    }
    if path.components().any(|part| matches!(part, Component::ParentDir)) {
        return Err(NameError(format!("`{text}` contains `..`; write the path that it leads to")));
    }
    if path.parent().is_none() {
        return Err(NameError("`/` can't be used here".to_owned()));
    }
    Ok(path.components().collect())
}
