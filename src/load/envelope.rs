//! What all manifests have in common: version, kind, metadata, `List`s; and the way of every document
//! from its text to a `Manifest`.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::check::{self, Path, first_key, is_null, scalar_type, unknown_name};
use super::diagnostic::Diagnostic;
use super::document::{self, Entry, Node, Problem, Value};
use super::scalar::Typed;
use super::shape::Shapes;
use super::source::Sources;
use super::text::{Origin, SourceFile, Span};
use super::{API_VERSION, Loaded, Manifest, Options, suggest};
use crate::kinds;
use crate::name::{Kind, ObjectId, ObjectName};

/// All that came of one document.
#[derive(Default)]
struct Outcome {
    manifests: Vec<Manifest>,
    problems: Vec<Diagnostic>,
    unusable: Vec<ObjectId>,
}

pub fn load_sources(sources: Sources, options: &Options) -> Loaded {
    let mut jobs: Vec<(Arc<SourceFile>, Range<usize>)> = Vec::new();
    for file in &sources.files {
        jobs.extend(document::split(file.text()).into_iter().map(|range| (Arc::clone(file), range)));
    }
    let outcomes = run_all(&jobs, options);
    let mut loaded = Loaded {
        manifests: Vec::with_capacity(outcomes.len()),
        problems: sources.problems,
        unusable: BTreeSet::new(),
        complete: true,
        fingerprint: sources.fingerprint,
    };
    for outcome in outcomes {
        loaded.manifests.extend(outcome.manifests);
        loaded.problems.extend(outcome.problems);
        loaded.unusable.extend(outcome.unusable);
    }
    refuse_duplicates(&mut loaded);
    loaded.complete = !loaded.problems.iter().any(Diagnostic::is_error);
    loaded
}

/// Documents up to which threads cost more than they save.
const FEW_DOCUMENTS: usize = 64;
/// Documents that a thread takes at a time.
const BATCH: usize = 32;

/// Loads each document, on all processors where that pays; outcomes are in the order of `jobs`.
fn run_all(jobs: &[(Arc<SourceFile>, Range<usize>)], options: &Options) -> Vec<Outcome> {
    let run = |job: &(Arc<SourceFile>, Range<usize>)| load_document(&job.0, job.1.clone(), options);
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
    if jobs.len() <= FEW_DOCUMENTS || threads == 1 {
        return jobs.iter().map(run).collect();
    }
    let batches: Vec<_> = jobs.chunks(BATCH).collect();
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(batch) = batches.get(index) else { return done };
            done.push((index, batch.iter().map(run).collect::<Vec<_>>()));
        }
    };
    let mut done: Vec<(usize, Vec<Outcome>)> = std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let mut done = work();
        for thread in others {
            match thread.join() {
                Ok(part) => done.extend(part),
                // A bug in here must not be taken for an empty source.
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        done
    });
    done.sort_unstable_by_key(|(index, _)| *index);
    done.into_iter().flat_map(|(_, outcomes)| outcomes).collect()
}

/// Two manifests of one object: neither is taken, since nobody can say which was meant.
fn refuse_duplicates(loaded: &mut Loaded) {
    let mut first: HashMap<&ObjectId, usize> = HashMap::with_capacity(loaded.manifests.len());
    let mut twice: BTreeSet<ObjectId> = BTreeSet::new();
    for (index, manifest) in loaded.manifests.iter().enumerate() {
        let Some(&before) = first.get(&manifest.id) else {
            first.insert(&manifest.id, index);
            continue;
        };
        twice.insert(manifest.id.clone());
        let problem = manifest
            .origin
            .error("/metadata/name", format!("{} is declared twice", manifest.id))
            .hint("rename one or remove it; until then neither is used")
            .related(loaded.manifests[before].origin.at("/metadata/name"), "declared first here");
        loaded.problems.push(problem);
    }
    if !twice.is_empty() {
        loaded.manifests.retain(|manifest| !twice.contains(&manifest.id));
        loaded.unusable.extend(twice);
    }
}

fn load_document(file: &Arc<SourceFile>, range: Range<usize>, options: &Options) -> Outcome {
    let mut outcome = Outcome::default();
    let parsed = document::parse(file.text(), range.clone(), &options.limits);
    let mut problems = parsed.problems;
    let root = parsed.root.filter(|root| !is_null(root));
    if let Some(root) = &root {
        let mut reader = Reader { file, range, problems: &mut problems, outcome: &mut outcome };
        match list_items(root) {
            Some(items) => reader.list(root, items),
            None => reader.object(root, ""),
        }
    }
    // A key that stands twice leaves the value of the first: the object can't be trusted.
    if problems.iter().any(|problem| problem.severity == super::Severity::Error) {
        outcome
            .unusable
            .extend(std::mem::take(&mut outcome.manifests).into_iter().map(|manifest| manifest.id));
    }
    report(file, problems, options.limits.problems, &mut outcome);
    outcome
}

