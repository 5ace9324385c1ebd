//! The DSDT: the devices that can't be probed for, in AML.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path, ResourceTemplate,
    Scope,
};
use acpi_tables::sdt::Sdt;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID};
use crate::vmm::layout;
use crate::vmm::power;

const HEADER_BYTES: u32 = 36;
/// 2 and more: integers are 64 bits wide.
const REVISION: u8 = 2;
/// Notify value of a control method power button (ACPI 6.5, 4.8.3.1.1).
const BUTTON_PRESSED: u8 = 0x80;

pub(super) fn build(virtio_slots: usize) -> Vec<u8> {
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_BYTES, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut aml = Vec::new();
    soft_off(&mut aml);
    let mut devices = Vec::new();
    power_button(&mut devices);
    serial_port(&mut devices);
    for slot in 0..virtio_slots {
        virtio(slot, &mut devices);
    }
    aml.extend(Scope::raw(Path::new("_SB_"), devices));
    dsdt.append_slice(&aml);
    bytes(&dsdt)
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// `\_S5`: the value for the sleep control register that powers off.
fn soft_off(aml: &mut Vec<u8>) {
    Name::new("_S5_".into(), &Package::new(vec![&power::SLEEP_TYPE_S5])).to_aml_bytes(aml);
}

/// A control method power button, pressed by the event device's only interrupt.
fn power_button(aml: &mut Vec<u8>) {
    Device::new("PWRB".into(), vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C"))]).to_aml_bytes(aml);
    Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&edge(layout::POWER_BUTTON_GSI)])),
            &Method::new("_EVT".into(), 1, true, vec![&Notify::new(&Path::new("PWRB"), &BUTTON_PRESSED)]),
        ],
    )
    .to_aml_bytes(aml);
}

fn serial_port(aml: &mut Vec<u8>) {
    let ports = IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, layout::SERIAL_PORTS as u8);
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports, &edge(layout::SERIAL_GSI)])),
        ],
    )
    .to_aml_bytes(aml);
}

fn virtio(slot: usize, aml: &mut Vec<u8>) {
    // The slots lie below 4 GiB (see layout), and there are at most 16.
    let registers =
        Memory32Fixed::new(true, layout::virtio_address(slot) as u32, layout::VIRTIO_MMIO_BYTES as u32);
    Device::new(
        Path::new(&format!("VR{slot:02}")),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &(slot as u8)),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&registers, &edge(layout::virtio_gsi(slot))]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}
