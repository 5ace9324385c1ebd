//! GRUB's commands, as far as they decide what is booted. Each gives whether it held.

use super::super::grubenv;
use super::super::place::Place;
use super::parse::Script;
use super::run::{Node, Run, device_of};

/// Commands that change nothing that we see, and succeed.
const WITHOUT_EFFECT: &[&str] = &[
    "insmod",
    "rmmod",
    "echo",
    "export",
    "save_env",
    "terminal_output",
    "terminal_input",
    "terminal",
    "serial",
    "play",
    "clear",
    "sleep",
    "background_image",
    "background_color",
    "gettext",
    "true",
    "videoinfo",
    "password",
    "password_pbkdf2",
    "authenticate",
    "cutmem",
    "badram",
    "nativedisk",
    "boot",
    "setparams",
    "eval",
    "increment",
];
/// Conditions of files and strings, each with one operand.
const UNARY: &[&str] = &["-f", "-e", "-s", "-d", "-n", "-z"];

pub(super) fn run(
    run: &mut Run<'_>,
    name: &str,
    arguments: &[String],
    block: Option<&Script>,
) -> Result<bool, String> {
    match name {
        "[" => Ok(arguments.split_last().is_some_and(|(end, rest)| end == "]" && test(run, rest))),
        "test" => Ok(test(run, arguments)),
        "!" => match arguments.split_first() {
            Some((name, rest)) => self::run(run, name, rest, None).map(|holds| !holds),
            None => Ok(true),
        },
        "set" => {
            for argument in arguments {
                if let Some((variable, value)) = argument.split_once('=') {
                    run.set(variable, value)?;
                }
            }
            Ok(true)
        }
        "unset" => {
            for argument in arguments {
                run.variables.remove(argument);
            }
            Ok(true)
        }
        "menuentry" | "submenu" => menu_entry(run, name, arguments, block),
        "search" => search(run, arguments),
        "search.fs_uuid" => search_short(run, By::Uuid, arguments),
        "search.fs_label" => search_short(run, By::Label, arguments),
        "search.file" | "search.fs_file" => search_short(run, By::File, arguments),
        "load_env" => load_env(run, arguments),
        "configfile" | "source" | "." | "normal" => match arguments.first() {
            Some(path) => {
                let piece = run.piece(path);
                let Some(file) = piece.filter(|_| exists(run, path)) else { return Ok(false) };
                if name == "configfile" {
                    run.set("config_file", path)?;
                    let directory = path.rsplit_once('/').map_or("", |(directory, _)| directory);
                    run.set("config_directory", directory)?;
                }
                run.configuration(path).map_err(|error| format!("{}: {error}", file.path))?;
                Ok(true)
            }
            None => Ok(false),
        },
        "linux" | "linux16" | "linuxefi" => linux(run, arguments),
        "initrd" | "initrd16" | "initrdefi" => initrd(run, arguments),
        "chainloader" | "multiboot" | "multiboot2" | "xen_hypervisor" | "kfreebsd" | "ntldr" => {
            run.refusal = Some(format!("it boots by {name}, not a Linux kernel"));
            Ok(true)
        }
        name => Ok(WITHOUT_EFFECT.contains(&name)),
    }
}

fn menu_entry(
    run: &mut Run<'_>,
    name: &str,
    arguments: &[String],
    block: Option<&Script>,
) -> Result<bool, String> {
    let Some(block) = block else { return Ok(false) };
    let (mut title, mut id) = (None, None);
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.split_once('=') {
            Some(("--id", value)) => id = Some(value),
            _ if argument == "--id" => id = rest.next().map(String::as_str),
            _ if matches!(argument.as_str(), "--class" | "--users" | "--hotkey" | "--source") => {
                rest.next();
            }
            _ if argument.starts_with("--") => {}
            _ => title = title.or(Some(argument.as_str())),
        }
    }
    let title = title.unwrap_or_default();
    run.add_node(Node::new(title, id.unwrap_or(title), name == "submenu", block, arguments))?;
    Ok(true)
}

#[derive(Clone, Copy)]
enum By {
    Uuid,
    Label,
    File,
}

fn search(run: &mut Run<'_>, arguments: &[String]) -> Result<bool, String> {
    let (mut by, mut variable, mut wanted) = (By::File, None, None);
    let mut rest = arguments.iter().peekable();
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "-u" | "--fs-uuid" => by = By::Uuid,
            "-l" | "--label" | "--fs-label" => by = By::Label,
            "-f" | "--file" => by = By::File,
            "-s" => variable = rest.next().map(String::as_str),
            "--set" => variable = Some("root"),
            "--hint" => {
                rest.next();
            }
            other => match other.strip_prefix("--set=") {
                Some(name) => variable = Some(name),
                None if other.starts_with('-') => {}
                None => wanted = Some(other),
            },
        }
    }
    // `--set root NAME`: the variable stands apart.
    if let (Some("root"), Some(at)) = (variable, arguments.iter().position(|argument| argument == "--set"))
        && let Some(name) = arguments.get(at + 1).filter(|_| arguments.len() > at + 2)
        && !name.starts_with('-')
    {
        variable = Some(name.as_str());
    }
    match wanted {
        Some(wanted) => found(run, by, wanted, variable),
        None => Ok(false),
    }
}

