//! The ACPI tables: how a stock kernel finds its processors, its interrupts and its devices.
//!
//! Hardware-reduced ACPI: no SCI, no PM timer, no 8259, no PIT. Linux then skips every legacy probe
//! (the 8259, the timer check, the i8042, VGA, the CMOS clock), and takes its time from kvmclock and the
//! TSC-deadline timer. The power button is a Generic Event Device with an edge interrupt of its own;
//! sleep and reset are two byte registers (see [`crate::vmm::power`]). Tables never change while the
//! guest runs.

mod dsdt;
mod generation_id;
mod pci;
mod pvpanic;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes as _, GuestAddress};

use super::layout;
use super::memory::GuestMemory;
use super::power;

const OEM_ID: [u8; 6] = *b"VMCTL ";
const OEM_TABLE_ID: [u8; 8] = *b"VMCTLVMM";
const OEM_REVISION: u32 = 1;

/// FADT IA-PC boot architecture flags: what this machine doesn't have.
const NO_VGA: u16 = 1 << 2;
const NO_CMOS_RTC: u16 = 1 << 5;

#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    #[error("the ACPI tables need {bytes} bytes, more than there is room for")]
    TooLarge { bytes: u64 },
    #[error("write the ACPI tables into guest memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Where the machine's virtio devices are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Devices {
    /// In the first slots of the MMIO transport.
    Mmio { slots: usize },
    /// On the PCI bus, where a guest finds them by itself.
    Pci,
}

/// What the tables say.
#[derive(Clone, Copy, Debug)]
pub struct Tables<'a> {
    /// Of the vCPUs.
    pub apic_ids: &'a [u8],
    pub devices: Devices,
    /// Whether there is a generation id.
    pub generation_id: bool,
}

/// Writes all tables; gives the address of the RSDP.
pub fn write_tables(memory: &GuestMemory, tables: Tables<'_>) -> Result<u64, AcpiError> {
    let Tables { apic_ids, devices, generation_id } = tables;
    let mut writer = Writer { memory, next: layout::ACPI_START };
    // The RSDP comes first, at the start of the area that a kernel also searches.
    let rsdp = writer.reserve(Rsdp::len() as u64)?;
    let dsdt = writer.append(&dsdt::build(devices, generation_id))?;
    let fadt = writer.append(&bytes(&fadt(dsdt)))?;
    let madt = writer.append(&bytes(&madt(apic_ids)))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    if devices == Devices::Pci {
        let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
        mcfg.add_ecam(layout::PCI_ECAM_START, 0, 0, 0);
        xsdt.add_entry(writer.append(&bytes(&mcfg))?);
    }
    let xsdt = writer.append(&bytes(&xsdt))?;
    memory.write_slice(&bytes(&Rsdp::new(OEM_ID, xsdt)), GuestAddress(rsdp))?;
    Ok(rsdp)
}

struct Writer<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl Writer<'_> {
    /// Tables start at multiples of 16 bytes, as the RSDP must.
    fn reserve(&mut self, bytes: u64) -> Result<u64, AcpiError> {
        let start = self.next;
        let end = (start + bytes).next_multiple_of(16);
        if end > layout::ACPI_END {
            return Err(AcpiError::TooLarge { bytes: end - layout::ACPI_START });
        }
        self.next = end;
        Ok(start)
    }

    fn append(&mut self, table: &[u8]) -> Result<u64, AcpiError> {
        let start = self.reserve(table.len() as u64)?;
        self.memory.write_slice(table, GuestAddress(start))?;
        Ok(start)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn byte_port(port: u16) -> GAS {
    GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into())
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // No fixed power and sleep buttons: the power button is a device.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .preferred_pm_profile(PmProfile::EnterpriseServer);
    fadt.iapc_boot_arch = (NO_VGA | NO_CMOS_RTC).into();
    fadt.reset_reg = byte_port(power::RESET_PORT);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = byte_port(power::SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = byte_port(power::SLEEP_STATUS_PORT);
    fadt.finalize()
}

fn madt(apic_ids: &[u8]) -> MADT {
    let mut madt =
        MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, LocalInterruptController::Address(layout::LOCAL_APIC));
    for (uid, &id) in (0..).zip(apic_ids) {
        madt.add_structure(ProcessorLocalApic::new(uid, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    madt
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::memory;

    #[test]
    fn tables_are_found_from_the_rsdp_and_their_checksums_hold() {
        let memory = memory::create(&[(0, 2 << 20)]).unwrap();
        for devices in [Devices::Mmio { slots: layout::VIRTIO_SLOTS }, Devices::Pci] {
            check_tables(&memory, devices);
        }
    }

    fn check_tables(memory: &GuestMemory, devices: Devices) {
        let apic_ids: Vec<u8> = (0..16).collect();
        let rsdp =
            write_tables(memory, Tables { apic_ids: &apic_ids, devices, generation_id: true }).unwrap();
        let sum = |start: u64, length: usize| {
            let mut table = vec![0; length];
            memory.read_slice(&mut table, GuestAddress(start)).unwrap();
            (table.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)), table)
        };
        let (checksum, table) = sum(rsdp, Rsdp::len());
        assert_eq!((checksum, &table[..8]), (0, b"RSD PTR ".as_slice()));
        let xsdt = u64::from_le_bytes(table[24..32].try_into().unwrap());
        let length = |start: u64| memory.read_obj::<u32>(GuestAddress(start + 4)).unwrap() as usize;
        let (checksum, table) = sum(xsdt, length(xsdt));
        assert_eq!((checksum, &table[..4]), (0, b"XSDT".as_slice()));
        let entries: Vec<u64> =
            table[36..].chunks_exact(8).map(|entry| u64::from_le_bytes(entry.try_into().unwrap())).collect();
        let names: Vec<Vec<u8>> = entries
            .iter()
            .map(|&entry| {
                let (checksum, table) = sum(entry, length(entry));
                assert_eq!(checksum, 0);
                table[..4].to_vec()
            })
            .collect();
        let mut wanted = vec![b"FACP".to_vec(), b"APIC".to_vec()];
        wanted.extend((devices == Devices::Pci).then(|| b"MCFG".to_vec()));
        assert_eq!(names, wanted);
        let dsdt = memory.read_obj::<u64>(GuestAddress(entries[0] + 140)).unwrap();
        let (checksum, table) = sum(dsdt, length(dsdt));
        assert_eq!((checksum, &table[..4]), (0, b"DSDT".as_slice()));
        // 16 processors of 8 bytes and an IO-APIC of 12 behind the header.
        assert_eq!(length(entries[1]), 44 + 16 * 8 + 12);
    }
}
