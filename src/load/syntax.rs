//! What the YAML parser's errors mean to somebody who writes manifests.

use granit_parser::{ErrorKind, ScanError};

use super::Limits;
use super::document::Problem;
use super::text::Span;

/// The parser's error with its place in the source; `base` is where the document begins in it.
pub fn problem(error: &ScanError, document: &str, base: usize, limits: &Limits) -> Problem {
    let mut offset = error.marker().byte_offset().unwrap_or(0).min(document.len());
    while !document.is_char_boundary(offset) {
        offset -= 1;
    }
    if is_about_tabs(error.kind()) {
        // The scanner notices a tab a little before or after it.
        let line = document[..offset].rfind('\n').map_or(0, |newline| newline + 1);
        offset = document[line..].find('\t').map_or(offset, |tab| line + tab);
    }
    // At the end of the text the last line with something on it says more than the emptiness after it.
    if document[offset..].trim().is_empty() {
        offset = document.trim_end().len().min(offset);
    }
    let span = Span::new(base + offset, base + offset + 1);
    let (message, hint) = explain(error.kind(), document, offset, limits);
    Problem::error(span, message).hint_maybe(hint)
}

fn is_about_tabs(kind: &ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::TabNotAllowed
            | ErrorKind::TabInBlockIndentation
            | ErrorKind::TabInIndentation
            | ErrorKind::TabAtBlockScalarStart
            | ErrorKind::TabInPlainScalar
    )
}

/// What the parser's error means to somebody who writes manifests.
fn explain(kind: &ErrorKind, document: &str, offset: usize, limits: &Limits) -> (String, Option<String>) {
    let line_start = document[..offset].rfind('\n').map_or(0, |newline| newline + 1);
    let line = document[line_start..].lines().next().unwrap_or("");
    let indent = &line[..line.len() - line.trim_start().len()];
    let with = |message: &str, hint: &str| (message.to_owned(), Some(hint.to_owned()));
    if indent.contains('\t') {
        return with("a tab in the indentation: YAML allows spaces only", "indent with two spaces");
    }
    match kind {
        kind if is_about_tabs(kind) => with("a tab where YAML allows spaces only", "replace it by spaces"),
        ErrorKind::RecursionLimitExceeded => (format!("nested deeper than {} levels", limits.depth), None),
        ErrorKind::MappingValueNotAllowed => with(
            "a `key: value` can't stand here",
            "a text that contains `: ` must be quoted; otherwise look at the indentation of this line and the one before",
        ),
        ErrorKind::UnclosedQuotedScalar => with("the quotation isn't closed", "write the closing quote"),
        ErrorKind::UnclosedFlowCollection { open } => {
            with(&format!("the `{open}` isn't closed"), "write the closing bracket")
        }
        ErrorKind::UnexpectedEofFlowMapping | ErrorKind::UnexpectedEofImplicitFlowMapping => {
            with("the document ends within `{…}`", "write the closing `}`")
        }
        ErrorKind::UnexpectedEofFlowSequence => {
            with("the document ends within `[…]`", "write the closing `]`")
        }
        ErrorKind::ExpectedBlockMappingKey => with(
            "expected a `key: value` here",
            "all keys of a mapping begin in the same column, and a list item begins with `- `",
        ),
        ErrorKind::SimpleKeyExpected => with("expected a `:` after the key", "write `key: value`"),
        ErrorKind::UnexpectedCharacter { character } => (
            format!("a value can't begin with `{character}`"),
            Some("quote the text if it is meant as one".to_owned()),
        ),
        ErrorKind::UnknownQuotedScalarEscape => with(
            "unknown escape in a double-quoted text",
            "write `\\\\` for a backslash, or use single quotes, where nothing is escaped",
        ),
        ErrorKind::InvalidColonPlacement | ErrorKind::ExpectedFlowSequenceSeparator => {
            with("expected `,` or `]` here", "is a `[` before this left open?")
        }
        ErrorKind::ExpectedFlowMappingSeparator => {
            with("expected `,` or `}` here", "is a `{` before this left open?")
        }
        ErrorKind::ExpectedBlockSequenceEntry => with(
            "expected another list item here",
            "items begin with `- `, all in one column; what isn't part of the list begins further left",
        ),
        ErrorKind::ExpectedDocumentStart => with(
            "the document was complete before this",
            "look for a bracket or an indentation that ends too early; manifests are separated by `---` lines",
        ),
        ErrorKind::BomInsideDocument => with("a byte-order mark within a document", "remove it"),
        kind => (format!("not YAML: {kind}"), None),
    }
}
