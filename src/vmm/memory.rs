//! The guest's memory: lazily allocated, of the pages that its configuration names. Nothing here decides
//! where the RAM lies in the guest's address space; that is [`crate::vmm::layout`]'s.
//!
//! Ordinary pages are anonymous and private. Huge pages of the host's pool are a file in memory, mapped
//! shared: all of them are reserved when the memory is made, so that a guest that runs never finds the
//! pool empty, which would kill it at the touch of a page.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _};
use std::ptr;

use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestMemoryRegion as _,
    GuestRegionMmap,
};

use super::config::{MemoryConfig, PageKind, TransparentHugepages};

/// The guest's memory, cheap to clone.
pub type GuestMemory = GuestMemoryMmap<()>;

/// Host mappings start at a multiple of this, as guest regions do, so that the kernel can back both
/// with transparent huge pages: fewer faults while the kernel is loaded, shallower nested walks after.
const HUGE_PAGE_BYTES: usize = 2 << 20;
const SMALL_PAGE_BYTES: u64 = 4096;

#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("reserve {bytes} bytes of guest memory")]
    Reserve {
        bytes: u64,
        #[source]
        source: io::Error,
    },
    #[error("{bytes} bytes of guest memory are no whole number of {page_bytes}-byte pages")]
    PageSize { bytes: u64, page_bytes: u64 },
    #[error("this host has no huge pages of {page_bytes} bytes")]
    NoPool {
        page_bytes: u64,
        #[source]
        source: io::Error,
    },
    #[error("this host's pool has fewer than {pages} free huge pages of {page_bytes} bytes")]
    PoolEmpty { pages: u64, page_bytes: u64 },
    #[error("the kernel does not take advice on guest memory: {what}")]
    Advice {
        what: &'static str,
        #[source]
        source: io::Error,
    },
    #[error("lay out the guest memory: {0}")]
    Layout(String),
    #[error("give guest memory back to the host")]
    Release(#[source] io::Error),
}

impl PageKind {
    pub fn bytes(self) -> u64 {
        match self {
            Self::Small => SMALL_PAGE_BYTES,
            Self::Huge2Mi => 2 << 20,
            Self::Huge1Gi => 1 << 30,
        }
    }
}

/// Reserves the given ranges (start, length in bytes) in ordinary pages. No page is touched.
pub fn create(ranges: &[(u64, u64)]) -> Result<GuestMemory, MemoryError> {
    create_of(ranges, MemoryConfig::default())
}

/// Reserves the given ranges in the pages that are asked for. No page is touched.
pub fn create_of(ranges: &[(u64, u64)], config: MemoryConfig) -> Result<GuestMemory, MemoryError> {
    let mut regions = Vec::with_capacity(ranges.len());
    for &(start, bytes) in ranges {
        let size = usize::try_from(bytes).map_err(|_| MemoryError::Layout(format!("{bytes} bytes")))?;
        let (address, file) = match config.pages {
            PageKind::Small => {
                (reserve(size).map_err(|source| MemoryError::Reserve { bytes, source })?, None)
            }
            pages => {
                let (address, file) = reserve_huge(size, pages)?;
                (address, Some(file))
            }
        };
        advise(address, size, config)?;
        // SAFETY: a mapping of at least `size` bytes was made at `address`, which is never unmapped: guest
        // memory lives as long as the process.
        let builder = unsafe { MmapRegionBuilder::new(size).with_raw_mmap_pointer(address) };
        let builder = match file {
            Some(file) => builder.with_mmap_flags(HUGE_FLAGS).with_file_offset(FileOffset::new(file, 0)),
            None => builder.with_mmap_flags(SMALL_FLAGS),
        };
        let region = builder
            .with_mmap_prot(READ_WRITE)
            .build()
            .map_err(|error| MemoryError::Layout(error.to_string()))?;
        let region = GuestRegionMmap::new(region, GuestAddress(start))
            .ok_or_else(|| MemoryError::Layout(format!("the region at {start:#x} overflows")))?;
        regions.push(region);
    }
    GuestMemory::from_regions(regions).map_err(|error| MemoryError::Layout(error.to_string()))
}

const READ_WRITE: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;

/// `MAP_NORESERVE`: memory is overcommitted on purpose; the host's policy is the manifests' matter.
const SMALL_FLAGS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// Of a file of huge pages: `MAP_HUGETLB` is the file's matter, and kept to know such a region by.
const HUGE_FLAGS: libc::c_int = libc::MAP_SHARED | libc::MAP_HUGETLB;

/// A fresh mapping at an address of the kernel's choice.
fn map(size: usize, flags: libc::c_int, file: Option<&File>) -> io::Result<*mut u8> {
    let fd = file.map_or(-1, |file| file.as_raw_fd());
    // SAFETY: without MAP_FIXED a mapping replaces nothing of ours.
    let start = unsafe { libc::mmap(ptr::null_mut(), size, READ_WRITE, flags, fd, 0) };
    if start == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(start.cast()) }
}

