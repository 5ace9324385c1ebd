//! VMGenID's place in the DSDT (see [`crate::vmm::generation_id`]).

use acpi_tables::Aml;
use acpi_tables::aml::{Device, Name, Notify, Package, Path};

use super::bytes;
use super::dsdt::GenericEvent;
use crate::vmm::layout;

/// Notify value of a changed generation.
const CHANGED: u8 = 0x80;

pub(super) fn generation_id(aml: &mut Vec<u8>) -> GenericEvent {
    // Below 1 MiB.
    let (low, high) = (layout::GENERATION_ID as u32, 0u8);
    Device::new(
        "VGEN".into(),
        vec![
            &Name::new("_HID".into(), &"VMGENCTR"),
            // By one of these two the drivers know it.
            &Name::new("_CID".into(), &"VM_Gen_Counter"),
            &Name::new("_DDN".into(), &"VM_Gen_Counter"),
            &Name::new("ADDR".into(), &Package::new(vec![&low, &high])),
        ],
    )
    .to_aml_bytes(aml);
    GenericEvent { gsi: layout::GENERATION_ID_GSI, action: bytes(&Notify::new(&Path::new("VGEN"), &CHANGED)) }
}
