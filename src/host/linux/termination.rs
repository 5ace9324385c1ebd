//! A request to end (SIGINT, SIGTERM, SIGHUP) as a flag, so that work can come to a clean end first.
//! The second request of a kind ends the process at once.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

static REQUESTED: AtomicBool = AtomicBool::new(false);
static CAUGHT: Once = Once::new();

extern "C" fn note(_signal: libc::c_int) {
    REQUESTED.store(true, Ordering::Relaxed);
}

/// From now on the first of each of these signals only sets the flag. Signals that the parent had ignored
/// (`nohup`) stay ignored.
pub fn catch_termination() -> &'static AtomicBool {
    CAUGHT.call_once(|| {
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            // SAFETY: both structures are plain data for which zeroes are valid, and live for the calls; the
            // handler only stores to an atomic, which is async-signal-safe.
            unsafe {
                let mut before: libc::sigaction = std::mem::zeroed();
                if libc::sigaction(signal, std::ptr::null(), &mut before) != 0
                    || before.sa_sigaction == libc::SIG_IGN
                {
                    continue;
                }
                let mut action: libc::sigaction = std::mem::zeroed();
                action.sa_sigaction = note as extern "C" fn(libc::c_int) as usize;
                // Interrupted calls go on; the second signal has its default effect.
                action.sa_flags = libc::SA_RESTART | libc::SA_RESETHAND;
                libc::sigemptyset(&mut action.sa_mask);
                libc::sigaction(signal, &action, std::ptr::null_mut());
            }
        }
    });
    &REQUESTED
}
