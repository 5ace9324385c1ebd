//! Image: a checksummed source image in a pool's cache.

pub mod compare;
pub mod wire;

use std::path::{Path, PathBuf};

use serde::Serialize;
use sha2::Digest as _;

use super::Reference;
use crate::host::snapshot::{FileFacts, FileKind};
use crate::host::step::{Compression, Container, ImageFile, ImageOrigin, ImageSource};
use crate::name::{Kind, ObjectId, ObjectName, Sha256};
use crate::vmm::config::DiskFormat;

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Image {
    pub pool: ObjectName,
    pub origin: ImageOrigin,
    /// Of the source as it lies there.
    pub sha256: Sha256,
    pub format: Format,
    pub compression: Option<Compression>,
}

/// What a source is declared to be, once it is decompressed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum Format {
    Raw,
    Qcow2,
    Vmdk,
    Ova { disk: Option<String> },
}

impl Image {
    pub fn references(&self) -> Vec<Reference> {
        vec![Reference {
            to: ObjectId::new(Kind::StoragePool, self.pool.clone()),
            pointer: "/pool".to_owned(),
        }]
    }

    /// The file of the host that it is made from.
    pub fn source_path(&self) -> Option<&PathBuf> {
        match &self.origin {
            ImageOrigin::Path(path) => Some(path),
            ImageOrigin::Url(_) => None,
        }
    }

    pub fn source(&self) -> ImageSource {
        let container = match &self.format {
            Format::Raw | Format::Qcow2 => Container::Plain,
            Format::Vmdk => Container::Vmdk,
            Format::Ova { disk } => Container::Ova { disk: disk.clone() },
        };
        ImageSource { origin: self.origin.clone(), compression: self.compression, container }
    }

    /// The cached copy: named by its content, so that a new content never replaces what an overlay needs. Where
    /// it is made from its source and isn't the same bytes, the name says how.
    pub fn cached(&self, pool_path: &Path) -> ImageFile {
        let mut file = self.sha256.to_string();
        file.push_str(match self.compression {
            None => "",
            Some(Compression::Gzip) => ".gz",
            Some(Compression::Xz) => ".xz",
            Some(Compression::Zstd) => ".zst",
        });
        let format = match &self.format {
            Format::Raw => DiskFormat::Raw,
            Format::Qcow2 => DiskFormat::Qcow2,
            Format::Vmdk => {
                file.push_str(".vmdk");
                DiskFormat::Qcow2
            }
            Format::Ova { disk } => {
                file.push_str(".ova");
                if let Some(disk) = disk {
                    let digest = sha2::Sha256::digest(disk);
                    digest[..4].iter().for_each(|byte| file.push_str(&format!("-{byte:02x}")));
                }
                DiskFormat::Qcow2
            }
        };
        file.push_str(match format {
            DiskFormat::Raw => ".raw",
            DiskFormat::Qcow2 => ".qcow2",
        });
        ImageFile { pool_path: pool_path.to_owned(), file, format }
    }

    /// The size that a guest will see, if the source's first bytes tell it.
    pub fn size_bytes(&self, facts: &FileFacts) -> Option<u64> {
        match (&self.format, &facts.kind) {
            _ if self.compression.is_some() => None,
            (Format::Raw | Format::Qcow2, _) => Some(facts.header.virtual_size_bytes),
            (Format::Vmdk, FileKind::Vmdk(disk)) => Some(disk.as_ref().ok()?.capacity_bytes),
            (Format::Ova { disk: wanted }, FileKind::Ova(disks)) => {
                let mut disks = disks.as_ref().ok()?.iter();
                let found = disks.find(|disk| wanted.as_ref().is_none_or(|wanted| *wanted == disk.name))?;
                Some(found.capacity_bytes)
            }
            _ => None,
        }
    }
}