/// Maps `size` bytes at a huge-page boundary. The slack around them stays mapped but untouched: it
/// costs address space alone.
fn reserve(size: usize) -> io::Result<*mut u8> {
    let mapped = size.checked_add(HUGE_PAGE_BYTES).ok_or(io::ErrorKind::InvalidInput)?;
    let start = map(mapped, SMALL_FLAGS, None)?;
    Ok(start.wrapping_add(start.align_offset(HUGE_PAGE_BYTES)))
}

/// Maps `size` bytes of the host's pool, and reserves them there. The kernel aligns the mapping.
fn reserve_huge(size: usize, pages: PageKind) -> Result<(*mut u8, File), MemoryError> {
    let page_bytes = pages.bytes();
    if !(size as u64).is_multiple_of(page_bytes) {
        return Err(MemoryError::PageSize { bytes: size as u64, page_bytes });
    }
    // The size is asked for by its logarithm.
    let flags = libc::MFD_CLOEXEC | libc::MFD_HUGETLB | page_bytes.ilog2() << libc::MFD_HUGE_SHIFT;
    // SAFETY: the name is a C string; a fresh descriptor is ours to own.
    let file = unsafe {
        let fd = libc::memfd_create(c"guest-memory".as_ptr(), flags);
        if fd < 0 {
            return Err(MemoryError::NoPool { page_bytes, source: io::Error::last_os_error() });
        }
        File::from_raw_fd(fd)
    };
    file.set_len(size as u64).map_err(|source| MemoryError::Reserve { bytes: size as u64, source })?;
    match map(size, libc::MAP_SHARED, Some(&file)) {
        Ok(address) => Ok((address, file)),
        Err(error) => Err(pool_error(size as u64, page_bytes, error)),
    }
}

fn pool_error(bytes: u64, page_bytes: u64, source: io::Error) -> MemoryError {
    if source.raw_os_error() == Some(libc::ENOMEM) {
        MemoryError::PoolEmpty { pages: bytes / page_bytes, page_bytes }
    } else {
        MemoryError::Reserve { bytes, source }
    }
}

