//! Many VMs asked at once: one that hangs doesn't hold up the others for long.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use crate::host::error::ObserveError;
use crate::name::ObjectName;

/// VMs asked at the same time.
const LOOKERS_MAX: usize = 32;

/// Calls `look` for each VM, from several threads, and gives what it said in no order.
pub fn ask_all<T: Send>(
    names: BTreeSet<ObjectName>,
    look: impl Fn(&ObjectName) -> T + Sync,
) -> Result<Vec<(ObjectName, T)>, ObserveError> {
    let lookers = names.len().min(LOOKERS_MAX);
    let names = Mutex::new(names.into_iter());
    let look = || {
        let mut seen = Vec::new();
        loop {
            // Nothing panics while it holds the lock.
            let next = names.lock().unwrap_or_else(PoisonError::into_inner).next();
            let Some(name) = next else { return seen };
            let answer = look(&name);
            seen.push((name, answer));
        }
    };
    std::thread::scope(|scope| {
        let others: Vec<_> =
            (1..lookers).map_while(|_| std::thread::Builder::new().spawn_scoped(scope, look).ok()).collect();
        let mut seen = look();
        for other in others {
            match other.join() {
                Ok(more) => seen.extend(more),
                Err(_) => return Err(ObserveError::new("look at the VMs", "a thread failed")),
            }
        }
        Ok(seen)
    })
}
