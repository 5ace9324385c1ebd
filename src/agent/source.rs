//! Reads the source when it is settled: two looks a moment apart must agree, with a cap on the wait.
//! What is missing, empty, half-written or invalid is said, and changes nothing.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::load::{self, Input, Limits, Loaded, Options};
use crate::name::{SetName, Sha256};
use crate::pipeline::{Declaration, Invalid, declare};

/// Between two looks that must agree.
const AGREE: Duration = Duration::from_millis(10);
/// A source that doesn't settle in this time is read when it next changes.
const SETTLE_MAX: Duration = Duration::from_millis(500);

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
        if before.manifests.is_empty() && before.unusable.is_empty() {
            let why = before.problems.first().map(|problem| problem.message.clone());
            return Reading::Unavailable(why.unwrap_or_else(|| "it declares nothing".to_owned()));
        }
        let fingerprint = before.fingerprint;
        match declare(self.set.clone(), before) {
            Ok(declaration) => Reading::Declared(Box::new(declaration), fingerprint),
            Err(invalid) => Reading::Invalid(invalid),
        }
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
