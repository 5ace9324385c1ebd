//! What is not as it should be with a VM and lasts: kept in the order in which it came, told to who
//! watches, shown to who asks.

use std::time::Instant;

use super::protocol::{Condition, ConditionKind, Event};

#[derive(Default)]
pub struct Conditions(Vec<Entry>);

struct Entry {
    kind: ConditionKind,
    device: Option<String>,
    message: String,
    since: Instant,
}

impl Entry {
    fn is(&self, kind: ConditionKind, device: Option<&str>) -> bool {
        self.kind == kind && self.device.as_deref() == device
    }

    fn show(&self, now: Instant) -> Condition {
        Condition {
            kind: self.kind,
            device: self.device.clone(),
            message: self.message.clone(),
            age_ms: now.saturating_duration_since(self.since).as_millis() as u64,
        }
    }
}

impl Conditions {
    /// What is to be announced: nothing if that was so already.
    pub fn raise(
        &mut self,
        kind: ConditionKind,
        device: Option<&str>,
        message: impl Into<String>,
    ) -> Option<Event> {
        if self.0.iter().any(|entry| entry.is(kind, device)) {
            return None;
        }
        let now = Instant::now();
        let entry = Entry { kind, device: device.map(str::to_owned), message: message.into(), since: now };
        let event = Event::Condition(entry.show(now));
        self.0.push(entry);
        Some(event)
    }

    /// What is to be announced: nothing if it wasn't so.
    pub fn clear(&mut self, kind: ConditionKind, device: Option<&str>) -> Option<Event> {
        let at = self.0.iter().position(|entry| entry.is(kind, device))?;
        let Entry { kind, device, .. } = self.0.remove(at);
        Some(Event::Cleared { kind, device })
    }

    /// As [`Self::clear`], for all devices.
    pub fn clear_all(&mut self, kind: ConditionKind) -> Vec<Event> {
        let cleared = self.0.extract_if(.., |entry| entry.kind == kind);
        cleared.map(|Entry { kind, device, .. }| Event::Cleared { kind, device }).collect()
    }

    pub fn any(&self, kind: ConditionKind) -> bool {
        self.0.iter().any(|entry| entry.kind == kind)
    }

    /// The oldest first.
    pub fn list(&self) -> Vec<Condition> {
        let now = Instant::now();
        self.0.iter().map(|entry| entry.show(now)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_condition_is_announced_once_each_way() {
        let mut conditions = Conditions::default();
        let raised = conditions.raise(ConditionKind::DiskFull, Some("root"), "full");
        let Some(Event::Condition(Condition { kind, device, message, .. })) = raised else {
            panic!("{raised:?}")
        };
        assert_eq!((kind, device.as_deref(), &*message), (ConditionKind::DiskFull, Some("root"), "full"));
        assert_eq!(conditions.raise(ConditionKind::DiskFull, Some("root"), "full"), None);
        assert!(conditions.raise(ConditionKind::DiskFull, Some("data"), "full").is_some());
        assert!(conditions.raise(ConditionKind::GuestPanicked, None, "panic").is_some());
        let names: Vec<_> = conditions.list().into_iter().map(|condition| condition.device).collect();
        assert_eq!(names, [Some("root".to_owned()), Some("data".to_owned()), None]);
        let cleared = Event::Cleared { kind: ConditionKind::DiskFull, device: Some("root".into()) };
        assert_eq!(conditions.clear(ConditionKind::DiskFull, Some("root")), Some(cleared));
        assert_eq!(conditions.clear(ConditionKind::DiskFull, Some("root")), None);
        assert!(conditions.any(ConditionKind::DiskFull));
        assert_eq!(conditions.clear_all(ConditionKind::DiskFull).len(), 1);
        assert!(!conditions.any(ConditionKind::DiskFull) && conditions.any(ConditionKind::GuestPanicked));
    }
}
