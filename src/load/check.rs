//! Walks a tree and a schema together: reports every problem with its place, and gives the JSON value
//! that the tree stands for. Knows no kind.

use std::fmt;

use serde_json::{Map, Value as Json};

use super::document::{Entry, Node, Problem, Scalar, Value};
use super::scalar::{Surprise, Typed, core, surprise};
use super::shape::{Field, Form, MapForm, Shape, ShapeId, Shapes};
use super::suggest;
use super::text::Span;

/// Where we are, as people write it: `spec.disks[0].volume`. Lives on the stack of the walk.
#[derive(Clone, Copy)]
pub enum Path<'a> {
    Root,
    Field(&'a Path<'a>, &'a str),
    Item(&'a Path<'a>, usize),
}

impl fmt::Display for Path<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Path::Root => Ok(()),
            Path::Field(Path::Root, name) => f.write_str(name),
            Path::Field(parent, name) => write!(f, "{parent}.{name}"),
            Path::Item(parent, index) => write!(f, "{parent}[{index}]"),
        }
    }
}

/// Checks `node` against `shapes`. What is wrong is reported; in the value it is left out or, where it is
/// required, replaced by a stand-in: if an error was reported, the value serves to find more of them only.
pub fn check(
    shapes: &Shapes,
    node: &Node<'_>,
    path: Path<'_>,
    key: Span,
    problems: &mut Vec<Problem>,
) -> Option<Json> {
    Walk { shapes, problems }.value(shapes.root(), node, &path, key)
}

struct Walk<'s, 'p> {
    shapes: &'s Shapes,
    problems: &'p mut Vec<Problem>,
}

