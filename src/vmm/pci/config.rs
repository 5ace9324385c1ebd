//! The configuration space of one function: bytes, and which of their bits a guest may write.

/// Bytes of a conventional configuration space. ECAM gives each function 4096; the rest reads as zeroes,
/// which says that there are no extended capabilities.
pub const CONFIG_BYTES: usize = 256;

pub const COMMAND: u16 = 0x04;
pub const BAR0: u16 = 0x10;

const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CAPABILITIES_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const FIRST_CAPABILITY: usize = 0x40;
/// Bits of the command register that are there: memory space, bus master, INTx disable.
const COMMAND_WRITABLE: u16 = super::COMMAND_MEMORY | super::COMMAND_BUS_MASTER | 1 << 10;

/// What a function is (PCI 3.0, section 6.1).
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    pub vendor: u16,
    pub device: u16,
    pub revision: u8,
    /// Base class, sub-class, programming interface.
    pub class: [u8; 3],
    pub subsystem_vendor: u16,
    pub subsystem: u16,
}

pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    writable: [u8; CONFIG_BYTES],
    /// As after construction, for a reset.
    initial: Box<[u8; CONFIG_BYTES]>,
    next_capability: usize,
    last_pointer: usize,
}

impl ConfigSpace {
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            initial: Box::new([0; CONFIG_BYTES]),
            next_capability: FIRST_CAPABILITY,
            last_pointer: CAPABILITIES_POINTER,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &[identity.revision, identity.class[2], identity.class[1], identity.class[0]]);
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        space.allow(COMMAND.into(), &COMMAND_WRITABLE.to_le_bytes());
        // Scratch for the operating system.
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
        self.initial[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn allow(&mut self, at: usize, mask: &[u8]) {
        self.writable[at..at + mask.len()].copy_from_slice(mask);
    }

    /// BAR 0: a 32-bit memory BAR of this length (a power of two, at least 16), that answers at this
    /// address from the start.
    pub fn add_bar(&mut self, address: u32, bytes: u32) {
        debug_assert!(bytes.is_power_of_two() && address.is_multiple_of(bytes));
        self.put(BAR0.into(), &address.to_le_bytes());
        // The low bits, which can't be written, are how a guest learns its length.
        self.allow(BAR0.into(), &(!(bytes - 1)).to_le_bytes());
        self.put(COMMAND.into(), &super::COMMAND_MEMORY.to_le_bytes());
    }

    /// Appends a capability: its id, and what follows the pointer to the next one. Gives its offset.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        debug_assert_eq!(body.len(), writable.len());
        let at = self.next_capability;
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.allow(at + 2, writable);
        self.put(self.last_pointer, &[at as u8]);
        let status = self.bytes[STATUS] | STATUS_CAPABILITIES;
        self.put(STATUS, &[status]);
        self.last_pointer = at + 1;
        self.next_capability = (at + 2 + body.len()).next_multiple_of(4);
        at as u16
    }

    /// Beyond the conventional space there are zeroes.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        data.fill(0);
        for (index, byte) in data.iter_mut().enumerate() {
            if let Some(value) = self.bytes.get(usize::from(offset) + index) {
                *byte = *value;
            }
        }
    }

    /// What may not be written stays as it is.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (index, value) in data.iter().enumerate() {
            let at = usize::from(offset) + index;
            if at < CONFIG_BYTES {
                let mask = self.writable[at];
                self.bytes[at] = self.bytes[at] & !mask | value & mask;
            }
        }
    }

    pub fn reset(&mut self) {
        self.bytes = *self.initial;
    }

    pub fn u16_at(&self, offset: u16) -> u16 {
        u16::from_le_bytes(self.array(offset))
    }

    pub fn u32_at(&self, offset: u16) -> u32 {
        u32::from_le_bytes(self.array(offset))
    }

    fn array<const N: usize>(&self, offset: u16) -> [u8; N] {
        let mut bytes = [0; N];
        self.read(offset, &mut bytes);
        bytes
    }

    /// The address in BAR 0, and whether memory is decoded.
    pub fn bar(&self) -> super::Bar {
        let decoding = self.u16_at(COMMAND) & super::COMMAND_MEMORY != 0;
        super::Bar { address: self.u32_at(BAR0), decoding }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let identity = Identity {
            vendor: 0x1af4,
            device: 0x1042,
            revision: 1,
            class: [1, 0, 0],
            subsystem_vendor: 0x1af4,
            subsystem: 0x1042,
        };
        let mut space = ConfigSpace::new(identity);
        space.add_bar(0xc000_8000, 0x8000);
        space
    }

    #[test]
    fn a_bar_tells_its_length_and_takes_an_address() {
        let mut space = space();
        assert_eq!(space.bar(), crate::vmm::pci::Bar { address: 0xc000_8000, decoding: true });
        space.write(BAR0, &[0xff; 4]);
        assert_eq!(space.u32_at(BAR0), 0xffff_8000);
        // The other BARs aren't there.
        space.write(BAR0 + 4, &[0xff; 4]);
        assert_eq!(space.u32_at(BAR0 + 4), 0);
        space.write(BAR0, &0xc123_4567_u32.to_le_bytes());
        assert_eq!(space.bar().address, 0xc123_0000);
        space.write(COMMAND, &[0, 0]);
        assert!(!space.bar().decoding);
        space.reset();
        assert_eq!(space.bar(), crate::vmm::pci::Bar { address: 0xc000_8000, decoding: true });
    }

    #[test]
    fn capabilities_form_a_list_and_only_their_writable_bits_change() {
        let mut space = space();
        assert_eq!(space.u16_at(6) & 0x10, 0);
        let first = space.add_capability(0x11, &[1, 2, 3], &[0, 0xf0, 0]);
        let second = space.add_capability(0x09, &[9], &[0]);
        assert_eq!(space.u16_at(6) & 0x10, 0x10);
        let mut byte = [0];
        space.read(0x34, &mut byte);
        assert_eq!(u16::from(byte[0]), first);
        space.read(first + 1, &mut byte);
        assert_eq!(u16::from(byte[0]), second);
        space.read(second + 1, &mut byte);
        assert_eq!(byte, [0]);
        space.write(first, &[0xff; 4]);
        assert_eq!(space.u32_at(first), u32::from_le_bytes([0x11, second as u8, 1, 0xf2]));
        // Identity can't be changed, and beyond the end there is nothing.
        space.write(0, &[0; 4]);
        assert_eq!(space.u32_at(0), 0x1042_1af4);
        space.write(254, &[0xff; 4]);
        let mut data = [1; 4];
        space.read(0xffc, &mut data);
        assert_eq!(data, [0; 4]);
    }
}
