//! Runs a script within bounds: so many commands, variables, bytes and files, however it loops.

use std::collections::BTreeMap;
use std::rc::Rc;

use super::super::menu::{Boot, Entry, Menu, Piece};
use super::super::place::Place;
use super::super::read::ReadError;
use super::parse::{Command, Part, Script, Word, parse};

const COMMANDS_MAX: u32 = 50_000;
const VARIABLES_MAX: usize = 512;
const VALUE_BYTES_MAX: usize = 16 << 10;
const WORDS_MAX: usize = 1024;
const CALLS_MAX: usize = 16;
const FILES_MAX: u32 = 16;
const FILE_BYTES_MAX: u64 = 1 << 20;
const ENTRIES_MAX: usize = 256;
const SUBMENUS_DEEP_MAX: usize = 4;

/// A `menuentry` or `submenu`, before it is run.
#[derive(Clone)]
pub(super) struct Node {
    pub title: String,
    pub id: String,
    pub is_submenu: bool,
    pub block: Script,
    pub arguments: Vec<String>,
}

pub(super) struct Run<'p> {
    pub places: &'p [Place],
    pub variables: BTreeMap<String, String>,
    functions: BTreeMap<String, Script>,
    /// Of the function or entry that runs.
    arguments: Vec<String>,
    /// Whether the last command held.
    pub holds: bool,
    pub nodes: Vec<Node>,
    /// What `linux` and `initrd` have named.
    pub kernel: Option<(Piece, String)>,
    pub initrds: Vec<Piece>,
    /// Why what the entry wants can't be had.
    pub refusal: Option<String>,
    commands_left: u32,
    files_left: u32,
    calls: usize,
}

impl<'p> Run<'p> {
    /// As GRUB starts with the configuration at `path` of this place.
    pub fn new(places: &'p [Place], place: usize, path: &str) -> Self {
        let root = places.get(place).map(device_of).unwrap_or_default();
        let directory = path.rsplit_once('/').map_or("", |(directory, _)| directory);
        let mut variables = BTreeMap::new();
        for (name, value) in [
            ("prefix", format!("({root}){directory}").as_str()),
            ("root", &root),
            ("config_directory", &format!("({root}){directory}")),
            ("config_file", &format!("({root}){path}")),
            ("grub_platform", "pc"),
            ("grub_cpu", "i386"),
            ("feature_menuentry_id", "y"),
            ("feature_menuentry_options", "y"),
            ("feature_all_video_module", "y"),
            ("feature_platform_search_hint", "y"),
            ("feature_timeout_style", "y"),
            ("feature_default_font_path", "y"),
            ("feature_chainloader_bpb", "y"),
            ("feature_ntldr", "y"),
            ("feature_nativedisk_cmd", "y"),
            ("feature_200_final", "y"),
        ] {
            variables.insert(name.to_owned(), value.to_owned());
        }
        Self {
            places,
            variables,
            functions: BTreeMap::new(),
            arguments: Vec::new(),
            holds: true,
            nodes: Vec::new(),
            kernel: None,
            initrds: Vec::new(),
            refusal: None,
            commands_left: COMMANDS_MAX,
            files_left: FILES_MAX,
            calls: 0,
        }
    }

    pub fn get(&self, name: &str) -> &str {
        self.variables.get(name).map_or("", String::as_str)
    }

    pub fn set(&mut self, name: &str, value: &str) -> Result<(), String> {
        if value.len() > VALUE_BYTES_MAX || self.variables.len() >= VARIABLES_MAX {
            return Err("variables that are too large, or too many".to_owned());
        }
        self.variables.insert(name.to_owned(), value.to_owned());
        Ok(())
    }

    /// Runs a configuration file: `$root`'s, or with its device.
    pub fn configuration(&mut self, path: &str) -> Result<(), String> {
        self.files_left = self.files_left.checked_sub(1).ok_or("too many nested files")?;
        let text = self.read_text(path, FILE_BYTES_MAX).map_err(|error| error.to_string())?;
        self.text(&text)
    }

    pub fn text(&mut self, text: &str) -> Result<(), String> {
        let script = parse(text)?;
        self.script(&script)
    }

