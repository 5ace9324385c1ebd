//! Volume: a disk in a pool. Its data outlives its manifest.

pub mod compare;
pub mod wire;

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::Reference;
use crate::host::snapshot::Pool;
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
        }
    }

    pub fn file(&self, name: &ObjectName) -> String {
        Pool::volume_file(name, self.format)
    }

    pub fn path(&self, name: &ObjectName, pool_path: &Path) -> PathBuf {
        pool_path.join(self.file(name))
    }
}
