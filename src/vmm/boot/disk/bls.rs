//! The Boot Loader Specification: text entries in `loader/entries` (type 1) and unified kernel images in
//! `EFI/Linux` (type 2), in one menu, as systemd-boot and GRUB's `blscfg` make it.

use std::cmp::Ordering;

use super::filesystem::FileSystem;
use super::menu::{Boot, Entry, Menu, Piece};
use super::read::ReadError;
use super::{grubenv, uki, version};

const ENTRIES_MAX: usize = 256;
const FILE_BYTES_MAX: u64 = 64 << 10;

/// An entry with what it is sorted by.
struct Sortable {
    entry: Entry,
    sort_key: Option<String>,
    machine_id: String,
    /// Its boot counter has run out: it was tried and never came up.
    is_bad: bool,
}

/// What the menu of one file system is made of. `None`: there is nothing of it.
pub(super) fn menu(place: usize, file_system: &FileSystem) -> Result<Option<Menu>, ReadError> {
    // The boot partition's own root, or /boot on the root file system.
    for root in ["", "/boot"] {
        let mut entries = type_1(place, file_system, root)?;
        entries.extend(type_2(place, file_system, root)?);
        if !entries.is_empty() {
            entries.sort_by(order);
            return Ok(Some(finish(file_system, root, entries)));
        }
    }
    Ok(None)
}

fn type_1(place: usize, file_system: &FileSystem, root: &str) -> Result<Vec<Sortable>, ReadError> {
    let directory = format!("{root}/loader/entries");
    let mut entries = Vec::new();
    for name in names(file_system, &directory, ".conf")? {
        let text = file_system.read_text(&format!("{directory}/{name}.conf"), FILE_BYTES_MAX)?;
        entries.extend(parse(place, file_system, root, &name, &text));
    }
    Ok(entries)
}

fn type_2(place: usize, file_system: &FileSystem, root: &str) -> Result<Vec<Sortable>, ReadError> {
    let directory = format!("{root}/EFI/Linux");
    let mut entries = Vec::new();
    for name in names(file_system, &directory, ".efi")? {
        let path = format!("{directory}/{name}.efi");
        let (id, is_bad) = split_counter(&name);
        let (entry, sort_key) = match uki::read(place, file_system, &path) {
            Ok(image) => (
                Entry {
                    title: image.title.unwrap_or_else(|| id.to_owned()),
                    id: id.to_owned(),
                    version: image.version,
                    boot: Ok(image.boot),
                },
                image.sort_key,
            ),
            Err(error) => {
                let boot = Err(format!("{path}: {error}"));
                (Entry { title: id.to_owned(), id: id.to_owned(), version: String::new(), boot }, None)
            }
        };
        entries.push(Sortable { entry, sort_key, machine_id: String::new(), is_bad });
    }
    Ok(entries)
}

