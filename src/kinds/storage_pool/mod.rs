//! StoragePool: a place for volumes and images. Today: a directory.

pub mod compare;
pub mod wire;

use std::path::PathBuf;

use serde::Serialize;

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct StoragePool {
    pub path: PathBuf,
}
