//! What a plain scalar is by YAML 1.2's core schema, and what other tools take it for.

/// The type of a scalar.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Typed {
    Null,
    Bool(bool),
    /// Values beyond i128 are clamped: they are out of any range.
    Int(i128),
    Float(f64),
    Text,
}

impl Typed {
    pub fn name(self) -> &'static str {
        match self {
            Typed::Null => "null",
            Typed::Bool(_) => "a boolean",
            Typed::Int(_) => "an integer",
            Typed::Float(_) => "a number with a fraction",
            Typed::Text => "a text",
        }
    }
}

/// YAML 1.2.2, 10.3.2: the core schema's tag resolution.
pub fn core(text: &str) -> Typed {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Typed::Null,
        "true" | "True" | "TRUE" => return Typed::Bool(true),
        "false" | "False" | "FALSE" => return Typed::Bool(false),
        ".nan" | ".NaN" | ".NAN" => return Typed::Float(f64::NAN),
        _ => {}
    }
    let (negative, digits) = match text.as_bytes()[0] {
        b'-' => (true, &text[1..]),
        b'+' => (false, &text[1..]),
        b'0'..=b'9' | b'.' => (false, text),
        _ => return Typed::Text,
    };
    let signed = |value: i128| Typed::Int(if negative { -value } else { value });
    if !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return signed(digits.parse().unwrap_or(i128::MAX));
    }
    // Octal and hexadecimal have no sign in the core schema.
    for (prefix, radix) in [("0o", 8), ("0x", 16)] {
        if let Some(rest) = text.strip_prefix(prefix)
            && !rest.is_empty()
            && rest.chars().all(|c| c.is_digit(radix))
        {
            return Typed::Int(i128::from_str_radix(rest, radix).unwrap_or(i128::MAX));
        }
    }
    if matches!(digits, ".inf" | ".Inf" | ".INF") {
        return Typed::Float(if negative { f64::NEG_INFINITY } else { f64::INFINITY });
    }
    if is_float(digits) { text.parse().map_or(Typed::Text, Typed::Float) } else { Typed::Text }
}

/// `(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?`
fn is_float(text: &str) -> bool {
    let (mantissa, exponent) = match text.find(['e', 'E']) {
        Some(at) => (&text[..at], Some(&text[at + 1..])),
        None => (text, None),
    };
    let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let exponent_ok = exponent.is_none_or(|text| {
        let text = text.strip_prefix(['-', '+']).unwrap_or(text);
        !text.is_empty() && digits(text)
    });
    !(whole.is_empty() && fraction.is_empty()) && digits(whole) && digits(fraction) && exponent_ok
}

/// What YAML 1.1 tools (PyYAML, Ruby, older Go and Java) read in a plain scalar, where YAML 1.2 and
/// this program read something else.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Surprise {
    /// `yes`, `no`, `on`, `off`, `y`, `n`.
    Bool(bool),
    /// `0755`: octal there, decimal here.
    Octal(i128),
    /// `12:30:00`: a number to the base of 60 there, a text here.
    Sexagesimal(i128),
    /// `1_000` or `0b11`: a number there, a text here.
    Number,
}

pub fn surprise(text: &str) -> Option<Surprise> {
    match text.to_ascii_lowercase().as_str() {
        "yes" | "on" | "y" => return Some(Surprise::Bool(true)),
        "no" | "off" | "n" => return Some(Surprise::Bool(false)),
        _ => {}
    }
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    if !digits.starts_with(|c: char| c.is_ascii_digit()) {
        return None;
    }
    if digits.len() > 1
        && digits.starts_with('0')
        && digits.bytes().all(|byte| matches!(byte, b'0'..=b'7' | b'_'))
    {
        let plain = digits.replace('_', "");
        return Some(Surprise::Octal(i128::from_str_radix(&plain, 8).unwrap_or(i128::MAX)));
    }
    if digits.len() > 1 && digits.starts_with('0') && digits.bytes().all(|byte| byte.is_ascii_digit()) {
        // `09` is a text there.
        return Some(Surprise::Number);
    }
    if let Some(value) = sexagesimal(digits) {
        return Some(Surprise::Sexagesimal(value));
    }
    let number = digits.contains('_') && digits.bytes().all(|byte| byte.is_ascii_digit() || byte == b'_');
    let binary = digits
        .strip_prefix("0b")
        .is_some_and(|rest| !rest.is_empty() && rest.bytes().all(|byte| matches!(byte, b'0' | b'1' | b'_')));
    (number || binary).then_some(Surprise::Number)
}

/// YAML 1.1: `[1-9][0-9_]*(:[0-5]?[0-9])+`
fn sexagesimal(text: &str) -> Option<i128> {
    let mut parts = text.split(':');
    let first = parts.next()?;
    if first.starts_with('0') || !first.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let mut value: i128 = first.parse().ok()?;
    let mut count = 0;
    for part in parts {
        let digits = part.bytes().all(|byte| byte.is_ascii_digit());
        let part = part.parse::<i128>().ok().filter(|&n| n < 60 && digits && part.len() <= 2)?;
        value = value.checked_mul(60)?.checked_add(part)?;
        count += 1;
    }
    (count > 0).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_scalars_have_the_types_of_the_core_schema() {
        for (text, expected) in [
            ("", Typed::Null),
            ("~", Typed::Null),
            ("nULL", Typed::Text),
            ("true", Typed::Bool(true)),
            ("FALSE", Typed::Bool(false)),
            ("yes", Typed::Text),
            ("0", Typed::Int(0)),
            ("-12", Typed::Int(-12)),
            ("+12", Typed::Int(12)),
            ("0755", Typed::Int(755)),
            ("0o17", Typed::Int(15)),
            ("0x1F", Typed::Int(31)),
            ("0x", Typed::Text),
            ("-0x1", Typed::Text),
            ("1_000", Typed::Text),
            ("1.5", Typed::Float(1.5)),
            ("1.", Typed::Float(1.0)),
            (".5", Typed::Float(0.5)),
            ("1e3", Typed::Float(1000.0)),
            ("-.inf", Typed::Float(f64::NEG_INFINITY)),
            (".", Typed::Text),
            ("-", Typed::Text),
            ("e3", Typed::Text),
            ("1e", Typed::Text),
            ("2Gi", Typed::Text),
            ("52:54:00:12:34:56", Typed::Text),
            ("1.2.3", Typed::Text),
            ("99999999999999999999999999999999999999999999", Typed::Int(i128::MAX)),
            ("é", Typed::Text),
        ] {
            assert_eq!(core(text), expected, "{text}");
        }
        assert!(matches!(core(".nan"), Typed::Float(value) if value.is_nan()));
    }

    #[test]
    fn yaml_1_1_is_known_where_it_differs() {
        for (text, expected) in [
            ("no", Some(Surprise::Bool(false))),
            ("On", Some(Surprise::Bool(true))),
            ("Y", Some(Surprise::Bool(true))),
            ("0755", Some(Surprise::Octal(0o755))),
            ("010", Some(Surprise::Octal(8))),
            ("089", Some(Surprise::Number)),
            ("0", None),
            ("12:30:00", Some(Surprise::Sexagesimal(45000))),
            ("52:54:00:12:34:56", Some(Surprise::Sexagesimal(41_135_085_296))),
            ("52:54:00:12:34:ab", None),
            ("12:60", None),
            ("1_000", Some(Surprise::Number)),
            ("0b11", Some(Surprise::Number)),
            ("1500", None),
            ("north", None),
            ("é", None),
        ] {
            assert_eq!(surprise(text), expected, "{text}");
        }
    }
}
