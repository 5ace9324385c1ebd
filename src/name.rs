//! The names and quantities that manifests, plans and the host share, each parsed once.
//!
//! Everything past `load` holds these types and no raw text. This room imports nothing.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Why a text is not the name or quantity that it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NameError(pub String);

fn error<T>(text: impl Into<String>) -> Result<T, NameError> {
    Err(NameError(text.into()))
}

/// The kinds of object, in the order in which people like to read them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Kind {
    HostPolicy,
    Bridge,
    Vlan,
    Network,
    StoragePool,
    Image,
    Volume,
    VirtualMachine,
}

impl Kind {
    pub const ALL: [Kind; 8] = [
        Kind::HostPolicy,
        Kind::Bridge,
        Kind::Vlan,
        Kind::Network,
        Kind::StoragePool,
        Kind::Image,
        Kind::Volume,
        Kind::VirtualMachine,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Kind::HostPolicy => "HostPolicy",
            Kind::Bridge => "Bridge",
            Kind::Vlan => "Vlan",
            Kind::Network => "Network",
            Kind::StoragePool => "StoragePool",
            Kind::Image => "Image",
            Kind::Volume => "Volume",
            Kind::VirtualMachine => "VirtualMachine",
        }
    }

    /// What people type: the kind in any case, its plural, or a short name.
    pub fn aliases(self) -> &'static [&'static str] {
        match self {
            Kind::HostPolicy => &["hostpolicy", "hostpolicies", "host", "hp"],
            Kind::Bridge => &["bridge", "bridges", "br"],
            Kind::Vlan => &["vlan", "vlans"],
            Kind::Network => &["network", "networks", "net"],
            Kind::StoragePool => &["storagepool", "storagepools", "pool", "pools", "sp"],
            Kind::Image => &["image", "images", "img"],
            Kind::Volume => &["volume", "volumes", "vol"],
            Kind::VirtualMachine => &["virtualmachine", "virtualmachines", "vm", "vms"],
        }
    }

    pub fn parse_alias(text: &str) -> Option<Kind> {
        let text = text.to_ascii_lowercase();
        Kind::ALL.into_iter().find(|kind| kind.aliases().contains(&text.as_str()))
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl FromStr for Kind {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        match Kind::ALL.into_iter().find(|kind| kind.as_str() == text) {
            Some(kind) => Ok(kind),
            None => error(format!("`{text}` is not a kind that vmctl knows")),
        }
    }
}

/// Makes a text newtype whose only way in is `parse`.
macro_rules! text_name {
    ($(#[$doc:meta])* $name:ident, $check:path) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            pub fn parse(text: &str) -> Result<Self, NameError> {
                $check(text)?;
                Ok(Self(text.to_owned()))
            }
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
        impl FromStr for $name {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::parse(text)
            }
        }
        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                Self::parse(&text)
            }
        }
        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }
        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    };
}

text_name!(
    /// An object's name: an RFC 1123 label of 1 to 63 bytes.
    ObjectName,
    check_label
);
text_name!(
    /// A set: the objects that one source owns. An RFC 1123 label.
    SetName,
    check_label
);
text_name!(
    /// A network interface's name: 1 to 15 bytes (`IFNAMSIZ` less the final NUL), no `/`, no white space.
    LinkName,
    check_link_name
);

text_name!(
    /// The name of a volume group or a logical volume, as LVM takes them.
    LvmName,
    check_lvm_name
);

fn check_lvm_name(text: &str) -> Result<(), NameError> {
    if text.is_empty() || text == "." || text == ".." || text.starts_with('-') {
        return error(format!("`{text}` can't be the name of a volume group or a logical volume"));
    }
    if text.len() > 63 {
        return error(format!(
            "`{text}` has {} bytes; the name of a volume group has at most 63",
            text.len()
        ));
    }
    if !text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"+_.-".contains(&byte)) {
        return error(format!("`{text}`: LVM's names hold letters, digits, `+`, `_`, `.` and `-`"));
    }
    Ok(())
}

