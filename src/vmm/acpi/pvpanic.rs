//! pvpanic's place in the DSDT (see [`crate::vmm::pvpanic`]).

use acpi_tables::Aml;
use acpi_tables::aml::{Device, IO, Name, ResourceTemplate};

use crate::vmm::layout;

pub(super) fn pvpanic(aml: &mut Vec<u8>) {
    let port = IO::new(layout::PVPANIC_PORT, layout::PVPANIC_PORT, 1, layout::PVPANIC_PORTS as u8);
    Device::new(
        "PEVT".into(),
        vec![
            &Name::new("_HID".into(), &"QEMU0001"),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&port])),
        ],
    )
    .to_aml_bytes(aml);
}
