//! What the agent says, on standard error: one line an event, with the time unless a journal adds it.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

#[derive(Debug, Default)]
pub struct Log {
    /// The last word on each subject: what has not changed is not said again.
    states: BTreeMap<&'static str, String>,
}

impl Log {
    pub fn say(&self, text: &str) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let stamp = utc(now.as_secs(), now.subsec_millis());
        // A closed standard error must not stop the agent.
        let _ = writeln!(std::io::stderr().lock(), "{stamp} {text}");
    }

    pub fn state(&mut self, subject: &'static str, text: &str) {
        if self.states.get(subject).map(String::as_str) != Some(text) {
            self.say(text);
            self.states.insert(subject, text.to_owned());
        }
    }

    /// It is over: if it comes again, it is said again.
    pub fn forget(&mut self, subject: &'static str) {
        self.states.remove(subject);
    }
}

/// RFC 3339 in UTC, from seconds since 1970 (days to a date by the civil calendar's 400-year cycle).
fn utc(seconds: u64, millis: u32) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    let shifted = days + 719_468;
    let era = shifted / 146_097;
    let day_of_era = shifted % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{millis:03}Z")
}

#[cfg(test)]
mod tests {
    use super::utc;

    #[test]
    fn dates_are_right() {
        assert_eq!(utc(0, 0), "1970-01-01T00:00:00.000Z");
        assert_eq!(utc(951_782_400, 5), "2000-02-29T00:00:00.005Z");
        assert_eq!(utc(1_795_392_838, 999), "2026-11-23T00:13:58.999Z");
    }
}