    pub fn read_text(&self, path: &str, max: u64) -> Result<String, ReadError> {
        let piece = self.piece(path).ok_or(ReadError::NotFound)?;
        let place = self.places.get(piece.place).and_then(Place::file_system);
        place.ok_or(ReadError::NotFound)?.read_text(&piece.path, max)
    }

    /// The place and path of `(hd0,gpt1)/path`, or of a path on `$root`.
    pub fn piece(&self, path: &str) -> Option<Piece> {
        let (device, path) = match path.strip_prefix('(') {
            Some(rest) => rest.split_once(')')?,
            None => (self.get("root"), path),
        };
        let device = device.trim_matches(['(', ')']);
        let place = self.places.iter().position(|place| is_device(place, device))?;
        Some(Piece { place, path: path.to_owned(), part: None })
    }

    fn script(&mut self, script: &Script) -> Result<(), String> {
        for command in script.iter() {
            self.commands_left = self.commands_left.checked_sub(1).ok_or("too many commands, or a loop")?;
            self.command(command)?;
        }
        Ok(())
    }

    fn condition(&mut self, script: &Script) -> Result<bool, String> {
        self.script(script)?;
        Ok(self.holds)
    }

    fn command(&mut self, command: &Command) -> Result<(), String> {
        match command {
            Command::Simple { words, block } => {
                let words = self.expand(words)?;
                self.simple(words, block.as_ref())?;
            }
            Command::If { branches, otherwise } => {
                for (condition, body) in branches {
                    if self.condition(condition)? {
                        return self.script(body);
                    }
                }
                self.holds = true;
                self.script(otherwise)?;
            }
            Command::For { variable, words, body } => {
                for word in self.expand(words)? {
                    self.set(variable, &word)?;
                    self.script(body)?;
                }
            }
            Command::While { condition, holds, body } => {
                while self.condition(condition)? == *holds {
                    // An empty body is no way out of the count.
                    self.commands_left = self.commands_left.checked_sub(1).ok_or("a loop without end")?;
                    self.script(body)?;
                }
            }
            Command::Function { name, body } => {
                if self.functions.len() >= VARIABLES_MAX {
                    return Err("too many functions".to_owned());
                }
                self.functions.insert(name.clone(), body.clone());
            }
        }
        Ok(())
    }

    fn simple(&mut self, words: Vec<String>, block: Option<&Script>) -> Result<(), String> {
        let Some(name) = words.first() else { return Ok(()) };
        if let Some(body) = self.functions.get(name).cloned() {
            if self.calls == CALLS_MAX {
                return Err("calls too deep in calls".to_owned());
            }
            self.calls += 1;
            let before = std::mem::replace(&mut self.arguments, words[1..].to_vec());
            let result = self.script(&body);
            self.arguments = before;
            self.calls -= 1;
            return result;
        }
        // `name=value`, as a command.
        if let Some((variable, value)) = name.split_once('=')
            && words.len() == 1
            && !variable.is_empty()
            && variable.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        {
            self.holds = true;
            return self.set(variable, value);
        }
        self.holds = super::commands::run(self, &words[0], &words[1..], block)?;
        Ok(())
    }

    fn expand(&self, words: &[Word]) -> Result<Vec<String>, String> {
        let mut expanded = Vec::new();
        let mut bytes = 0;
        for word in words {
            let mut text = String::new();
            let mut is_word = word.is_quoted;
            for part in &word.parts {
                match part {
                    Part::Text(part) => {
                        text.push_str(part);
                        is_word = true;
                    }
                    Part::Variable { name, is_quoted: true } => text.push_str(&self.value(name)),
                    Part::Variable { name, is_quoted: false } => {
                        let value = self.value(name);
                        // Blanks end words, but what stands beside them without one belongs to them.
                        for (index, piece) in value.split([' ', '\t', '\n']).enumerate() {
                            if index > 0 && (is_word || !text.is_empty()) {
                                expanded.push(std::mem::take(&mut text));
                                is_word = false;
                            }
                            text.push_str(piece);
                            is_word |= !piece.is_empty();
                        }
                    }
                }
            }
            bytes += text.len();
            if is_word {
                expanded.push(text);
            }
            if expanded.len() > WORDS_MAX || bytes > 4 * VALUE_BYTES_MAX {
                return Err("a command that is too long".to_owned());
            }
        }
        Ok(expanded)
    }