/// The files with this ending, without it.
fn names(file_system: &FileSystem, directory: &str, ending: &str) -> Result<Vec<String>, ReadError> {
    let names = match file_system.list(directory) {
        Ok(names) => names,
        Err(ReadError::NotFound | ReadError::Invalid(_)) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let names = names.iter().filter(|name| !name.is_directory);
    let stems = names.filter_map(|name| {
        let at = name.name.len().checked_sub(ending.len())?;
        let (stem, found) = name.name.split_at_checked(at)?;
        found.eq_ignore_ascii_case(ending).then(|| stem.to_owned())
    });
    Ok(stems.take(ENTRIES_MAX).collect())
}

/// A name ends in `+LEFT` or `+LEFT-DONE` while its boots are counted.
fn split_counter(name: &str) -> (&str, bool) {
    let Some((stem, counter)) = name.rsplit_once('+') else { return (name, false) };
    let (left, done) = counter.split_once('-').unwrap_or((counter, "0"));
    let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match is_number(left) && is_number(done) {
        true => (stem, left.bytes().all(|byte| byte == b'0')),
        false => (name, false),
    }
}

fn parse(place: usize, file_system: &FileSystem, root: &str, name: &str, text: &str) -> Option<Sortable> {
    let (id, is_bad) = split_counter(name);
    let (mut title, mut version, mut machine_id, mut sort_key) = (None, String::new(), String::new(), None);
    let (mut kernel, mut image, mut initrds, mut options) = (None, None, Vec::new(), Vec::new());
    for line in text.lines() {
        let line = line.trim();
        let Some((key, value)) = line.split_once(char::is_whitespace) else { continue };
        let value = value.trim();
        match key {
            "title" => title = Some(value.to_owned()),
            "version" => version = value.to_owned(),
            "machine-id" => machine_id = value.to_owned(),
            "sort-key" => sort_key = Some(value.to_owned()),
            "linux" => kernel = Some(value.to_owned()),
            "uki" => image = Some(value.to_owned()),
            // GRUB's entries name several in one line.
            "initrd" => initrds.extend(value.split_whitespace().map(str::to_owned)),
            "options" => options.push(value),
            "architecture" if !matches!(value.to_ascii_lowercase().as_str(), "x64" | "x86_64") => {
                return None;
            }
            _ => {}
        }
    }
    // Paths are the file system's; where that holds /boot, some write them from there.
    let piece = |path: String| match file_system.has_file(&path) {
        true => Piece { place, path, part: None },
        false => Piece { place, path: format!("{root}/{}", path.trim_start_matches('/')), part: None },
    };
    let boot = match (kernel, image) {
        (Some(kernel), _) => Ok(Boot {
            kernel: piece(kernel),
            // Left over from "$tuned_initrd" and its like, which name nothing by default.
            initrds: initrds.into_iter().filter(|path| !path.starts_with('$')).map(piece).collect(),
            cmdline: expand(file_system, root, &options.join(" ")),
        }),
        (None, Some(image)) => uki::read(place, file_system, &image)
            .map(|image| image.boot)
            .map_err(|error| format!("{image}: {error}")),
        (None, None) => Err("it names no Linux kernel".to_owned()),
    };
    let entry = Entry { title: title.unwrap_or_else(|| id.to_owned()), id: id.to_owned(), version, boot };
    Some(Sortable { entry, sort_key, machine_id, is_bad })
}

/// Fedora's entries leave arguments to variables of GRUB's environment block.
fn expand(file_system: &FileSystem, root: &str, options: &str) -> String {
    if !options.contains('$') {
        return options.to_owned();
    }
    let variables = environment(file_system, root);
    let words = options.split_whitespace().map(|word| match word.strip_prefix('$') {
        Some(name) => {
            let name = name.trim_start_matches('{').trim_end_matches('}');
            variables.iter().find(|(known, _)| known == name).map_or("", |(_, value)| value.as_str())
        }
        None => word,
    });
    words.filter(|word| !word.is_empty()).collect::<Vec<_>>().join(" ")
}

fn environment(file_system: &FileSystem, root: &str) -> Vec<(String, String)> {
    let paths = ["grub2/grubenv", "grub/grubenv"].map(|path| format!("{root}/{path}"));
    let text = paths.iter().find_map(|path| file_system.read_text(path, grubenv::BYTES_MAX).ok());
    text.map(|text| grubenv::parse(&text)).unwrap_or_default()
}

/// What comes first is what a boot loader would boot: the newest that hasn't failed.
fn order(a: &Sortable, b: &Sortable) -> Ordering {
    let newest_first = |a: &str, b: &str| version::compare(b, a);
    let by_key = match (&a.sort_key, &b.sort_key) {
        (Some(key_a), Some(key_b)) => key_a
            .cmp(key_b)
            .then_with(|| a.machine_id.cmp(&b.machine_id))
            .then_with(|| newest_first(&a.entry.version, &b.entry.version)),
        (Some(_), None) => Ordering::Less,
        (None, Some(_)) => Ordering::Greater,
        (None, None) => Ordering::Equal,
    };
    a.is_bad.cmp(&b.is_bad).then(by_key).then_with(|| newest_first(&a.entry.id, &b.entry.id))
}

fn finish(file_system: &FileSystem, root: &str, entries: Vec<Sortable>) -> Menu {
    let entries: Vec<Entry> = entries.into_iter().map(|sortable| sortable.entry).collect();
    let mut default = None;
    if let Ok(text) = file_system.read_text(&format!("{root}/loader/loader.conf"), FILE_BYTES_MAX) {
        let mut patterns = text.lines().filter_map(|line| line.trim().split_once(char::is_whitespace));
        let pattern = patterns.rfind(|(key, _)| *key == "default").map(|(_, value)| value.trim());
        default = pattern.and_then(|pattern| {
            entries.iter().position(|entry| {
                let names = [entry.id.clone(), format!("{}.conf", entry.id), format!("{}.efi", entry.id)];
                names.iter().any(|name| matches(pattern.as_bytes(), name.as_bytes()))
            })
        });
    }
    if default.is_none() {
        // GRUB's: an id, a title, or a number.
        let variables = environment(file_system, root);
        let saved = variables.iter().find(|(name, _)| name == "saved_entry").map(|(_, value)| value);
        default = saved.and_then(|saved| {
            let by_name = entries.iter().position(|entry| entry.id == *saved || entry.title == *saved);
            by_name.or_else(|| saved.parse().ok().filter(|&index| index < entries.len()))
        });
    }
    Menu { source: format!("{root}/loader/entries"), entries, default: default.unwrap_or(0) }
}

/// Glob patterns: `*` and `?`. Without recursion: a star is retried from one place further.
fn matches(pattern: &[u8], name: &[u8]) -> bool {
    let (mut at_pattern, mut at_name) = (0, 0);
    let mut star = None;
    while at_name < name.len() {
        match pattern.get(at_pattern) {
            Some(b'*') => {
                star = Some((at_pattern, at_name));
                at_pattern += 1;
            }
            Some(&byte) if byte == b'?' || byte == name[at_name] => {
                at_pattern += 1;
                at_name += 1;
            }
            _ => match star {
                Some((pattern_from, name_from)) => {
                    star = Some((pattern_from, name_from + 1));
                    (at_pattern, at_name) = (pattern_from + 1, name_from + 1);
                }
                None => return false,
            },
        }
    }
    pattern[at_pattern..].iter().all(|&byte| byte == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_told_from_names() {
        assert_eq!(split_counter("debian-6.1"), ("debian-6.1", false));
        assert_eq!(split_counter("debian-6.1+3"), ("debian-6.1", false));
        assert_eq!(split_counter("debian-6.1+0-3"), ("debian-6.1", true));
        assert_eq!(split_counter("debian+deb12u1"), ("debian+deb12u1", false));
        assert_eq!(split_counter("debian+1-x"), ("debian+1-x", false));
    }

    #[test]
    fn patterns_match() {
        for (pattern, name, expected) in [
            ("debian-*", "debian-6.1", true),
            ("*6.1*", "debian-6.1.conf", true),
            ("*a*b*c", "xaxbxbxc", true),
            ("*a*b*c", "xaxbxbx", false),
            ("debian", "debian-6.1", false),
            ("d?b*", "debian", true),
            ("", "", true),
            ("***", "x", true),
        ] {
            assert_eq!(matches(pattern.as_bytes(), name.as_bytes()), expected, "{pattern} {name}");
        }
    }
}
