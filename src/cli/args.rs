//! Arguments that several commands share, and how their texts are read.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::error::{CliError, Result};
use crate::load::{self, Input, Limits};
use crate::name::{Kind, ObjectId, ObjectName, SetName};

/// Which manifests.
#[derive(Debug, Args)]
pub struct SourceArgs {
    /// A manifest file, a directory of them (*.yaml, *.yml, *.json), or `-` for stdin; may be repeated
    #[arg(short = 'f', long = "filename", value_name = "FILE|DIR|-", value_hint = clap::ValueHint::AnyPath)]
    pub filename: Vec<PathBuf>,

    /// Read the directories below, too
    #[arg(short = 'R', long)]
    pub recursive: bool,
}

/// Which set.
#[derive(Debug, Args)]
pub struct SetArg {
    /// The set that the objects belong to: what one source owns. Sets never touch one another's objects
    #[arg(long, value_name = "NAME", default_value = "default", env = "VMCTL_SET", hide_env_values = true)]
    pub set: SetName,
}

/// Text for people or JSON for programs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    #[default]
    Text,
    Json,
}

impl SourceArgs {
    /// Reads stdin, if it is asked for; all other reading is `load`'s.
    pub fn inputs(&self) -> Result<Vec<Input>> {
        let mut inputs = Vec::with_capacity(self.filename.len());
        let mut stdin_taken = false;
        for path in &self.filename {
            inputs.push(if path.as_os_str() == "-" {
                if std::mem::replace(&mut stdin_taken, true) {
                    return Err(CliError::usage("stdin (`-f -`) can be read only once"));
                }
                let bytes = load::source::read_stdin(std::io::stdin().lock(), &Limits::default())
                    .map_err(|error| CliError::usage(format!("read stdin: {error}")))?;
                Input::Stdin(bytes)
            } else if path.is_dir() {
                Input::Directory { path: path.clone(), recursive: self.recursive }
            } else {
                Input::File(path.clone())
            });
        }
        Ok(inputs)
    }
}

/// `5m`, `90s`, `1h30m`, `500ms`.
pub fn parse_duration(text: &str) -> std::result::Result<Duration, String> {
    let wrong = || format!("`{text}` is not a time such as 500ms, 90s, 5m or 1h30m");
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(|| {
            if text.bytes().all(|byte| byte.is_ascii_digit()) {
                format!("`{text}` has no unit; write {text}s or {text}m")
            } else {
                wrong()
            }
        })?;
        let number: u64 = rest[..digits].parse().map_err(|_| wrong())?;
        rest = &rest[digits..];
        let letters = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        let unit_ms = match &rest[..letters] {
            "ms" => 1,
            "s" => 1000,
            "m" => 60 * 1000,
            "h" => 60 * 60 * 1000,
            _ => return Err(wrong()),
        };
        rest = &rest[letters..];
        let part = number.checked_mul(unit_ms).filter(|ms| *ms <= 1000 * 60 * 60 * 24 * 365);
        total += Duration::from_millis(part.ok_or_else(wrong)?);
    }
    if text.is_empty() { Err(wrong()) } else { Ok(total) }
}

/// A kind in any spelling, or the nearest one as a hint.
pub fn parse_kind(text: &str) -> Result<Kind> {
    if let Some(kind) = Kind::parse_alias(text) {
        return Ok(kind);
    }
    let lower = text.to_ascii_lowercase();
    let aliases =
        Kind::ALL.into_iter().flat_map(|kind| kind.aliases().iter().map(move |alias| (kind, *alias)));
    let nearest = aliases
        .map(|(kind, alias)| (strsim::osa_distance(&lower, alias), kind))
        .filter(|(distance, _)| *distance <= 2.max(lower.len() / 3))
        .min_by_key(|(distance, _)| *distance);
    let kinds: Vec<&str> = Kind::ALL.iter().map(|kind| kind.as_str()).collect();
    let hint = match nearest {
        Some((_, kind)) => format!("did you mean {kind}?"),
        None => format!("the kinds are {}", kinds.join(", ")),
    };
    Err(CliError::usage(format!("`{text}` is not a kind that vmctl knows")).hint(hint))
}

pub fn parse_name(text: &str) -> Result<ObjectName> {
    ObjectName::parse(text).map_err(|error| CliError::usage(error.to_string()))
}

/// What a person named: a whole kind, or one object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Resource {
    All,
    Kind(Kind),
    Object(ObjectId),
}

/// `vm`, `vm/web`, `vm web db`, `vm,bridge`, `all`: as kubectl reads them.
pub fn parse_resources(words: &[String]) -> Result<Vec<Resource>> {
    let mut resources = Vec::new();
    let mut rest = words.iter();
    while let Some(word) = rest.next() {
        if let Some((kind, name)) = word.split_once('/') {
            resources.push(Resource::Object(ObjectId::new(parse_kind(kind)?, parse_name(name)?)));
            continue;
        }
        if word.eq_ignore_ascii_case("all") {
            resources.push(Resource::All);
            continue;
        }
        let kinds = word.split(',').map(parse_kind).collect::<Result<Vec<_>>>()?;
        // `vm web db`: what follows a kind and is neither a kind nor a pair is a name of that kind.
        let mut named = false;
        if let [kind] = kinds[..] {
            while let Some(name) = rest.as_slice().first().filter(|next| is_name_after_kind(next)) {
                resources.push(Resource::Object(ObjectId::new(kind, parse_name(name)?)));
                named = true;
                rest.next();
            }
        }
        if !named {
            resources.extend(kinds.into_iter().map(Resource::Kind));
        }
    }
    Ok(resources)
}

fn is_name_after_kind(word: &str) -> bool {
    !word.contains(['/', ',']) && !word.eq_ignore_ascii_case("all") && Kind::parse_alias(word).is_none()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resources(text: &str) -> Result<Vec<Resource>> {
        parse_resources(&text.split_whitespace().map(str::to_owned).collect::<Vec<_>>())
    }

    #[test]
    fn resources_are_read_in_every_form() {
        let vm = |name: &str| Resource::Object(ObjectId::new(Kind::VirtualMachine, name.parse().unwrap()));
        let cases = [
            ("vm", vec![Resource::Kind(Kind::VirtualMachine)]),
            ("VMs", vec![Resource::Kind(Kind::VirtualMachine)]),
            ("vm/web", vec![vm("web")]),
            ("vm web db", vec![vm("web"), vm("db")]),
            ("vm/web br", vec![vm("web"), Resource::Kind(Kind::Bridge)]),
            ("vm web br", vec![vm("web"), Resource::Kind(Kind::Bridge)]),
            ("vm,pools", vec![Resource::Kind(Kind::VirtualMachine), Resource::Kind(Kind::StoragePool)]),
            ("all", vec![Resource::All]),
        ];
        for (text, expected) in cases {
            assert_eq!(resources(text).unwrap(), expected, "{text}");
        }
        let error = resources("vmz/web").unwrap_err();
        assert_eq!(error.hint.as_deref(), Some("did you mean VirtualMachine?"));
        assert!(resources("vm/Web").is_err() && resources("vm/").is_err());
    }

    #[test]
    fn times_carry_units() {
        for (text, ms) in [("0", 0), ("500ms", 500), ("90s", 90_000), ("5m", 300_000), ("1h30m", 5_400_000)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "5", "s", "5x", "-1s", "1.5s", "99999999999999999999s", "5m 3", "99999999h"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
        assert!(parse_duration("5").unwrap_err().contains("no unit"));
    }
}
