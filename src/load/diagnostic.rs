//! What is wrong with the input, where, and what to do about it.
//!
//! A diagnostic is complete in itself: it carries the line that it speaks of, so that it prints and
//! serialises without the file. Text that came from a file is never sent to a terminal as it is.

use std::fmt::{self, Write as _};
use std::sync::Arc;

use serde::Serialize;

/// How bad it is. Errors make a load incomplete; warnings don't.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    Error,
    Warning,
}

impl Severity {
    pub fn as_str(self) -> &'static str {
        match self {
            Severity::Error => "error",
            Severity::Warning => "warning",
        }
    }
}

/// A place in a source. Lines and columns begin at 1; columns and `len` count characters, not bytes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub struct Location {
    /// The file as the user named it, `<stdin>`, or the name of a text.
    #[serde(serialize_with = "as_text")]
    pub file: Arc<str>,
    pub line: u32,
    pub column: u32,
    /// How many characters of the line are meant: at least 1, never past the line's end.
    pub len: u32,
}

fn as_text<S: serde::Serializer>(text: &Arc<str>, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(text)
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", Printable(&self.file), self.line, self.column)
    }
}

/// Another place that has to do with the problem, and what is there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Related {
    pub location: Location,
    pub message: String,
}

/// A piece of the source line that a location points into.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Snippet {
    /// The line, or where it is very long a window of it. White space is kept.
    pub text: String,
    /// Where in `text` the marked part begins, in characters from 0.
    pub start: u32,
    /// How many characters are marked, at least 1 (which may stand just behind the line's end).
    pub len: u32,
}

/// One problem with the input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Diagnostic {
    pub severity: Severity,
    /// None only where there is no text to point into: a directory, a command-line argument.
    pub location: Option<Location>,
    pub message: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub related: Vec<Related>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snippet: Option<Snippet>,
}

impl Diagnostic {
    pub fn error(message: impl Into<String>) -> Self {
        Self {
            severity: Severity::Error,
            location: None,
            message: message.into(),
            hint: None,
            related: Vec::new(),
            snippet: None,
        }
    }

    pub fn warning(message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(message) }
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub fn hint_maybe(mut self, hint: Option<String>) -> Self {
        self.hint = hint;
        self
    }

    /// Points at `place`, with its line of source.
    pub fn at(mut self, place: Place) -> Self {
        self.location = Some(place.location);
        self.snippet = place.snippet;
        self
    }

    pub fn related(mut self, location: Location, message: impl Into<String>) -> Self {
        self.related.push(Related { location, message: message.into() });
        self
    }

    pub fn is_error(&self) -> bool {
        self.severity == Severity::Error
    }

    /// The text that people read: `colour` adds ANSI escapes for a terminal.
    pub fn render(&self, colour: bool) -> String {
        let mut out = String::new();
        // Writing to a String never fails.
        let _ = self.write(&mut out, &Paint::new(colour));
        out
    }

    fn write(&self, out: &mut impl fmt::Write, paint: &Paint) -> fmt::Result {
        let tint = if self.is_error() { paint.error } else { paint.warning };
        if let Some(location) = &self.location {
            write!(out, "{}{location}:{} ", paint.bold, paint.off)?;
        }
        let name = self.severity.as_str();
        write!(out, "{tint}{name}:{} {}{}{}", paint.off, paint.bold, Printable(&self.message), paint.off)?;
        if let (Some(location), Some(snippet)) = (&self.location, &self.snippet) {
            let number = location.line.to_string();
            let gap = " ".repeat(number.len());
            let blue = paint.frame;
            let off = paint.off;
            write!(out, "\n  {blue}{number} |{off} {}", Printable(snippet.text.trim_end()))?;
            write!(out, "\n  {blue}{gap} |{off} ")?;
            let (indent, carets) = snippet.widths();
            write!(out, "{}{tint}{}{off}", " ".repeat(indent), "^".repeat(carets))?;
        }
        for related in &self.related {
            write!(
                out,
                "\n  {}note:{} {}: {}",
                paint.frame,
                paint.off,
                related.location,
                Printable(&related.message)
            )?;
        }
        if let Some(hint) = &self.hint {
            write!(out, "\n  {}hint:{} {}", paint.hint, paint.off, Printable(hint))?;
        }
        Ok(())
    }
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.write(f, &Paint::new(false))
    }
}

impl Snippet {
    /// Columns on the terminal before the mark and under it, as `Printable` shows the text.
    fn widths(&self) -> (usize, usize) {
        let shown = |chars: &mut dyn Iterator<Item = char>| -> usize {
            let mut text = String::new();
            let part: String = chars.collect();
            // Writing to a String never fails.
            let _ = write!(text, "{}", Printable(&part));
            text.chars().count()
        };
        let before = shown(&mut self.text.chars().take(self.start as usize));
        let marked = shown(&mut self.text.chars().skip(self.start as usize).take(self.len as usize));
        (before, marked.max(1))
    }
}

/// A location with the line that it points into: what a `SourceFile` gives for a byte range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub location: Location,
    pub snippet: Option<Snippet>,
}

/// Shows text from a file on a terminal: tabs as one space, line ends as `↵`, other control
/// characters and the invisible marks that reorder text as `�`. A manifest can't move the cursor.
struct Printable<'a>(&'a str);

impl fmt::Display for Printable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '\t' => f.write_char(' ')?,
                '\n' | '\r' => f.write_char('↵')?,
                '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}' => {
                    f.write_char('\u{fffd}')?
                }
                c if c.is_control() => f.write_char('\u{fffd}')?,
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}

/// The escapes in use: empty texts without colour.
struct Paint {
    bold: &'static str,
    error: &'static str,
    warning: &'static str,
    frame: &'static str,
    hint: &'static str,
    off: &'static str,
}

impl Paint {
    fn new(colour: bool) -> Self {
        if colour {
            Self {
                bold: "\x1b[1m",
                error: "\x1b[1;31m",
                warning: "\x1b[1;33m",
                frame: "\x1b[1;34m",
                hint: "\x1b[1;36m",
                off: "\x1b[0m",
            }
        } else {
            Self { bold: "", error: "", warning: "", frame: "", hint: "", off: "" }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prints_like_a_compiler_and_never_moves_the_cursor() {
        let diagnostic = Diagnostic::error("`\x1b[2J` is not a name").hint("write a name").at(Place {
            location: Location { file: "a.yaml".into(), line: 7, column: 9, len: 4 },
            snippet: Some(Snippet { text: "\tname: \x1b[2J".into(), start: 7, len: 4 }),
        });
        let expected = "a.yaml:7:9: error: `\u{fffd}[2J` is not a name\n  7 |  name: \u{fffd}[2J\n    |        ^^^^\n  hint: write a name";
        assert_eq!(diagnostic.to_string(), expected);
        assert!(diagnostic.render(true).contains("\x1b[1;31merror:\x1b[0m"));
        assert!(!diagnostic.render(true).contains("\x1b[2J"));
        let json = serde_json::to_value(&diagnostic).unwrap();
        assert_eq!(json["location"]["line"], 7);
        assert_eq!(json["severity"], "error");
    }
}
