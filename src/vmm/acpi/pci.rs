//! The PCI host bridge in AML: its windows, and a node for each slot that can be ejected (ACPI 6.5,
//! 6.3). What the registers mean is [`crate::vmm::pci::hotplug`]'s.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Arg, Device, EISAName, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Local, Method, MethodCall, Name, Notify, OpRegion, OpRegionSpace,
    Path, ResourceTemplate, Store,
};

use super::bytes;
use super::dsdt::{GenericEvent, Made};
use crate::vmm::layout;
use crate::vmm::pci::{hotplug, root};

const DEVICE_CHECK: u8 = 1;
const EJECT_REQUEST: u8 = 3;

/// Appends the bridge; gives the event that announces devices.
pub(super) fn host_bridge(aml: &mut Vec<u8>) -> GenericEvent {
    let ports = IO::new(root::PORTS_START, root::PORTS_START, 1, root::PORTS as u8);
    let memory = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        layout::PCI_MEMORY_START as u32,
        layout::PCI_MEMORY_END as u32 - 1,
        None,
    );
    let mut children = Vec::new();
    for child in [
        &Name::new("_HID".into(), &EISAName::new("PNP0A08")) as &dyn Aml,
        &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
        &Name::new("_SEG".into(), &0u8),
        &Name::new("_BBN".into(), &0u8),
        &Name::new("_UID".into(), &0u8),
        &Name::new(
            "_CRS".into(),
            &ResourceTemplate::new(vec![&AddressSpace::new_bus_number(0u16, 0u16), &ports, &memory]),
        ),
        &OpRegion::new(
            "HPRG".into(),
            OpRegionSpace::SystemIO,
            &hotplug::PORTS_START,
            &(hotplug::PORTS as u8),
        ),
        &registers(),
        &Method::new("EJCT".into(), 1, true, vec![&Store::new(&Path::new("EJEC"), &Arg(0))]),
    ] {
        child.to_aml_bytes(&mut children);
    }
    let slots = layout::PCI_FIRST_DISK_SLOT..=layout::PCI_LAST_HOTPLUG_SLOT;
    slots.clone().for_each(|number| slot(number, &mut children));
    scan(slots, &mut children);
    Device::new("PCI0".into(), vec![&Made(children)]).to_aml_bytes(aml);
    let action = bytes(&MethodCall::new("\\_SB_.PCI0.SCAN".into(), vec![]));
    GenericEvent { gsi: layout::PCI_HOTPLUG_GSI, action }
}

fn registers() -> Field {
    const BITS: usize = 32;
    Field::new(
        "HPRG".into(),
        FieldAccessType::DWord,
        FieldLockRule::NoLock,
        FieldUpdateRule::WriteAsZeroes,
        vec![
            FieldEntry::Named(*b"ADDD", BITS),
            FieldEntry::Named(*b"ASKD", BITS),
            FieldEntry::Named(*b"EJEC", BITS),
        ],
    )
}

fn slot_name(slot: u8) -> String {
    format!("S{slot:03}")
}

fn slot_bit(slot: u8) -> u32 {
    1 << slot
}

/// A slot whose device can be ejected.
fn slot(slot: u8, aml: &mut Vec<u8>) {
    Device::new(
        Path::new(&slot_name(slot)),
        vec![
            &Name::new("_ADR".into(), &(u32::from(slot) << 16)),
            &Name::new("_SUN".into(), &slot),
            &Method::new(
                "_EJ0".into(),
                1,
                true,
                vec![&MethodCall::new("\\_SB_.PCI0.EJCT".into(), vec![&slot_bit(slot)])],
            ),
        ],
    )
    .to_aml_bytes(aml);
}

/// Reads the two registers once, and tells the operating system of each slot in them.
fn scan(slots: std::ops::RangeInclusive<u8>, aml: &mut Vec<u8>) {
    let mut body = Vec::new();
    Store::new(&Local(0), &Path::new("ADDD")).to_aml_bytes(&mut body);
    Store::new(&Local(1), &Path::new("ASKD")).to_aml_bytes(&mut body);
    for slot in slots {
        let name = Path::new(&slot_name(slot));
        for (register, what) in [(0, DEVICE_CHECK), (1, EJECT_REQUEST)] {
            And::new(&Local(2), &Local(register), &slot_bit(slot)).to_aml_bytes(&mut body);
            If::new(&Local(2), vec![&Notify::new(&name, &what)]).to_aml_bytes(&mut body);
        }
    }
    Method::new("SCAN".into(), 0, true, vec![&Made(body)]).to_aml_bytes(aml);
}
