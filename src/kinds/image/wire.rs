//! The YAML form of an Image.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Image as Inner;
use crate::kinds::storage_pool::wire::parse_path;
use crate::kinds::volume::wire::Format;
use crate::kinds::{Problems, SpecProblem};
use crate::name::{ObjectName, Sha256};

/// A source image, copied into a pool's cache once its checksum is proven.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Image {
    /// The StoragePool that caches it.
    pub pool: String,
    /// Where it comes from.
    pub source: Source,
    /// The file's SHA-256, 64 hexadecimal digits. It is checked while the file is copied.
    pub sha256: String,
    /// The image's format. It is never guessed from the content; a content that says otherwise is refused.
    pub format: Format,
}

/// Where an image comes from.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Source {
    /// An absolute path on the host.
    pub path: String,
}

impl Image {
    pub fn decode(self) -> Result<Inner, Vec<SpecProblem>> {
        let mut problems = Problems::default();
        let pool = problems.take("/pool", ObjectName::parse(&self.pool));
        let source_path = problems.take("/source/path", parse_path(&self.source.path));
        let sha256 = problems.take("/sha256", self.sha256.parse::<Sha256>());
        let inner = (|| {
            Some(Inner {
                pool: pool?,
                source_path: source_path?,
                sha256: sha256?,
                format: self.format.into(),
            })
        })();
        problems.finish(inner)
    }
}
