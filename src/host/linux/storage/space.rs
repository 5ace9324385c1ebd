//! Room on a pool's file system, and what to say when there is too little.

use std::io;

use super::directory::PoolDirectory;
use crate::host::error::StepError;

/// What a step is about to write, and what was free before it began.
pub struct Space {
    pub needed_bytes: u64,
    pub free_bytes: u64,
}

impl Space {
    pub fn for_writing(pool: &PoolDirectory, needed_bytes: u64) -> Self {
        // Without an answer (or on a file system that counts no blocks) there is no early refusal;
        // the write itself will tell.
        let free_bytes = match rustix::fs::fstatvfs(&pool.root) {
            Ok(space) if space.f_blocks != 0 => space.f_bavail.saturating_mul(space.f_frsize),
            _ => u64::MAX,
        };
        Self { needed_bytes, free_bytes }
    }

    /// Refuses what can't fit, before anything is written.
    pub fn check(&self, what: &str) -> Result<(), StepError> {
        match self.needed_bytes > self.free_bytes {
            true => Err(self.full(what)),
            false => Ok(()),
        }
    }

    fn full(&self, what: &str) -> StepError {
        StepError::Failed {
            what: what.to_owned(),
            why: format!(
                "the pool's file system is full: {} needed, {} free",
                human(self.needed_bytes),
                human(self.free_bytes)
            ),
            hint: Some("make room in the pool, or declare another one".to_owned()),
        }
    }

    /// The error of a failed write.
    pub fn explain(&self, what: &str, error: impl Into<io::Error>) -> StepError {
        let error = error.into();
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => self.full(what),
            _ => StepError::failed(what, error),
        }
    }
}

/// A number of bytes for people.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut scaled = bytes as f64;
    let mut unit = None;
    for name in UNITS {
        if scaled < 1024.0 {
            break;
        }
        scaled /= 1024.0;
        unit = Some(name);
    }
    match unit {
        None => format!("{bytes} bytes"),
        Some(unit) => format!("{scaled:.1} {unit}"),
    }
}
