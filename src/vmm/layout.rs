//! Where everything lies in the guest's physical address space and on its ports. Pure arithmetic.
//!
//! ```text
//!  0x0000_0000  ┌──────────────────────────────┐
//!               │ 0x0500 GDT                   │
//!               │ 0x6000 PVH start info        │  or the zero page (0x7000) of a bzImage
//!               │ 0x9000 page tables (6 pages) │  identity map of 4 GiB, for the 64-bit entry
//!               │ 0x2_0000 command line        │
//!  0x0009_fc00  ├──────────────────────────────┤
//!               │ (reserved, still RAM)        │
//!               │ 0xe_0000 ACPI: RSDP, tables  │
//!               │ 0xf_0000 generation id       │
//!               │ 0xf_fff0 reset vector        │
//!  0x0010_0000  ├──────────────────────────────┤
//!               │ kernel, at its own address   │
//!               │ …                            │
//!               │ initrd, at the top           │
//!  ≤ 3 GiB      ├──────────────────────────────┤
//!               │ gap                          │
//!  0xc000_0000  │   PCI BARs                   │  (machine pci)
//!  0xd000_0000  │   virtio-mmio, 16 × 4 KiB    │  (machine micro)
//!  0xe000_0000  │   PCI configuration (ECAM)   │
//!  0xfec0_0000  │   IO-APIC                    │
//!  0xfee0_0000  │   local APICs                │
//!  0xfffb_c000  │   KVM's own pages (Intel)    │
//!  4 GiB        ├──────────────────────────────┤
//!               │ the rest of the RAM          │
//!               └──────────────────────────────┘
//! ```

/// Where the gap for devices begins: RAM above it continues at [`HIGH_RAM_START`].
pub const GAP_START: u64 = 3 << 30;
pub const HIGH_RAM_START: u64 = 4 << 30;

pub const GDT_START: u64 = 0x500;
pub const PVH_START_INFO: u64 = 0x6000;
pub const PVH_MODULES: u64 = 0x6040;
pub const PVH_MEMORY_MAP: u64 = 0x6080;
pub const ZERO_PAGE: u64 = 0x7000;
pub const BOOT_STACK_TOP: u64 = 0x8ff0;
pub const PAGE_TABLES: u64 = 0x9000;
pub const CMDLINE_START: u64 = 0x2_0000;
/// Linux takes 2,048 bytes on x86; other kernels may take more.
pub const CMDLINE_BYTES_MAX: usize = 0x1_0000;
/// The RAM below the legacy area ends here.
pub const LOW_RAM_END: u64 = 0x9_fc00;
pub const ACPI_START: u64 = 0xe_0000;
pub const ACPI_END: u64 = 0xf_0000;
/// A page of its own, for [`crate::vmm::generation_id`].
pub const GENERATION_ID: u64 = 0xf_0000;
/// Where a BIOS starts: the processor's reset vector, as real mode reaches it.
pub const RESET_VECTOR: u64 = 0xf_fff0;
pub const KERNEL_MIN: u64 = 0x10_0000;

/// Where BARs may be, below the MMIO transport's registers.
pub const PCI_MEMORY_START: u64 = GAP_START;
pub const PCI_MEMORY_END: u64 = 0xd000_0000;
/// Configuration space of bus 0.
pub const PCI_ECAM_START: u64 = 0xe000_0000;
/// The slots of disks, from here up; then those of NICs, then those of what every machine has or that
/// never comes or goes. A slot that is taken is passed over.
pub const PCI_FIRST_DISK_SLOT: u8 = 1;
pub const PCI_FIRST_NIC_SLOT: u8 = 14;
pub const PCI_LAST_HOTPLUG_SLOT: u8 = super::config::DEVICES_MAX as u8;
pub const PCI_FIRST_FIXED_SLOT: u8 = 28;

pub const VIRTIO_MMIO_START: u64 = 0xd000_0000;
pub const VIRTIO_MMIO_BYTES: u64 = 0x1000;
pub const VIRTIO_SLOTS: usize = super::config::MICRO_DEVICES_MAX + 4;
pub const IO_APIC: u32 = 0xfec0_0000;
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// One page and then three, which KVM needs on Intel for real mode; they must not be RAM.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
pub const KVM_TSS: usize = 0xfffb_d000;

pub const SERIAL_PORT: u16 = 0x3f8;
pub const SERIAL_PORTS: u16 = 8;
pub const PVPANIC_PORT: u16 = 0x505;
pub const PVPANIC_PORTS: u16 = 1;

