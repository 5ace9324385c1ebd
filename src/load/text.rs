//! A source's text, and where in it things are. Offsets are bytes; people get lines and columns.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::sync::{Arc, Mutex, OnceLock};

use super::diagnostic::{Diagnostic, Location, Place, Snippet};
use super::{Limits, document};

/// Half-open range of bytes in a source. Sources are far below 4 GiB (`Limits::file_bytes`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Span {
    pub start: u32,
    pub end: u32,
}

impl Span {
    pub fn new(start: usize, end: usize) -> Self {
        let clamp = |offset: usize| u32::try_from(offset).unwrap_or(u32::MAX);
        Self { start: clamp(start), end: clamp(end.max(start)) }
    }
}

/// Characters of a source line that a snippet shows before it becomes a window.
const SNIPPET_CHARS: usize = 160;

/// One text that manifests come from: a file, standard input or a text of the caller.
pub struct SourceFile {
    name: Arc<str>,
    text: String,
    line_starts: OnceLock<Vec<u32>>,
    /// The pointers of the document that was asked for last: problems come in the order of objects,
    /// so this one entry spares parsing a long list again for each of its items.
    last_index: Mutex<Option<(Range<usize>, Arc<PointerIndex>)>>,
}

/// For each RFC 6901 pointer of a document: its key's span where it has one, and where to show it.
type PointerIndex = BTreeMap<String, (Option<Span>, Span)>;

impl fmt::Debug for SourceFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SourceFile").field("name", &self.name).field("bytes", &self.text.len()).finish()
    }
}

impl SourceFile {
    pub fn new(name: &str, text: String) -> Self {
        Self { name: name.into(), text, line_starts: OnceLock::new(), last_index: Mutex::new(None) }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn text(&self) -> &str {
        &self.text
    }

    /// Where `span` is, with its line. A span of several lines is cut at the end of its first.
    pub fn place(&self, span: Span) -> Place {
        let (line_index, line) = self.line_at(span.start as usize);
        let line_start = line.start;
        let line = self.text[line].trim_end_matches(['\n', '\r']);
        let start = self.char_floor(span.start as usize).saturating_sub(line_start).min(line.len());
        let end = self.char_floor(span.end as usize).saturating_sub(line_start).clamp(start, line.len());
        let before = line[..start].chars().count();
        let marked = line[start..end].trim_end().chars().count().max(1);
        let number = |count: usize| u32::try_from(count).unwrap_or(u32::MAX);
        let location = Location {
            file: Arc::clone(&self.name),
            line: number(line_index + 1),
            column: number(before + 1),
            len: number(marked),
        };
        // A window with a little of what stands before the mark.
        let skip = if before + marked > SNIPPET_CHARS { before.saturating_sub(SNIPPET_CHARS / 4) } else { 0 };
        let text: String = line.chars().skip(skip).take(SNIPPET_CHARS).collect();
        let shown = text.chars().count();
        let start = before - skip;
        let len = marked.min(shown.saturating_sub(start)).max(1);
        let snippet = Snippet { text, start: number(start), len: number(len) };
        Place { location, snippet: Some(snippet) }
    }

    fn char_floor(&self, offset: usize) -> usize {
        let mut offset = offset.min(self.text.len());
        while !self.text.is_char_boundary(offset) {
            offset -= 1;
        }
        offset
    }

    /// Index from 0 and byte range of the line that holds the byte at `offset`.
    fn line_at(&self, offset: usize) -> (usize, Range<usize>) {
        let starts = self.line_starts.get_or_init(|| {
            let ends = self.text.bytes().enumerate().filter(|&(_, byte)| byte == b'\n');
            std::iter::once(0).chain(ends.map(|(index, _)| Span::new(index + 1, index + 1).start)).collect()
        });
        let offset = offset.min(self.text.len());
        // `starts` begins with 0, so there is always one at or before the offset.
        let index = starts.partition_point(|&start| start as usize <= offset).saturating_sub(1);
        let end = starts.get(index + 1).map_or(self.text.len(), |&start| start as usize);
        (index, starts[index] as usize..end)
    }

    fn index(&self, document: &Range<usize>) -> Arc<PointerIndex> {
        // A panic while the lock was held can't leave half an entry: the value is replaced whole.
        let mut last = self.last_index.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some((range, index)) = &*last
            && range == document
        {
            return Arc::clone(index);
        }
        let mut index = PointerIndex::new();
        let parsed = document::parse(&self.text, document.clone(), &Limits::default());
        if let Some(root) = parsed.root {
            root.visit(&mut |pointer, key, span| {
                index.insert(pointer.to_owned(), (key, span));
            });
        }
        let index = Arc::new(index);
        *last = Some((document.clone(), Arc::clone(&index)));
        index
    }
}

/// Where a manifest was written. Cheap to clone: two words of text and a few offsets.
#[derive(Clone, Debug)]
pub struct Origin {
    file: Arc<SourceFile>,
    start: u32,
    end: u32,
    /// The object's own first byte, past comments.
    object: Span,
    /// Where in the document the object is: empty, or `/items/3` in a `List`.
    prefix: Arc<str>,
}

impl Origin {
    pub(super) fn new(file: Arc<SourceFile>, document: Range<usize>, object: Span, prefix: &str) -> Self {
        let Span { start, end } = Span::new(document.start, document.end);
        Self { file, start, end, object, prefix: prefix.into() }
    }

