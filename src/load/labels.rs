//! The syntax of labels and annotations: Kubernetes', so that what passes here passes there.

/// The name part of a label key, or a label value: Kubernetes' "qualified name".
pub fn check_value(text: &str) -> Result<(), String> {
    let alnum = |byte: &u8| byte.is_ascii_alphanumeric();
    let bytes = text.as_bytes();
    if bytes.len() > 63 {
        return Err(format!("has {} bytes; at most 63 are allowed", bytes.len()));
    }
    if !bytes.iter().all(|byte| alnum(byte) || matches!(byte, b'-' | b'_' | b'.')) {
        return Err("may only hold letters, digits, `-`, `_` and `.`".to_owned());
    }
    if !bytes.first().is_none_or(alnum) || !bytes.last().is_none_or(alnum) {
        return Err("must begin and end with a letter or a digit".to_owned());
    }
    Ok(())
}

/// `[prefix/]name`, the prefix a DNS name.
pub fn check_key(key: &str) -> Result<(), String> {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    if name.is_empty() {
        return Err("has no name".to_owned());
    }
    if let Some(prefix) = prefix {
        let good = |label: &str| {
            let bytes = label.as_bytes();
            let alnum = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
            bytes.iter().all(|byte| alnum(byte) || *byte == b'-')
                && bytes.first().is_some_and(alnum)
                && bytes.last().is_some_and(alnum)
        };
        if prefix.len() > 253 || !prefix.split('.').all(good) {
            return Err("has a prefix that is not a DNS name such as `example.org`".to_owned());
        }
    }
    check_value(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_and_values_follow_kubernetes() {
        for key in ["app", "vmctl.dev/protect", "a.b-c_d", "example.org/A", &format!("x/{}", "a".repeat(63))]
        {
            assert_eq!(check_key(key), Ok(()), "{key}");
        }
        for key in
            ["", "/", "a/", "/a", "a/b/c", "A.org/x", "-a", "a-", "a b", "ä", &"a".repeat(64), "a..b/c"]
        {
            assert!(check_key(key).is_err(), "{key}");
        }
        assert!(check_value("").is_ok() && check_value("a b").is_err());
    }
}
