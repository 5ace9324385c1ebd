//! "Did you mean …?": the nearest of the names that would have been right.

/// The candidate that `text` is most likely a misspelling of, if any is near enough.
pub fn nearest<'a>(text: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // The distance is quadratic in the length; no name that we offer is longer than this.
    if text.len() > 64 {
        return None;
    }
    let plain = fold(text);
    let allowed = (plain.len() / 3).clamp(1, 3);
    let near = candidates.into_iter().map(|candidate| {
        let folded = fold(candidate);
        // `ports` for `port`, `mac` for `macAddress`: one is the beginning of the other.
        let prefix = plain.len() >= 3 && (folded.starts_with(&plain) || plain.starts_with(&folded));
        let distance = distance(&plain, &folded);
        (if prefix { distance.min(allowed) } else { distance }, candidate)
    });
    near.filter(|&(distance, _)| distance <= allowed)
        .min_by_key(|&(distance, _)| distance)
        .map(|(_, name)| name)
}

/// Case, `-` and `_` are what people get wrong without meaning another word.
fn fold(text: &str) -> Vec<char> {
    text.chars().filter(|c| !matches!(c, '-' | '_' | ' ')).flat_map(char::to_lowercase).collect()
}

/// Optimal string alignment distance: insertions, deletions, substitutions, swaps of neighbours.
fn distance(a: &[char], b: &[char]) -> usize {
    let mut before: Vec<usize> = Vec::new();
    let mut last: Vec<usize> = (0..=b.len()).collect();
    for i in 0..a.len() {
        let mut row = vec![i + 1; b.len() + 1];
        for j in 0..b.len() {
            let change = last[j] + usize::from(a[i] != b[j]);
            row[j + 1] = change.min(last[j + 1] + 1).min(row[j] + 1);
            if i > 0 && j > 0 && a[i] == b[j - 1] && a[i - 1] == b[j] {
                row[j + 1] = row[j + 1].min(before[j - 1] + 1);
            }
        }
        before = std::mem::replace(&mut last, row);
    }
    last[b.len()]
}

/// "`a`, `b` or `c`"
pub fn list<'a>(names: impl IntoIterator<Item = &'a str>, joint: &str) -> String {
    let mut names: Vec<String> = names.into_iter().map(|name| format!("`{name}`")).collect();
    match names.pop() {
        None => String::new(),
        Some(last) if names.is_empty() => last,
        Some(last) => format!("{} {joint} {last}", names.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_names_are_offered_and_far_ones_are_not() {
        let fields = ["mtu", "macAddress", "ports", "vlanFiltering", "addresses"];
        for (text, expected) in [
            ("mtuu", Some("mtu")),
            ("MTU", Some("mtu")),
            ("mut", Some("mtu")),
            ("mac_address", Some("macAddress")),
            ("mac", Some("macAddress")),
            ("port", Some("ports")),
            ("vlan-filtering", Some("vlanFiltering")),
            ("adresses", Some("addresses")),
            ("x", None),
            ("colour", None),
            ("", None),
        ] {
            assert_eq!(nearest(text, fields), expected, "{text}");
        }
        assert_eq!(list(["a", "b", "c"], "or"), "`a`, `b` or `c`");
    }
}
