//! The guest's memory: anonymous, private, lazily allocated. Nothing here decides where the RAM lies
//! in the guest's address space; that is [`crate::vmm::layout`]'s.

use std::io;
use std::ptr;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestRegionMmap};

/// The guest's memory, cheap to clone.
pub type GuestMemory = GuestMemoryMmap<()>;

/// Host mappings start at a multiple of this, as guest regions do, so that the kernel can back both
/// with transparent huge pages: fewer faults while the kernel is loaded, shallower nested walks after.
const HUGE_PAGE_BYTES: usize = 2 << 20;

#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("reserve {bytes} bytes of guest memory")]
    Reserve {
        bytes: u64,
        #[source]
        source: io::Error,
    },
    #[error("lay out the guest memory: {0}")]
    Layout(String),
    #[error("give guest memory back to the host")]
    Release(#[source] io::Error),
}

/// Reserves the given ranges (start, length in bytes). No page is touched.
pub fn create(ranges: &[(u64, u64)]) -> Result<GuestMemory, MemoryError> {
    let mut regions = Vec::with_capacity(ranges.len());
    for &(start, bytes) in ranges {
        let size = usize::try_from(bytes).map_err(|_| MemoryError::Layout(format!("{bytes} bytes")))?;
        let address = reserve(size).map_err(|source| MemoryError::Reserve { bytes, source })?;
        // SAFETY: `reserve` returned a private mapping of at least `size` bytes at `address`, which is
        // never unmapped: guest memory lives as long as the process.
        let builder = unsafe { MmapRegionBuilder::new(size).with_raw_mmap_pointer(address) };
        let region = builder
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(MAP_FLAGS)
            .build()
            .map_err(|error| MemoryError::Layout(error.to_string()))?;
        let region = GuestRegionMmap::new(region, GuestAddress(start))
            .ok_or_else(|| MemoryError::Layout(format!("the region at {start:#x} overflows")))?;
        regions.push(region);
    }
    GuestMemory::from_regions(regions).map_err(|error| MemoryError::Layout(error.to_string()))
}

/// `MAP_NORESERVE`: memory is overcommitted on purpose; the host's policy is the manifests' matter.
const MAP_FLAGS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// Maps `size` bytes at a huge-page boundary. The slack around them stays mapped but untouched: it
/// costs address space alone.
fn reserve(size: usize) -> io::Result<*mut u8> {
    let mapped = size.checked_add(HUGE_PAGE_BYTES).ok_or(io::ErrorKind::InvalidInput)?;
    // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches nothing of ours.
    let start =
        unsafe { libc::mmap(ptr::null_mut(), mapped, libc::PROT_READ | libc::PROT_WRITE, MAP_FLAGS, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let start = start.cast::<u8>();
    let aligned = start.wrapping_add(start.align_offset(HUGE_PAGE_BYTES));
    // SAFETY: `aligned..aligned + size` lies in the mapping just made. Both are hints: a kernel
    // without huge pages answers EINVAL, and nothing is lost.
    unsafe {
        libc::madvise(aligned.cast(), size, libc::MADV_HUGEPAGE);
        libc::madvise(aligned.cast(), size, libc::MADV_DONTDUMP);
    }
    Ok(aligned)
}

/// Empties the guest's memory: it reads as zeroes again, and the host has its pages back. No vCPU and
/// no device may be running.
pub fn clear(memory: &GuestMemory) -> Result<(), MemoryError> {
    for region in memory.iter() {
        // SAFETY: the region is a private anonymous mapping that we made, and guest memory is only
        // ever reached through volatile accesses, never through Rust references.
        let done = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), libc::MADV_DONTNEED) };
        if done != 0 {
            return Err(MemoryError::Release(io::Error::last_os_error()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes as _;

    #[test]
    fn memory_starts_aligned_and_clears_to_zero() {
        let memory = create(&[(0, 4 << 20), (1 << 32, 2 << 20)]).unwrap();
        for region in memory.iter() {
            assert_eq!(region.as_ptr() as usize % HUGE_PAGE_BYTES, 0);
        }
        let high = GuestAddress((1 << 32) + 5);
        memory.write_obj(7u64, high).unwrap();
        assert_eq!(memory.read_obj::<u64>(high).unwrap(), 7);
        clear(&memory).unwrap();
        assert_eq!(memory.read_obj::<u64>(high).unwrap(), 0);
        assert!(memory.read_obj::<u8>(GuestAddress(4 << 20)).is_err(), "the gap is not memory");
    }
}
