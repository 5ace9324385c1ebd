//! The host as a whole: its CPUs and memory, the settings of its memory management, and the policy that is
//! recorded for it in the state directory.
//!
//! A setting's value is written down before it is changed for the first time, so that it can come back. What
//! was written down in another boot counts no more: a boot sets everything anew.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use serde::{Deserialize, Serialize};

use super::storage::directory::{not_ours, read_bounded, replace_file};
use crate::host::error::{ObserveError, StepError};
use crate::host::snapshot::{
    HostFacts, HostSetting, HugePages, Ksm, Observed, PolicyRules, Previous, RecordedPolicy,
};
use crate::host::step::Step;
use crate::name::{ByteSize, Mark};

const FILE: &str = "host-policy.json";
const FILE_BYTES_MAX: usize = 64 << 10;

/// Where the host's files are; a test has its own.
#[derive(Clone, Debug)]
pub struct HostFiles {
    root: PathBuf,
    state_dir: PathBuf,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    boot_id: String,
    policy: RecordedPolicy,
}

impl HostFiles {
    pub fn new(state_dir: &Path) -> Self {
        Self { root: PathBuf::from("/"), state_dir: state_dir.to_owned() }
    }

    /// With `/proc` and `/sys` elsewhere.
    pub fn below(root: impl Into<PathBuf>, state_dir: &Path) -> Self {
        Self { root: root.into(), state_dir: state_dir.to_owned() }
    }

    fn text(&self, path: &str) -> Result<String, ObserveError> {
        let path = self.root.join(path);
        fs::read_to_string(&path)
            .map_err(|error| ObserveError::new(format!("read {}", path.display()), error))
    }

    fn number(&self, path: &str) -> Result<u64, ObserveError> {
        let text = self.text(path)?;
        text.trim().parse().map_err(|error| {
            ObserveError::new(
                format!("read {}", self.root.join(path).display()),
                format!("`{}`: {error}", text.trim()),
            )
        })
    }

    fn is_there(&self, path: &str) -> bool {
        self.root.join(path).exists()
    }

    pub fn observe(&self) -> Observed<HostFacts> {
        let memory = self.text("proc/meminfo")?;
        let kib = |field: &str| {
            let line = memory.lines().find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
            let number = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
            number
                .map(|kib| kib << 10)
                .ok_or_else(|| ObserveError::new("read /proc/meminfo", format!("no {field} in it")))
        };
        Ok(HostFacts {
            cpus: self.cpus()?,
            memory_bytes: kib("MemTotal")?,
            available_bytes: kib("MemAvailable")?,
            pressure: self.pressure(),
            hugepages: self.hugepages()?,
            ksm: self.ksm()?,
            policy: self.record()?.map(|record| record.policy),
        })
    }

    fn cpus(&self) -> Result<u32, ObserveError> {
        const ONLINE: &str = "sys/devices/system/cpu/online";
        let text = self.text(ONLINE)?;
        let count = |range: &str| -> Option<u32> {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            last.parse::<u32>().ok()?.checked_sub(first.parse().ok()?)?.checked_add(1)
        };
        let counts: Option<Vec<u32>> = text.trim().split(',').map(count).collect();
        counts
            .map(|counts| counts.iter().sum())
            .ok_or_else(|| ObserveError::new(format!("read /{ONLINE}"), format!("`{}`", text.trim())))
    }

