//! The YAML form of an Image.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Format as InnerFormat, Image as Inner};
use crate::host::step::{Compression as InnerCompression, ImageOrigin};
use crate::kinds::storage_pool::wire::parse_path;
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
    /// The SHA-256 of the source as it lies there (of a compressed source: as it is, compressed), 64 hexadecimal
    /// digits. It is checked while the source is copied.
    pub sha256: String,
    /// The image's format. It is never guessed from the content; a content that says otherwise is refused. Of
    /// a `vmdk` (monolithicSparse or streamOptimized), and of the one in an `ova`, a qcow2 image is made.
    pub format: Format,
    /// What the source is compressed by. Default: it isn't.
    pub compression: Option<Compression>,
    /// With `format: ova`: the file name of the disk, of an OVA that has several. Default: the only one.
    pub disk: Option<String>,
}

/// Where an image comes from: `path` or `url`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Source {
    /// An absolute path on the host.
    pub path: Option<String>,
    /// An `http://` or `https://` URL. A fetch that was interrupted goes on where it ended.
    pub url: Option<String>,
}

/// An image's format.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    Raw,
    Qcow2,
    Vmdk,
    Ova,
}

/// What a source is compressed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    Gzip,
    Xz,
    Zstd,
}

impl Image {
    pub fn decode(self) -> Result<Inner, Vec<SpecProblem>> {
        let mut problems = Problems::default();
        let pool = problems.take("/pool", ObjectName::parse(&self.pool));
        let origin = self.source.decode(&mut problems);
        let sha256 = problems.take("/sha256", self.sha256.parse::<Sha256>());
        let format = match self.format {
            Format::Raw => InnerFormat::Raw,
            Format::Qcow2 => InnerFormat::Qcow2,
            Format::Vmdk => InnerFormat::Vmdk,
            Format::Ova => InnerFormat::Ova { disk: self.disk.clone() },
        };
        if self.disk.is_some() && self.format != Format::Ova {
            problems.add(SpecProblem::new("/disk", "`disk` has a meaning only with `format: ova`"));
        }
        let compression = self.compression.map(|method| match method {
            Compression::Gzip => InnerCompression::Gzip,
            Compression::Xz => InnerCompression::Xz,
            Compression::Zstd => InnerCompression::Zstd,
        });
        let inner = (|| Some(Inner { pool: pool?, origin: origin?, sha256: sha256?, format, compression }))();
        problems.finish(inner)
    }
}

impl Source {
    fn decode(self, problems: &mut Problems) -> Option<ImageOrigin> {
        match (self.path, self.url) {
            (Some(path), None) => problems.take("/source/path", parse_path(&path)).map(ImageOrigin::Path),
            (None, Some(url)) => problems.take("/source/url", parse_url(&url)).map(ImageOrigin::Url),
            (Some(_), Some(_)) => {
                let message = "`path` and `url` are both given; an image comes from one of them";
                problems.add(SpecProblem::new("/source", message));
                None
            }
            (None, None) => {
                let message = "neither `path` nor `url` is given; an image comes from one of them";
                problems.add(SpecProblem::new("/source", message));
                None
            }
        }
    }
}

fn parse_url(url: &str) -> Result<String, String> {
    let rest = url.strip_prefix("https://").or_else(|| url.strip_prefix("http://"));
    let host = rest.map(|rest| rest.split(['/', '?', '#']).next().unwrap_or_default());
    match host {
        // Not repeated: what stands before the @ is a secret.
        Some(host) if host.contains('@') => {
            Err("a URL here holds no user and no password: manifests and plans are no place for them".into())
        }
        Some(host) if !host.is_empty() && url.bytes().all(|byte| byte.is_ascii_graphic()) => {
            Ok(url.to_owned())
        }
        _ => Err(format!("`{url}` is not an `http://` or `https://` URL")),
    }
}
