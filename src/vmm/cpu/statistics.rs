//! KVM's own counts of a vCPU, by the descriptor that KVM_GET_STATS_FD gives: made before the sandbox
//! closes, read at any time after, without a word to the vCPU.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::os::unix::fs::FileExt as _;

use kvm_ioctls::VcpuFd;

use crate::vmm::metrics::KvmCounts;

const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;

/// `struct kvm_stats_header` and `struct kvm_stats_desc` of the kernel's header, without the name that
/// follows the latter.
const HEADER_BYTES: usize = 24;
const DESCRIPTOR_BYTES: usize = 16;
/// More than any kernel has; a table that claims to be longer is none that we understand.
const DESCRIPTORS_MAX: u32 = 4096;
const NAME_BYTES_MAX: u32 = 256;

/// The counts that we read, in the order of [`Statistics::at`].
const NAMES: [&str; 5] = ["exits", "halt_exits", "halt_wait_ns", "irq_exits", "irq_injections"];

#[derive(Debug)]
pub struct Statistics {
    file: File,
    /// Where each of [`NAMES`] lies, if this kernel has it.
    at: [Option<u64>; NAMES.len()],
}

impl Statistics {
    /// `None`: this kernel has none, or none that we understand.
    pub fn of(vcpu: &VcpuFd) -> Option<Self> {
        // SAFETY: the call takes no argument; what it returns is a fresh descriptor, or an error.
        let fd = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_STATS_FD, 0) };
        if fd < 0 {
            return None;
        }
        // SAFETY: a fresh descriptor of which nobody else knows.
        let file = unsafe { File::from_raw_fd(fd) };
        let at = find(&file).ok()?;
        at.iter().any(Option::is_some).then_some(Self { file, at })
    }

    /// What was counted so far. Of what this kernel doesn't count: zero.
    pub fn read(&self) -> KvmCounts {
        let value = |index: usize| {
            let mut bytes = [0; 8];
            let at = self.at[index]?;
            self.file.read_exact_at(&mut bytes, at).ok()?;
            Some(u64::from_ne_bytes(bytes))
        };
        let [exits, halt_exits, halt_wait_ns, interrupt_exits, interrupt_injections] =
            [0, 1, 2, 3, 4].map(|index| value(index).unwrap_or(0));
        KvmCounts { exits, halt_exits, halt_wait_ns, interrupt_exits, interrupt_injections }
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let word = bytes.get(at..at + 4).and_then(|word| word.try_into().ok());
    word.map_or(0, u32::from_ne_bytes)
}

fn find(file: &File) -> io::Result<[Option<u64>; NAMES.len()]> {
    let mut header = [0; HEADER_BYTES];
    file.read_exact_at(&mut header, 0)?;
    let [name_bytes, descriptors] = [4, 8].map(|at| word(&header, at));
    let [descriptors_at, data_at] = [16, 20].map(|at| u64::from(word(&header, at)));
    if name_bytes > NAME_BYTES_MAX || descriptors > DESCRIPTORS_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let stride = DESCRIPTOR_BYTES + name_bytes as usize;
    let mut table = vec![0; stride * descriptors as usize];
    file.read_exact_at(&mut table, descriptors_at)?;
    let mut found = [None; NAMES.len()];
    for descriptor in table.chunks_exact(stride) {
        let name = descriptor[DESCRIPTOR_BYTES..].split(|byte| *byte == 0).next().unwrap_or_default();
        if let Some(index) = NAMES.iter().position(|wanted| wanted.as_bytes() == name) {
            found[index] = Some(data_at + u64::from(word(descriptor, 8)));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The file that a kernel with these counts would show.
    fn file(counts: &[(&str, u64)]) -> File {
        const NAME: usize = 48;
        let file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        let descriptors_at = HEADER_BYTES + NAME;
        let data_at = descriptors_at + counts.len() * (DESCRIPTOR_BYTES + NAME);
        let words = [0, NAME, counts.len(), HEADER_BYTES, descriptors_at, data_at];
        let mut bytes: Vec<u8> = words.iter().flat_map(|word| (*word as u32).to_ne_bytes()).collect();
        bytes.resize(descriptors_at, 0);
        for (index, (name, _)) in counts.iter().enumerate() {
            bytes.extend([0u32, 1 << 16, index as u32 * 8, 0].iter().flat_map(|word| word.to_ne_bytes()));
            let end = bytes.len() + NAME;
            bytes.extend(name.as_bytes());
            bytes.resize(end, 0);
        }
        bytes.extend(counts.iter().flat_map(|(_, count)| count.to_ne_bytes()));
        file.write_all_at(&bytes, 0).unwrap();
        file
    }

    #[test]
    fn counts_are_found_by_name() {
        let file = file(&[("pf_taken", 1), ("halt_exits", 2), ("exits", 3), ("exits_of_others", 4)]);
        let at = find(&file).unwrap();
        let counts = Statistics { file, at }.read();
        assert_eq!(counts, KvmCounts { exits: 3, halt_exits: 2, ..Default::default() });
    }

    #[test]
    fn a_table_that_is_none_is_refused() {
        let short = file(&[]);
        short.set_len(20).unwrap();
        assert!(find(&short).is_err());
        let long = file(&[]);
        long.write_all_at(&u32::MAX.to_ne_bytes(), 8).unwrap();
        assert!(find(&long).is_err());
    }
}