fn check_label(text: &str) -> Result<(), NameError> {
    let alnum = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    let bytes = text.as_bytes();
    if bytes.is_empty() {
        return error("a name can't be empty");
    }
    if bytes.len() > 63 {
        return error(format!("`{text}` has {} bytes; a name has at most 63", bytes.len()));
    }
    if !bytes.iter().all(|&byte| alnum(byte) || byte == b'-') {
        return error(format!("`{text}` may only hold lower-case letters, digits and `-` (RFC 1123 label)"));
    }
    if !alnum(bytes[0]) || !alnum(bytes[bytes.len() - 1]) {
        return error(format!(
            "`{text}` must begin and end with a lower-case letter or a digit (RFC 1123 label)"
        ));
    }
    Ok(())
}

fn check_link_name(text: &str) -> Result<(), NameError> {
    if text.is_empty() || text == "." || text == ".." {
        return error(format!("`{text}` can't be the name of a network interface"));
    }
    if text.len() > 15 {
        return error(format!(
            "`{text}` has {} bytes; the kernel allows 15 in the name of a network interface",
            text.len()
        ));
    }
    if text
        .bytes()
        .any(|byte| byte.is_ascii_whitespace() || byte == b'/' || byte == b':' || !byte.is_ascii_graphic())
    {
        return error(format!(
            "`{text}`: the name of a network interface has no space, `/`, `:` or control character"
        ));
    }
    Ok(())
}

/// `Kind/name`: how an object is named everywhere.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ObjectId {
    pub kind: Kind,
    pub name: ObjectName,
}

impl ObjectId {
    pub fn new(kind: Kind, name: ObjectName) -> Self {
        Self { kind, name }
    }
}

impl fmt::Display for ObjectId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}/{}", self.kind, self.name))
    }
}

impl FromStr for ObjectId {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let Some((kind, name)) = text.split_once('/') else {
            return error(format!("`{text}` is not of the form Kind/name"));
        };
        Ok(Self { kind: kind.parse()?, name: name.parse()? })
    }
}

impl TryFrom<String> for ObjectId {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<ObjectId> for String {
    fn from(id: ObjectId) -> String {
        id.to_string()
    }
}

/// Whose an object on the host is. Written as `vmctl:<set>:<Kind>/<name>` and, for a part of an
/// object (a VM's tap, a bridge's enslaved port), `vmctl:<set>:<Kind>/<name>#<part>`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mark {
    pub set: SetName,
    pub owner: ObjectId,
    pub part: Option<String>,
}

impl Mark {
    pub fn new(set: SetName, owner: ObjectId) -> Self {
        Self { set, owner, part: None }
    }

    pub fn part(set: SetName, owner: ObjectId, part: impl Into<String>) -> Self {
        Self { set, owner, part: Some(part.into()) }
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "vmctl:{}:{}", self.set, self.owner)?;
        match &self.part {
            Some(part) => write!(f, "#{part}"),
            None => Ok(()),
        }
    }
}

impl FromStr for Mark {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let mut pieces = text.splitn(3, ':');
        let (Some("vmctl"), Some(set), Some(rest)) = (pieces.next(), pieces.next(), pieces.next()) else {
            return error(format!("`{text}` is not a vmctl mark"));
        };
        let (owner, part) = match rest.split_once('#') {
            Some((owner, part)) => (owner, Some(part.to_owned())),
            None => (rest, None),
        };
        Ok(Self { set: set.parse()?, owner: owner.parse()?, part })
    }
}

