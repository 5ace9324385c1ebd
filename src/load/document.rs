//! YAML text to a tree with spans. Knows YAML, and nothing of manifests.
//!
//! The events come from `granit-parser`; the tree is our own, for it keeps the place of every key and
//! value and reports more than the first problem. A file is cut at its `---` lines before it is parsed
//! (YAML allows no such line within a document, not even in a quoted or block scalar), so that an error
//! in one document can't hide another.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;

use granit_parser::{Event, Parser, ScalarStyle};

use super::Limits;
use super::diagnostic::Severity;
use super::syntax;
use super::text::Span;

/// A problem with a place in the text that is being looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub severity: Severity,
    pub span: Span,
    pub message: String,
    pub hint: Option<String>,
    pub related: Vec<(Span, String)>,
}

impl Problem {
    pub fn error(span: Span, message: impl Into<String>) -> Self {
        Self { severity: Severity::Error, span, message: message.into(), hint: None, related: Vec::new() }
    }

    pub fn warning(span: Span, message: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, ..Self::error(span, message) }
    }

    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    pub fn hint_maybe(self, hint: Option<String>) -> Self {
        Self { hint, ..self }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Node<'a> {
    pub value: Value<'a>,
    /// Of the value alone. For an alias, of the alias; what is below it lies at the anchor.
    pub span: Span,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Value<'a> {
    Scalar(Scalar<'a>),
    Map(Vec<Entry<'a>>),
    Seq(Vec<Node<'a>>),
}

#[derive(Clone, Debug, PartialEq)]
pub struct Scalar<'a> {
    pub text: Cow<'a, str>,
    /// Neither quoted nor a block: its type follows from its text.
    pub plain: bool,
    /// A core-schema tag such as `!!str`, by its suffix.
    pub tag: Option<&'static str>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct Entry<'a> {
    pub key: Cow<'a, str>,
    pub key_plain: bool,
    pub key_span: Span,
    pub value: Node<'a>,
}

/// What came of one document.
pub struct Parsed<'a> {
    /// None: nothing but comments, or no YAML.
    pub root: Option<Node<'a>>,
    pub problems: Vec<Problem>,
}

impl<'a> Node<'a> {
    /// The entries, if this is a mapping.
    pub fn entries(&self) -> Option<&[Entry<'a>]> {
        match &self.value {
            Value::Map(entries) => Some(entries),
            _ => None,
        }
    }

    /// Where to point when this value is meant: at itself if it is a written scalar, else at its key or
    /// its first one, for a collection fills many lines.
    pub fn shown(&self, key: Option<Span>) -> Span {
        match &self.value {
            Value::Scalar(_) if self.span.start < self.span.end => self.span,
            Value::Map(entries) if key.is_none() => entries.first().map_or(self.span, |entry| entry.key_span),
            _ => key.unwrap_or(self.span),
        }
    }

    /// Calls `see` for each node with its RFC 6901 pointer, its key's span and where to show it.
    pub fn visit(&self, see: &mut dyn FnMut(&str, Option<Span>, Span)) {
        self.visit_below(&mut String::new(), None, see);
    }

    fn visit_below(
        &self,
        pointer: &mut String,
        key: Option<Span>,
        see: &mut dyn FnMut(&str, Option<Span>, Span),
    ) {
        see(pointer, key, self.shown(key));
        let length = pointer.len();
        match &self.value {
            Value::Scalar(_) => {}
            Value::Map(entries) => {
                for entry in entries {
                    push_token(pointer, &entry.key);
                    entry.value.visit_below(pointer, Some(entry.key_span), see);
                    pointer.truncate(length);
                }
            }
            Value::Seq(items) => {
                for (index, item) in items.iter().enumerate() {
                    push_token(pointer, &index.to_string());
                    item.visit_below(pointer, None, see);
                    pointer.truncate(length);
                }
            }
        }
    }
}

/// Appends one reference token to an RFC 6901 pointer.
pub fn push_token(pointer: &mut String, token: &str) {
    pointer.push('/');
    for c in token.chars() {
        match c {
            '~' => pointer.push_str("~0"),
            '/' => pointer.push_str("~1"),
            c => pointer.push(c),
        }
    }
}

/// The documents of a stream. A part before the first `---` that holds only comments and directives
/// belongs to the document after it.
pub fn split(text: &str) -> Vec<Range<usize>> {
    let mut documents = Vec::new();
    let mut start = 0;
    let mut begun = false;
    let mut offset = 0;
    for line in text.split_inclusive('\n') {
        let next = offset + line.len();
        if is_marker(line, "---") {
            if begun {
                documents.push(start..offset);
                start = offset;
            }
            begun = true;
        } else if is_marker(line, "...") {
            documents.push(start..next);
            start = next;
            begun = false;
        } else if !begun {
            let content = line.trim_start();
            begun = !(content.is_empty() || content.starts_with('#') || line.starts_with('%'));
        }
        offset = next;
    }
    if start < text.len() {
        documents.push(start..text.len());
    }
    documents
}

fn is_marker(line: &str, marker: &str) -> bool {
    line.strip_prefix(marker).is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\n', '\r']))
}

/// Parses the one document at `range` of `text`; spans count from the beginning of `text`.
pub fn parse<'a>(text: &'a str, range: Range<usize>, limits: &Limits) -> Parsed<'a> {
    let base = range.start;
    let document = &text[range];
    if document.len() > limits.document_bytes {
        let message =
            format!("the document has {} bytes; at most {} are read", document.len(), limits.document_bytes);
        let problem = Problem::error(Span::new(base, base), message)
            .hint("split it with `---` lines or into several files; a manifest takes about 1 KiB");
        return Parsed { root: None, problems: vec![problem] };
    }
    if let Some(problem) = control_character(document, base) {
        return Parsed { root: None, problems: vec![problem] };
    }
    let mut options = granit_parser::options! {
        emit_unresolved_aliases: true,
        simple_key_max_lookahead: 1024,
        flow_nesting_limit: limits.depth,
        block_nesting_limit: limits.depth,
    };
    options.set_emit_comments(false);
    let mut builder = Builder::new(document, base, limits);
    for event in Parser::new_from_str_with_options(document, options) {
        let done = match event {
            Ok((event, span)) => builder.event(event, span),
            Err(error) => Err(syntax::problem(&error, document, base, limits)),
        };
        if let Err(problem) = done {
            builder.problems.push(problem);
            return Parsed { root: None, problems: builder.problems };
        }
    }
    Parsed { root: builder.root, problems: builder.problems }
}

