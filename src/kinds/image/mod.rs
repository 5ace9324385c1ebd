//! Image: a checksummed source image in a pool's cache.

pub mod compare;
pub mod wire;

use std::path::{Path, PathBuf};

use serde::Serialize;

use super::Reference;
use crate::host::step::ImageFile;
use crate::name::{Kind, ObjectId, ObjectName, Sha256};
use crate::vmm::config::DiskFormat;

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Image {
    pub pool: ObjectName,
    pub source_path: PathBuf,
    pub sha256: Sha256,
    pub format: DiskFormat,
}

impl Image {
    pub fn references(&self) -> Vec<Reference> {
        vec![Reference {
            to: ObjectId::new(Kind::StoragePool, self.pool.clone()),
            pointer: "/pool".to_owned(),
        }]
    }

    /// The cached copy: named by its content, so that a new content never replaces what an overlay needs.
    pub fn cached(&self, pool_path: &Path) -> ImageFile {
        let extension = match self.format {
            DiskFormat::Raw => "raw",
            DiskFormat::Qcow2 => "qcow2",
        };
        ImageFile {
            pool_path: pool_path.to_owned(),
            file: format!("{}.{extension}", self.sha256),
            format: self.format,
        }
    }
}
