//! The YAML form of a Volume.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Content, Volume as Inner};
use crate::kinds::{Problems, SpecProblem};
use crate::name::{ByteSize, ObjectName};
use crate::vmm::config::DiskFormat;

/// A disk.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Volume {
    /// The StoragePool that holds it.
    pub pool: String,
    /// The disk image's format. Default: qcow2. A logical volume (pools `lvm` and `lvmThin`) is always raw.
    pub format: Option<Format>,
    /// The size that the guest sees, a binary quantity such as `20Gi`, a multiple of 512 bytes, at least
    /// 1Mi. It may grow later and never shrink. A logical volume is rounded up to its group's extents.
    pub capacity: String,
    /// What a new volume starts with: a full copy (a reflink where the file system can). Default: blank.
    /// Has no effect on a volume that exists.
    pub source: Option<Source>,
    /// What a new volume is an overlay of; only with format qcow2. Has no effect on a volume that exists.
    pub backing: Option<Backing>,
    /// Whether space is set aside when the volume is made. Default: none.
    pub preallocation: Option<Preallocation>,
    /// What happens to the data when the manifest goes. `Retain`: it stays where it is, and is vmctl's no
    /// more. `Delete`: with consent, it goes to the pool's trash. Default: Retain.
    pub reclaim_policy: Option<ReclaimPolicy>,
}

/// A disk image's format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    Raw,
    Qcow2,
}

impl From<Format> for DiskFormat {
    fn from(format: Format) -> Self {
        match format {
            Format::Raw => DiskFormat::Raw,
            Format::Qcow2 => DiskFormat::Qcow2,
        }
    }
}

/// Where a volume's content comes from: one of an image and a volume.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Source {
    /// An Image: of the same pool, or for a logical volume of any directory pool.
    pub image: Option<String>,
    /// A Volume of the same thin pool: the new volume is a thin snapshot of it.
    pub volume: Option<String>,
}

/// What a volume is an overlay of.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Backing {
    /// An Image in the same pool.
    pub image: String,
}

/// Whether space is set aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Preallocation {
    None,
    Full,
}

/// What happens to the data when the manifest goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ReclaimPolicy {
    Retain,
    Delete,
}

/// The least and most a volume can hold, in bytes.
const CAPACITY_BYTES: std::ops::RangeInclusive<u64> = (1 << 20)..=(64 << 40);

impl Volume {
    fn content(&self, problems: &mut Problems) -> Content {
        if let (Some(_), Some(_)) = (&self.source, &self.backing) {
            problems.add(
                SpecProblem::new("/backing", "a volume has a `source` or a `backing`, not both")
                    .hint("`source` copies the image, `backing` makes a thin overlay of it"),
            );
            return Content::Blank;
        }
        let content = match (&self.source, &self.backing) {
            (Some(Source { image: Some(image), volume: None }), _) => {
                problems.take("/source/image", ObjectName::parse(image)).map(Content::CopyOf)
            }
            (Some(Source { image: None, volume: Some(volume) }), _) => {
                problems.take("/source/volume", ObjectName::parse(volume)).map(Content::SnapshotOf)
            }
            (Some(_), _) => {
                problems.add(SpecProblem::new("/source", "a source is either an `image` or a `volume`"));
                None
            }
            (None, Some(backing)) => {
                problems.take("/backing/image", ObjectName::parse(&backing.image)).map(Content::OverlayOn)
            }
            (None, None) => None,
        };
        content.unwrap_or(Content::Blank)
    }

    pub fn decode(self) -> Result<Inner, Vec<SpecProblem>> {
        let mut problems = Problems::default();
        let pool = problems.take("/pool", ObjectName::parse(&self.pool));
        let format: DiskFormat = self.format.unwrap_or(Format::Qcow2).into();
        let capacity = problems.take("/capacity", self.capacity.parse::<ByteSize>());
        if let Some(ByteSize(bytes)) = capacity
            && (!CAPACITY_BYTES.contains(&bytes) || !bytes.is_multiple_of(512))
        {
            problems.add(SpecProblem::new(
                "/capacity",
                format!("`{}`: a capacity is 1Mi to 64Ti and a multiple of 512 bytes", self.capacity),
            ));
        }
        let content = self.content(&mut problems);
        if matches!(content, Content::OverlayOn(_)) && format != DiskFormat::Qcow2 {
            problems.add(
                SpecProblem::new("/backing", "only qcow2 volumes can have a backing file")
                    .hint("set `format: qcow2`, or use `source` for a full copy"),
            );
        }
        let preallocate = self.preallocation == Some(Preallocation::Full);
        if preallocate && content != Content::Blank {
            problems.add(SpecProblem::new("/preallocation", "`preallocation: full` is for blank volumes"));
        }
        let inner = (|| {
            Some(Inner {
                pool: pool?,
                format,
                capacity: capacity?,
                content,
                preallocate,
                reclaim_delete: self.reclaim_policy == Some(ReclaimPolicy::Delete),
            })
        })();
        problems.finish(inner)
    }
}