/// YAML allows no control characters but tab and line ends; most often they mean a binary file.
fn control_character(document: &str, base: usize) -> Option<Problem> {
    let bad = |byte: u8| (byte < 0x20 && !matches!(byte, b'\t' | b'\n' | b'\r')) || byte == 0x7f;
    let at = document.bytes().position(bad)?;
    let code = document.as_bytes()[at];
    let span = Span::new(base + at, base + at + 1);
    let problem =
        Problem::error(span, format!("control character U+{code:04X}: YAML allows none in its text"));
    Some(problem.hint("is this a binary file? In a quoted text write it as an escape, such as \"\\x1b\""))
}

/// A collection that isn't closed yet.
struct Open<'a> {
    entries: Vec<Entry<'a>>,
    items: Vec<Node<'a>>,
    is_map: bool,
    /// The key that waits for its value.
    key: Option<(Cow<'a, str>, bool, Span)>,
    span: Span,
    anchor: usize,
    height: usize,
    /// Nodes when it was opened: the difference at its end is its size.
    nodes_before: usize,
    text_before: usize,
    /// First place of each key, once there are too many to search.
    seen: HashMap<Cow<'a, str>, Span>,
}

/// What an alias stands for.
struct Anchored<'a> {
    node: Node<'a>,
    nodes: usize,
    height: usize,
    text_bytes: usize,
}

struct Builder<'a, 'l> {
    document: &'a str,
    base: usize,
    limits: &'l Limits,
    stack: Vec<Open<'a>>,
    root: Option<Node<'a>>,
    anchors: HashMap<usize, Anchored<'a>>,
    nodes: usize,
    text_bytes: usize,
    documents: usize,
    problems: Vec<Problem>,
}

/// Keys of one mapping up to which a search in the list is quicker than a map.
const FEW_KEYS: usize = 16;

impl<'a, 'l> Builder<'a, 'l> {
    fn new(document: &'a str, base: usize, limits: &'l Limits) -> Self {
        Self {
            document,
            base,
            limits,
            stack: Vec::new(),
            root: None,
            anchors: HashMap::new(),
            nodes: 0,
            text_bytes: 0,
            documents: 0,
            problems: Vec::new(),
        }
    }

    fn span(&self, span: &granit_parser::Span) -> Span {
        let (start, end) = (span.start.byte_offset().unwrap_or(0), span.end.byte_offset().unwrap_or(0));
        Span::new(self.base + start, self.base + end)
    }