impl<'s> Walk<'s, '_> {
    /// `key` is what to point at when the value itself is empty or lacks something.
    fn value(&mut self, id: ShapeId, node: &Node<'_>, path: &Path<'_>, key: Span) -> Option<Json> {
        let shape = self.shapes.get(id);
        match (&shape.form, &node.value) {
            (Form::Any, _) => Some(self.plain_json(node, path)),
            (_, Value::Scalar(scalar)) if scalar_type(scalar) == Typed::Null && shape.nullable => {
                Some(Json::Null)
            }
            (Form::OneOf(ids), _) => self.one_of(ids, node, path, key),
            (Form::Map(form), Value::Map(entries)) => self.map(form, entries, path, key),
            (Form::Seq { item, min, max }, Value::Seq(items)) => {
                self.count(items.len(), *min, *max, path, key);
                let values = items.iter().enumerate().map(|(index, node)| {
                    let at = first_key(node).unwrap_or(node.span);
                    let value = self.value(*item, node, &Path::Item(path, index), at);
                    value.unwrap_or_else(|| self.stand_in(*item, 0))
                });
                Some(Json::Array(values.collect()))
            }
            (_, Value::Scalar(scalar)) => self.scalar(shape, scalar, node.span, path, key),
            (_, value) => {
                let found = if matches!(value, Value::Map(_)) { "a mapping" } else { "a list" };
                let at = first_key(node).unwrap_or(node.span);
                let mut problem = Problem::error(at, must_be(path, &expected(self.shapes, shape), found));
                match (&shape.form, value) {
                    (Form::Map(_), Value::Seq(_)) => problem = problem.hint("remove the `- `"),
                    (Form::Seq { .. }, Value::Map(_)) => problem = problem.hint("begin each entry with `- `"),
                    _ => {}
                }
                self.problems.push(problem);
                None
            }
        }
    }

    fn count(&mut self, have: usize, min: usize, max: usize, path: &Path<'_>, key: Span) {
        if have < min {
            self.problems
                .push(Problem::error(key, format!("`{path}` has {have} entries; it needs at least {min}")));
        } else if have > max {
            self.problems
                .push(Problem::error(key, format!("`{path}` has {have} entries; at most {max} are allowed")));
        }
    }

    fn map(&mut self, form: &MapForm, entries: &[Entry<'_>], path: &Path<'_>, key: Span) -> Option<Json> {
        let mut values = Map::new();
        // Required fields that an unknown one was probably meant to be: said once is enough.
        let mut meant: Vec<&str> = Vec::new();
        for entry in entries {
            let below = Path::Field(path, &entry.key);
            let field = form.fields.iter().find(|field| field.name == entry.key);
            let id = match (field, form.others) {
                (Some(field), _) => field.shape,
                (None, Some(others)) => {
                    self.free_key(entry);
                    others
                }
                (None, None) => {
                    let names = form.fields.iter().map(|field| field.name.as_str());
                    let near = suggest::nearest(&entry.key, names.clone());
                    meant.extend(near);
                    let problem = unknown_name(entry, &path.to_string(), names);
                    self.problems.push(match self.elsewhere(form, &entry.key).filter(|_| near.is_none()) {
                        Some(place) => problem.hint(format!("did you mean `{path}.{place}`?")),
                        None => problem,
                    });
                    continue;
                }
            };
            // `mtu:` and `mtu: null` say the same as no `mtu` at all, as everywhere in Kubernetes.
            if let Some(field) = field
                && is_null(&entry.value)
                && !self.shapes.get(id).nullable
            {
                if field.required {
                    let problem = Problem::error(entry.key_span, format!("`{below}` has no value"));
                    self.problems.push(problem.hint_maybe(about(field)));
                }
                continue;
            }
            if let Some(value) = self.value(id, &entry.value, &below, entry.key_span) {
                values.insert(entry.key.clone().into_owned(), value);
            }
        }
        for field in form.fields.iter().filter(|field| field.required) {
            let declared = entries.iter().any(|entry| entry.key == field.name);
            if !declared && !meant.contains(&field.name.as_str()) {
                let message = format!("`{path}` lacks the field `{}`", field.name);
                self.problems.push(Problem::error(key, message).hint_maybe(about(field)));
            }
            if !values.contains_key(&field.name) {
                values.insert(field.name.clone(), self.stand_in(field.shape, 0));
            }
        }
        Some(Json::Object(values))
    }

    /// Where among the parts of this mapping a field of that name is: `boot.kernel`, `disks[].volume`.
    fn elsewhere(&self, form: &MapForm, name: &str) -> Option<String> {
        form.fields.iter().find_map(|field| {
            let (brackets, inner) = match &self.shapes.get(field.shape).form {
                Form::Seq { item, .. } => ("[]", &self.shapes.get(*item).form),
                inner => ("", inner),
            };
            let Form::Map(inner) = inner else { return None };
            let found = inner.fields.iter().any(|field| field.name == name);
            found.then(|| format!("{}{brackets}.{name}", field.name))
        })
    }

    /// A value of the right form for what is missing or wrong (and reported as such), so that the rest
    /// can still be decoded and all problems come in one run.
    fn stand_in(&self, id: ShapeId, depth: usize) -> Json {
        // A type that requires itself has no finite value; decoding will say so.
        if depth > 16 {
            return Json::Null;
        }
        match &self.shapes.get(id).form {
            Form::Any => Json::Null,
            Form::Bool => Json::Bool(false),
            Form::Int { min, .. } => Json::from(i64::try_from(*min).unwrap_or(0).max(0)),
            Form::Number { min, .. } => Json::from(min.max(0.0)),
            Form::Text { choices, .. } => Json::from(choices.first().map_or("", String::as_str)),
            Form::Seq { .. } => Json::Array(Vec::new()),
            Form::OneOf(ids) => ids.first().map_or(Json::Null, |&id| self.stand_in(id, depth + 1)),
            Form::Map(form) => {
                let required = form.fields.iter().filter(|field| field.required);
                let value = |field: &Field| (field.name.clone(), self.stand_in(field.shape, depth + 1));
                Json::Object(required.map(value).collect())
            }
        }
    }

    /// Keys that the user chooses are texts: `yes: x` or `1: x` would be another key elsewhere.
    fn free_key(&mut self, entry: &Entry<'_>) {
        let typed = core(&entry.key);
        if entry.key_plain
            && (typed != Typed::Text || matches!(surprise(&entry.key), Some(Surprise::Bool(_))))
        {
            let message = format!("the key `{}` is not a text to every YAML reader", entry.key);
            self.problems
                .push(Problem::error(entry.key_span, message).hint(format!("quote it: \"{}\"", entry.key)));
        }
    }

    fn scalar(
        &mut self,
        shape: &Shape,
        scalar: &Scalar<'_>,
        span: Span,
        path: &Path<'_>,
        key: Span,
    ) -> Option<Json> {
        let typed = scalar_type(scalar);
        if typed == Typed::Null {
            let found = must_be(path, &expected(self.shapes, shape), "empty");
            self.problems.push(Problem::error(if span.start == span.end { key } else { span }, found));
            return None;
        }
        let text = scalar.text.as_ref();
        let odd = if scalar.plain && scalar.tag.is_none() { surprise(text) } else { None };
        match (&shape.form, typed) {
            (Form::Bool, Typed::Bool(value)) => return Some(Json::Bool(value)),
            (Form::Int { min, max }, Typed::Int(value)) => {
                if let Some(Surprise::Octal(octal)) = odd {
                    let message =
                        format!("`{path}`: `{text}` is {value} in YAML 1.2 and {octal} (octal) in YAML 1.1");
                    self.problems.push(
                        Problem::error(span, message)
                            .hint(format!("write {value}, or 0o{octal:o} if {octal} is meant")),
                    );
                    return None;
                }
                return self.integer(text, value, *min, *max, span, path);
            }
            (Form::Number { min, max }, Typed::Int(_) | Typed::Float(_)) => {
                let value = match typed {
                    Typed::Int(value) => value as f64,
                    Typed::Float(value) => value,
                    _ => f64::NAN,
                };
                if value >= *min && value <= *max && value.is_finite() {
                    return Some(Json::from(value));
                }
                self.problems.push(Problem::error(
                    span,
                    format!("`{path}` is {text}; it must be between {min} and {max}"),
                ));
                return None;
            }
            (Form::Text { choices, .. }, _) if choices.iter().any(|choice| choice == text) => {
                return Some(Json::from(text));
            }
            (Form::Text { choices, min_chars }, Typed::Text) => {
                return self.text(choices, *min_chars, text, odd, span, path);
            }
            _ => {}
        }
        let mut message = must_be(path, &expected(self.shapes, shape), typed.name());
        if !matches!(shape.form, Form::Map(_) | Form::Seq { .. }) && text.chars().count() <= 40 {
            message = format!("{message}: `{text}`");
        }
        let hint = scalar_hint(&shape.form, typed, scalar, odd);
        self.problems.push(Problem::error(span, message).hint_maybe(hint));
        None
    }

    fn integer(
        &mut self,
        text: &str,
        value: i128,
        min: i128,
        max: i128,
        span: Span,
        path: &Path<'_>,
    ) -> Option<Json> {
        let json = i64::try_from(value).map(Json::from).or_else(|_| u64::try_from(value).map(Json::from));
        match json {
            Ok(json) if (min..=max).contains(&value) => Some(json),
            _ => {
                let limits = if max >= i128::from(u32::MAX) && value < min {
                    format!("at least {min}")
                } else {
                    format!("between {min} and {max}")
                };
                self.problems.push(Problem::error(span, format!("`{path}` is {text}; it must be {limits}")));
                None
            }
        }
    }

    fn text(
        &mut self,
        choices: &[String],
        min_chars: usize,
        text: &str,
        odd: Option<Surprise>,
        span: Span,
        path: &Path<'_>,
    ) -> Option<Json> {
        if !choices.is_empty() {
            let names = || choices.iter().map(String::as_str);
            let all = suggest::list(names(), "or");
            let hint = match suggest::nearest(text, names()) {
                Some(near) if choices.len() > 1 => format!("did you mean `{near}`? It can be {all}"),
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("it can be {all}"),
            };
            self.problems.push(Problem::error(span, format!("`{path}` can't be `{text}`")).hint(hint));
            return None;
        }
        if text.chars().count() < min_chars {
            let message = if min_chars == 1 {
                "is empty".to_owned()
            } else {
                format!("has less than {min_chars} characters")
            };
            self.problems.push(Problem::error(span, format!("`{path}` {message}")));
            return None;
        }
        match odd {
            Some(Surprise::Bool(value)) => {
                let message =
                    format!("`{path}`: `{text}` without quotes is the boolean {value} to YAML 1.1 readers");
                self.problems.push(
                    Problem::error(span, message).hint(format!("write \"{text}\" if the text is meant")),
                );
                None
            }
            Some(Surprise::Sexagesimal(value)) if !is_mac_like(text) => {
                let message =
                    format!("`{path}`: `{text}` without quotes is the number {value} to YAML 1.1 readers");
                self.problems.push(Problem::warning(span, message).hint(format!("write \"{text}\"")));
                Some(Json::from(text))
            }
            _ => Some(Json::from(text)),
        }
    }

    /// The alternative that fits best: by its type first, then by the fewest problems.
    fn one_of(&mut self, ids: &[ShapeId], node: &Node<'_>, path: &Path<'_>, key: Span) -> Option<Json> {
        let mut best: Option<(Option<Json>, Vec<Problem>)> = None;
        for &id in ids.iter().filter(|&&id| ids.len() == 1 || fits(self.shapes, id, node, 0)) {
            let mut problems = Vec::new();
            let value = Walk { shapes: self.shapes, problems: &mut problems }.value(id, node, path, key);
            if value.is_some() && problems.is_empty() {
                return value;
            }
            if best.as_ref().is_none_or(|(_, least)| problems.len() < least.len()) {
                best = Some((value, problems));
            }
        }
        if let Some((value, problems)) = best {
            self.problems.extend(problems);
            return value;
        }
        let found = match &node.value {
            Value::Scalar(scalar) => scalar_type(scalar).name(),
            Value::Map(_) => "a mapping",
            Value::Seq(_) => "a list",
        };
        let wanted: Vec<String> = ids.iter().map(|&id| expected(self.shapes, self.shapes.get(id))).collect();
        let message = must_be(path, &wanted.join(" or "), found);
        self.problems.push(Problem::error(first_key(node).unwrap_or(node.span), message));
        None
    }

    /// The value of a tree that no schema speaks of.
    fn plain_json(&mut self, node: &Node<'_>, path: &Path<'_>) -> Json {
        match &node.value {
            Value::Map(entries) => {
                let values = entries.iter().map(|entry| {
                    let value = self.plain_json(&entry.value, &Path::Field(path, &entry.key));
                    (entry.key.clone().into_owned(), value)
                });
                Json::Object(values.collect())
            }
            Value::Seq(items) => {
                let values = items.iter().enumerate();
                Json::Array(
                    values.map(|(index, node)| self.plain_json(node, &Path::Item(path, index))).collect(),
                )
            }
            Value::Scalar(scalar) => match scalar_type(scalar) {
                Typed::Null => Json::Null,
                Typed::Bool(value) => Json::Bool(value),
                Typed::Int(value) => match i64::try_from(value) {
                    Ok(value) => Json::from(value),
                    Err(_) => u64::try_from(value).map_or_else(|_| Json::from(value as f64), Json::from),
                },
                // JSON knows neither infinities nor NaN: they become null.
                Typed::Float(value) => Json::from(value),
                Typed::Text => Json::from(scalar.text.as_ref()),
            },
        }
    }
}