fn advise(address: *mut u8, size: usize, config: MemoryConfig) -> Result<(), MemoryError> {
    let give = |advice: libc::c_int| {
        // SAFETY: the range is a mapping that was just made and that nobody uses yet; none of the advice
        // given here unmaps or frees anything.
        if unsafe { libc::madvise(address.cast(), size, advice) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    };
    let advice = |what, advice| give(advice).map_err(|source| MemoryError::Advice { what, source });
    // A guest's memory has no place in a core dump. All kernels of this century take that.
    advice("keep it out of core dumps", libc::MADV_DONTDUMP)?;
    if config.pages != PageKind::Small {
        // They are huge already, are never swapped and never shared.
        return Ok(());
    }
    match config.transparent_hugepages {
        TransparentHugepages::Host => {}
        TransparentHugepages::Always => advice("use transparent huge pages", libc::MADV_HUGEPAGE)?,
        // A kernel without them does what is wanted.
        TransparentHugepages::Never => drop(give(libc::MADV_NOHUGEPAGE)),
    }
    if config.ksm {
        advice("share equal pages (KSM)", libc::MADV_MERGEABLE)?;
    }
    Ok(())
}

/// Empties the guest's memory: it reads as zeroes again, and the host has its pages back. Those of the
/// pool stay reserved. No vCPU and no device may be running.
pub fn clear(memory: &GuestMemory) -> Result<(), MemoryError> {
    for region in memory.iter() {
        // SAFETY: the region is a mapping that we made, and guest memory is only ever reached through
        // volatile accesses, never through Rust references.
        let release = |advice| unsafe { libc::madvise(region.as_ptr().cast(), region.size(), advice) };
        let done = match region.file_offset() {
            None => release(libc::MADV_DONTNEED),
            Some(_) => release(libc::MADV_REMOVE),
        };
        if done != 0 {
            return Err(MemoryError::Release(io::Error::last_os_error()));
        }
        if let Some(file) = region.file_offset() {
            reserve_again(file.file(), region.size())?;
        }
    }
    Ok(())
}

/// What was removed from a file of huge pages is no longer reserved, and another VM could take it. A
/// mapping reserves what is missing, for the file and not for itself: it may go again.
fn reserve_again(file: &File, size: usize) -> Result<(), MemoryError> {
    let page_bytes = file.metadata().map_or(HUGE_PAGE_BYTES as u64, |metadata| {
        std::os::unix::fs::MetadataExt::blksize(&metadata).max(SMALL_PAGE_BYTES)
    });
    let mapping = map(size, libc::MAP_SHARED, Some(file))
        .map_err(|error| pool_error(size as u64, page_bytes, error))?;
    // SAFETY: exactly the mapping that was just made, of which nobody else knows.
    if unsafe { libc::munmap(mapping.cast(), size) } < 0 {
        return Err(MemoryError::Release(io::Error::last_os_error()));
    }
    Ok(())
}

/// Gives the host back every page that lies wholly in the range (start, length in bytes): it reads as
/// zeroes until somebody writes it again. What of the range is no RAM is passed over. Gives how many
/// bytes that were. Of the host's pool of huge pages it is nothing: what was given back could be gone
/// when the guest wants it again, and the touch would kill it.
///
/// vCPUs and devices may be running. A device's thread that uses such a page at this instant finds
/// the old one or an empty one; a transfer for which the kernel holds the page goes on in the old one,
/// which nobody sees any more. So it is the guest alone that may lose something.
pub fn discard(memory: &GuestMemory, start: GuestAddress, bytes: u64) -> Result<u64, MemoryError> {
    let end = start.0.saturating_add(bytes);
    let mut given_back = 0;
    for region in memory.iter() {
        if region.flags() & libc::MAP_HUGETLB != 0 {
            continue;
        }
        let region_start = region.start_addr().0;
        let from = start.0.max(region_start);
        let to = end.min(region_start + region.len());
        if from >= to {
            continue;
        }
        // Regions and their mappings begin at multiples of pages.
        let (from, to) = (from.next_multiple_of(SMALL_PAGE_BYTES), to / SMALL_PAGE_BYTES * SMALL_PAGE_BYTES);
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

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes as _;

    #[test]
    fn memory_starts_aligned_and_clears_to_zero() {
        for (ksm, transparent_hugepages) in [
            (false, TransparentHugepages::Host),
            (true, TransparentHugepages::Never),
            (false, TransparentHugepages::Always),
        ] {
            let config = MemoryConfig { ksm, transparent_hugepages, ..Default::default() };
            let memory = create_of(&[(0, 4 << 20), (1 << 32, 2 << 20)], config).unwrap();
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

    /// `VmFlags` of the mapping at this address, as the kernel shows them.
    fn flags(address: *const u8) -> Vec<String> {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let holds = |line: &str| {
            let (start, rest) = line.split_once('-')?;
            let end = rest.split_once(' ')?.0;
            let number = |text| usize::from_str_radix(text, 16).ok();
            Some((number(start)?..number(end)?).contains(&(address as usize)))
        };
        let mut lines = maps.lines().skip_while(|line| holds(line) != Some(true));
        let flags = lines.find_map(|line| line.strip_prefix("VmFlags: ")).unwrap();
        flags.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn the_kernel_has_the_advice() {
        let cases = [
            (false, TransparentHugepages::Host, [("dd", true), ("mg", false), ("hg", false), ("nh", false)]),
            (true, TransparentHugepages::Always, [("dd", true), ("mg", true), ("hg", true), ("nh", false)]),
            (false, TransparentHugepages::Never, [("dd", true), ("mg", false), ("hg", false), ("nh", true)]),
        ];
        for (ksm, transparent_hugepages, expected) in cases {
            let config = MemoryConfig { ksm, transparent_hugepages, ..Default::default() };
            let memory = create_of(&[(0, 2 << 20)], config).unwrap();
            let flags = flags(memory.iter().next().unwrap().as_ptr());
            for (flag, set) in expected {
                assert_eq!(flags.iter().any(|have| have == flag), set, "{flag} in {flags:?}");
            }
        }
    }

    fn resident_bytes(memory: &GuestMemory) -> usize {
        let region = memory.iter().next().unwrap();
        let mut pages = vec![0u8; region.size() / SMALL_PAGE_BYTES as usize];
        // SAFETY: the region is mapped, and `pages` has room for one byte for each of its pages.
        let done = unsafe { libc::mincore(region.as_ptr().cast(), region.size(), pages.as_mut_ptr()) };
        assert_eq!(done, 0);
        pages.iter().filter(|page| **page & 1 != 0).count() * SMALL_PAGE_BYTES as usize
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

    fn huge() -> MemoryConfig {
        MemoryConfig { pages: PageKind::Huge2Mi, ..Default::default() }
    }

    #[test]
    fn huge_pages_come_whole_and_from_a_pool() {
        let split = create_of(&[(0, 3 << 20)], huge());
        assert!(matches!(split, Err(MemoryError::PageSize { page_bytes: 0x20_0000, .. })), "{split:?}");
        // No host has so many to spare.
        let error = create_of(&[(0, 1 << 45)], huge()).unwrap_err();
        assert!(matches!(error, MemoryError::PoolEmpty { .. } | MemoryError::NoPool { .. }), "{error:?}");
    }
}