    fn event(&mut self, event: Event<'a>, raw: granit_parser::Span) -> Result<(), Problem> {
        let span = self.span(&raw);
        match event {
            Event::DocumentStart(..) => {
                self.documents += 1;
                if self.documents > 1 {
                    return Err(Problem::error(span, "a second document begins without a `---` line"));
                }
            }
            Event::Scalar(text, style, anchor, tag) => {
                let plain = style == ScalarStyle::Plain;
                let tag = self.tag(tag.as_deref(), &raw)?;
                self.count(1, text.len(), span)?;
                let size = text.len();
                let span = if plain { span } else { self.scalar_span(span, style) };
                let node = Node { value: Value::Scalar(Scalar { text, plain, tag }), span };
                self.remember(anchor, &node, 1, 0, size)?;
                self.push(node)?;
            }
            Event::SequenceStart(_, anchor, tag) => self.open(false, anchor, tag.as_deref(), span, &raw)?,
            Event::MappingStart(_, anchor, tag) => self.open(true, anchor, tag.as_deref(), span, &raw)?,
            Event::SequenceEnd | Event::MappingEnd => self.close(span)?,
            Event::Alias(anchor) => self.alias(anchor, span)?,
            Event::UnresolvedAlias(name) => {
                return Err(Problem::error(span, format!("`*{name}` refers to an anchor that is not defined"))
                    .hint(format!("write `&{name}` at a value before it in the same document, or quote the text if no alias is meant")));
            }
            _ => {}
        }
        Ok(())
    }

    /// Block scalars end with the next line's beginning; they are shown by their header.
    fn scalar_span(&self, span: Span, style: ScalarStyle) -> Span {
        if matches!(style, ScalarStyle::Literal | ScalarStyle::Folded) {
            let text = &self.document[(span.start as usize - self.base).min(self.document.len())..];
            let line = text.find('\n').unwrap_or(text.len());
            return Span::new(span.start as usize, span.start as usize + line);
        }
        span
    }

