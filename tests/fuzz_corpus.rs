//! What fuzzing found and what it started from, run as ordinary tests: see `fuzz/README.md`.

#[path = "../fuzz/src/lib.rs"]
mod fuzz;

use std::path::{Path, PathBuf};

/// The committed inputs of a target, in the order of their names.
fn corpus(target: &str) -> Vec<PathBuf> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let entries = std::fs::read_dir(&directory).unwrap_or_else(|error| panic!("{target}: {error}"));
    let mut files: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{target} has no corpus");
    files
}

#[test]
fn every_input_ever_found_does_no_harm() {
    // A panic of a device's own thread would otherwise go unnoticed, as would the input that caused it.
    let current = std::sync::Arc::new(std::sync::Mutex::new(PathBuf::new()));
    let shown = current.clone();
    std::panic::set_hook(Box::new(move |panic| {
        eprintln!("{}: {panic}", shown.lock().unwrap().display());
        std::process::abort();
    }));
    for (target, run) in fuzz::TARGETS {
        for file in corpus(target) {
            *current.lock().unwrap() = file.clone();
            run(&std::fs::read(&file).unwrap());
        }
    }
}
