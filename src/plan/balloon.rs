//! How much guests give back while the host's memory is short, and get again when it isn't.
//!
//! ```text
//!   available   0 ───────── low ─────── aim ─────── high ─────────▶
//!                  inflate        leave as it is         deflate
//! ```
//!
//! It remembers nothing: what the balloons are to hold is read from the VMs. Between the two bounds nothing
//! changes, and each change aims at the middle, so memory doesn't go to and fro. A guest never has less than
//! its bound, whatever the host suffers.

use crate::host::snapshot::BalloonRules;
use crate::name::ObjectName;

/// Balloons take and give at most this part of a guest's memory at once: a guest needs time for it.
const SHARE_AT_ONCE: u64 = 8;
const GRAIN: u64 = 1 << 20;

/// What the host has at this moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pressure {
    pub available_bytes: u64,
    /// In hundredths of a per cent.
    pub stalled: Option<u32>,
}

/// A guest that runs and says how far it may be pressed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guest {
    pub vm: ObjectName,
    pub memory_bytes: u64,
    /// It keeps at least this.
    pub least_bytes: u64,
    /// What its manifest lets the balloon take.
    pub declared_bytes: u64,
    /// What the balloon is to take, and what it has taken. The latter is `None` where it can't be told.
    pub target_bytes: u64,
    pub actual_bytes: Option<u64>,
}

impl Guest {
    /// The most that its balloon may take.
    fn most(&self) -> u64 {
        self.memory_bytes.saturating_sub(self.least_bytes).max(self.declared_bytes) / GRAIN * GRAIN
    }

    fn at_once(&self) -> u64 {
        (self.memory_bytes / SHARE_AT_ONCE).max(GRAIN)
    }

    /// What it was asked for and has not given yet.
    fn owes(&self) -> u64 {
        self.target_bytes.saturating_sub(self.actual_bytes.unwrap_or(self.target_bytes))
    }
}

/// The balloons that are to change, with what they are to take, in the order of the guests.
pub fn decide(rules: &BalloonRules, host: Pressure, guests: &[Guest]) -> Vec<(ObjectName, u64)> {
    let stalls = host.stalled.is_some_and(|stalled| stalled >= rules.pressure_percent * 100);
    let available = host.available_bytes;
    let middle = rules.low_bytes + (rules.high_bytes - rules.low_bytes) / 2;
    if available < rules.low_bytes || (stalls && available < rules.high_bytes) {
        // Where programs wait although there is some: towards the upper bound.
        let aim = if available < middle { middle } else { rules.high_bytes };
        return inflate(aim - available, guests);
    }
    if available > rules.high_bytes && !stalls {
        return deflate(available - middle, guests);
    }
    Vec::new()
}

fn inflate(needed: u64, guests: &[Guest]) -> Vec<(ObjectName, u64)> {
    // What is on its way counts, but a guest without a driver never gives: at most half waits for such ones.
    let owed: u64 = guests.iter().map(Guest::owes).sum();
    let needed = needed - owed.min(needed / 2);
    let ready: Vec<(&Guest, u64)> = guests
        .iter()
        .filter(|guest| guest.owes() <= guest.at_once() / 4)
        .map(|guest| (guest, guest.most().saturating_sub(guest.target_bytes)))
        .filter(|(_, room)| *room > 0)
        .collect();
    share(needed, &ready)
        .into_iter()
        .map(|(guest, part)| (guest.vm.clone(), (guest.target_bytes + part).min(guest.most())))
        .filter(|(vm, target)| guests.iter().any(|guest| guest.vm == *vm && guest.target_bytes != *target))
        .collect()
}

fn deflate(spare: u64, guests: &[Guest]) -> Vec<(ObjectName, u64)> {
    let taken: Vec<(&Guest, u64)> = guests
        .iter()
        .map(|guest| (guest, guest.target_bytes.saturating_sub(guest.declared_bytes)))
        .filter(|(_, taken)| *taken > 0)
        .collect();
    share(spare, &taken)
        .into_iter()
        .map(|(guest, part)| {
            // What is left of less than a grain goes with it, so that it comes to an end.
            let target = guest.target_bytes.saturating_sub(part).max(guest.declared_bytes);
            let rest = target - guest.declared_bytes;
            (guest.vm.clone(), if rest < GRAIN { guest.declared_bytes } else { target })
        })
        .collect()
}

