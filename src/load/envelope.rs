//! What all manifests have in common: version, kind, metadata; and the `List` that holds several.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use super::batch::Outcome;
use super::check::{self, Path, first_key, is_null, scalar_type, unknown_name};
use super::document::{Entry, Node, Problem, Value};
use super::scalar::Typed;
use super::shape::Shapes;
use super::text::{Origin, SourceFile, Span};
use super::{API_VERSION, Manifest, Severity, labels, suggest};
use crate::kinds;
use crate::name::{Kind, ObjectId, ObjectName};

fn find<'n, 'a>(entries: &'n [Entry<'a>], key: &str) -> Option<&'n Entry<'a>> {
    entries.iter().find(|entry| entry.key == key)
}

fn text_of<'n>(node: &'n Node<'_>) -> Option<&'n str> {
    match &node.value {
        Value::Scalar(scalar) if scalar_type(scalar) == Typed::Text => Some(&scalar.text),
        _ => None,
    }
}

/// Whether this is a `kind: List`, as `kubectl get -o yaml` writes it.
fn is_list(root: &Node<'_>) -> bool {
    let kind = root.entries().and_then(|entries| find(entries, "kind"));
    kind.and_then(|entry| text_of(&entry.value)) == Some("List")
}

/// Reads the manifests of one document.
pub fn read(
    file: &Arc<SourceFile>,
    range: Range<usize>,
    root: &Node<'_>,
    problems: &mut Vec<Problem>,
    outcome: &mut Outcome,
) {
    // `---` and nothing, or `null`: there is no manifest here.
    if is_null(root) {
        return;
    }
    let mut reader = Reader { file, range, problems, outcome };
    match root.entries() {
        Some(entries) if is_list(root) => reader.list(entries),
        _ => reader.object(root, ""),
    }
}

struct Reader<'r> {
    file: &'r Arc<SourceFile>,
    range: Range<usize>,
    problems: &'r mut Vec<Problem>,
    outcome: &'r mut Outcome,
}