/// The type of a scalar: by its tag, its quotes, or its text.
pub fn scalar_type(scalar: &Scalar<'_>) -> Typed {
    match scalar.tag {
        Some("str") => Typed::Text,
        Some(tag) => {
            let typed = core(&scalar.text);
            let right = match typed {
                Typed::Null => "null",
                Typed::Bool(_) => "bool",
                Typed::Int(_) => "int",
                Typed::Float(_) => "float",
                Typed::Text => "str",
            };
            // A tag that doesn't fit its text leaves a text, which the schema will refuse.
            if tag == right { typed } else { Typed::Text }
        }
        None if scalar.plain => core(&scalar.text),
        None => Typed::Text,
    }
}

pub fn is_null(node: &Node<'_>) -> bool {
    matches!(&node.value, Value::Scalar(scalar) if scalar_type(scalar) == Typed::Null)
}

/// The place of a collection that people look at: its first key, or its first item's.
pub fn first_key(node: &Node<'_>) -> Option<Span> {
    match &node.value {
        Value::Map(entries) => entries.first().map(|entry| entry.key_span),
        _ => None,
    }
}

/// Six groups of two: a MAC address, which no reader could mistake for a time.
fn is_mac_like(text: &str) -> bool {
    text.split(':').count() == 6
}

fn fits(shapes: &Shapes, id: ShapeId, node: &Node<'_>, depth: usize) -> bool {
    match (&shapes.get(id).form, &node.value) {
        (Form::Any, _) | (Form::Map(_), Value::Map(_)) | (Form::Seq { .. }, Value::Seq(_)) => true,
        (Form::OneOf(ids), _) => depth < 8 && ids.iter().any(|&id| fits(shapes, id, node, depth + 1)),
        (form, Value::Scalar(scalar)) => matches!(
            (form, scalar_type(scalar)),
            (Form::Bool, Typed::Bool(_))
                | (Form::Int { .. } | Form::Number { .. }, Typed::Int(_))
                | (Form::Number { .. }, Typed::Float(_))
                | (Form::Text { .. }, Typed::Text)
        ),
        _ => false,
    }
}

