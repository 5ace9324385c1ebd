//! What links and their addresses are told by: VLAN ids, Ethernet addresses, IP prefixes.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{NameError, as_text, error};

/// An 802.1Q VLAN id: 1 to 4094.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u16", into = "u16")]
pub struct VlanId(u16);

impl VlanId {
    pub fn new(id: u64) -> Result<Self, NameError> {
        match id {
            1..=4094 => Ok(Self(id as u16)),
            0 => error("VLAN id 0 is reserved (a priority tag, no VLAN); use 1 to 4094"),
            4095 => error("VLAN id 4095 is reserved by IEEE 802.1Q; use 1 to 4094"),
            _ => error(format!("VLAN id {id} is out of range; use 1 to 4094")),
        }
    }
    pub fn get(self) -> u16 {
        self.0
    }
}

impl TryFrom<u16> for VlanId {
    type Error = NameError;
    fn try_from(id: u16) -> Result<Self, NameError> {
        Self::new(id.into())
    }
}

impl From<VlanId> for u16 {
    fn from(id: VlanId) -> u16 {
        id.0
    }
}

impl fmt::Display for VlanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An Ethernet address, written in lower case with colons.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress(pub [u8; 6]);

impl MacAddress {
    /// An address that an interface may have: not multicast, not zero.
    pub fn parse_unicast(text: &str) -> Result<Self, NameError> {
        let mac: Self = text.parse()?;
        if mac.0[0] & 1 == 1 {
            return error(format!(
                "`{text}` is a multicast address (the lowest bit of its first byte is set); an interface needs a unicast one"
            ));
        }
        if mac.0 == [0; 6] {
            return error(format!("`{text}` is the null address"));
        }
        Ok(mac)
    }
}

impl FromStr for MacAddress {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let mut bytes = [0u8; 6];
        let mut pieces = text.split(':');
        for byte in &mut bytes {
            let piece = pieces
                .next()
                .filter(|piece| piece.len() == 2 && piece.bytes().all(|b| b.is_ascii_hexdigit()));
            match piece.and_then(|piece| u8::from_str_radix(piece, 16).ok()) {
                Some(value) => *byte = value,
                None => return error(format!("`{text}` is not a MAC address such as 52:54:00:12:34:56")),
            }
        }
        if pieces.next().is_some() {
            return error(format!("`{text}` is not a MAC address such as 52:54:00:12:34:56"));
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        f.pad(&format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}"))
    }
}

as_text!(MacAddress);

/// An address with its prefix length: `192.168.10.1/24`, `fd00::1/64`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct IpPrefix {
    pub address: IpAddr,
    pub prefix_len: u8,
}

impl IpPrefix {
    /// The network that the address is in: its host bits are zero.
    pub fn network(self) -> Self {
        let address = match self.address {
            IpAddr::V4(address) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(self.prefix_len)).unwrap_or(0);
                IpAddr::V4((u32::from(address) & mask).into())
            }
            IpAddr::V6(address) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(self.prefix_len)).unwrap_or(0);
                IpAddr::V6((u128::from(address) & mask).into())
            }
        };
        Self { address, prefix_len: self.prefix_len }
    }

    pub fn contains(self, address: IpAddr) -> bool {
        self.address.is_ipv4() == address.is_ipv4()
            && Self { address, prefix_len: self.prefix_len }.network() == self.network()
    }

    /// Whether some address is in both.
    pub fn overlaps(self, other: Self) -> bool {
        let wider = if self.prefix_len <= other.prefix_len { self } else { other };
        wider.contains(if wider == self { other.address } else { self.address })
    }
}

impl FromStr for IpPrefix {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let wrong = || NameError(format!("`{text}` is not an address with a prefix such as 192.168.10.1/24"));
        let (address, prefix_len) = text.split_once('/').ok_or_else(wrong)?;
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let prefix_len: u8 = prefix_len.parse().map_err(|_| wrong())?;
        let longest = if address.is_ipv4() { 32 } else { 128 };
        if prefix_len > longest {
            return error(format!("`{text}`: the prefix is at most {longest} bits long"));
        }
        Ok(Self { address, prefix_len })
    }
}

impl fmt::Display for IpPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix_len)
    }
}

as_text!(IpPrefix);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vlan_ids_macs_and_prefixes() {
        assert!(VlanId::new(1).is_ok() && VlanId::new(4094).is_ok());
        for id in [0, 4095, 4096, u64::MAX] {
            assert!(VlanId::new(id).is_err(), "{id}");
        }
        assert!(MacAddress::parse_unicast("52:54:00:12:34:56").is_ok());
        for text in [
            "01:00:5e:00:00:01",
            "00:00:00:00:00:00",
            "52:54:00:12:34",
            "52-54-00-12-34-56",
            "5:54:00:12:34:56",
        ] {
            assert!(MacAddress::parse_unicast(text).is_err(), "{text}");
        }
        assert_eq!("10.0.0.1/8".parse::<IpPrefix>().unwrap().to_string(), "10.0.0.1/8");
        for text in ["10.0.0.1", "10.0.0.1/33", "::1/129", "x/8"] {
            assert!(text.parse::<IpPrefix>().is_err(), "{text}");
        }
        let prefix = |text: &str| text.parse::<IpPrefix>().unwrap();
        for (text, network) in
            [("10.1.2.3/8", "10.0.0.0/8"), ("10.1.2.3/0", "0.0.0.0/0"), ("fd00:1::7/64", "fd00:1::/64")]
        {
            assert_eq!(prefix(text).network(), prefix(network));
        }
        assert!(prefix("10.0.0.1/24").overlaps(prefix("10.0.0.129/25")));
        assert!(prefix("10.0.0.129/25").overlaps(prefix("10.0.0.1/24")));
        assert!(!prefix("10.0.0.1/25").overlaps(prefix("10.0.0.129/25")));
        assert!(!prefix("0.0.0.0/0").overlaps(prefix("::/0")));
    }
}
