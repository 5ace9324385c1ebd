//! The ports by which a guest resets itself or powers itself off. Pure: says what a write means, and
//! leaves the doing to the event loop.

/// ACPI sleep control register (ACPI 6.5, 4.8.3.7).
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// ACPI reset register, and what to write there.
pub const RESET_PORT: u16 = 0x602;
pub const RESET_VALUE: u8 = 0x06;
/// The sleep type that `\_S5` names.
pub const SLEEP_TYPE_S5: u8 = 5;

const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;

/// The PC's own reset control register: bit 2 pulses the reset line.
const PCI_RESET_PORT: u16 = 0xcf9;
const PCI_RESET_CPU: u8 = 1 << 2;
/// The keyboard controller's command port, and its command to pulse the reset line.
const KEYBOARD_COMMAND_PORT: u16 = 0x64;
const KEYBOARD_PULSE_RESET: u8 = 0xfe;

/// Real-mode code for the processor's reset vector, which resets the machine. Linux jumps there when it
/// runs on hardware-reduced ACPI without EFI: it then takes EFI for the one way to reboot, and the BIOS
/// for the next, and never looks at the ACPI reset register.
pub const RESET_VECTOR_CODE: [u8; 9] = [
    0xba,
    RESET_PORT.to_le_bytes()[0],
    RESET_PORT.to_le_bytes()[1], // mov dx, RESET_PORT
    0xb0,
    RESET_VALUE, // mov al, RESET_VALUE
    0xee,        // out dx, al
    0xf4,        // hlt
    0xeb,
    0xfd, // jmp to hlt
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerRequest {
    Reset,
    PowerOff,
}

/// What writing `data` to `port` asks for, if anything.
pub fn request(port: u16, data: &[u8]) -> Option<PowerRequest> {
    let &[value] = data else { return None };
    match port {
        SLEEP_CONTROL_PORT => {
            let kind = (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK;
            (value & SLEEP_ENABLE != 0 && kind == SLEEP_TYPE_S5).then_some(PowerRequest::PowerOff)
        }
        RESET_PORT => (value == RESET_VALUE).then_some(PowerRequest::Reset),
        PCI_RESET_PORT => (value & PCI_RESET_CPU != 0).then_some(PowerRequest::Reset),
        KEYBOARD_COMMAND_PORT => (value == KEYBOARD_PULSE_RESET).then_some(PowerRequest::Reset),
        _ => None,
    }
}

/// What reading one of the ports gives: registers at rest. The keyboard controller's status says
/// "ready", so that a guest that resets by it doesn't wait.
pub fn read(port: u16) -> Option<u8> {
    matches!(port, SLEEP_CONTROL_PORT | SLEEP_STATUS_PORT | RESET_PORT | KEYBOARD_COMMAND_PORT).then_some(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_value_at_the_right_port_means_something() {
        use PowerRequest::{PowerOff, Reset};
        let s5 = SLEEP_TYPE_S5 << 2 | 1 << 5;
        for (port, data, wanted) in [
            (0x600, &[s5][..], Some(PowerOff)),
            (0x600, &[SLEEP_TYPE_S5 << 2], None),
            (0x600, &[1 << 5], None),
            (0x600, &[s5, 0], None),
            (0x601, &[s5], None),
            (0x602, &[6], Some(Reset)),
            (0x602, &[0], None),
            (0xcf9, &[0x06], Some(Reset)),
            (0xcf9, &[0x0e], Some(Reset)),
            (0xcf9, &[0x02], None),
            (0x64, &[0xfe], Some(Reset)),
            (0x64, &[0xd1], None),
            (0x60, &[0xfe], None),
        ] {
            assert_eq!(request(port, data), wanted, "{port:#x} {data:?}");
        }
    }
}
