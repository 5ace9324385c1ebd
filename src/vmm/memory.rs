//! The guest's memory: anonymous, private, lazily allocated. Nothing here decides where the RAM lies
//! in the guest's address space; that is [`crate::vmm::layout`]'s.

use std::io;
use std::ptr;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _, GuestRegionMmap,
};

/// The guest's memory, cheap to clone.
pub type GuestMemory = GuestMemoryMmap<()>;

/// Host mappings start at a multiple of this, as guest regions do, so that the kernel can back both
/// with transparent huge pages: fewer faults while the kernel is loaded, shallower nested walks after.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// The pages of everything that isn't made of others on purpose.
const SMALL_PAGE_BYTES: usize = 4096;

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

/// Gives the host back every page that lies wholly in the range (start, length in bytes): it reads as
/// zeroes until somebody writes it again. What of the range is no RAM is passed over. Gives how many
/// bytes that were.
///
/// vCPUs and devices may be running. A device's thread that uses such a page at this instant finds
/// the old one or an empty one; a transfer for which the kernel holds the page goes on in the old one,
/// which nobody sees any more. So it is the guest alone that may lose something.
pub fn discard(memory: &GuestMemory, start: GuestAddress, bytes: u64) -> Result<u64, MemoryError> {
    let end = start.0.saturating_add(bytes);
    let mut given_back = 0;
    for region in memory.iter() {
        let page_bytes = page_bytes(region) as u64;
        let region_start = region.start_addr().0;
        let from = start.0.max(region_start);
        let to = end.min(region_start + region.len());
        if from >= to {
            continue;
        }
        // Regions and their mappings begin at multiples of their pages.
        let (from, to) = (from.next_multiple_of(page_bytes), to / page_bytes * page_bytes);
        if from >= to {
            continue;
        }
        // Pages of a file or of shared memory stay in it when they are only unmapped.
        let advice = match region.flags() & libc::MAP_SHARED {
            0 => libc::MADV_DONTNEED,
            _ => libc::MADV_REMOVE,
        };
        let address = region.as_ptr().wrapping_add((from - region_start) as usize);
        // SAFETY: the range lies in the region, a mapping that we made, and guest memory is only ever
        // reached through volatile accesses, never through Rust references.
        if unsafe { libc::madvise(address.cast(), (to - from) as usize, advice) } != 0 {
            return Err(MemoryError::Release(io::Error::last_os_error()));
        }
        given_back += to - from;
    }
    Ok(given_back)
}

/// Of the host's pages that a region is made of: what can be given back is a multiple of it.
fn page_bytes(region: &GuestRegionMmap) -> usize {
    let flags = region.flags();
    match flags & libc::MAP_HUGETLB {
        0 => SMALL_PAGE_BYTES,
        _ => 1 << (flags >> libc::MAP_HUGE_SHIFT & libc::MAP_HUGE_MASK),
    }
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

    fn resident_bytes(memory: &GuestMemory) -> usize {
        let region = memory.iter().next().unwrap();
        let mut pages = vec![0u8; region.size() / SMALL_PAGE_BYTES];
        // SAFETY: the region is mapped, and `pages` has room for one byte for each of its pages.
        let done = unsafe { libc::mincore(region.as_ptr().cast(), region.size(), pages.as_mut_ptr()) };
        assert_eq!(done, 0);
        pages.iter().filter(|page| **page & 1 != 0).count() * SMALL_PAGE_BYTES
    }

    #[test]
    fn discarded_pages_are_the_hosts_again_and_read_as_zeroes() {
        let memory = create(&[(0, 4 << 20), (1 << 32, 2 << 20)]).unwrap();
        memory.write_slice(&[7; 4 << 20], GuestAddress(0)).unwrap();
        assert_eq!(resident_bytes(&memory), 4 << 20);
        // The first and the last page are only touched by the range.
        assert_eq!(discard(&memory, GuestAddress(1), (1 << 20) + 4096).unwrap(), 1 << 20);
        assert_eq!(resident_bytes(&memory), 3 << 20);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(4095)).unwrap(), 7);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(4096)).unwrap(), 0);
        assert_eq!(memory.read_obj::<u8>(GuestAddress((1 << 20) + 4096)).unwrap(), 7);
    }

    #[test]
    fn what_is_no_ram_is_passed_over() {
        let memory = create(&[(0, 2 << 20), (1 << 32, 2 << 20)]).unwrap();
        assert_eq!(discard(&memory, GuestAddress(2 << 20), 1 << 20).unwrap(), 0);
        assert_eq!(discard(&memory, GuestAddress(0), u64::MAX).unwrap(), 4 << 20);
        assert_eq!(discard(&memory, GuestAddress(1 << 20), u64::MAX).unwrap(), 3 << 20);
        assert_eq!(discard(&memory, GuestAddress(u64::MAX), u64::MAX).unwrap(), 0);
        assert_eq!(discard(&memory, GuestAddress(5), 4096).unwrap(), 0);
    }

    #[test]
    fn shared_memory_is_given_back_too() {
        use vm_memory::{FileOffset, MmapRegion};
        let file = vmm_sys_util::tempfile::TempFile::new_in("/dev/shm".as_ref()).unwrap().into_file();
        file.set_len(1 << 20).unwrap();
        let blocks = |file: &std::fs::File| std::os::unix::fs::MetadataExt::blocks(&file.metadata().unwrap());
        let kept = file.try_clone().unwrap();
        let region: MmapRegion = MmapRegion::from_file(FileOffset::new(file, 0), 1 << 20).unwrap();
        let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
        let memory = GuestMemory::from_regions(vec![region]).unwrap();
        memory.write_slice(&[7; 1 << 20], GuestAddress(0)).unwrap();
        assert_eq!(blocks(&kept), 2048);
        assert_eq!(discard(&memory, GuestAddress(0), 1 << 19).unwrap(), 1 << 19);
        assert_eq!(blocks(&kept), 1024);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0)).unwrap(), 0);
    }
}