/// Each one's part of an amount, by how much it can bear; in grains, rounded up.
fn share<'a>(amount: u64, bears: &[(&'a Guest, u64)]) -> Vec<(&'a Guest, u64)> {
    let all: u64 = bears.iter().map(|(_, room)| room).sum();
    let part = |room: u64, at_once: u64| {
        let exact = u128::from(amount.min(all)) * u128::from(room) / u128::from(all.max(1));
        let part = u64::try_from(exact).unwrap_or(u64::MAX).div_ceil(GRAIN) * GRAIN;
        part.min(room).min(at_once)
    };
    bears
        .iter()
        .map(|(guest, room)| (*guest, part(*room, guest.at_once())))
        .filter(|(_, part)| *part > 0)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GI: u64 = 1 << 30;
    const MI: u64 = 1 << 20;
    const RULES: BalloonRules = BalloonRules { low_bytes: 2 * GI, high_bytes: 4 * GI, pressure_percent: 20 };

    fn guest(vm: &str, memory: u64, least: u64, target: u64) -> Guest {
        Guest {
            vm: vm.parse().unwrap(),
            memory_bytes: memory,
            least_bytes: least,
            declared_bytes: 0,
            target_bytes: target,
            actual_bytes: Some(target),
        }
    }

    fn targets(available: u64, stalled: u32, guests: &[Guest]) -> Vec<(String, u64)> {
        let host = Pressure { available_bytes: available, stalled: Some(stalled) };
        decide(&RULES, host, guests).into_iter().map(|(vm, target)| (vm.to_string(), target / MI)).collect()
    }

    #[test]
    fn nothing_changes_between_the_bounds() {
        let guests = [guest("a", 8 * GI, GI, 0), guest("b", 8 * GI, GI, GI)];
        for available in [2 * GI, 3 * GI, 4 * GI] {
            assert_eq!(targets(available, 0, &guests), []);
        }
    }

    #[test]
    fn guests_give_by_what_they_can_spare_and_no_more_than_a_part_at_once() {
        // 3 Gi are aimed at, 1.5 Gi are there: 1.5 Gi from 3 Gi and 6 Gi, an eighth of each guest at once.
        let guests = [guest("a", 4 * GI, GI, 0), guest("b", 8 * GI, 2 * GI, 0)];
        assert_eq!(targets(3 * GI / 2, 0, &guests), [("a".to_owned(), 512), ("b".to_owned(), 1024)]);
        assert_eq!(targets(2 * GI - 9 * MI, 0, &guests), [("a".to_owned(), 345), ("b".to_owned(), 689)]);
    }

    #[test]
    fn no_guest_is_pressed_below_its_bound() {
        let mut guests = [guest("a", 4 * GI, 3 * GI, 900 * MI), guest("b", 2 * GI, 2 * GI, 0)];
        for _ in 0..10 {
            for (vm, target) in targets(0, 10_000, &guests) {
                let guest = guests.iter_mut().find(|guest| guest.vm.as_str() == vm).unwrap();
                (guest.target_bytes, guest.actual_bytes) = (target * MI, Some(target * MI));
            }
            assert!(guests.iter().all(|guest| guest.memory_bytes - guest.target_bytes >= guest.least_bytes));
        }
        assert_eq!(guests[0].target_bytes, GI, "all that it may, and not a byte more");
        assert_eq!(targets(0, 10_000, &guests), []);
    }

    #[test]
    fn programs_that_wait_are_a_shortage_too() {
        let guests = [guest("a", 8 * GI, GI, GI)];
        assert_eq!(targets(3 * GI + 1, 1999, &guests), []);
        assert_eq!(targets(3 * GI + 1, 2000, &guests), [("a".to_owned(), 2048)]);
        assert_eq!(targets(5 * GI, 2000, &guests), [], "and nothing is given back meanwhile");
    }

    #[test]
    fn what_was_taken_comes_back_to_what_is_declared() {
        let mut guests = [Guest { declared_bytes: 100 * MI, ..guest("a", 4 * GI, GI, 2 * GI) }];
        let mut rounds = 0;
        while let [(_, target)] = targets(6 * GI, 0, &guests)[..] {
            assert!(guests[0].target_bytes - target * MI <= 512 * MI);
            guests[0].target_bytes = target * MI;
            rounds += 1;
        }
        assert_eq!((guests[0].target_bytes, rounds), (100 * MI, 4));
    }

    #[test]
    fn one_that_owes_is_not_asked_for_more_and_holds_up_no_other() {
        let stuck = Guest { actual_bytes: Some(0), ..guest("a", 8 * GI, GI, 4 * GI) };
        let guests = [stuck, guest("b", 8 * GI, GI, 0)];
        assert_eq!(targets(GI, 0, &guests), [("b".to_owned(), 1024)]);
    }

    /// A host and guests that follow: it comes to rest between the bounds.
    #[test]
    fn it_comes_to_rest() {
        let mut guests = [guest("a", 8 * GI, GI, 0), guest("b", 4 * GI, GI, 0)];
        let mut others = 0i64;
        let mut changes_at_rest = 0;
        for round in 0..60 {
            // Something else takes 3 Gi, and lets them go later.
            others = if (5..40).contains(&round) { 4 * GI as i64 } else { others.min(0) };
            let given: u64 = guests.iter().map(|guest| guest.target_bytes).sum();
            let available = (5 * GI as i64 - others + given as i64).max(0) as u64;
            let changes = targets(available, 0, &guests);
            if (25..40).contains(&round) || round > 55 {
                changes_at_rest += changes.len();
                assert!(available >= 2 * GI, "round {round}");
            }
            for (vm, target) in changes {
                let guest = guests.iter_mut().find(|guest| guest.vm.as_str() == vm).unwrap();
                (guest.target_bytes, guest.actual_bytes) = (target * MI, Some(target * MI));
            }
        }
        assert_eq!(changes_at_rest, 0);
        assert!(guests.iter().all(|guest| guest.target_bytes == 0));
    }
}
