//! How the event loop orders the vCPUs about: one order at a time, obeyed and acknowledged by all.
//!
//! ```text
//!             ┌────────────── Park ◀─────────────┐
//!             ▼                                  │
//!   start ─▶ parked ── Reset ─▶ parked ── Run ─▶ running
//!             │                                  │
//!             └── End ─▶ (thread ends) ◀── End ──┘
//! ```
//!
//! A vCPU in the guest must be kicked to see an order (see [`crate::vmm::vcpu`]). A vCPU that has asked
//! for a reset or a power-off parks itself, and waits for the next order like the others.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::boot::Entry;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Stay out of the guest.
    Park,
    /// Go back to the state at reset; the first vCPU then stands at this entry. Stay out of the guest.
    Reset(Entry),
    Run,
    /// The thread ends.
    End,
}

struct State {
    order: Order,
    /// Counts the orders; 0 is the initial [`Order::Park`].
    number: u64,
    /// How many have obeyed the current order.
    obeyed: usize,
}

pub struct Gate {
    vcpus: usize,
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    pub fn new(vcpus: usize) -> Self {
        let state = State { order: Order::Park, number: 0, obeyed: vcpus };
        Self { vcpus, state: Mutex::new(state), changed: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds the lock, and a panic ends the process.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives an order. Kick the vCPUs after, then [`Gate::wait_obeyed`].
    pub fn give(&self, order: Order) {
        let mut state = self.lock();
        state.order = order;
        state.number += 1;
        state.obeyed = 0;
        self.changed.notify_all();
    }

    /// Waits until all vCPUs have obeyed the last order; false if some haven't within `timeout`.
    pub fn wait_obeyed(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        let mut state = self.lock();
        while state.obeyed < self.vcpus {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// For a vCPU: the order after the one numbered `seen`, if there is one.
    pub fn newer(&self, seen: u64) -> Option<(u64, Order)> {
        let state = self.lock();
        (state.number > seen).then_some((state.number, state.order))
    }

    /// For a vCPU: waits for the order after the one numbered `seen`.
    pub fn wait_newer(&self, seen: u64) -> (u64, Order) {
        let mut state = self.lock();
        while state.number <= seen {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        (state.number, state.order)
    }

    /// For a vCPU: it has obeyed this order.
    pub fn obeyed(&self, number: u64) {
        let mut state = self.lock();
        if state.number == number {
            state.obeyed += 1;
            self.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    #[test]
    fn an_order_is_done_when_all_have_obeyed() {
        let gate = Arc::new(Gate::new(3));
        assert!(gate.wait_obeyed(Duration::ZERO));
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let gate = gate.clone();
                std::thread::spawn(move || {
                    let mut seen = 0;
                    let mut orders = Vec::new();
                    loop {
                        let (number, order) = gate.wait_newer(seen);
                        seen = number;
                        orders.push(order);
                        gate.obeyed(number);
                        if order == Order::End {
                            return orders;
                        }
                    }
                })
            })
            .collect();
        let orders = [Order::Reset(Entry::Pvh { address: 1 }), Order::Run, Order::Park, Order::End];
        for order in orders {
            gate.give(order);
            assert!(gate.wait_obeyed(Duration::from_secs(10)));
        }
        for thread in threads {
            assert_eq!(thread.join().unwrap(), orders);
        }
        gate.give(Order::Park);
        assert!(!gate.wait_obeyed(Duration::from_millis(1)), "nobody is left to obey");
    }
}
