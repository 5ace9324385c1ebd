//! On which of the host's processors a thread may run.

use std::io;
use std::mem::size_of;

/// Ties the calling thread to these processors of the host; to none in particular if the list is empty.
/// Each must be there, and be one that this process may use.
pub fn pin(cpus: &[u16]) -> io::Result<()> {
    if cpus.is_empty() {
        return Ok(());
    }
    let mut set = empty();
    for &cpu in cpus {
        if usize::from(cpu) >= libc::CPU_SETSIZE as usize {
            return Err(absent(cpu));
        }
        // SAFETY: the number lies in the set, as was just checked.
        unsafe { libc::CPU_SET(cpu.into(), &mut set) };
    }
    // SAFETY: the set is as long as said; 0 is the calling thread.
    if unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) } < 0 {
        let error = io::Error::last_os_error();
        // The kernel's word for "none of them".
        return Err(if error.raw_os_error() == Some(libc::EINVAL) { absent(cpus[0]) } else { error });
    }
    // Of a set, the kernel takes what it can and leaves out the rest without a word.
    let mut taken = empty();
    // SAFETY: the kernel writes no more than the set that it is given.
    if unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut taken) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: all numbers lie in the set, as was checked above.
    let missing = cpus.iter().find(|cpu| unsafe { !libc::CPU_ISSET((**cpu).into(), &taken) });
    missing.map_or(Ok(()), |cpu| Err(absent(*cpu)))
}

fn empty() -> libc::cpu_set_t {
    // SAFETY: a set of processors is an array of numbers, for which zero is as good as any.
    unsafe { std::mem::zeroed() }
}

fn absent(cpu: u16) -> io::Error {
    io::Error::other(format!("this host has no CPU {cpu}, or its cgroup doesn't let the VM have it"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Affinity belongs to a thread: each case gets its own.
    fn pinned(cpus: &'static [u16]) -> io::Result<Vec<usize>> {
        std::thread::spawn(move || {
            pin(cpus)?;
            let status = std::fs::read_to_string("/proc/thread-self/status")?;
            let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:\t")).unwrap();
            Ok(list.split(',').map(|cpu| cpu.parse().unwrap_or(usize::MAX)).collect())
        })
        .join()
        .unwrap()
    }

    #[test]
    fn a_thread_is_where_it_was_put() {
        assert_eq!(pinned(&[0]).unwrap(), [0]);
        pinned(&[]).unwrap();
    }

    #[test]
    fn a_cpu_that_is_not_there_is_named() {
        for (cpus, absent) in [(&[1000][..], 1000), (&[0, 999], 999), (&[0, 2000], 2000), (&[65535], 65535)] {
            let error = pinned(cpus).unwrap_err().to_string();
            assert!(error.contains(&format!("no CPU {absent},")), "{error}");
        }
    }
}
