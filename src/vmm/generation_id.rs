//! VMGenID: 128 bits in the guest's memory that change when the guest's state was cloned or taken back,
//! so that it makes new random seeds and lets go of what must exist once only. (Microsoft's "Virtual
//! Machine Generation ID"; Linux has a driver since 5.18.)

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryError};

use super::layout;
use super::memory::GuestMemory;

/// In the byte order in which a guest reads it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GenerationId([u8; 16]);

impl GenerationId {
    /// Parses the usual form of a UUID, with its hyphens.
    pub fn parse(text: &str) -> Option<Self> {
        let groups: Vec<&str> = text.split('-').collect();
        if groups.iter().map(|group| group.len()).ne([8, 4, 4, 4, 12]) {
            return None;
        }
        let digits = groups.concat();
        if !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return None;
        }
        let mut bytes = u128::from_str_radix(&digits, 16).ok()?.to_be_bytes();
        // A GUID: the first three groups are little-endian numbers, the others bytes.
        bytes[..4].reverse();
        bytes[4..6].reverse();
        bytes[6..8].reverse();
        Some(Self(bytes))
    }

    /// Puts it where the ACPI tables say that it is.
    pub fn write(self, memory: &GuestMemory) -> Result<(), GuestMemoryError> {
        memory.write_slice(&self.0, GuestAddress(layout::GENERATION_ID))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_becomes_a_guid() {
        let id = GenerationId::parse("00112233-4455-6677-8899-aabbccddeeff").unwrap();
        let wanted =
            [0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff];
        assert_eq!(id.0, wanted);
        assert_eq!(GenerationId::parse("00112233-4455-6677-8899-AABBCCDDEEFF"), Some(id));
        for bad in [
            "",
            "00112233445566778899aabbccddeeff",
            "0011223-34455-6677-8899-aabbccddeeff",
            "00112233-4455-6677-8899-aabbccddeefg",
            "+0112233-4455-6677-8899-aabbccddeeff",
            "00112233-4455-6677-8899-aabbccddeeff-",
            "0011223é-4455-6677-8899-aabbccddeef",
        ] {
            assert_eq!(GenerationId::parse(bad), None, "{bad}");
        }
    }

    #[test]
    fn it_has_a_page_of_its_own_that_no_kernel_takes_for_ram() {
        let page = layout::GENERATION_ID;
        assert_eq!(page % 4096, 0);
        let kind = |address: u64| {
            let map = layout::memory_map(16 << 20);
            map.into_iter().find(|(start, length, _)| (*start..start + length).contains(&address)).unwrap().2
        };
        assert_eq!(
            (kind(page), kind(page + 4095)),
            (layout::RangeKind::Reserved, layout::RangeKind::Reserved)
        );
        assert!(page >= layout::ACPI_END && page + 4096 <= layout::RESET_VECTOR);
    }
}
