//! Reads the source when it is settled: two looks a moment apart must agree, with a cap on the wait.
//! What is missing, empty, half-written or invalid is said, and changes nothing.

use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::host::linux::has_writer;
use crate::load::{self, Input, Limits, Loaded, Options};
use crate::name::{SetName, Sha256};
use crate::pipeline::{Declaration, Invalid, declare};

/// Between two looks that must agree.
const AGREE: Duration = Duration::from_millis(10);
/// A source that doesn't settle in this time is read when it next changes.
const SETTLE_MAX: Duration = Duration::from_millis(500);
/// Files and directories that are asked whether somebody writes to them.
const LOOKED_AT_MAX: usize = 100_000;

#[derive(Debug)]
pub enum Reading {
    /// The same as what is in force.
    Unchanged,
    Declared(Box<Declaration>, Sha256),
    /// Not there, dangling, or without a manifest.
    Unavailable(String),
    Invalid(Invalid),
    /// It kept changing while it was read.
    Unsettled,
    /// Somebody has this file open to write: when they are done, that is an event.
    BeingWritten(PathBuf),
}

pub struct Source {
    path: PathBuf,
    set: SetName,
}

impl Source {
    pub fn new(path: &Path, set: SetName) -> Self {
        Self { path: path.to_owned(), set }
    }

    /// `in_force`: the fingerprint of what was declared last.
    pub fn read(&self, in_force: Option<Sha256>) -> Reading {
        if let Some(path) = self.being_written() {
            return Reading::BeingWritten(path);
        }
        let deadline = Instant::now() + SETTLE_MAX;
        let mut before = self.load();
        loop {
            std::thread::sleep(AGREE);
            let again = self.fingerprint();
            if again == before.fingerprint {
                break;
            }
            if Instant::now() >= deadline {
                return Reading::Unsettled;
            }
            before = self.load();
        }
        if in_force == Some(before.fingerprint) {
            return Reading::Unchanged;
        }
        if !self.path.exists() {
            return Reading::Unavailable(format!("{} is not there", self.path.display()));
        }
        // Problems with a place are of files that are there.
        let has_files = before.problems.iter().any(|problem| problem.location.is_some());
        if before.manifests.is_empty() && before.unusable.is_empty() && !has_files {
            let why: Vec<&str> = before.problems.iter().map(|problem| problem.message.as_str()).collect();
            return Reading::Unavailable(match why.as_slice() {
                [] => "it declares nothing".to_owned(),
                why => why.join("; "),
            });
        }
        let fingerprint = before.fingerprint;
        match declare(self.set.clone(), before) {
            Ok(declaration) => Reading::Declared(Box::new(declaration), fingerprint),
            Err(invalid) => Reading::Invalid(invalid),
        }
    }

    /// A file that isn't finished. (That it reads the same twice proves nothing: a slow writer pauses.)
    fn being_written(&self) -> Option<PathBuf> {
        let mut queue = vec![self.path.clone()];
        let mut count = 0;
        while let Some(path) = queue.pop() {
            count += 1;
            if count > LOOKED_AT_MAX {
                break;
            }
            // (Links to directories are not gone into; or there could be no end.)
            if path.is_dir() && (path == self.path || !path.is_symlink()) {
                let entries = std::fs::read_dir(&path).into_iter().flatten().flatten();
                let shown = entries.filter(|entry| !entry.file_name().as_bytes().starts_with(b"."));
                queue.extend(shown.map(|entry| entry.path()));
            } else if is_manifest(&path) && has_writer(&path) {
                return Some(path);
            }
        }
        None
    }

    fn inputs(&self) -> [Input; 1] {
        if self.path.is_file() {
            return [Input::File(self.path.clone())];
        }
        [Input::Directory { path: self.path.clone(), recursive: true }]
    }

    fn load(&self) -> Loaded {
        load::load(&self.inputs(), &Options::default())
    }

    fn fingerprint(&self) -> Sha256 {
        load::source::read(&self.inputs(), &Limits::default()).fingerprint
    }
}

fn is_manifest(path: &Path) -> bool {
    path.extension().is_some_and(|extension| ["yaml", "yml", "json"].iter().any(|known| extension == *known))
}