/// Global system interrupts: inputs of the one IO-APIC, all edge-triggered.
pub const SERIAL_GSI: u32 = 4;
pub const POWER_BUTTON_GSI: u32 = 5;
pub const PCI_HOTPLUG_GSI: u32 = 6;
pub const GENERATION_ID_GSI: u32 = 7;
pub const VIRTIO_FIRST_GSI: u32 = 8;
pub const IO_APIC_INPUTS: u32 = 24;
/// Messages have the GSIs behind the IO-APIC's: so many for each slot.
pub const PCI_FIRST_GSI: u32 = IO_APIC_INPUTS;

const _: () = assert!(VIRTIO_FIRST_GSI as usize + VIRTIO_SLOTS <= IO_APIC_INPUTS as usize);

/// Of the virtio device in this slot.
pub fn virtio_address(slot: usize) -> u64 {
    VIRTIO_MMIO_START + slot as u64 * VIRTIO_MMIO_BYTES
}

/// Of the virtio device in this slot.
pub fn virtio_gsi(slot: usize) -> u32 {
    VIRTIO_FIRST_GSI + slot as u32
}

/// Where the machine puts the BAR of the function in this slot.
pub fn pci_bar_address(slot: u8) -> u32 {
    PCI_MEMORY_START as u32 + u32::from(slot) * super::transport::pci::BAR_BYTES
}

/// Of the first vector of the function in this slot.
pub fn pci_first_gsi(slot: u8) -> u32 {
    PCI_FIRST_GSI + u32::from(slot) * u32::from(super::transport::pci::VECTORS_MAX)
}

/// The ranges of RAM (start, length): one, or two around the gap.
pub fn ram_ranges(memory_bytes: u64) -> Vec<(u64, u64)> {
    let low = memory_bytes.min(GAP_START);
    let mut ranges = vec![(0, low)];
    if memory_bytes > low {
        ranges.push((HIGH_RAM_START, memory_bytes - low));
    }
    ranges
}

/// What the guest is told about an address range, in the numbers of e820 and PVH.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RangeKind {
    Ram = 1,
    Reserved = 2,
}

/// The memory map for the guest: (start, length, kind).
pub fn memory_map(memory_bytes: u64) -> Vec<(u64, u64, RangeKind)> {
    let mut map = vec![
        (0, LOW_RAM_END, RangeKind::Ram),
        (LOW_RAM_END, KERNEL_MIN - LOW_RAM_END, RangeKind::Reserved),
        (KERNEL_MIN, memory_bytes.min(GAP_START) - KERNEL_MIN, RangeKind::Ram),
    ];
    // Linux uses ECAM only where firmware has reserved it.
    map.push((PCI_ECAM_START, super::pci::root::ECAM_BYTES, RangeKind::Reserved));
    if memory_bytes > GAP_START {
        map.push((HIGH_RAM_START, memory_bytes - GAP_START, RangeKind::Ram));
    }
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_around_the_gap() {
        assert_eq!(ram_ranges(1 << 30), [(0, 1 << 30)]);
        assert_eq!(ram_ranges(GAP_START), [(0, GAP_START)]);
        assert_eq!(ram_ranges(GAP_START + (1 << 20)), [(0, GAP_START), (HIGH_RAM_START, 1 << 20)]);
        assert_eq!(ram_ranges(64 << 30), [(0, GAP_START), (HIGH_RAM_START, 61 << 30)]);
    }

    #[test]
    fn the_memory_map_covers_all_ram_once() {
        for memory_bytes in [16 << 20, 1 << 30, GAP_START, 5 << 30, 64 << 30] {
            let map = memory_map(memory_bytes);
            let ram = |&&(start, ..): &&(u64, u64, RangeKind)| start != PCI_ECAM_START;
            let total: u64 = map.iter().filter(ram).map(|&(_, length, _)| length).sum();
            assert_eq!(total, memory_bytes);
            for pair in map.windows(2) {
                assert!(pair[0].0 + pair[0].1 <= pair[1].0);
            }
        }
    }

    #[test]
    fn device_ranges_lie_in_the_gap() {
        let end = virtio_address(VIRTIO_SLOTS);
        assert!(VIRTIO_MMIO_START >= PCI_MEMORY_END && end <= PCI_ECAM_START);
        let last = super::super::pci::SLOTS - 1;
        assert!(u64::from(pci_bar_address(last)) < PCI_MEMORY_END);
        assert!(PCI_ECAM_START + super::super::pci::root::ECAM_BYTES <= u64::from(IO_APIC));
        // KVM_MAX_IRQ_ROUTES
        assert!(pci_first_gsi(last + 1) <= 4096);
    }
}