/// Sorts a document's problems by place, drops what aliases repeat, and bounds their number.
fn report(file: &SourceFile, mut problems: Vec<Problem>, max: usize, outcome: &mut Outcome) {
    problems.sort_by_key(|problem| problem.span);
    problems.dedup();
    let more = problems.len().saturating_sub(max);
    for problem in problems.into_iter().take(max) {
        let mut diagnostic = Diagnostic { severity: problem.severity, ..Diagnostic::error(problem.message) }
            .hint_maybe(problem.hint)
            .at(file.place(problem.span));
        for (span, message) in problem.related {
            diagnostic = diagnostic.related(file.place(span).location, message);
        }
        outcome.problems.push(diagnostic);
    }
    if more > 0
        && let Some(last) = outcome.problems.last()
    {
        let mut diagnostic = Diagnostic::error(format!("{more} more problems in this document"));
        diagnostic.location = last.location.clone();
        outcome.problems.push(diagnostic);
    }
}

fn find<'n, 'a>(entries: &'n [Entry<'a>], key: &str) -> Option<&'n Entry<'a>> {
    entries.iter().find(|entry| entry.key == key)
}

fn text_of<'n>(node: &'n Node<'_>) -> Option<&'n str> {
    match &node.value {
        Value::Scalar(scalar) if scalar_type(scalar) == Typed::Text => Some(&scalar.text),
        _ => None,
    }
}

/// The items of a `kind: List`, as `kubectl get -o yaml` writes it.
fn list_items<'n, 'a>(root: &'n Node<'a>) -> Option<&'n Entry<'a>> {
    let entries = root.entries()?;
    let is_list = find(entries, "kind").and_then(|entry| text_of(&entry.value)) == Some("List");
    if is_list { find(entries, "items") } else { None }
}

struct Reader<'r> {
    file: &'r Arc<SourceFile>,
    range: Range<usize>,
    problems: &'r mut Vec<Problem>,
    outcome: &'r mut Outcome,
}