fn search_short(run: &mut Run<'_>, by: By, arguments: &[String]) -> Result<bool, String> {
    match arguments {
        [wanted, rest @ ..] => found(run, by, wanted, Some(rest.first().map_or("root", String::as_str))),
        [] => Ok(false),
    }
}

fn found(run: &mut Run<'_>, by: By, wanted: &str, variable: Option<&str>) -> Result<bool, String> {
    let place = run.places.iter().find(|place| {
        place.file_system().is_some_and(|file_system| match by {
            By::Uuid => file_system.uuid().eq_ignore_ascii_case(wanted),
            By::Label => file_system.label() == wanted,
            By::File => file_system.has_file(wanted),
        })
    });
    match (place.map(device_of), variable) {
        (Some(device), Some(variable)) => run.set(variable, &device).map(|()| true),
        (place, _) => Ok(place.is_some()),
    }
}

fn load_env(run: &mut Run<'_>, arguments: &[String]) -> Result<bool, String> {
    let mut path = format!("{}/grubenv", run.get("prefix"));
    let mut only = Vec::new();
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        match argument.as_str() {
            "-f" | "--file" => path = rest.next().cloned().unwrap_or_default(),
            other => match other.strip_prefix("--file=") {
                Some(other) => path = other.to_owned(),
                None if other.starts_with('-') => {}
                None => only.push(other),
            },
        }
    }
    let Ok(text) = run.read_text(&path, grubenv::BYTES_MAX) else { return Ok(false) };
    for (name, value) in grubenv::parse(&text) {
        let is_wanted = only.is_empty() || only.contains(&name.as_str());
        // It holds for one boot, and we couldn't cross it out.
        if is_wanted && name != "next_entry" {
            run.set(&name, &value)?;
        }
    }
    Ok(true)
}

fn linux(run: &mut Run<'_>, arguments: &[String]) -> Result<bool, String> {
    let Some((path, arguments)) = arguments.split_first() else { return Ok(false) };
    let Some(piece) = run.piece(path) else {
        run.refusal =
            Some(format!("its kernel {path} lies on {:?}, which this disk doesn't have", run.get("root")));
        return Ok(false);
    };
    // GRUB names the kernel first, and quotes what has blanks in it.
    let mut cmdline = format!("BOOT_IMAGE={path}");
    for argument in arguments {
        let quote = if argument.contains(' ') { "\"" } else { "" };
        cmdline.push_str(&format!(" {quote}{argument}{quote}"));
    }
    run.kernel = Some((piece, cmdline));
    run.initrds.clear();
    Ok(true)
}

fn initrd(run: &mut Run<'_>, arguments: &[String]) -> Result<bool, String> {
    for path in arguments {
        match run.piece(path) {
            Some(piece) => run.initrds.push(piece),
            None => run.refusal = Some(format!("its initrd {path} can't be read here")),
        }
    }
    Ok(true)
}

fn exists(run: &Run<'_>, path: &str) -> bool {
    size(run, path).is_some()
}

fn size(run: &Run<'_>, path: &str) -> Option<u64> {
    let piece = run.piece(path)?;
    let file_system = run.places.get(piece.place).and_then(Place::file_system)?;
    file_system.open(&piece.path).ok().map(|file| file.size_bytes())
}

fn is_directory(run: &Run<'_>, path: &str) -> bool {
    let Some(piece) = run.piece(path) else { return false };
    let file_system = run.places.get(piece.place).and_then(Place::file_system);
    file_system.is_some_and(|file_system| file_system.has_directory(&piece.path))
}

/// `-o` binds less than `-a`, `!` most. The number of words is bounded, and so is the depth.
fn test(run: &Run<'_>, words: &[String]) -> bool {
    words
        .split(|word| word == "-o")
        .any(|words| words.split(|word| word == "-a").all(|words| term(run, words)))
}

fn term(run: &Run<'_>, words: &[String]) -> bool {
    match words {
        [] => false,
        [not, rest @ ..] if not == "!" => !term(run, rest),
        [word] => !word.is_empty(),
        [operator, operand] if UNARY.contains(&operator.as_str()) => match operator.as_str() {
            "-n" => !operand.is_empty(),
            "-z" => operand.is_empty(),
            "-d" => is_directory(run, operand),
            "-s" => size(run, operand).is_some_and(|bytes| bytes > 0),
            "-f" => exists(run, operand),
            _ => exists(run, operand) || is_directory(run, operand),
        },
        [a, operator, b] => compare(a, operator, b),
        _ => false,
    }
}

fn compare(a: &str, operator: &str, b: &str) -> bool {
    let numbers = || Some((a.parse::<i64>().ok()?, b.parse::<i64>().ok()?));
    let by_number = |holds: fn(i64, i64) -> bool| numbers().is_some_and(|(a, b)| holds(a, b));
    match operator {
        "=" | "==" => a == b,
        "!=" => a != b,
        "<" => a < b,
        ">" => a > b,
        "-eq" => by_number(|a, b| a == b),
        "-ne" => by_number(|a, b| a != b),
        "-lt" => by_number(|a, b| a < b),
        "-le" => by_number(|a, b| a <= b),
        "-gt" => by_number(|a, b| a > b),
        "-ge" => by_number(|a, b| a >= b),
        _ => false,
    }
}