impl Reader<'_> {
    fn list(&mut self, entries: &[Entry<'_>]) {
        for entry in entries {
            match entry.key.as_ref() {
                "apiVersion" if matches!(text_of(&entry.value), Some("v1" | API_VERSION)) => {}
                "apiVersion" => self.problems.push(
                    Problem::error(entry.value.span, "the `apiVersion` of a `List` is `v1`")
                        .hint(format!("write `apiVersion: v1` or `apiVersion: {API_VERSION}`")),
                ),
                // `metadata` holds nothing but what a server wrote.
                "kind" | "items" | "metadata" => {}
                _ => self.problems.push(unknown_name(entry, "", ["apiVersion", "kind", "items"].into_iter())),
            }
        }
        let Some(items) = find(entries, "items") else {
            let place = entries.first().map_or(Span::new(0, 0), |entry| entry.key_span);
            let problem = Problem::error(place, "a `List` lacks the field `items`");
            return self.problems.push(problem.hint("write `items:` with a list of manifests"));
        };
        match &items.value.value {
            Value::Seq(objects) => {
                for (index, object) in objects.iter().enumerate() {
                    self.object(object, &format!("/items/{index}"));
                }
            }
            _ if is_null(&items.value) => {}
            _ => self.problems.push(Problem::error(items.key_span, "`items` must be a list of manifests")),
        }
    }

    /// Reads one manifest; `prefix` is its pointer in the document.
    fn object(&mut self, node: &Node<'_>, prefix: &str) {
        let Some(entries) = node.entries() else {
            let found = match &node.value {
                Value::Seq(_) => "a list",
                _ => "a single value",
            };
            let problem = Problem::error(node.span, format!("a manifest is a mapping, but this is {found}"));
            self.problems.push(problem.hint(MANIFEST_HINT));
            return;
        };
        let before = self.problems.len();
        let place = first_key(node).unwrap_or(node.span);
        self.unknown_fields(entries);
        self.missing_fields(entries, place);
        self.version(entries);
        let kind = self.kind(entries);
        let (name, labels, annotations) = self.metadata(entries);
        let spec = kind.and_then(|kind| self.spec(kind, entries));
        let (Some(kind), Some(name)) = (kind, name) else { return };
        let id = ObjectId::new(kind, name);
        let origin = Origin::new(Arc::clone(self.file), self.range.clone(), place, prefix);
        self.outcome.declared.push((id.clone(), origin.clone()));
        if let Some(spec) = spec
            && !has_error(&self.problems[before..])
        {
            self.outcome.manifests.push(Manifest { id, labels, annotations, spec, origin });
        }
    }

    fn unknown_fields(&mut self, entries: &[Entry<'_>]) {
        // `status` is what a server or `vmctl get -o yaml` wrote: not an instruction, so not read.
        let known = |entry: &&Entry<'_>| FIELDS.contains(&entry.key.as_ref()) || entry.key == "status";
        for entry in entries.iter().filter(|entry| !known(entry)) {
            self.problems.push(unknown_name(entry, "", FIELDS.into_iter()));
        }
    }

    /// All fields that every manifest has and this one lacks, as one problem: most often the text is no
    /// manifest at all.
    fn missing_fields(&mut self, entries: &[Entry<'_>], place: Span) {
        let mut missing: Vec<&str> =
            FIELDS.into_iter().filter(|name| find(entries, name).is_none()).collect();
        // Looked for only where something is missing: distances between names take time.
        missing.retain(|name| {
            let misspelt = |entry: &Entry<'_>| suggest::nearest(&entry.key, FIELDS) == Some(*name);
            !entries.iter().any(misspelt)
        });
        let kind = find(entries, "kind").and_then(|entry| text_of(&entry.value));
        let hint = match missing[..] {
            [] => return,
            ["apiVersion"] => format!("write `apiVersion: {API_VERSION}`"),
            ["kind"] => all_kinds(),
            ["metadata"] => "write `metadata: {name: …}`".to_owned(),
            ["spec"] => format!(
                "`vmctl explain {}` lists its fields; `spec: {{}}` leaves all at their defaults",
                kind.unwrap_or("KIND")
            ),
            _ => MANIFEST_HINT.to_owned(),
        };
        let plural = if missing.len() == 1 { "field" } else { "fields" };
        let missing = suggest::list(missing.iter().copied(), "and");
        self.problems
            .push(Problem::error(place, format!("the manifest lacks the {plural} {missing}")).hint(hint));
    }

    /// The text of a field that every manifest has; None if it is missing or none.
    fn text<'n>(&mut self, entries: &'n [Entry<'_>], name: &str, hint: &str) -> Option<(&'n str, Span)> {
        let entry = find(entries, name)?;
        if let Some(text) = text_of(&entry.value) {
            return Some((text, entry.value.span));
        }
        let at = if is_null(&entry.value) { entry.key_span } else { entry.value.span };
        self.problems.push(Problem::error(at, format!("`{name}` must be a text")).hint(hint));
        None
    }

    fn version(&mut self, entries: &[Entry<'_>]) {
        let hint = format!("write `apiVersion: {API_VERSION}`");
        let Some((text, span)) = self.text(entries, "apiVersion", &hint) else { return };
        if text == API_VERSION {
            return;
        }
        let message = match text.split_once('/') {
            Some(("vmctl.dev", version)) => {
                format!("this vmctl doesn't know the version `{version}` of its manifests")
            }
            _ => format!("`{text}` is not an API of vmctl"),
        };
        self.problems.push(Problem::error(span, message).hint(hint));
    }

    fn kind(&mut self, entries: &[Entry<'_>]) -> Option<Kind> {
        let hint = all_kinds();
        let (text, span) = self.text(entries, "kind", &hint)?;
        if let Ok(kind) = text.parse::<Kind>() {
            return Some(kind);
        }
        let near = Kind::parse_alias(text)
            .map(Kind::as_str)
            .or_else(|| suggest::nearest(text, Kind::ALL.into_iter().map(Kind::as_str)));
        let (message, hint) = match (text, near) {
            ("List", _) => ("a `List` can't be within another".to_owned(), hint),
            (_, Some(near)) => {
                (format!("unknown kind `{text}`"), format!("did you mean `{near}`? {}", capital(&hint)))
            }
            (_, None) => (format!("unknown kind `{text}`"), hint),
        };
        self.problems.push(Problem::error(span, message).hint(hint));
        None
    }

    #[allow(clippy::type_complexity)]
    fn metadata(
        &mut self,
        entries: &[Entry<'_>],
    ) -> (Option<ObjectName>, BTreeMap<String, String>, BTreeMap<String, String>) {
        let mut found = (None, BTreeMap::new(), BTreeMap::new());
        let Some(metadata) = find(entries, "metadata") else {
            return found;
        };
        let Some(fields) = metadata.value.entries() else {
            self.problems
                .push(Problem::error(metadata.key_span, "`metadata` must be a mapping with a `name`"));
            return found;
        };
        for entry in fields {
            match entry.key.as_ref() {
                "name" => {}
                "labels" => found.1 = self.text_map(entry, "metadata.labels", labels::check_value),
                "annotations" => found.2 = self.text_map(entry, "metadata.annotations", |_| Ok(())),
                "namespace" => self.problems.push(
                    Problem::error(entry.key_span, "vmctl has no namespaces")
                        .hint("remove it; `--set NAME` keeps the objects of several sources apart"),
                ),
                _ => self.problems.push(unknown_name(
                    entry,
                    "metadata",
                    ["name", "labels", "annotations"].into_iter(),
                )),
            }
        }
        let annotations: usize = found.2.iter().map(|(key, value)| key.len() + value.len()).sum();
        if annotations > ANNOTATIONS_BYTES_MAX {
            let message = format!(
                "the annotations have {annotations} bytes; at most {ANNOTATIONS_BYTES_MAX} are allowed"
            );
            self.problems.push(Problem::error(metadata.key_span, message));
        }
        found.0 = self.name(fields, metadata.key_span);
        found
    }

    fn name(&mut self, fields: &[Entry<'_>], place: Span) -> Option<ObjectName> {
        let Some(entry) = find(fields, "name") else {
            let known = ["name", "labels", "annotations"];
            if fields.iter().any(|field| suggest::nearest(&field.key, known) == Some("name")) {
                return None;
            }
            self.problems.push(Problem::error(place, "`metadata` lacks the field `name`").hint(NAME_HINT));
            return None;
        };
        let Value::Scalar(scalar) = &entry.value.value else {
            self.problems
                .push(Problem::error(entry.key_span, "`metadata.name` must be a text").hint(NAME_HINT));
            return None;
        };
        let mut problems = Vec::new();
        let path = Path::Field(&Path::Field(&Path::Root, "metadata"), "name");
        let text = check::check(text_shape(), &entry.value, path, entry.key_span, &mut problems);
        let sound = problems.is_empty();
        self.problems.extend(problems);
        text.as_ref()?;
        match ObjectName::parse(&scalar.text) {
            Ok(name) if sound => return Some(name),
            Ok(_) => {}
            Err(error) => {
                let at = if scalar.text.is_empty() { entry.key_span } else { entry.value.span };
                let hint = suggest_name(&scalar.text)
                    .map_or(NAME_HINT.to_owned(), |name| format!("for example `{name}`"));
                self.problems.push(Problem::error(at, format!("`metadata.name`: {}", error.0)).hint(hint));
            }
        }
        None
    }

    fn text_map(
        &mut self,
        entry: &Entry<'_>,
        name: &str,
        check_value: fn(&str) -> Result<(), String>,
    ) -> BTreeMap<String, String> {
        let mut found = BTreeMap::new();
        if is_null(&entry.value) {
            return found;
        }
        let path = Path::Field(&Path::Root, name);
        let Some(serde_json::Value::Object(values)) =
            check::check(text_map_shape(), &entry.value, path, entry.key_span, self.problems)
        else {
            return found;
        };
        for pair in entry.value.entries().into_iter().flatten() {
            if let Err(message) = labels::check_key(&pair.key) {
                self.problems.push(Problem::error(
                    pair.key_span,
                    format!("`{name}`: the key `{}` {message}", pair.key),
                ));
            }
            if let Some(Err(message)) = text_of(&pair.value).map(check_value) {
                let text = text_of(&pair.value).unwrap_or("");
                self.problems.push(Problem::error(
                    pair.value.span,
                    format!("`{name}.{}`: `{text}` {message}", pair.key),
                ));
            }
        }
        for (key, value) in values {
            if let serde_json::Value::String(value) = value {
                found.insert(key, value);
            }
        }
        found
    }

    fn spec(&mut self, kind: Kind, entries: &[Entry<'_>]) -> Option<kinds::Spec> {
        let entry = find(entries, "spec")?;
        if is_null(&entry.value) {
            self.problems.push(
                Problem::error(entry.key_span, "`spec` is empty")
                    .hint("write `spec: {}` if all fields shall have their defaults"),
            );
            return None;
        }
        let before = self.problems.len();
        let path = Path::Field(&Path::Root, "spec");
        let value = check::check(Shapes::of(kind), &entry.value, path, entry.key_span, self.problems)?;
        let sound = !has_error(&self.problems[before..]);
        let found = match kinds::decode(kind, value) {
            Ok(spec) if sound => return Some(spec),
            Ok(_) => return None,
            Err(found) => found,
        };
        let mut more = Vec::new();
        for problem in found {
            let (span, exact) = locate(entry, &problem.pointer);
            // In a spec with errors only what is wrong with a text or number that was really written.
            let known = |before: &Problem| before.span == span && before.severity == Severity::Error;
            if sound || (exact && !self.problems[before..].iter().any(known)) {
                let message = format!("`{}`: {}", dotted(&problem.pointer), problem.message);
                more.push(Problem::error(span, message).hint_maybe(problem.hint));
            }
        }
        // Whoever must rewrite a value needs no warning of how it is written.
        self.problems.retain(|before| {
            before.severity == Severity::Error || more.iter().all(|problem| problem.span != before.span)
        });
        self.problems.extend(more);
        None
    }
}

pub fn has_error(problems: &[Problem]) -> bool {
    problems.iter().any(|problem| problem.severity == Severity::Error)
}

/// `/disks/0/volume` as `spec.disks[0].volume`.
fn dotted(pointer: &str) -> String {
    let mut text = "spec".to_owned();
    for token in pointer.split('/').skip(1) {
        match token.parse::<usize>() {
            Ok(index) => text.push_str(&format!("[{index}]")),
            Err(_) => {
                text.push('.');
                text.push_str(&token.replace("~1", "/").replace("~0", "~"));
            }
        }
    }
    text
}

/// The fields of a manifest.
const FIELDS: [&str; 4] = ["apiVersion", "kind", "metadata", "spec"];

const MANIFEST_HINT: &str =
    "a manifest has `apiVersion:`, `kind:`, `metadata:` and `spec:`; several are separated by `---` lines";

fn all_kinds() -> String {
    format!("it can be {}", suggest::list(Kind::ALL.into_iter().map(Kind::as_str), "or"))
}

const NAME_HINT: &str = "a name has 1 to 63 lower-case letters, digits and `-`, such as `web-1`";

/// The limit of Kubernetes, so that what passes here passes there.
const ANNOTATIONS_BYTES_MAX: usize = 256 << 10;

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |first| first.to_uppercase().chain(chars).collect())
}

/// A valid name that is near to `text`.
fn suggest_name(text: &str) -> Option<String> {
    let plain: String = text
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
        .take(63)
        .collect();
    let plain = plain.trim_matches('-');
    (text.is_ascii() && ObjectName::parse(plain).is_ok()).then(|| plain.to_owned())
}

/// The span that a pointer within the spec means: of a value, or of the key where it is a collection;
/// for what isn't there, of the nearest that holds it. And whether it is just that value.
fn locate(spec: &Entry<'_>, pointer: &str) -> (Span, bool) {
    let mut node = &spec.value;
    let mut key = spec.key_span;
    let mut missing = false;
    for token in pointer.split('/').skip(1) {
        let token = token.replace("~1", "/").replace("~0", "~");
        let next = match &node.value {
            Value::Map(entries) => find(entries, &token).map(|entry| (&entry.value, entry.key_span)),
            Value::Seq(items) => token
                .parse::<usize>()
                .ok()
                .and_then(|index| items.get(index))
                .map(|item| (item, first_key(item).unwrap_or(item.span))),
            Value::Scalar(_) => None,
        };
        let Some((below, at)) = next else {
            missing = true;
            break;
        };
        (node, key) = (below, at);
    }
    match &node.value {
        Value::Scalar(_) if !missing && !is_null(node) => (node.span, true),
        _ => (key, false),
    }
}

fn text_shape() -> &'static Shapes {
    static SHAPE: std::sync::OnceLock<Shapes> = std::sync::OnceLock::new();
    SHAPE.get_or_init(|| Shapes::compile(&serde_json::json!({"type": "string"})))
}

fn text_map_shape() -> &'static Shapes {
    static SHAPE: std::sync::OnceLock<Shapes> = std::sync::OnceLock::new();
    let schema = || serde_json::json!({"type": "object", "additionalProperties": {"type": "string"}});
    SHAPE.get_or_init(|| Shapes::compile(&schema()))
}
