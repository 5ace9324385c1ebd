//! HostPolicy: differences to steps.

use super::HostPolicy;
use super::capacity::ratio;
use crate::host::Step;
use crate::host::snapshot::{HostFacts, HostSetting, PolicyRules, RecordedPolicy};
use crate::kinds::Context;
use crate::kinds::action::{Action, Blocker, Impact, Verb};
use crate::name::{ByteSize, Mark, ObjectId};

pub fn compare(id: &ObjectId, want: &HostPolicy, context: &Context) -> Action {
    let mut action = Action::new(id, summary(&want.rules));
    let host = match &context.snapshot.host {
        Ok(host) => host,
        Err(error) => return action.blocked(Blocker::unseen(error)),
    };
    let mark = Mark::new(context.declared.set.clone(), id.clone());
    match &host.policy {
        None => {
            action.verb(Verb::Create, "this host has no policy");
            record(&mut action, want, &mark);
        }
        Some(have) if have.mark.set != mark.set => {
            let whose = format!("this host's policy is {} of set {}", have.mark.owner, have.mark.set);
            return action.blocked(Blocker::new(whose).hint("a host has one policy; declare it in one set"));
        }
        Some(have) => {
            action.usable = true;
            compare_rules(&mut action, want, have, &mark);
        }
    }
    ksm(&mut action, &want.rules, host, &mark);
    restore(&mut action, Some(&want.rules), host, &mark);
    // Last, for the kernel may not find so many, and then nothing else waits for it.
    hugepages(&mut action, &want.rules, host, &mark);
    action.finish()
}

fn summary(rules: &PolicyRules) -> String {
    let mut parts = Vec::new();
    parts.extend(rules.cpu_overcommit_thousandths.map(|cpu| format!("CPU × {}", ratio(cpu))));
    parts.extend(rules.memory_overcommit_thousandths.map(|memory| format!("memory × {}", ratio(memory))));
    let pages = rules.hugepages.iter();
    parts.extend(pages.map(|(size, count)| format!("{count} huge pages of {}", ByteSize(*size))));
    parts.extend(rules.ksm.map(|ksm| format!("KSM {}", if ksm.run { "on" } else { "off" })));
    if parts.is_empty() { "no limits".to_owned() } else { parts.join(", ") }
}

fn record(action: &mut Action, want: &HostPolicy, mark: &Mark) {
    action.step(Step::RecordHostPolicy { mark: mark.clone(), rules: Box::new(want.rules.clone()) });
}

/// The rules in the manifest's words, for those that nothing but the record holds.
fn fields(rules: &PolicyRules) -> [(&'static str, Option<String>); 4] {
    let balloon = rules.balloon.map(|balloon| {
        let (low, high) = (ByteSize(balloon.low_bytes), ByteSize(balloon.high_bytes));
        format!("{low} to {high}, pressure {} %", balloon.pressure_percent)
    });
    [
        ("cpuOvercommit", rules.cpu_overcommit_thousandths.map(ratio)),
        ("memoryOvercommit", rules.memory_overcommit_thousandths.map(ratio)),
        ("reservedMemory", Some(ByteSize(rules.reserved_bytes).to_string())),
        ("balloon", balloon),
    ]
}

fn compare_rules(action: &mut Action, want: &HostPolicy, have: &RecordedPolicy, mark: &Mark) {
    if have.mark == *mark && have.rules == want.rules {
        return;
    }
    if have.mark != *mark {
        let (from, to) = (have.mark.owner.to_string(), mark.owner.to_string());
        action.differs("metadata.name", Some(from), Some(to), Impact::Live);
    }
    for ((field, from), (_, to)) in fields(&have.rules).into_iter().zip(fields(&want.rules)) {
        if from != to {
            action.differs(field, from, to, Impact::Live);
        }
    }
    record(action, want, mark);
}

fn hugepages(action: &mut Action, rules: &PolicyRules, host: &HostFacts, mark: &Mark) {
    for (size, count) in &rules.hugepages {
        let shown = ByteSize(*size);
        let Some(have) = host.hugepages.get(size) else {
            action.block(Blocker::new(format!("this host has no huge pages of {shown}")).hint(format!(
                "take {shown} out of `hugepages`; `ls /sys/kernel/mm/hugepages` shows the sizes"
            )));
            continue;
        };
        let target = (*count).max(have.in_use().min(have.total));
        if target > *count {
            action.note(format!(
                "{} huge pages of {shown} are in use; they go down to {count} as they become free",
                have.in_use()
            ));
        }
        set(action, mark, HostSetting::HugePages { page_bytes: *size }, have.total, target);
    }
}

fn ksm(action: &mut Action, rules: &PolicyRules, host: &HostFacts, mark: &Mark) {
    let Some(ksm) = rules.ksm else { return };
    let Some(have) = host.ksm else {
        action.block(
            Blocker::new("this host's kernel has no KSM")
                .hint("take `ksm` out, or boot a kernel with CONFIG_KSM"),
        );
        return;
    };
    if let Some(pages) = ksm.pages_to_scan {
        set(action, mark, HostSetting::KsmPagesToScan, have.pages_to_scan, pages);
    }
    // Stopped with what was merged, or with that apart again: both are off.
    if (have.run == 1) != ksm.run {
        set(action, mark, HostSetting::KsmRun, have.run, ksm.run.into());
    }
}

fn set(action: &mut Action, mark: &Mark, setting: HostSetting, have: u64, want: u64) {
    if have != want {
        action.differs(setting.to_string(), Some(have.to_string()), Some(want.to_string()), Impact::Live);
        action.step(Step::SetHostSetting { mark: mark.clone(), setting, value: want });
    }
}

/// Settings that were changed once and are declared no more become what they were.
pub fn restore(action: &mut Action, rules: Option<&PolicyRules>, host: &HostFacts, mark: &Mark) {
    let Some(policy) = &host.policy else { return };
    for previous in &policy.previous {
        let declared = rules.is_some_and(|rules| match previous.setting {
            HostSetting::HugePages { page_bytes } => rules.hugepages.contains_key(&page_bytes),
            HostSetting::KsmRun => rules.ksm.is_some(),
            HostSetting::KsmPagesToScan => rules.ksm.is_some_and(|ksm| ksm.pages_to_scan.is_some()),
        });
        if declared {
            continue;
        }
        let setting = previous.setting;
        let have = match setting {
            HostSetting::HugePages { page_bytes } => host.hugepages.get(&page_bytes).map(|pages| pages.total),
            HostSetting::KsmRun => host.ksm.map(|ksm| ksm.run),
            HostSetting::KsmPagesToScan => host.ksm.map(|ksm| ksm.pages_to_scan),
        };
        let from = have.map(|have| have.to_string());
        let to = format!("{}, as before", previous.value);
        action.differs(setting.to_string(), from, Some(to), Impact::Live);
        action.step(Step::RestoreHostSetting { mark: mark.clone(), setting });
    }
}