    /// `some avg10=1.23 …`
    fn pressure(&self) -> Option<u32> {
        let text = self.text("proc/pressure/memory").ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix("some "))?;
        let percent = line.split_whitespace().find_map(|word| word.strip_prefix("avg10="))?;
        Some((percent.parse::<f64>().ok()? * 100.0).round() as u32)
    }

    fn hugepages(&self) -> Result<BTreeMap<u64, HugePages>, ObserveError> {
        const POOLS: &str = "sys/kernel/mm/hugepages";
        let mut pools = BTreeMap::new();
        let directory = self.root.join(POOLS);
        let entries = match fs::read_dir(&directory) {
            Ok(entries) => entries,
            // A kernel without them.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(pools),
            Err(error) => return Err(ObserveError::new(format!("read {}", directory.display()), error)),
        };
        for entry in entries.flatten() {
            let name = entry.file_name();
            let kib = name
                .to_str()
                .and_then(|name| name.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse::<u64>().ok());
            let Some(kib) = kib else { continue };
            pools.insert(kib << 10, self.pool(kib << 10)?);
        }
        Ok(pools)
    }

    fn pool(&self, page_bytes: u64) -> Result<HugePages, ObserveError> {
        let count = |which: &str| self.number(&format!("{}/{which}_hugepages", pool_path(page_bytes)));
        // Those that the kernel adds by itself are counted in both; reserved ones are free until touched.
        let surplus = count("surplus").unwrap_or(0);
        Ok(HugePages {
            total: count("nr")?.saturating_sub(surplus),
            free: count("free")?.saturating_sub(count("resv")?),
        })
    }

    fn ksm(&self) -> Result<Option<Ksm>, ObserveError> {
        if !self.is_there("sys/kernel/mm/ksm/run") {
            return Ok(None);
        }
        Ok(Some(Ksm {
            run: self.number("sys/kernel/mm/ksm/run")?,
            pages_to_scan: self.number("sys/kernel/mm/ksm/pages_to_scan")?,
            saved_bytes: self.number("sys/kernel/mm/ksm/pages_sharing").unwrap_or(0) * 4096,
        }))
    }

    fn boot_id(&self) -> Result<String, ObserveError> {
        Ok(self.text("proc/sys/kernel/random/boot_id")?.trim().to_owned())
    }

    fn what(&self) -> String {
        format!("read {}", self.state_dir.join(FILE).display())
    }

    /// What is recorded, without what another boot has made void.
    fn record(&self) -> Result<Option<Record>, ObserveError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let failed = |why: String| ObserveError::new(self.what(), why);
        let file = match rustix::fs::openat(CWD, self.state_dir.join(FILE), flags, Mode::empty()) {
            Ok(file) => file,
            Err(rustix::io::Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(failed(errno.to_string())),
        };
        let text = read_bounded(file, FILE_BYTES_MAX).map_err(|errno| failed(errno.to_string()))?;
        let mut record: Record = serde_json::from_slice(&text).map_err(|error| failed(error.to_string()))?;
        let boot_id = self.boot_id()?;
        if record.boot_id != boot_id {
            record.policy.previous.clear();
            record.boot_id = boot_id;
        }
        Ok(Some(record))
    }

    fn write(&self, record: &Record) -> Result<(), StepError> {
        let failed =
            |why: String| StepError::failed(format!("write {}", self.state_dir.join(FILE).display()), why);
        fs::create_dir_all(&self.state_dir).map_err(|error| failed(error.to_string()))?;
        let text = serde_json::to_vec(record).map_err(|error| failed(error.to_string()))?;
        let directory = self.directory().map_err(|errno| failed(errno.to_string()))?;
        replace_file(&directory, ".host-policy", &directory, FILE, &text)
            .map_err(|errno| failed(errno.to_string()))
    }

    fn directory(&self) -> Result<OwnedFd, rustix::io::Errno> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::openat(CWD, &self.state_dir, flags, Mode::empty())
    }

    pub fn run(&self, step: &Step) -> Result<(), StepError> {
        let unseen = |error: ObserveError| StepError::failed(error.what, error.why);
        let record = self.record().map_err(unseen)?;
        match step {
            Step::RecordHostPolicy { mark, rules } => self.record_policy(record, mark, rules),
            Step::SetHostSetting { mark, setting, value } => {
                let mut record = self.ours(record, mark, step)?;
                if record.policy.previous(*setting).is_none() {
                    let value = self.value(*setting).map_err(unseen)?;
                    record.policy.previous.push(Previous { setting: *setting, value });
                    self.write(&record)?;
                }
                self.set(*setting, *value)
            }
            Step::RestoreHostSetting { mark, setting } => {
                let mut record = self.ours(record, mark, step)?;
                let Some(previous) = record.policy.previous(*setting) else { return Ok(()) };
                self.set(*setting, previous)?;
                record.policy.previous.retain(|previous| previous.setting != *setting);
                self.write(&record)
            }
            Step::ForgetHostPolicy { mark } => match record {
                None => Ok(()),
                Some(_) => {
                    self.ours(record, mark, step)?;
                    let path = self.state_dir.join(FILE);
                    let removed = match fs::remove_file(&path) {
                        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
                        removed => removed,
                    };
                    let synced = removed.and_then(|()| Ok(rustix::fs::fsync(self.directory()?)?));
                    synced.map_err(|error| StepError::failed(format!("remove {}", path.display()), error))
                }
            },
            other => Err(StepError::failed(other.to_string(), "it is not about the host's policy")),
        }
    }

    fn record_policy(&self, have: Option<Record>, mark: &Mark, rules: &PolicyRules) -> Result<(), StepError> {
        let previous = match have {
            Some(have) if have.policy.mark.set != mark.set => {
                return Err(not_ours("record the host's policy".to_owned(), Some(&have.policy.mark), mark));
            }
            Some(have) => have.policy.previous,
            None => Vec::new(),
        };
        let boot_id = self.boot_id().map_err(|error| StepError::failed(error.what, error.why))?;
        let policy = RecordedPolicy { mark: mark.clone(), rules: rules.clone(), previous };
        self.write(&Record { boot_id, policy })
    }

    fn ours(&self, record: Option<Record>, mark: &Mark, step: &Step) -> Result<Record, StepError> {
        match record {
            Some(record) if record.policy.mark == *mark => Ok(record),
            record => Err(not_ours(step.to_string(), record.map(|record| record.policy.mark).as_ref(), mark)),
        }
    }

    fn path(setting: HostSetting) -> String {
        match setting {
            HostSetting::HugePages { page_bytes } => format!("{}/nr_hugepages", pool_path(page_bytes)),
            HostSetting::KsmRun => "sys/kernel/mm/ksm/run".to_owned(),
            HostSetting::KsmPagesToScan => "sys/kernel/mm/ksm/pages_to_scan".to_owned(),
        }
    }

    fn value(&self, setting: HostSetting) -> Result<u64, ObserveError> {
        match setting {
            HostSetting::HugePages { page_bytes } => Ok(self.pool(page_bytes)?.total),
            _ => self.number(&Self::path(setting)),
        }
    }

    fn set(&self, setting: HostSetting, value: u64) -> Result<(), StepError> {
        let unseen = |error: ObserveError| StepError::failed(error.what, error.why);
        let mut value = value;
        if let HostSetting::HugePages { page_bytes } = setting {
            let pool = self.pool(page_bytes).map_err(unseen)?;
            // A guest may have taken some since the plan was made.
            value = value.max(pool.in_use().min(pool.total));
        }
        if self.value(setting).map_err(unseen)? == value {
            return Ok(());
        }
        let path = self.root.join(Self::path(setting));
        fs::write(&path, value.to_string())
            .map_err(|error| StepError::failed(format!("write {value} to {}", path.display()), error))?;
        let HostSetting::HugePages { page_bytes } = setting else { return Ok(()) };
        let got = self.pool(page_bytes).map_err(unseen)?.total;
        if got >= value {
            return Ok(());
        }
        let size = ByteSize(page_bytes);
        Err(StepError::Failed {
            what: format!("set {setting} to {value}"),
            why: format!("the kernel found room for {got} pages of {size}"),
            hint: Some(format!(
                "its memory is in use or in pieces: stop something and apply again, or reserve them at boot (`hugepagesz={}M hugepages={value}` on the host's kernel command line)",
                page_bytes >> 20
            )),
        })
    }
}

