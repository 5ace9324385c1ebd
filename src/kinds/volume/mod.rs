//! Volume: a disk in a pool. Its data outlives its manifest.

pub mod compare;
mod lvm;
pub mod wire;

use std::path::PathBuf;

use serde::Serialize;

use super::Reference;
use crate::host::snapshot::{Pool, PoolPlace};
use crate::name::{ByteSize, Kind, ObjectId, ObjectName};
use crate::vmm::config::DiskFormat;

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Volume {
    pub pool: ObjectName,
    pub format: DiskFormat,
    pub capacity: ByteSize,
    /// What it starts with; of no account once it exists.
    pub content: Content,
    pub preallocate: bool,
    pub reclaim_delete: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum Content {
    Blank,
    CopyOf(ObjectName),
    OverlayOn(ObjectName),
    /// A snapshot of another volume in the same thin pool.
    SnapshotOf(ObjectName),
}

impl Volume {
    pub fn references(&self) -> Vec<Reference> {
        let pool = Reference {
            to: ObjectId::new(Kind::StoragePool, self.pool.clone()),
            pointer: "/pool".to_owned(),
        };
        let image = |image: &ObjectName, field: &str| Reference {
            to: ObjectId::new(Kind::Image, image.clone()),
            pointer: format!("/{field}/image"),
        };
        match &self.content {
            Content::Blank => vec![pool],
            Content::CopyOf(name) => vec![pool, image(name, "source")],
            Content::OverlayOn(name) => vec![pool, image(name, "backing")],
            Content::SnapshotOf(name) => vec![
                pool,
                Reference {
                    to: ObjectId::new(Kind::Volume, name.clone()),
                    pointer: "/source/volume".to_owned(),
                },
            ],
        }
    }

    pub fn is_raw(&self) -> bool {
        self.format == DiskFormat::Raw
    }

    /// Its file in a directory, its logical volume in a group.
    pub fn file(&self, name: &ObjectName, place: &PoolPlace) -> String {
        match place {
            PoolPlace::Directory(_) => Pool::volume_file(name, self.format),
            PoolPlace::Lvm(_) => name.to_string(),
        }
    }

    pub fn path(&self, name: &ObjectName, place: &PoolPlace) -> PathBuf {
        place.path().join(self.file(name, place))
    }
}
