//! Label selectors, as kubectl reads them: `app=web,tier!=db,env in (prod,test),!legacy`.

use std::collections::BTreeMap;
use std::str::FromStr;

/// All requirements must hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selector(Vec<Requirement>);

#[derive(Clone, Debug, PartialEq, Eq)]
struct Requirement {
    key: String,
    test: Test,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Test {
    Exists,
    Absent,
    In(Vec<String>),
    /// Holds for objects without the label too, as in Kubernetes.
    NotIn(Vec<String>),
}

impl Selector {
    pub fn matches(&self, labels: &BTreeMap<String, String>) -> bool {
        self.0.iter().all(|requirement| {
            let value = labels.get(&requirement.key);
            match &requirement.test {
                Test::Exists => value.is_some(),
                Test::Absent => value.is_none(),
                Test::In(values) => value.is_some_and(|value| values.contains(value)),
                Test::NotIn(values) => value.is_none_or(|value| !values.contains(value)),
            }
        })
    }
}

impl FromStr for Selector {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        split(text)?.into_iter().map(requirement).collect::<Result<_, _>>().map(Self)
    }
}

/// Splits at the commas that are not within parentheses.
fn split(text: &str) -> Result<Vec<&str>, String> {
    let (mut parts, mut start, mut inside) = (Vec::new(), 0, false);
    for (index, c) in text.char_indices() {
        match c {
            '(' if inside => return Err("`(` within `(…)`".to_owned()),
            ')' if !inside => return Err("`)` without `(`".to_owned()),
            '(' => inside = true,
            ')' => inside = false,
            ',' if !inside => {
                parts.push(&text[start..index]);
                start = index + 1;
            }
            _ => {}
        }
    }
    if inside {
        return Err("`(` without `)`".to_owned());
    }
    parts.push(&text[start..]);
    Ok(parts)
}

fn requirement(text: &str) -> Result<Requirement, String> {
    let text = text.trim();
    if text.is_empty() {
        return Err("an empty requirement; write `key=value`, `key!=value`, `key in (a,b)`, `key` or `!key`"
            .to_owned());
    }
    if let Some(key) = text.strip_prefix('!') {
        return Ok(Requirement { key: label_key(key)?, test: Test::Absent });
    }
    // The longest operators first: `!=` and `==` both hold an `=`.
    for (operator, negative) in [("!=", true), ("==", false), ("=", false)] {
        if let Some((key, value)) = text.split_once(operator) {
            let values = vec![label_value(value)?];
            let test = if negative { Test::NotIn(values) } else { Test::In(values) };
            return Ok(Requirement { key: label_key(key)?, test });
        }
    }
    if let Some((head, list)) = text.strip_suffix(')').and_then(|text| text.split_once('(')) {
        let values = list.split(',').map(label_value).collect::<Result<Vec<_>, _>>()?;
        let mut words = head.split_whitespace();
        return match (words.next(), words.next(), words.next()) {
            (Some(key), Some("in"), None) => Ok(Requirement { key: label_key(key)?, test: Test::In(values) }),
            (Some(key), Some("notin"), None) => {
                Ok(Requirement { key: label_key(key)?, test: Test::NotIn(values) })
            }
            _ => Err(format!("`{text}`: write `key in (a,b)` or `key notin (a,b)`")),
        };
    }
    Ok(Requirement { key: label_key(text)?, test: Test::Exists })
}

fn is_name(text: &str) -> bool {
    let edge = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = text.as_bytes();
    bytes.len() <= 63
        && edge(bytes.first())
        && edge(bytes.last())
        && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(byte))
}

fn label_key(text: &str) -> Result<String, String> {
    let text = text.trim();
    let (prefix, name) = match text.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, text),
    };
    let good_prefix = prefix.is_none_or(|prefix| prefix.len() <= 253 && prefix.split('.').all(is_name));
    if good_prefix && is_name(name) {
        Ok(text.to_owned())
    } else {
        Err(format!("`{text}` can't be the key of a label"))
    }
}

fn label_value(text: &str) -> Result<String, String> {
    let text = text.trim();
    if text.is_empty() || is_name(text) {
        Ok(text.to_owned())
    } else {
        Err(format!("`{text}` can't be the value of a label"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(selector: &str, labels: &[(&str, &str)], expected: bool) {
        let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        assert_eq!(selector.parse::<Selector>().unwrap().matches(&labels), expected, "{selector}");
    }

    #[test]
    fn selects_as_kubectl_does() {
        let web = [("app", "web"), ("env", "prod")];
        for (selector, expected) in [
            ("app=web", true),
            ("app==web", true),
            ("app!=web", false),
            ("tier!=db", true),
            ("app=web,env=test", false),
            ("env in (prod, test)", true),
            ("env in (test)", false),
            ("env notin (test,dev), app", true),
            ("tier notin (db)", true),
            ("tier", false),
            ("!tier", true),
            ("! app", false),
            ("app=", false),
            ("vmctl.dev/role", false),
        ] {
            check(selector, &web, expected);
        }
        check("app=", &[("app", "")], true);
    }

    #[test]
    fn refuses_what_it_cannot_read() {
        for text in [
            "",
            "a,",
            "a in b",
            "a in (b",
            "a b",
            "a in ((b))",
            "=x",
            "a=b=c",
            "a~b",
            "a notin b)",
            "a/b/c=d",
        ] {
            assert!(text.parse::<Selector>().is_err(), "{text}");
        }
    }
}
