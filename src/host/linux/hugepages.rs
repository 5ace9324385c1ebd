//! The host's pools of huge pages: read, never changed. How many there are is the administrator's matter.

use std::fs;
use std::io;
use std::path::Path;

use crate::vmm::config::{PageKind, VmConfig};

const POOLS: &str = "/sys/kernel/mm/hugepages";

/// Why a VM's memory can't come from a pool, and what helps.
#[derive(Debug, PartialEq, Eq)]
pub struct Shortage {
    pub why: String,
    pub hint: String,
}

/// Whether the pool has what this VM needs, now: another may take it before the VM does, which then says
/// so itself.
pub fn check(config: &VmConfig) -> Result<(), Shortage> {
    check_in(Path::new(POOLS), config)
}

fn check_in(pools: &Path, config: &VmConfig) -> Result<(), Shortage> {
    let (name, page_bytes, boot_only) = match config.memory.pages {
        PageKind::Small => return Ok(()),
        PageKind::Huge2Mi => ("2Mi", 2u64 << 20, false),
        PageKind::Huge1Gi => ("1Gi", 1 << 30, true),
    };
    let needed = config.memory_bytes / page_bytes;
    let pool = pools.join(format!("hugepages-{}kB", page_bytes >> 10));
    let pool_path = pool.display();
    let at_boot = format!("hugepagesz={}M hugepages=N", page_bytes >> 20);
    let hint = if boot_only {
        format!("reserve them with `{at_boot}` on the host's kernel command line")
    } else {
        format!(
            "raise the number in {pool_path}/nr_hugepages by as many, or put `{at_boot}` on the host's kernel command line"
        )
    };
    let count = |which: &str| read(&pool.join(format!("{which}_hugepages")));
    let counts = || io::Result::Ok((count("nr")?, count("free")?, count("resv")?));
    match counts() {
        // Reserved pages are counted as free until they are touched.
        Ok((all, free, reserved)) => {
            let available = free.saturating_sub(reserved);
            if available >= needed {
                return Ok(());
            }
            let why = format!(
                "it needs {needed} huge pages of {name}, and {available} of the host's {all} are free"
            );
            Err(Shortage { why, hint })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let why = format!("it needs huge pages of {name}, which this host does not have");
            Err(Shortage { why, hint: "declare another size of pages".to_owned() })
        }
        Err(error) => Err(Shortage { why: format!("read {pool_path}: {error}"), hint }),
    }
}

fn read(path: &Path) -> io::Result<u64> {
    fs::read_to_string(path)?.trim().parse().map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::config::BootConfig;

    #[test]
    fn a_shortage_says_how_many_there_are_and_what_helps() {
        let pools = std::env::temp_dir().join(format!("vmctl-pools-{}", std::process::id()));
        let pool = pools.join("hugepages-2048kB");
        fs::create_dir_all(&pool).unwrap();
        let set = |all: u64, free: u64, reserved: u64| {
            for (which, count) in [("nr", all), ("free", free), ("resv", reserved)] {
                fs::write(pool.join(format!("{which}_hugepages")), format!("{count}\n")).unwrap();
            }
        };
        let mut config = VmConfig::new("web", "mark", 64 << 20, BootConfig::kernel("k", None, ""));
        assert_eq!(check_in(&pools, &config), Ok(()), "ordinary pages need no pool");
        config.memory.pages = PageKind::Huge2Mi;
        set(40, 32, 0);
        assert_eq!(check_in(&pools, &config), Ok(()));
        set(40, 32, 1);
        let shortage = check_in(&pools, &config).unwrap_err();
        assert_eq!(shortage.why, "it needs 32 huge pages of 2Mi, and 31 of the host's 40 are free");
        assert!(shortage.hint.contains("nr_hugepages"), "{}", shortage.hint);
        config.memory.pages = PageKind::Huge1Gi;
        let shortage = check_in(&pools, &config).unwrap_err();
        assert_eq!(shortage.why, "it needs huge pages of 1Gi, which this host does not have");
        fs::remove_dir_all(&pools).unwrap();
    }
}