impl TryFrom<String> for Mark {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<Mark> for String {
    fn from(mark: Mark) -> String {
        mark.to_string()
    }
}

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

impl TryFrom<String> for MacAddress {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> String {
        mac.to_string()
    }
}

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

impl TryFrom<String> for IpPrefix {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<IpPrefix> for String {
    fn from(prefix: IpPrefix) -> String {
        prefix.to_string()
    }
}

/// A number of bytes, written as a binary quantity: `512Mi`, `20Gi`, `1Ti`, or plain bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

impl FromStr for ByteSize {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, unit) = text.split_at(digits);
        let shift = match unit {
            "" => 0,
            "Ki" => 10,
            "Mi" => 20,
            "Gi" => 30,
            "Ti" => 40,
            "Pi" => 50,
            "k" | "K" | "M" | "G" | "T" | "P" | "KB" | "MB" | "GB" | "TB" | "kB" if digits > 0 => {
                let letter = unit[..1].to_ascii_uppercase();
                return error(format!(
                    "`{text}`: sizes are binary quantities here, and `{unit}` would be a decimal one; write `{number}{letter}i` ({number} × 1024{}) or the exact number of bytes",
                    match letter.as_str() {
                        "K" => "",
                        "M" => "²",
                        "G" => "³",
                        "T" => "⁴",
                        _ => "⁵",
                    }
                ));
            }
            _ => return error(format!("`{text}` is not a size such as 512Mi, 20Gi or 1Ti")),
        };
        let number: u64 = match number.parse() {
            Ok(number) => number,
            Err(_) => return error(format!("`{text}` is not a size such as 512Mi, 20Gi or 1Ti")),
        };
        match number.checked_mul(1 << shift) {
            Some(bytes) if bytes <= 1 << 60 => Ok(Self(bytes)),
            _ => error(format!("`{text}` is larger than 1 EiB")),
        }
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(50, "Pi"), (40, "Ti"), (30, "Gi"), (20, "Mi"), (10, "Ki")] {
            if self.0 != 0 && self.0.trailing_zeros() >= shift {
                return f.pad(&format!("{}{unit}", self.0 >> shift));
            }
        }
        f.pad(&self.0.to_string())
    }
}

/// A SHA-256 digest, in lower-case hexadecimal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Sha256(pub [u8; 32]);

impl FromStr for Sha256 {
    type Err = NameError;
    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.len() != 64 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return error(format!(
                "`{text}` is not a SHA-256 digest (64 hexadecimal digits, as `sha256sum` prints)"
            ));
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            let digit = |ascii: u8| (ascii as char).to_digit(16).unwrap_or(0) as u8;
            *byte = digit(pair[0]) << 4 | digit(pair[1]);
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Sha256 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl TryFrom<String> for Sha256 {
    type Error = NameError;
    fn try_from(text: String) -> Result<Self, NameError> {
        text.parse()
    }
}

impl From<Sha256> for String {
    fn from(digest: Sha256) -> String {
        digest.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_binary_and_print_as_they_are_read() {
        for (text, bytes) in [("0", 0), ("1", 1), ("1Ki", 1024), ("512Mi", 512 << 20), ("20Gi", 20 << 30)] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)));
            assert_eq!(ByteSize(bytes).to_string(), text);
        }
        for text in ["", "Gi", "-1Gi", "1.5Gi", "2G", "2GB", "2gi", "99999999999Pi", "2 Gi", "é"] {
            assert!(text.parse::<ByteSize>().is_err(), "{text}");
        }
        assert!("2G".parse::<ByteSize>().unwrap_err().0.contains("2Gi"));
    }

    #[test]
    fn names_hold_to_their_rules() {
        for text in ["a", "web-1", "0", &"a".repeat(63)] {
            assert!(ObjectName::parse(text).is_ok(), "{text}");
        }
        for text in ["", "-a", "a-", "A", "a.b", "a_b", &"a".repeat(64), "ä"] {
            assert!(ObjectName::parse(text).is_err(), "{text}");
        }
        for text in ["eth0.10", "brvlan10", "123456789012345"] {
            assert!(LinkName::parse(text).is_ok(), "{text}");
        }
        for text in ["", ".", "..", "a/b", "a b", "1234567890123456", "a:1", "é"] {
            assert!(LinkName::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn marks_read_back() {
        for text in ["vmctl:default:Bridge/br0", "vmctl:prod:VirtualMachine/web#net0"] {
            assert_eq!(text.parse::<Mark>().unwrap().to_string(), text);
        }
        for text in ["", "vmctl", "vmctl:a", "vmctl:a:b", "other:default:Bridge/br0", "vmctl:default:Bond/b0"]
        {
            assert!(text.parse::<Mark>().is_err(), "{text}");
        }
    }

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
