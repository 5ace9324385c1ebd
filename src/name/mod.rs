//! The names and quantities that manifests, plans and the host share, each parsed once.
//!
//! Everything past `load` holds these types and no raw text. This room imports nothing.

mod kind;
mod link;
mod quantity;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use kind::Kind;
pub use link::{IpPrefix, MacAddress, VlanId};
pub use quantity::{ByteSize, Sha256};

/// Why a text is not the name or quantity that it should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct NameError(pub String);

fn error<T>(text: impl Into<String>) -> Result<T, NameError> {
    Err(NameError(text.into()))
}

/// Has serde read and write a type as the text that it parses and prints.
macro_rules! as_text {
    ($name:ident) => {
        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }
        impl From<$name> for String {
            fn from(value: $name) -> String {
                value.to_string()
            }
        }
    };
}
use as_text;

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

as_text!(ObjectId);

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

as_text!(Mark);

#[cfg(test)]
mod tests {
    use super::*;

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
}