fn must_be(path: &Path<'_>, expected: &str, found: &str) -> String {
    format!("`{path}` must be {expected}, but is {found}")
}

fn expected(shapes: &Shapes, shape: &Shape) -> String {
    match &shape.form {
        Form::Any => "a value".to_owned(),
        Form::Bool => "true or false".to_owned(),
        Form::Int { .. } => "an integer".to_owned(),
        Form::Number { .. } => "a number".to_owned(),
        Form::Text { choices, .. } if choices.is_empty() => "a text".to_owned(),
        Form::Text { choices, .. } => suggest::list(choices.iter().map(String::as_str), "or"),
        Form::Seq { .. } => "a list".to_owned(),
        Form::Map(_) => "a mapping".to_owned(),
        Form::OneOf(ids) => match ids[..] {
            // A recursive type: named by what it is, not by what it holds.
            [id] if !matches!(shapes.get(id).form, Form::OneOf(_)) => expected(shapes, shapes.get(id)),
            _ => "one of several forms".to_owned(),
        },
    }
}

fn about(field: &Field) -> Option<String> {
    (!field.summary.is_empty()).then(|| format!("`{}`: {}", field.name, field.summary))
}

/// An unknown field with what it may have been meant to be, and all that could stand there.
pub fn unknown_name<'f>(
    entry: &Entry<'_>,
    parent: &str,
    fields: impl Iterator<Item = &'f str> + Clone,
) -> Problem {
    let message = match parent {
        "" => format!("unknown field `{}`", entry.key),
        parent => format!("unknown field `{}` in `{parent}`", entry.key),
    };
    let all = suggest::list(fields.clone(), "and");
    let hint = match suggest::nearest(&entry.key, fields) {
        Some(near) => format!("did you mean `{near}`? The fields here are {all}"),
        None if all.is_empty() => "there are no fields here".to_owned(),
        None => format!("the fields here are {all}"),
    };
    Problem::error(entry.key_span, message).hint(hint)
}

