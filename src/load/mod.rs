//! Files to typed manifests: all problems at once, each with its place.
//!
//! ```text
//! inputs ──source──▶ texts ──document──▶ trees with spans ──envelope + check──▶ values ──kinds──▶ Manifest
//! ```
//!
//! `source` is the only room that reads files. Everything else is pure: the same bytes give the same
//! manifests and the same diagnostics. Nothing here looks at other objects but to find the same name
//! twice; that is `resolve`'s work. Input is hostile until proven otherwise: every size is bounded
//! (`Limits`), and no input makes this room panic.

mod batch;
mod check;
pub mod diagnostic;
mod document;
mod envelope;
pub mod explain;
mod labels;
mod scalar;
pub mod schema;
mod shape;
pub mod source;
mod suggest;
mod syntax;
mod text;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use crate::kinds::Spec;
use crate::name::{ObjectId, Sha256};

pub use diagnostic::{Diagnostic, Location, Related, Severity, Snippet};
pub use explain::{Explanation, explain};
pub use text::{Origin, SourceFile};

/// The only version of manifests so far.
pub const API_VERSION: &str = "vmctl.dev/v1alpha1";

/// Where manifests come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// A file, whatever its name.
    File(PathBuf),
    /// The `*.yaml`, `*.yml` and `*.json` of a directory; with `recursive` also of those below it.
    Directory { path: PathBuf, recursive: bool },
    /// What was read from standard input (`source::read_stdin` bounds it).
    Stdin(Vec<u8>),
    /// A text of the program itself, shown under `name`.
    Text { name: String, text: String },
}

/// What is too much. No honest input comes near these; a broken generator or a hostile file does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// One document between `---` lines. A VM takes about 1 KiB.
    pub document_bytes: usize,
    /// One file: 16 times 10,000 objects would fit.
    pub file_bytes: usize,
    /// All inputs together: bounds the memory of one load.
    pub total_bytes: usize,
    /// Files in all directories together.
    pub files: usize,
    /// Directory entries that are looked at, manifests or not: somebody may pass `/`.
    pub entries: usize,
    /// Directories within directories.
    pub directory_depth: usize,
    /// Scalars, mappings and sequences of a document, with aliases expanded: stops YAML bombs.
    pub nodes: usize,
    /// Collections within collections; the deepest field of a manifest is at about 8.
    pub depth: usize,
    /// Problems that one document may report before the rest are only counted.
    pub problems: usize,
    /// And all documents together: nobody reads more, and a broken generator would fill the memory.
    pub problems_total: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            document_bytes: 1 << 20,
            file_bytes: 16 << 20,
            total_bytes: 256 << 20,
            files: 10_000,
            entries: 100_000,
            directory_depth: 32,
            nodes: 100_000,
            depth: 64,
            problems: 200,
            problems_total: 5_000,
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    pub limits: Limits,
}

/// A declared object: its own fields are right, its references are not yet looked at.
#[derive(Clone, Debug)]
pub struct Manifest {
    pub id: ObjectId,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    pub spec: Spec,
    pub origin: Origin,
}

/// What `load` found: good manifests and problems side by side.
#[derive(Debug)]
pub struct Loaded {
    /// In the order of inputs, files by name, documents from the top.
    pub manifests: Vec<Manifest>,
    pub problems: Vec<Diagnostic>,
    /// Objects that are declared but can't be used: invalid, or declared twice. They are *not* absent:
    /// whoever refers to one is waiting for its repair, not dangling.
    pub unusable: BTreeSet<ObjectId>,
    /// False: something could not be read, parsed or understood, so nothing may be pruned.
    pub complete: bool,
    /// Of all names and bytes that were read: equal fingerprints, equal input.
    pub fingerprint: Sha256,
}

/// Reads and checks all inputs. Never fails as a whole: see `Loaded::complete`.
pub fn load(inputs: &[Input], options: &Options) -> Loaded {
    let sources = source::read(inputs, &options.limits);
    batch::load_sources(sources, options)
}