    fn tag(
        &self,
        tag: Option<&granit_parser::Tag>,
        raw: &granit_parser::Span,
    ) -> Result<Option<&'static str>, Problem> {
        let Some(tag) = tag else { return Ok(None) };
        // `!` alone says: what it looks like doesn't matter, it is a text (or the collection it is).
        if tag.handle().is_empty() && tag.suffix() == "!" || tag.handle() == "!" && tag.suffix().is_empty() {
            return Ok(Some("str"));
        }
        let known = ["str", "int", "bool", "float", "null", "map", "seq"];
        let found = tag.core_suffix().and_then(|suffix| known.into_iter().find(|known| *known == suffix));
        if found.is_some() {
            return Ok(found);
        }
        let span = raw.tag_span().map_or_else(|| self.span(raw), |span| self.span(&span));
        Err(Problem::error(span, format!("unknown tag `{}`", tag.original())).hint(
            "only the core tags (`!!str`, `!!int`, `!!bool`, …) are known, and they are hardly ever needed",
        ))
    }

    fn count(&mut self, nodes: usize, text_bytes: usize, span: Span) -> Result<(), Problem> {
        self.nodes += nodes;
        self.text_bytes += text_bytes;
        // Text without aliases is never longer than the document.
        let text_max = self.limits.document_bytes.saturating_mul(2);
        if self.nodes > self.limits.nodes || self.text_bytes > text_max {
            let max = self.limits.nodes;
            return Err(Problem::error(span, format!("the document expands to more than {max} values or {text_max} bytes"))
                .hint("aliases of aliases grow quickly (a \"YAML bomb\"); write the values out, in several documents"));
        }
        Ok(())
    }

    fn open(
        &mut self,
        is_map: bool,
        anchor: usize,
        tag: Option<&granit_parser::Tag>,
        span: Span,
        raw: &granit_parser::Span,
    ) -> Result<(), Problem> {
        let tag = self.tag(tag, raw)?;
        let right = if is_map { "map" } else { "seq" };
        // `!` on a collection came as `str` and changes nothing.
        if let Some(tag) = tag
            && tag != right
            && tag != "str"
        {
            let span = raw.tag_span().map_or(span, |span| self.span(&span));
            return Err(Problem::error(
                span,
                format!("the tag `!!{tag}` doesn't fit a {}", if is_map { "mapping" } else { "list" }),
            ));
        }
        if self.stack.len() >= self.limits.depth {
            return Err(self.too_deep(span));
        }
        if let Some(open) = self.stack.last()
            && open.is_map
            && open.key.is_none()
        {
            let before = (span.start as usize - self.base).saturating_sub(1);
            let template = self.document.get(before..).is_some_and(|text| text.starts_with("{{"));
            let hint = if template {
                "is this a template that was not rendered?"
            } else {
                "a value that begins with `{` or `[` must be quoted if it is meant as text"
            };
            return Err(Problem::error(span, "a key must be a text, not a mapping or a list").hint(hint));
        }
        let (nodes_before, text_before) = (self.nodes, self.text_bytes);
        self.count(1, 0, span)?;
        self.stack.push(Open {
            entries: Vec::new(),
            items: Vec::new(),
            is_map,
            key: None,
            span,
            anchor,
            height: 0,
            nodes_before,
            text_before,
            seen: HashMap::new(),
        });
        Ok(())
    }

    fn too_deep(&self, span: Span) -> Problem {
        Problem::error(span, format!("nested deeper than {} levels", self.limits.depth))
    }

    fn close(&mut self, end: Span) -> Result<(), Problem> {
        // The parser sends as many ends as starts.
        let Some(open) = self.stack.pop() else { return Ok(()) };
        let span = self.trimmed(open.span.start, end.end);
        let value = if open.is_map { Value::Map(open.entries) } else { Value::Seq(open.items) };
        let node = Node { value, span };
        let (nodes, text) = (self.nodes - open.nodes_before, self.text_bytes - open.text_before);
        self.remember(open.anchor, &node, nodes, open.height + 1, text)?;
        if let Some(parent) = self.stack.last_mut() {
            parent.height = parent.height.max(open.height + 1);
        }
        self.push(node)
    }

    /// Block collections end where the next token begins: white space behind them is not theirs.
    fn trimmed(&self, start: u32, end: u32) -> Span {
        let (start, end) = (start as usize - self.base, (end as usize).saturating_sub(self.base));
        let text = self.document.get(start..end.max(start)).unwrap_or("");
        Span::new(self.base + start, self.base + start + text.trim_end().len())
    }

    fn remember(
        &mut self,
        anchor: usize,
        node: &Node<'a>,
        nodes: usize,
        height: usize,
        text_bytes: usize,
    ) -> Result<(), Problem> {
        if anchor != 0 {
            // The copy takes memory as the node itself does.
            self.count(nodes, text_bytes, node.span)?;
            self.anchors.insert(anchor, Anchored { node: node.clone(), nodes, height, text_bytes });
        }
        Ok(())
    }

    fn alias(&mut self, anchor: usize, span: Span) -> Result<(), Problem> {
        let Some(anchored) = self.anchors.get(&anchor) else {
            return Err(Problem::error(span, "the alias stands within the value that it refers to")
                .hint("a manifest can't contain itself"));
        };
        let (nodes, height, text_bytes) = (anchored.nodes, anchored.height, anchored.text_bytes);
        self.count(nodes, text_bytes, span)?;
        if self.stack.len() + height > self.limits.depth {
            return Err(self.too_deep(span));
        }
        if let Some(parent) = self.stack.last_mut() {
            parent.height = parent.height.max(height);
        }
        // Counted above; looked up again because `count` borrows all of `self`.
        let Some(anchored) = self.anchors.get(&anchor) else { return Ok(()) };
        let node = Node { value: anchored.node.value.clone(), span };
        self.push(node)
    }

    /// Gives a finished node to the collection that is open, as key, value or item.
    fn push(&mut self, node: Node<'a>) -> Result<(), Problem> {
        let Some(open) = self.stack.last_mut() else {
            self.root = Some(node);
            return Ok(());
        };
        if !open.is_map {
            open.items.push(node);
            return Ok(());
        }
        let Some((key, key_plain, key_span)) = open.key.take() else {
            let Value::Scalar(scalar) = node.value else {
                return Err(Problem::error(node.span, "a key must be a text, not a mapping or a list"));
            };
            if scalar.plain && scalar.text == "<<" {
                return Err(Problem::error(node.span, "merge keys (`<<`) are not part of YAML 1.2")
                    .hint("write the fields out, or alias whole values (`spec: *base`)"));
            }
            open.key = Some((scalar.text, scalar.plain && scalar.tag.is_none(), node.span));
            return Ok(());
        };
        let first = if open.entries.len() < FEW_KEYS {
            open.entries.iter().find(|entry| entry.key == key).map(|entry| entry.key_span)
        } else {
            if open.seen.is_empty() {
                open.seen = open.entries.iter().map(|entry| (entry.key.clone(), entry.key_span)).collect();
            }
            let first = open.seen.get(&key).copied();
            if first.is_none() {
                open.seen.insert(key.clone(), key_span);
            }
            first
        };
        if let Some(first) = first {
            let mut problem =
                Problem::error(key_span, format!("the key `{key}` stands twice in this mapping"));
            problem.related.push((first, "first here".to_owned()));
            if self.problems.len() < self.limits.problems {
                self.problems.push(problem.hint("remove one of them; which one counts is anyone's guess"));
            }
            return Ok(());
        }
        open.entries.push(Entry { key, key_plain, key_span, value: node });
        Ok(())
    }
}