impl Reader<'_> {
    fn list(&mut self, root: &Node<'_>, items: &Entry<'_>) {
        for entry in root.entries().into_iter().flatten() {
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
            self.problems.push(problem.hint("it begins with `apiVersion:`, `kind:`, `metadata:` and `spec:`; several are separated by `---` lines"));
            return;
        };
        let before = self.problems.len();
        let place = first_key(node).unwrap_or(node.span);
        self.unknown_fields(entries);
        self.version(entries, place);
        let kind = self.kind(entries, place);
        let (name, labels, annotations) = self.metadata(entries, place);
        let spec = kind.and_then(|kind| self.spec(kind, entries, place));
        let (Some(kind), Some(name)) = (kind, name) else { return };
        let id = ObjectId::new(kind, name);
        let good = !self.problems[before..].iter().any(|problem| problem.severity == super::Severity::Error);
        match spec {
            Some(spec) if good => {
                let origin = Origin::new(Arc::clone(self.file), self.range.clone(), place, prefix);
                self.outcome.manifests.push(Manifest { id, labels, annotations, spec, origin });
            }
            _ => self.outcome.unusable.push(id),
        }
    }

    fn unknown_fields(&mut self, entries: &[Entry<'_>]) {
        // `status` is what a server or `vmctl get -o yaml` wrote: not an instruction, so not read.
        let known = ["apiVersion", "kind", "metadata", "spec", "status"];
        for entry in entries.iter().filter(|entry| !known.contains(&entry.key.as_ref())) {
            self.problems.push(unknown_name(entry, "", known[..4].iter().copied()));
        }
    }

    /// The text of a field that every manifest has.
    fn required_text<'n>(
        &mut self,
        entries: &'n [Entry<'_>],
        name: &str,
        place: Span,
        hint: &str,
    ) -> Option<(&'n str, Span)> {
        let Some(entry) = find(entries, name) else {
            self.problems
                .push(Problem::error(place, format!("the manifest lacks the field `{name}`")).hint(hint));
            return None;
        };
        if let Some(text) = text_of(&entry.value) {
            return Some((text, entry.value.span));
        }
        let at = if is_null(&entry.value) { entry.key_span } else { entry.value.span };
        self.problems.push(Problem::error(at, format!("`{name}` must be a text")).hint(hint));
        None
    }

    fn version(&mut self, entries: &[Entry<'_>], place: Span) {
        let hint = format!("write `apiVersion: {API_VERSION}`");
        let Some((text, span)) = self.required_text(entries, "apiVersion", place, &hint) else { return };
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

    fn kind(&mut self, entries: &[Entry<'_>], place: Span) -> Option<Kind> {
        let all = suggest::list(Kind::ALL.into_iter().map(Kind::as_str), "or");
        let hint = format!("it can be {all}");
        let (text, span) = self.required_text(entries, "kind", place, &hint)?;
        if let Ok(kind) = text.parse::<Kind>() {
            return Some(kind);
        }
        let near = Kind::parse_alias(text)
            .map(Kind::as_str)
            .or_else(|| suggest::nearest(text, Kind::ALL.into_iter().map(Kind::as_str)));
        let (message, hint) = match (text, near) {
            ("List", _) => (
                "a `List` needs `items` and can't be within another".to_owned(),
                "write `items:` with manifests".to_owned(),
            ),
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
        place: Span,
    ) -> (Option<ObjectName>, BTreeMap<String, String>, BTreeMap<String, String>) {
        let mut found = (None, BTreeMap::new(), BTreeMap::new());
        let Some(metadata) = find(entries, "metadata") else {
            self.problems.push(
                Problem::error(place, "the manifest lacks the field `metadata`")
                    .hint("write `metadata: {name: …}`"),
            );
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
                "labels" => found.1 = self.text_map(entry, "metadata.labels", check_label_value),
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
            if let Err(message) = check_label_key(&pair.key) {
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

    fn spec(&mut self, kind: Kind, entries: &[Entry<'_>], place: Span) -> Option<kinds::Spec> {
        let Some(entry) = find(entries, "spec") else {
            self.problems.push(Problem::error(place, "the manifest lacks the field `spec`").hint(format!(
                "`vmctl explain {kind}.spec` lists its fields; `spec: {{}}` leaves all at their defaults"
            )));
            return None;
        };
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
        if self.problems[before..].iter().any(|problem| problem.severity == super::Severity::Error) {
            return None;
        }
        match kinds::decode(kind, value) {
            Ok(spec) => Some(spec),
            Err(found) => {
                for problem in found {
                    let span = locate(entry, &problem.pointer);
                    self.problems.push(Problem::error(span, problem.message).hint_maybe(problem.hint));
                }
                None
            }
        }
    }
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
/// for what isn't there, of the nearest that holds it.
fn locate(spec: &Entry<'_>, pointer: &str) -> Span {
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
        Value::Scalar(_) if !missing && !is_null(node) => node.span,
        _ => key,
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

/// The name part of a label key, or a label value: Kubernetes' "qualified name".
fn check_name_part(text: &str) -> Result<(), String> {
    let alnum = |byte: &u8| byte.is_ascii_alphanumeric();
    let bytes = text.as_bytes();
    if bytes.len() > 63 {
        return Err(format!("has {} bytes; at most 63 are allowed", bytes.len()));
    }
    if !bytes.iter().all(|byte| alnum(byte) || matches!(byte, b'-' | b'_' | b'.')) {
        return Err("may only hold letters, digits, `-`, `_` and `.`".to_owned());
    }
    if !bytes.first().is_none_or(alnum) || !bytes.last().is_none_or(alnum) {
        return Err("must begin and end with a letter or a digit".to_owned());
    }
    Ok(())
}

fn check_label_value(text: &str) -> Result<(), String> {
    check_name_part(text)
}

/// `[prefix/]name`, the prefix a DNS name.
fn check_label_key(key: &str) -> Result<(), String> {
    let (prefix, name) = match key.split_once('/') {
        Some((prefix, name)) => (Some(prefix), name),
        None => (None, key),
    };
    if name.is_empty() {
        return Err("has no name".to_owned());
    }
    if let Some(prefix) = prefix {
        let good = |label: &str| {
            let bytes = label.as_bytes();
            let alnum = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
            bytes.iter().all(|byte| alnum(byte) || *byte == b'-')
                && bytes.first().is_some_and(alnum)
                && bytes.last().is_some_and(alnum)
        };
        if prefix.len() > 253 || !prefix.split('.').all(good) {
            return Err("has a prefix that is not a DNS name such as `example.org`".to_owned());
        }
    }
    check_name_part(name)
}
