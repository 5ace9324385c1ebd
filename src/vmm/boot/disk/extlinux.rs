//! Configurations of extlinux and syslinux: `LABEL`, `KERNEL`, `INITRD`, `APPEND` and what goes with them.

use super::filesystem::FileSystem;
use super::menu::{Boot, Entry, Menu, Piece};
use super::read::ReadError;

/// Where they are looked for.
pub(super) const PATHS: &[&str] = &[
    "/boot/extlinux/extlinux.conf",
    "/extlinux/extlinux.conf",
    "/boot/extlinux.conf",
    "/extlinux.conf",
    "/boot/syslinux/syslinux.cfg",
    "/syslinux/syslinux.cfg",
    "/EFI/syslinux/syslinux.cfg",
    "/syslinux.cfg",
];
const FILE_BYTES_MAX: u64 = 256 << 10;
const INCLUDES_MAX: usize = 16;
const LABELS_MAX: usize = 256;

#[derive(Default)]
struct Label {
    name: String,
    title: Option<String>,
    kernel: Option<String>,
    initrds: Vec<String>,
    append: Option<String>,
}

#[derive(Default)]
struct Configuration {
    default: Option<String>,
    menu_default: Option<usize>,
    append: String,
    labels: Vec<Label>,
    included: usize,
}

pub(super) fn menu(place: usize, file_system: &FileSystem) -> Result<Option<Menu>, ReadError> {
    let Some(path) = PATHS.iter().find(|path| file_system.has_file(path)) else { return Ok(None) };
    let mut configuration = Configuration::default();
    let text = file_system.read_text(path, FILE_BYTES_MAX)?;
    let directory = path.rsplit_once('/').map_or("", |(directory, _)| directory);
    read(&mut configuration, file_system, directory, &text)?;
    let named = configuration
        .default
        .as_ref()
        .and_then(|name| configuration.labels.iter().position(|label| label.name.eq_ignore_ascii_case(name)));
    let default = named.or(configuration.menu_default).unwrap_or(0);
    let global = &configuration.append;
    let entries = configuration.labels.iter().map(|label| entry(place, directory, label, global)).collect();
    Ok(Some(Menu { source: (*path).to_owned(), entries, default }))
}

fn read(
    configuration: &mut Configuration,
    file_system: &FileSystem,
    directory: &str,
    text: &str,
) -> Result<(), ReadError> {
    for line in text.lines() {
        let line = line.trim();
        let (keyword, value) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let (mut keyword, mut value) = (keyword.to_ascii_uppercase(), value.trim());
        if keyword == "MENU" {
            let (second, rest) = value.split_once(char::is_whitespace).unwrap_or((value, ""));
            keyword = format!("MENU {}", second.to_ascii_uppercase());
            value = rest.trim();
        }
        let owned = || value.to_owned();
        let many = configuration.labels.len();
        let label = configuration.labels.last_mut();
        match (keyword.as_str(), label) {
            ("DEFAULT", _) => configuration.default = Some(owned()),
            ("LABEL", _) if many < LABELS_MAX => {
                configuration.labels.push(Label { name: owned(), ..Label::default() });
            }
            ("INCLUDE" | "MENU INCLUDE", _) if configuration.included < INCLUDES_MAX => {
                configuration.included += 1;
                // A second word is a tag that marks the menu.
                let name = value.split_whitespace().next().unwrap_or_default();
                if let Ok(text) = file_system.read_text(&absolute(directory, name), FILE_BYTES_MAX) {
                    read(configuration, file_system, directory, &text)?;
                }
            }
            ("MENU DEFAULT", Some(_)) => configuration.menu_default = Some(many - 1),
            // A caret marks the key that chooses the entry.
            ("MENU LABEL", Some(label)) => label.title = Some(value.replace('^', "")),
            ("KERNEL" | "LINUX", Some(label)) => label.kernel = Some(owned()),
            ("INITRD", Some(label)) => {
                label.initrds = value.split(',').map(|path| path.trim().to_owned()).collect()
            }
            ("APPEND", Some(label)) => label.append = Some(owned()),
            ("APPEND", None) => configuration.append = owned(),
            _ => {}
        }
    }
    Ok(())
}

fn absolute(directory: &str, path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("{directory}/{path}") }
}

fn entry(place: usize, directory: &str, label: &Label, global: &str) -> Entry {
    let piece = |path: &str| Piece { place, path: absolute(directory, path), part: None };
    let append = match label.append.as_deref() {
        // "None, not even the global ones."
        Some("-") => "",
        Some(append) => append,
        None => global,
    };
    let mut initrds: Vec<Piece> = label.initrds.iter().map(|path| piece(path)).collect();
    let mut words = Vec::new();
    for word in append.split_whitespace() {
        match word.strip_prefix("initrd=") {
            Some(paths) if initrds.is_empty() => initrds = paths.split(',').map(piece).collect(),
            Some(_) => {}
            None => words.push(word),
        }
    }
    let boot = match label.kernel.as_deref() {
        Some(kernel) if !is_module(kernel) => {
            Ok(Boot { kernel: piece(kernel), initrds, cmdline: words.join(" ") })
        }
        Some(module) => Err(format!("it starts {module}, which is no Linux kernel")),
        None => Err("it names no kernel".to_owned()),
    };
    Entry {
        title: label.title.clone().unwrap_or_else(|| label.name.clone()),
        id: label.name.clone(),
        version: String::new(),
        boot,
    }
}

fn is_module(kernel: &str) -> bool {
    [".c32", ".bin", ".0", ".bs", ".com"].iter().any(|ending| kernel.to_ascii_lowercase().ends_with(ending))
}