/// What a scalar of the wrong type was probably meant to be.
fn scalar_hint(form: &Form, typed: Typed, scalar: &Scalar<'_>, odd: Option<Surprise>) -> Option<String> {
    let text = scalar.text.as_ref();
    let quoted = !scalar.plain;
    match (form, typed) {
        (Form::Int { .. } | Form::Number { .. }, Typed::Text) => match odd {
            Some(Surprise::Sexagesimal(value)) => {
                Some(format!("write {value} if the number to the base of 60 is meant"))
            }
            Some(Surprise::Number) => Some("write the number in decimal digits, without `_`".to_owned()),
            _ if quoted && matches!(core(text), Typed::Int(_)) => Some(format!("remove the quotes: {text}")),
            _ if text.starts_with(|c: char| c.is_ascii_digit()) => {
                Some("write digits alone: the unit is in the field's description".to_owned())
            }
            _ => None,
        },
        (Form::Int { .. }, Typed::Float(value)) if value.fract() == 0.0 && value.abs() < 1e15 => {
            Some(format!("write {value:.0}"))
        }
        (Form::Bool, Typed::Text) => match surprise(text) {
            Some(Surprise::Bool(value)) => Some(format!("write {value}: in YAML 1.2 `{text}` is a text")),
            _ if quoted && matches!(core(text), Typed::Bool(_)) => Some(format!("remove the quotes: {text}")),
            _ => Some("write true or false".to_owned()),
        },
        (Form::Bool, Typed::Int(0 | 1)) => Some(format!("write {}", text != "0")),
        (Form::Text { choices, .. }, Typed::Int(_) | Typed::Float(_) | Typed::Bool(_))
            if choices.is_empty() =>
        {
            Some(format!("quote it: \"{text}\""))
        }
        (Form::Map(_), Typed::Text) if scalar.plain && text.contains(':') => {
            Some("write a space after the `:`".to_owned())
        }
        (Form::Map(form), _) if form.others.is_none() => {
            let names = form.fields.iter().map(|field| field.name.as_str());
            Some(format!("it has the fields {}", suggest::list(names, "and")))
        }
        (Form::Seq { .. }, _) => Some("write it as an item of a list: `- …`".to_owned()),
        _ => None,
    }
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
