//! The YAML form of a StoragePool.

use std::path::{Component, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::StoragePool as Inner;
use crate::kinds::{Problems, SpecProblem};
use crate::name::NameError;

/// A place for volumes and images.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct StoragePool {
    /// A directory of the host's file system.
    pub directory: Directory,
}

/// A directory as a pool.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Directory {
    /// An absolute path, such as `/var/lib/vmctl/images`. Made if it is missing; never removed.
    pub path: String,
}

impl StoragePool {
    pub fn decode(self) -> Result<Inner, Vec<SpecProblem>> {
        let mut problems = Problems::default();
        let path = problems.take("/directory/path", parse_path(&self.directory.path));
        let inner = path.map(|path| Inner { path });
        problems.finish(inner)
    }
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
