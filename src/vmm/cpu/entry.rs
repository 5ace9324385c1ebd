//! The registers with which the first vCPU enters the kernel.

use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes as _, GuestAddress};

use super::{CpuError, failed};
use crate::vmm::boot::Entry;
use crate::vmm::layout;
use crate::vmm::memory::GuestMemory;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;

/// GDT entries 2 and 3, as the Linux boot protocol wants them (__BOOT_CS, __BOOT_DS); 4 is a TSS.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;
const GDT_ENTRIES: u64 = 5;
const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_TSS_BUSY: u8 = 0xb;

/// Writes the descriptor table that [`apply`] points at.
pub fn write_gdt(memory: &GuestMemory, entry: Entry) -> Result<(), vm_memory::GuestMemoryError> {
    for (index, segment) in [(2, code(entry)), (3, data()), (4, task())] {
        memory.write_obj(descriptor(&segment), GuestAddress(layout::GDT_START + index * 8))?;
    }
    Ok(())
}

/// Brings a vCPU that is in its reset state to the kernel's entry.
pub fn apply(vcpu: &VcpuFd, entry: Entry) -> Result<(), CpuError> {
    let mut sregs = vcpu.get_sregs().map_err(failed("read special registers"))?;
    special_registers(&mut sregs, entry);
    vcpu.set_sregs(&sregs).map_err(failed("set special registers for the kernel's entry"))?;
    vcpu.set_regs(&registers(entry)).map_err(failed("set registers for the kernel's entry"))
}

fn registers(entry: Entry) -> kvm_regs {
    let base = kvm_regs { rflags: RFLAGS_RESERVED, ..Default::default() };
    match entry {
        Entry::Pvh { address } => kvm_regs { rip: address, rbx: layout::PVH_START_INFO, ..base },
        Entry::Linux64 { address } => kvm_regs {
            rip: address,
            rsi: layout::ZERO_PAGE,
            rsp: layout::BOOT_STACK_TOP,
            rbp: layout::BOOT_STACK_TOP,
            ..base
        },
    }
}

fn special_registers(sregs: &mut kvm_sregs, entry: Entry) {
    sregs.gdt.base = layout::GDT_START;
    sregs.gdt.limit = (GDT_ENTRIES * 8 - 1) as u16;
    sregs.cs = code(entry);
    for segment in [&mut sregs.ds, &mut sregs.es, &mut sregs.fs, &mut sregs.gs, &mut sregs.ss] {
        *segment = data();
    }
    sregs.tr = task();
    match entry {
        Entry::Pvh { .. } => {
            sregs.cr0 = CR0_PE | CR0_ET;
            sregs.cr4 = 0;
        }
        Entry::Linux64 { .. } => {
            sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
            sregs.cr3 = layout::PAGE_TABLES;
            sregs.cr4 = CR4_PAE;
            sregs.efer |= EFER_LME | EFER_LMA;
        }
    }
}

/// A flat segment of 4 GiB.
fn flat(selector: u16, kind: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

fn code(entry: Entry) -> kvm_segment {
    let long = matches!(entry, Entry::Linux64 { .. });
    kvm_segment { l: long.into(), db: (!long).into(), ..flat(CODE_SELECTOR, TYPE_CODE) }
}

fn data() -> kvm_segment {
    kvm_segment { db: 1, ..flat(DATA_SELECTOR, TYPE_DATA) }
}

fn task() -> kvm_segment {
    kvm_segment { limit: 0x67, s: 0, g: 0, ..flat(TSS_SELECTOR, TYPE_TSS_BUSY) }
}

/// A segment as the processor reads it from memory.
fn descriptor(segment: &kvm_segment) -> u64 {
    let limit = u64::from(if segment.g == 1 { segment.limit >> 12 } else { segment.limit });
    let access = u64::from(segment.type_)
        | u64::from(segment.s) << 4
        | u64::from(segment.dpl) << 5
        | u64::from(segment.present) << 7;
    let flags = u64::from(segment.l) << 1 | u64::from(segment.db) << 2 | u64::from(segment.g) << 3;
    (limit & 0xffff)
        | (segment.base & 0xff_ffff) << 16
        | access << 40
        | ((limit >> 16) & 0xf) << 48
        | flags << 52
        | (segment.base >> 24 & 0xff) << 56
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_well_known_ones() {
        assert_eq!(descriptor(&code(Entry::Linux64 { address: 0 })), 0x00af_9b00_0000_ffff);
        assert_eq!(descriptor(&code(Entry::Pvh { address: 0 })), 0x00cf_9b00_0000_ffff);
        assert_eq!(descriptor(&data()), 0x00cf_9300_0000_ffff);
        assert_eq!(descriptor(&task()), 0x0000_8b00_0000_0067);
    }
}
