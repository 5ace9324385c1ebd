//! StoragePool: a place for volumes and images: a directory, a volume group, or a thin pool in one.

pub mod compare;
mod lvm;
pub mod wire;

use std::path::PathBuf;

use serde::Serialize;

use crate::host::snapshot::PoolPlace;
use crate::name::ByteSize;

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StoragePool {
    pub place: PoolPlace,
    /// Blank devices that the volume group may be made on, if it is missing.
    pub devices: Vec<PathBuf>,
    /// The size of the thin pool, if it is to be made.
    pub thin_pool_size: Option<ByteSize>,
}
