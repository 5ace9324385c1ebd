//! Guards the layers: who may import whom, where `unsafe` and input/output may stand, and that nothing is
//! left open. Every rule names its reason.

use std::fs;
use std::path::{Path, PathBuf};

/// A room and what it may import, as prefixes of `crate::` paths. Later rows are looked at first.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("src/name/", &[]),
    // The VM process must stay small enough to be read as one thing, and to be sandboxed as one.
    ("src/vmm/", &["vmm"]),
    ("src/host/", &["name", "host", "vmm::config", "vmm::protocol", "vmm::client", "vmm::packet"]),
    // Kinds are knowledge: no look at the real host, no plan, no file.
    (
        "src/kinds/",
        &[
            "name",
            "kinds",
            "vmm::config",
            "vmm::protocol",
            "host::snapshot",
            "host::step",
            "host::error",
            "host::Step",
        ],
    ),
    ("src/load/", &["name", "kinds", "load"]),
    ("src/resolve/", &["name", "kinds", "resolve", "host::Scope"]),
    (
        "src/plan/",
        &[
            "name",
            "kinds",
            "resolve",
            "plan",
            "host::snapshot",
            "host::step",
            "host::Step",
            "host::Snapshot",
            "vmm::config",
        ],
    ),
    // What a host has already, as manifests: texts and a snapshot in, values out.
    (
        "src/adopt/",
        &["name", "kinds", "resolve", "plan", "adopt", "load::API_VERSION", "host::snapshot", "vmm::config"],
    ),
    ("src/execute/", &["name", "kinds", "plan", "execute", "host::"]),
    ("src/report/", &["name", "kinds", "plan", "execute", "report"]),
    ("src/pipeline.rs", &["name", "kinds", "load", "resolve", "plan", "execute", "host::", "report"]),
];

/// Pure rooms: they decide, and so must not reach the world.
const PURE: &[&str] =
    &["src/name/", "src/kinds/", "src/resolve/", "src/plan/", "src/adopt/", "src/execute/", "src/report/"];

/// Where `unsafe` may stand.
const MAY_BE_UNSAFE: &[&str] = &["src/vmm/", "src/host/"];

fn files(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// Each source file, by its path from the root, without its tests and comments.
fn sources() -> Vec<(String, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = Vec::new();
    files(&root.join("src"), &mut found);
    found.sort();
    let read = |path: &PathBuf| {
        let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_owned();
        (name, code_of(&fs::read_to_string(path).unwrap()))
    };
    let sources: Vec<_> = found
        .iter()
        .map(read)
        .filter(|(name, _)| !name.contains("tests") && !name.ends_with("testing.rs"))
        .collect();
    assert!(sources.len() > 60, "the sources were not found");
    sources
}

fn code_of(text: &str) -> String {
    let before_tests = text.split("#[cfg(test)]\nmod tests {").next().unwrap();
    let line = |line: &str| if line.trim_start().starts_with("//") { String::new() } else { line.to_owned() };
    before_tests.lines().map(line).collect::<Vec<_>>().join("\n")
}

/// The `crate::` paths that a file names, groups expanded one level.
fn imports(code: &str) -> Vec<String> {
    let mut found = Vec::new();
    for (at, _) in code.match_indices("crate::") {
        let rest = &code[at + "crate::".len()..];
        if let Some(group) = rest.strip_prefix('{') {
            let group = group.split(';').next().unwrap();
            let mut depth = 0;
            let mut item = String::new();
            for c in group.chars() {
                match c {
                    '{' => depth += 1,
                    '}' if depth == 0 => break,
                    '}' => depth -= 1,
                    ',' if depth == 0 => found.push(std::mem::take(&mut item).trim().to_owned()),
                    _ => item.push(c),
                }
            }
            found.push(item.trim().to_owned());
            continue;
        }
        let path: String =
            rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_' || *c == ':').collect();
        // `host::{Step, Snapshot}` names two things of one room.
        match path.strip_suffix("::").and_then(|room| Some((room, rest[path.len()..].strip_prefix('{')?))) {
            Some((room, group)) => {
                let group = group.split('}').next().unwrap();
                let names = group.split(',').map(|name| name.trim().split("::").next().unwrap().to_owned());
                found.extend(names.filter(|name| !name.is_empty()).map(|name| format!("{room}::{name}")));
            }
            None => found.push(path),
        }
    }
    found.retain(|path| !path.is_empty());
    found
}

#[test]
fn rooms_import_only_what_is_below_them() {
    let mut breaches = Vec::new();
    let sources = sources();
    for (room, _) in MAY_IMPORT {
        assert!(sources.iter().any(|(name, _)| name.starts_with(room)), "{room} is no more");
    }
    for (name, code) in sources {
        let Some((_, allowed)) = MAY_IMPORT.iter().find(|(room, _)| name.starts_with(room)) else { continue };
        for import in imports(&code) {
            let fits = |prefix: &&str| {
                let prefix = prefix.trim_end_matches("::");
                import == prefix || import.starts_with(&format!("{prefix}::"))
            };
            if !allowed.iter().any(fits) {
                breaches.push(format!("{name} imports crate::{import}"));
            }
        }
    }
    assert!(breaches.is_empty(), "{breaches:#?}");
}

#[test]
fn pure_rooms_do_no_input_or_output() {
    let reach = [
        "std::fs",
        "std::process",
        "std::env",
        "std::net::Tcp",
        "std::net::Udp",
        "rustix::",
        "libc::",
        "println!",
    ];
    let mut breaches = Vec::new();
    for (name, code) in sources() {
        if !PURE.iter().any(|room| name.starts_with(room)) {
            continue;
        }
        breaches.extend(
            reach.iter().filter(|word| code.contains(**word)).map(|word| format!("{name} uses {word}")),
        );
    }
    assert!(breaches.is_empty(), "{breaches:#?}");
}

#[test]
fn unsafe_stands_only_where_the_platform_is() {
    let mut breaches = Vec::new();
    for (name, code) in sources() {
        if !MAY_BE_UNSAFE.iter().any(|room| name.starts_with(room)) && code.contains("unsafe ") {
            breaches.push(name);
        }
    }
    assert!(breaches.is_empty(), "{breaches:#?}");
}

#[test]
fn nothing_is_left_open() {
    let words = ["todo!(", "unimplemented!(", "dbg!(", ".unwrap()"];
    let mut breaches = Vec::new();
    for (name, code) in sources() {
        for (number, line) in code.lines().enumerate() {
            if words.iter().any(|word| line.contains(word)) {
                breaches.push(format!("{name}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    assert!(breaches.is_empty(), "{breaches:#?}");
}

#[test]
fn binaries_are_thin() {
    for binary in ["vmctl", "vmctl-vmm"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("src/bin/{binary}.rs"));
        let lines = fs::read_to_string(&path).unwrap().lines().count();
        assert!(lines <= 40, "{} has {lines} lines; the work belongs in the library", path.display());
    }
}
