//! Sizes and digests.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::{NameError, as_text, error};

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

as_text!(Sha256);

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
}
