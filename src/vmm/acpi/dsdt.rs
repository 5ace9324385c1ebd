//! The DSDT: the devices that can't be probed for, in AML.

use acpi_tables::aml::{
    Arg, Device, EISAName, Equal, IO, If, Interrupt, Memory32Fixed, Method, Name, Notify, Package, Path,
    ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{Devices, OEM_ID, OEM_REVISION, OEM_TABLE_ID, bytes, generation_id, pci, pvpanic};
use crate::vmm::layout;
use crate::vmm::power;

const HEADER_BYTES: u32 = 36;
/// 2 and more: integers are 64 bits wide.
const REVISION: u8 = 2;
/// Notify value of a control method power button (ACPI 6.5, 4.8.3.1.1).
const BUTTON_PRESSED: u8 = 0x80;

/// AML that is already made.
pub(super) struct Made(pub Vec<u8>);

impl Aml for Made {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// An interrupt of the Generic Event Device (ACPI 6.5, 5.6.9), and the AML that it runs.
pub(super) struct GenericEvent {
    pub gsi: u32,
    pub action: Vec<u8>,
}

pub(super) fn build(devices: Devices, generation_id: bool) -> Vec<u8> {
    let mut dsdt = Sdt::new(*b"DSDT", HEADER_BYTES, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let mut aml = Vec::new();
    soft_off(&mut aml);
    let mut scope = Vec::new();
    let mut events = vec![power_button(&mut scope)];
    serial_port(&mut scope);
    pvpanic::pvpanic(&mut scope);
    if generation_id {
        events.push(generation_id::generation_id(&mut scope));
    }
    match devices {
        Devices::Mmio { slots } => (0..slots).for_each(|slot| virtio(slot, &mut scope)),
        Devices::Pci => events.push(pci::host_bridge(&mut scope)),
    }
    event_device(&events, &mut scope);
    aml.extend(Scope::raw(Path::new("_SB_"), scope));
    dsdt.append_slice(&aml);
    bytes(&dsdt)
}

fn edge(gsi: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, gsi)
}

/// `\_S5`: the value for the sleep control register that powers off.
fn soft_off(aml: &mut Vec<u8>) {
    Name::new("_S5_".into(), &Package::new(vec![&power::SLEEP_TYPE_S5])).to_aml_bytes(aml);
}

/// A control method power button.
fn power_button(aml: &mut Vec<u8>) -> GenericEvent {
    Device::new("PWRB".into(), vec![&Name::new("_HID".into(), &EISAName::new("PNP0C0C"))]).to_aml_bytes(aml);
    let action = bytes(&Notify::new(&Path::new("PWRB"), &BUTTON_PRESSED));
    GenericEvent { gsi: layout::POWER_BUTTON_GSI, action }
}

/// The device behind which all our events are: an edge interrupt for each.
fn event_device(events: &[GenericEvent], aml: &mut Vec<u8>) {
    let interrupts: Vec<Interrupt> = events.iter().map(|event| edge(event.gsi)).collect();
    let interrupts: Vec<&dyn Aml> = interrupts.iter().map(|interrupt| interrupt as &dyn Aml).collect();
    let actions: Vec<Made> = events
        .iter()
        .map(|event| {
            Made(bytes(&If::new(&Equal::new(&Arg(0), &event.gsi), vec![&Made(event.action.clone())])))
        })
        .collect();
    let actions: Vec<&dyn Aml> = actions.iter().map(|action| action as &dyn Aml).collect();
    Device::new(
        "GED_".into(),
        vec![
            &Name::new("_HID".into(), &"ACPI0013"),
            &Name::new("_CRS".into(), &ResourceTemplate::new(interrupts)),
            &Method::new("_EVT".into(), 1, true, actions),
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
