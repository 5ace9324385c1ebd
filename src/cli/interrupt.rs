//! Ctrl-C during a run: the first one lets running steps finish, the second one ends the process.

use std::sync::atomic::AtomicBool;

use crate::host::linux::termination;

/// Set by the first SIGINT or SIGTERM from now on.
pub fn flag() -> &'static AtomicBool {
    termination::catch_termination()
}
