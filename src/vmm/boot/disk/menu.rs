//! What every boot loader's configuration comes down to: entries, and which of them is the default.

/// A file that an entry names, or a part of one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    /// Which of the disk's places.
    pub place: usize,
    pub path: String,
    /// Offset and length, of what lies in a larger file.
    pub part: Option<(u64, u64)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Boot {
    pub kernel: Piece,
    pub initrds: Vec<Piece>,
    pub cmdline: String,
}

#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub title: String,
    pub id: String,
    pub version: String,
    /// Or why it can't be booted here.
    pub boot: Result<Boot, String>,
}

#[derive(Debug)]
pub(super) struct Menu {
    /// The file or directory that it was read from, to be shown.
    pub source: String,
    pub entries: Vec<Entry>,
    /// Into the entries.
    pub default: usize,
}

impl Entry {
    /// Whether a person would mean it by this: its title, its id or its version.
    fn is_called(&self, name: &str) -> bool {
        let kernel = self.boot.as_ref().ok().map(|boot| boot.kernel.path.as_str());
        self.title == name
            || self.id == name
            || self.version == name
            || kernel.is_some_and(|path| path.strip_suffix(name).is_some_and(|rest| rest.ends_with('-')))
    }
}

impl Menu {
    pub fn pick(&self, wanted: Option<&str>) -> Option<&Entry> {
        match wanted {
            None => self.entries.get(self.default).or_else(|| self.entries.first()),
            // Where several have the name (a normal and a recovery entry of one version), the first.
            Some(name) => self.entries.iter().find(|entry| entry.is_called(name)),
        }
    }
}
