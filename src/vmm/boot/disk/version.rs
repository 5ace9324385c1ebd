//! The order of versions as boot loaders sort by them (the UAPI group's version format specification).

use std::cmp::Ordering;

/// Compares from left to right: what stands for "before the release" first (`~`), then separators,
/// then runs of digits by value and letters by code.
pub(super) fn compare(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a.as_bytes(), b.as_bytes());
    loop {
        a = skip_other(a);
        b = skip_other(b);
        for mark in [b'~', b'-', b'^', b'.'] {
            if mark == b'-' && (a.is_empty() || b.is_empty()) {
                // Whatever has more, has more; only "~" is less than nothing.
                return a.len().cmp(&b.len());
            }
            match (a.first() == Some(&mark), b.first() == Some(&mark)) {
                (true, true) => {
                    (a, b) = (&a[1..], &b[1..]);
                    break;
                }
                (true, false) => return Ordering::Less,
                (false, true) => return Ordering::Greater,
                (false, false) => {}
            }
        }
        let starts_with_digit = |text: &[u8]| text.first().is_some_and(u8::is_ascii_digit);
        let in_digits = starts_with_digit(a) || starts_with_digit(b);
        let (run_a, rest_a) = run(a, in_digits);
        let (run_b, rest_b) = run(b, in_digits);
        let order = if in_digits { by_value(run_a, run_b) } else { by_letters(run_a, run_b) };
        if order != Ordering::Equal {
            return order;
        }
        (a, b) = (rest_a, rest_b);
    }
}

fn skip_other(text: &[u8]) -> &[u8] {
    let counts = |byte: &u8| byte.is_ascii_alphanumeric() || b"~-^.".contains(byte);
    &text[text.iter().position(counts).unwrap_or(text.len())..]
}

fn run(text: &[u8], digits: bool) -> (&[u8], &[u8]) {
    let belongs = |byte: &u8| if digits { byte.is_ascii_digit() } else { byte.is_ascii_alphabetic() };
    text.split_at(text.iter().position(|byte| !belongs(byte)).unwrap_or(text.len()))
}

fn by_value(a: &[u8], b: &[u8]) -> Ordering {
    let strip = |text: &[u8]| text.iter().position(|&byte| byte != b'0').map_or(text.len(), |at| at);
    let (a, b) = (&a[strip(a)..], &b[strip(b)..]);
    a.len().cmp(&b.len()).then(a.cmp(b))
}

/// Large letters before small ones, and the shorter first.
fn by_letters(a: &[u8], b: &[u8]) -> Ordering {
    a.cmp(b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_in_order() {
        let sorted = [
            "~",
            "",
            "ab",
            "abb",
            "abc",
            "0001",
            "002",
            "12",
            "122",
            "122.9",
            "123~rc1",
            "123",
            "123-a",
            "123-a.1",
            "123-a1",
            "123-a1-1",
            "123-3",
            "123-3.1",
            "123^patch1",
            "123^1",
            "123.a-1",
            "123.1-1",
            "123a-1",
            "124",
        ];
        for (at, a) in sorted.iter().enumerate() {
            for (other, b) in sorted.iter().enumerate() {
                assert_eq!(compare(a, b), at.cmp(&other), "{a} and {b}");
            }
        }
        assert_eq!(compare("6.1.0-9-cloud-amd64", "6.1.0-28-cloud-amd64"), Ordering::Less);
        assert_eq!(compare("6.10.3", "6.9.12"), Ordering::Greater);
        assert_eq!(compare("1.0_2", "1.0_2"), Ordering::Equal);
    }
}
