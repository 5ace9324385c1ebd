//! The last words of a VM process: the exit record, also after a panic.

use std::fs::File;
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::fs::FileExt as _;
use std::sync::OnceLock;

use super::protocol::{ExitReason, ExitRecord};

static RECORD: OnceLock<File> = OnceLock::new();

/// From now on [`end`] and panics write to this file. The first call counts.
pub fn install(record: File) {
    let _ = RECORD.set(record);
    // Whichever thread panics: nobody can say what state the guest and its disks are in, so all ends
    // here, with a record of why.
    std::panic::set_hook(Box::new(|panic| {
        let message = panic.to_string().replace('\n', " ");
        write(&ExitRecord { reason: ExitReason::Internal, message });
        // SAFETY: _exit has no preconditions.
        unsafe { libc::_exit(1) }
    }));
}

/// For a signal handler, which writes it without an allocation.
pub fn record_fd() -> Option<RawFd> {
    RECORD.get().map(|file| file.as_raw_fd())
}

/// Writes the record, last of all, and ends the process.
pub fn end(record: &ExitRecord) -> ! {
    write(record);
    // SAFETY: _exit has no preconditions. No destructor has anything left to do.
    unsafe { libc::_exit(0) }
}

fn write(record: &ExitRecord) {
    let Some(file) = RECORD.get() else { return };
    if let Ok(bytes) = serde_json::to_vec(record) {
        // Nobody is left to hear of an error; the reader takes a missing record for a crash.
        let _ = file.write_all_at(&bytes, 0);
    }
}
