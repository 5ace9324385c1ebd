//! What a VM's processors and memory are, as a host and a guest see them. Every test here runs in the lab
//! (`tests/lab/`): it has huge pages to give away, and real guests.

#[path = "support/in_lab.rs"]
mod in_lab;

use std::fs;

use in_lab::ran_in_lab;
use vm_memory::{Bytes as _, GuestAddress};
use vmctl::vmm::config::{MemoryConfig, PageKind};
use vmctl::vmm::memory::{self, MemoryError};

fn pool(which: &str) -> String {
    format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{which}_hugepages")
}

/// Pages of the pool that are free, and those of them that are reserved.
fn free_and_reserved() -> (u64, u64) {
    let count = |which| fs::read_to_string(pool(which)).unwrap().trim().parse().unwrap();
    (count("free"), count("resv"))
}

#[test]
fn huge_pages_are_reserved_and_stay_so_through_a_reset() {
    if ran_in_lab() {
        return;
    }
    fs::write(pool("nr"), "8").unwrap();
    assert_eq!(free_and_reserved(), (8, 0));
    let huge = MemoryConfig { pages: PageKind::Huge2Mi, ..Default::default() };
    let guest = memory::create_of(&[(0, 12 << 20), (1 << 32, 4 << 20)], huge).unwrap();
    assert_eq!(free_and_reserved(), (8, 8), "reserved, none touched");
    let refused = memory::create_of(&[(0, 2 << 20)], huge);
    let Err(MemoryError::PoolEmpty { pages: 1, page_bytes: 0x20_0000 }) = refused else {
        panic!("{refused:?}")
    };
    let (low, high) = (GuestAddress(10 << 20), GuestAddress(1 << 32));
    guest.write_obj(7u64, low).unwrap();
    guest.write_obj(8u64, high).unwrap();
    assert_eq!(free_and_reserved(), (6, 6));
    assert_eq!(memory::discard(&guest, low, 2 << 20).unwrap(), 0, "none is given away");
    assert_eq!(guest.read_obj::<u64>(low).unwrap(), 7);
    memory::clear(&guest).unwrap();
    assert_eq!(free_and_reserved(), (8, 8), "given back, and reserved again");
    assert_eq!((guest.read_obj::<u64>(low).unwrap(), guest.read_obj::<u64>(high).unwrap()), (0, 0));
}