    /// The source's name as the user gave it.
    pub fn file(&self) -> &str {
        self.file.name()
    }

    /// The line, from 1, on which the object begins.
    pub fn line(&self) -> u32 {
        self.file.place(self.object).location.line
    }

    /// The object's text: all of its document, comments included.
    pub fn document(&self) -> &str {
        self.file.text().get(self.start as usize..self.end as usize).unwrap_or("")
    }

    /// Where `pointer` is (RFC 6901, from the manifest's root: `/spec/disks/0/volume`). What is not
    /// in the text, such as a default, is shown at the nearest that is.
    pub fn at(&self, pointer: &str) -> Location {
        self.place(pointer).location
    }

    /// An error at `pointer`, with its snippet.
    pub fn error(&self, pointer: &str, message: impl Into<String>) -> Diagnostic {
        Diagnostic::error(message).at(self.place(pointer))
    }

    /// A warning at `pointer`, with its snippet.
    pub fn warning(&self, pointer: &str, message: impl Into<String>) -> Diagnostic {
        Diagnostic::warning(message).at(self.place(pointer))
    }

    pub fn place(&self, pointer: &str) -> Place {
        let index = self.file.index(&(self.start as usize..self.end as usize));
        let full = format!("{}{pointer}", self.prefix);
        let mut rest = full.as_str();
        loop {
            if let Some(&(key, shown)) = index.get(rest) {
                let exact = rest.len() == full.len();
                // A value that is missing is best shown by the key of the mapping that lacks it.
                let span = if exact { shown } else { key.unwrap_or(shown) };
                return self.file.place(if rest.is_empty() { self.object } else { span });
            }
            match rest.rfind('/') {
                Some(slash) => rest = &rest[..slash],
                None => return self.file.place(self.object),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{Input, Options, load};

    #[test]
    fn places_count_characters_and_stay_in_their_line() {
        let file = SourceFile::new("a", "é: x\r\nab\n".replace("\\r", "\r").replace("\\n", "\n"));
        let place = |start, end| {
            let location = file.place(Span::new(start, end)).location;
            (location.line, location.column, location.len)
        };
        assert_eq!(place(4, 5), (1, 4, 1));
        assert_eq!(place(4, 9), (1, 4, 1), "cut at the end of the line");
        assert_eq!(place(7, 9), (2, 1, 2));
        assert_eq!(place(1, 2), (1, 1, 1), "within a character");
        assert_eq!(place(1000, 2000), (3, 1, 1), "past the end");
        let long = SourceFile::new("a", "x".repeat(1000) + "y");
        let place = long.place(Span::new(1000, 1001));
        let snippet = place.snippet.unwrap();
        assert_eq!(snippet.text.chars().nth(snippet.start as usize), Some('y'));
        assert_eq!(place.location.column, 1001);
    }

    #[test]
    fn origins_find_pointers_in_documents_and_in_items_of_lists() {
        let bridge = "apiVersion: vmctl.dev/v1alpha1\nkind: Bridge\nmetadata:\n  name: br0\nspec:\n  ports:\n    - interface: eth1\n";
        let text = format!("# First.\n---\n{bridge}");
        let loaded = load(&[Input::Text { name: "a".into(), text }], &Options::default());
        let origin = &loaded.manifests[0].origin;
        assert_eq!(origin.line(), 3);
        let at = |pointer| {
            let location = origin.at(pointer);
            (location.line, location.column)
        };
        assert_eq!(at("/spec/ports/0/interface"), (9, 18));
        assert_eq!(at("/spec/ports/0"), (9, 7));
        assert_eq!(at("/spec/ports"), (8, 3));
        assert_eq!(at("/spec/mtu"), (7, 1), "a default is shown at the mapping that lacks it");
        assert_eq!(at("/spec/ports/7"), (8, 3));
        assert_eq!(at(""), (3, 1));
        assert_eq!(at("/nonsense~1/~"), (3, 1));
        let items: String = bridge.lines().map(|line| format!("    {line}\n")).collect();
        let text = format!("kind: List\napiVersion: v1\nitems:\n  - {}", items.trim_start());
        let loaded = load(&[Input::Text { name: "a".into(), text }], &Options::default());
        let origin = &loaded.manifests[0].origin;
        assert_eq!((origin.line(), origin.at("/metadata/name").line), (4, 7));
        assert_eq!(origin.at("/spec/mtu").line, 8);
    }
}