    fn value(&self, name: &str) -> String {
        match name {
            "?" => String::from(if self.holds { "0" } else { "1" }),
            "#" => self.arguments.len().to_string(),
            "*" | "@" => self.arguments.join(" "),
            _ => match name.parse::<usize>() {
                Ok(number) => {
                    let argument = number.checked_sub(1).and_then(|index| self.arguments.get(index));
                    argument.cloned().unwrap_or_default()
                }
                Err(_) => self.get(name).to_owned(),
            },
        }
    }

    /// Runs all entries, each from the state that the script left.
    pub fn into_menu(mut self, source: String) -> Result<Menu, String> {
        let default = self.get("default").to_owned();
        let nodes = std::mem::take(&mut self.nodes);
        let mut entries = Vec::new();
        let default = self.flatten(nodes, Some(&default), &mut entries, 0)?;
        Ok(Menu { source, entries, default: default.unwrap_or(0) })
    }

    /// Appends the entries in order, those of submenus where these stand; finds the default among them.
    fn flatten(
        &mut self,
        nodes: Vec<Node>,
        default: Option<&str>,
        entries: &mut Vec<Entry>,
        depth: usize,
    ) -> Result<Option<usize>, String> {
        let (first, rest) = match default {
            Some(default) => match default.split_once('>') {
                Some((first, rest)) => (Some(first), rest),
                None => (Some(default), ""),
            },
            None => (None, ""),
        };
        let by_name =
            first.and_then(|name| nodes.iter().position(|node| node.id == name || node.title == name));
        let by_number = || first?.parse().ok().filter(|&index| index < nodes.len());
        // GRUB, too, takes the first where there is no such entry.
        let chosen = first.map(|_| by_name.or_else(by_number).unwrap_or(0));
        let mut found = None;
        for (index, node) in nodes.into_iter().enumerate() {
            if entries.len() >= ENTRIES_MAX {
                break;
            }
            let is_chosen = chosen == Some(index);
            if is_chosen {
                found = Some(entries.len());
            }
            if !node.is_submenu {
                let entry = self.entry(node)?;
                entries.push(entry);
            } else if depth < SUBMENUS_DEEP_MAX {
                let before = self.variables.clone();
                self.arguments = node.arguments;
                self.script(&node.block)?;
                let nodes = std::mem::take(&mut self.nodes);
                let inner = self.flatten(nodes, is_chosen.then_some(rest), entries, depth + 1)?;
                found = if is_chosen { inner } else { found };
                self.variables = before;
            }
        }
        Ok(found)
    }

    fn entry(&mut self, node: Node) -> Result<Entry, String> {
        let before = self.variables.clone();
        (self.kernel, self.initrds, self.refusal) = (None, Vec::new(), None);
        self.arguments = node.arguments;
        self.script(&node.block)?;
        self.nodes.clear();
        self.variables = before;
        let boot = match (self.refusal.take(), self.kernel.take()) {
            (Some(refusal), _) => Err(refusal),
            (None, Some((kernel, cmdline))) => {
                Ok(Boot { kernel, initrds: std::mem::take(&mut self.initrds), cmdline })
            }
            (None, None) => Err("it loads no Linux kernel".to_owned()),
        };
        Ok(Entry { title: node.title, id: node.id, version: String::new(), boot })
    }

    pub fn add_node(&mut self, node: Node) -> Result<(), String> {
        if self.nodes.len() >= ENTRIES_MAX {
            return Err("too many entries".to_owned());
        }
        self.nodes.push(node);
        Ok(())
    }
}

/// What GRUB calls a place.
pub(super) fn device_of(place: &Place) -> String {
    match place.partition.grub_name.as_str() {
        "" => "hd0".to_owned(),
        name => format!("hd0,{name}"),
    }
}

/// `hd0,gpt1`, or `hd0,1` in its short form.
fn is_device(place: &Place, device: &str) -> bool {
    let short = place.partition.number.map(|number| format!("hd0,{number}"));
    device == device_of(place) || short.as_deref() == Some(device)
}

impl Node {
    pub fn new(title: &str, id: &str, is_submenu: bool, block: &Script, arguments: &[String]) -> Self {
        Self {
            title: title.to_owned(),
            id: id.to_owned(),
            is_submenu,
            block: Rc::clone(block),
            arguments: arguments.to_vec(),
        }
    }
}