fn pool_path(page_bytes: u64) -> String {
    format!("sys/kernel/mm/hugepages/hugepages-{}kB", page_bytes >> 10)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::name::{Kind, ObjectId};

    struct Ground {
        root: PathBuf,
        files: HostFiles,
    }

    impl Ground {
        fn new(name: &str) -> Self {
            let root = std::env::temp_dir().join(format!("vmctl-host-{}-{name}", std::process::id()));
            let _ = fs::remove_dir_all(&root);
            let ground = Self { files: HostFiles::below(&root, &root.join("state")), root };
            for (path, text) in [
                ("proc/meminfo", "MemTotal:       8000 kB\nMemFree: 1 kB\nMemAvailable:    500 kB\n"),
                ("proc/pressure/memory", "some avg10=1.25 avg60=0.00 avg300=0.00 total=1\nfull avg10=0.00\n"),
                ("proc/sys/kernel/random/boot_id", "one\n"),
                ("sys/devices/system/cpu/online", "0-3,6,8-9\n"),
            ] {
                ground.write(path, text);
            }
            ground.pool(8, 8, 0, 0);
            ground
        }

        fn write(&self, path: &str, text: &str) {
            let path = self.root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }

        fn pool(&self, nr: u64, free: u64, resv: u64, surplus: u64) {
            for (which, count) in [("nr", nr), ("free", free), ("resv", resv), ("surplus", surplus)] {
                self.write(&format!("{}/{which}_hugepages", pool_path(2 << 20)), &format!("{count}\n"));
            }
        }

        fn pages(&self) -> u64 {
            self.files.number(&format!("{}/nr_hugepages", pool_path(2 << 20))).unwrap()
        }
    }

    impl Drop for Ground {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.root);
        }
    }

    fn mark() -> Mark {
        Mark::new("default".parse().unwrap(), ObjectId::new(Kind::HostPolicy, "host".parse().unwrap()))
    }

    const PAGES: HostSetting = HostSetting::HugePages { page_bytes: 2 << 20 };

    #[test]
    fn a_host_is_read_from_its_files() {
        let ground = Ground::new("read");
        ground.pool(10, 7, 2, 1);
        let facts = ground.files.observe().unwrap();
        assert_eq!((facts.cpus, facts.memory_bytes, facts.available_bytes), (7, 8000 << 10, 500 << 10));
        assert_eq!((facts.pressure, facts.ksm, &facts.policy), (Some(125), None, &None));
        assert_eq!(facts.hugepages, [(2 << 20, HugePages { total: 9, free: 5 })].into());
        ground.write("proc/meminfo", "MemTotal: 1 kB\n");
        assert!(ground.files.observe().unwrap_err().to_string().contains("no MemAvailable"));
    }

    #[test]
    fn what_was_before_is_written_down_once_and_void_after_a_reboot() {
        let ground = Ground::new("before");
        let run = |step: Step| ground.files.run(&step);
        let record = Step::RecordHostPolicy { mark: mark(), rules: Box::default() };
        let set = |value| Step::SetHostSetting { mark: mark(), setting: PAGES, value };
        let restore = Step::RestoreHostSetting { mark: mark(), setting: PAGES };
        assert!(matches!(run(set(3)), Err(StepError::NotOurs { .. })), "nothing is recorded");
        run(record.clone()).unwrap();
        run(set(12)).unwrap();
        run(set(16)).unwrap();
        let previous = || ground.files.observe().unwrap().policy.unwrap().previous;
        assert_eq!(previous(), [Previous { setting: PAGES, value: 8 }]);
        run(restore.clone()).unwrap();
        assert_eq!((ground.pages(), previous().len()), (8, 0));
        run(set(12)).unwrap();
        ground.write("proc/sys/kernel/random/boot_id", "two\n");
        assert_eq!(previous(), [], "a boot sets everything anew");
        run(restore).unwrap();
        assert_eq!(ground.pages(), 12);
        run(Step::ForgetHostPolicy { mark: mark() }).unwrap();
        assert_eq!(ground.files.observe().unwrap().policy, None);
    }

    #[test]
    fn pages_in_use_are_never_taken() {
        let ground = Ground::new("in-use");
        ground.files.run(&Step::RecordHostPolicy { mark: mark(), rules: Box::default() }).unwrap();
        // Three are touched and two more are promised.
        ground.pool(8, 5, 2, 0);
        ground.files.run(&Step::SetHostSetting { mark: mark(), setting: PAGES, value: 0 }).unwrap();
        assert_eq!(ground.pages(), 5);
    }

    #[test]
    fn a_record_that_cannot_be_read_is_not_none() {
        let ground = Ground::new("damaged");
        ground.write("state/host-policy.json", "{");
        assert!(ground.files.observe().is_err());
    }
}
