//! What a field means, read from the same schemas that manifests are checked against.

use std::fmt::{self, Write as _};

use serde_json::Value;

use super::schema::document_schema;
use super::{API_VERSION, suggest};
use crate::name::Kind;

/// One field as documentation shows it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FieldDoc {
    /// From where the question began: `ports`, or in a full list `ports[].interface`.
    pub name: String,
    /// `string`, `integer`, `boolean`, `object`, `[]string`, `map[string]string`…
    pub type_name: String,
    pub required: bool,
    pub description: String,
    /// As its description states it.
    pub default: Option<String>,
    /// The texts that it can be, if they are few.
    pub choices: Vec<String>,
}

/// The answer to `explain`: prints as `kubectl explain` does.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Explanation {
    pub kind: Kind,
    /// The field that was asked for, if it was not the kind itself.
    pub field: Option<FieldDoc>,
    pub description: String,
    /// What is in it.
    pub fields: Vec<FieldDoc>,
}

/// Why there is nothing to explain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ExplainError {
    pub message: String,
    pub hint: String,
}

/// Explains `VirtualMachine`, `VirtualMachine.spec.disks`, or in short `vm.disks`.
pub fn explain(path: &str) -> Result<Explanation, ExplainError> {
    let mut parts = path.split('.').map(|part| part.trim_end_matches("[]")).filter(|part| !part.is_empty());
    let first = parts.next().unwrap_or("");
    let Some(kind) = Kind::parse_alias(first) else {
        let names = || Kind::ALL.into_iter().map(Kind::as_str);
        let near =
            suggest::nearest(first, names()).map_or(String::new(), |near| format!("did you mean `{near}`? "));
        return Err(ExplainError {
            message: format!("unknown kind `{first}`"),
            hint: format!("{near}The kinds are {}", suggest::list(names(), "and")),
        });
    };
    let schema = document_schema(kind);
    let root = View { root: &schema, schema: &schema };
    let mut here = root;
    let mut field = None;
    for (depth, part) in parts.enumerate() {
        let inner = here.inside();
        let found = inner.field(part).or_else(|| {
            // `vm.memory`: everybody means the spec.
            let spec = inner.field("spec").filter(|_| depth == 0)?;
            spec.0.inside().field(part)
        });
        let Some((next, doc)) = found else {
            let spec = inner.field("spec").filter(|_| depth == 0);
            return Err(unknown_field(&spec.map_or(inner, |(spec, _)| spec.inside()), kind, part));
        };
        (here, field) = (next, Some(doc));
    }
    let description = here.description();
    let description = if description.is_empty() { here.inside().description() } else { description };
    Ok(Explanation { kind, field, description, fields: here.inside().fields() })
}

fn unknown_field(inner: &View<'_>, kind: Kind, part: &str) -> ExplainError {
    let fields = inner.fields();
    let names = || fields.iter().map(|field| field.name.as_str());
    let near =
        suggest::nearest(part, names()).map_or(String::new(), |near| format!("did you mean `{near}`? "));
    let list = if fields.is_empty() {
        "There are no fields in it".to_owned()
    } else {
        format!("The fields are {}", suggest::list(names(), "and"))
    };
    ExplainError { message: format!("{kind} has no field `{part}` there"), hint: format!("{near}{list}") }
}

/// All fields of a kind's spec, those of parts right after the part: `ports`, `ports[].interface`…
pub fn spec_fields(kind: Kind) -> Vec<FieldDoc> {
    let schema = document_schema(kind);
    let root = View { root: &schema, schema: &schema };
    let mut all = Vec::new();
    if let Some((spec, _)) = root.field("spec") {
        spec.collect("", 0, &mut all);
    }
    all
}

/// What a kind is, in a sentence or two.
pub fn description(kind: Kind) -> String {
    let schema = document_schema(kind);
    View { root: &schema, schema: &schema }.description()
}

/// A part of a schema, with references resolved where they are met.
#[derive(Clone, Copy)]
struct View<'s> {
    root: &'s Value,
    schema: &'s Value,
}

/// Types within types that a list of all fields shows; ours have four levels, a recursive one has no end.
const DEPTH_MAX: usize = 8;

impl<'s> View<'s> {
    fn at(&self, schema: &'s Value) -> Self {
        Self { root: self.root, schema }
    }

    fn text(&self, key: &str) -> &'s str {
        self.schema.get(key).and_then(Value::as_str).unwrap_or("")
    }

    /// Past references and `or null`.
    fn resolved(&self) -> Self {
        let mut view = *self;
        for _ in 0..DEPTH_MAX {
            let not_null = |schema: &&Value| schema.get("type").and_then(Value::as_str) != Some("null");
            let union =
                view.schema.get("anyOf").or_else(|| view.schema.get("allOf")).and_then(Value::as_array);
            let target = match (view.text("$ref").strip_prefix('#'), union) {
                (Some(pointer), _) => self.root.pointer(pointer),
                (None, Some(list)) => match list.iter().filter(not_null).collect::<Vec<_>>()[..] {
                    [one] => Some(one),
                    _ => None,
                },
                (None, None) => None,
            };
            match target {
                Some(target) => view = self.at(target),
                None => break,
            }
        }
        view
    }

    /// The mapping that fields are in: itself, its items or its values.
    fn inside(&self) -> Self {
        let mut view = self.resolved();
        for key in ["items", "additionalProperties"] {
            if let Some(inner) = view.schema.get(key).filter(|inner| inner.is_object()) {
                view = view.at(inner).resolved();
            }
        }
        view
    }

    fn type_name(&self) -> String {
        let view = self.resolved();
        let types = match view.schema.get("type") {
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).find(|name| *name != "null"),
            Some(Value::String(name)) => Some(name.as_str()),
            _ => None,
        };
        let of = |key: &str| {
            view.schema.get(key).filter(|inner| inner.is_object()).map(|inner| view.at(inner).type_name())
        };
        match types {
            Some("array") => format!("[]{}", of("items").unwrap_or_else(|| "any".to_owned())),
            Some("object") => match of("additionalProperties") {
                Some(inner) => format!("map[string]{inner}"),
                None => "object".to_owned(),
            },
            Some(name) => name.to_owned(),
            None if !view.choices().is_empty() => "string".to_owned(),
            None => "any".to_owned(),
        }
    }

    fn choices(&self) -> Vec<String> {
        let view = self.resolved();
        let list = |key: &str| view.schema.get(key).and_then(Value::as_array).into_iter().flatten();
        let constant = |schema: &Value| schema.get("const").and_then(Value::as_str).map(str::to_owned);
        let mut choices: Vec<String> = list("enum").filter_map(Value::as_str).map(str::to_owned).collect();
        choices.extend(list("oneOf").filter_map(constant));
        choices.extend(constant(view.schema));
        choices
    }

    /// The text of the field, or of its type, as one paragraph a line.
    fn description(&self) -> String {
        let text = match self.text("description") {
            "" => self.resolved().text("description"),
            text => text,
        };
        let paragraphs = text.split("\n\n").map(|part| part.split_whitespace().collect::<Vec<_>>().join(" "));
        paragraphs.collect::<Vec<_>>().join("\n")
    }

    fn field(&self, name: &str) -> Option<(View<'s>, FieldDoc)> {
        let schema = self.resolved().schema;
        let field = self.at(schema.get("properties")?.get(name)?);
        let required = schema
            .get("required")
            .and_then(Value::as_array)
            .is_some_and(|list| list.iter().any(|item| item == name));
        let full = field.description();
        let (description, default) = split_default(&full);
        let doc = FieldDoc {
            name: name.to_owned(),
            type_name: field.type_name(),
            required,
            description,
            default,
            choices: field.choices(),
        };
        Some((field, doc))
    }

    /// Required fields first, then by name.
    fn fields(&self) -> Vec<FieldDoc> {
        let properties = self.resolved().schema.get("properties").and_then(Value::as_object);
        let names = properties.into_iter().flatten().map(|(name, _)| name);
        let mut fields: Vec<FieldDoc> =
            names.filter_map(|name| self.field(name)).map(|(_, doc)| doc).collect();
        fields.sort_by_key(|field| !field.required);
        fields
    }

    fn collect(&self, prefix: &str, depth: usize, all: &mut Vec<FieldDoc>) {
        let inner = self.inside();
        for doc in inner.fields() {
            let Some((view, _)) = inner.field(&doc.name) else { continue };
            let name = format!("{prefix}{}", doc.name);
            let brackets = if doc.type_name.starts_with("[]") { "[]" } else { "" };
            all.push(FieldDoc { name: name.clone(), ..doc });
            if depth < DEPTH_MAX {
                view.collect(&format!("{name}{brackets}."), depth + 1, all);
            }
        }
    }
}

/// Descriptions state defaults as `Default: X.`: an `Option` in the wire type has none of its own.
fn split_default(text: &str) -> (String, Option<String>) {
    let Some(at) = text.find("Default: ") else { return (text.to_owned(), None) };
    let rest = &text[at + "Default: ".len()..];
    let end = rest.find(". ").or_else(|| rest.find(".\n")).unwrap_or(rest.len());
    let default = rest[..end].trim_end_matches('.').to_owned();
    let after = rest[end..].trim_start_matches('.').trim_start();
    let before = text[..at].trim_end();
    let description = if after.is_empty() { before.to_owned() } else { format!("{before} {after}") };
    (description.trim().to_owned(), Some(default))
}

/// Columns of the texts of `Explanation`.
const WIDTH: usize = 78;

fn wrap(out: &mut String, text: &str, indent: usize) {
    for paragraph in text.lines() {
        let mut column = 0;
        for word in paragraph.split(' ') {
            let chars = word.chars().count();
            if column > 0 && indent + column + 1 + chars > WIDTH {
                out.push('\n');
                column = 0;
            }
            if column == 0 {
                out.push_str(&" ".repeat(indent));
            } else {
                out.push(' ');
                column += 1;
            }
            out.push_str(word);
            column += chars;
        }
        out.push('\n');
    }
}

impl fmt::Display for FieldDoc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}\t<{}>", self.name, self.type_name)?;
        if self.required { f.write_str(" -required-") } else { Ok(()) }
    }
}

impl Explanation {
    fn text(&self) -> Result<String, fmt::Error> {
        let mut out = String::new();
        writeln!(out, "KIND:     {}\nVERSION:  {API_VERSION}\n", self.kind)?;
        if let Some(field) = &self.field {
            writeln!(out, "FIELD:    {}\n", field.to_string().replace('\t', " "))?;
        }
        let about = self.field.as_ref().map_or(self.description.as_str(), |field| field.description.as_str());
        let about = if about.is_empty() { self.description.as_str() } else { about };
        writeln!(out, "DESCRIPTION:")?;
        wrap(&mut out, about, 4);
        if let Some(field) = &self.field {
            extras(&mut out, field, 4);
        }
        if !self.fields.is_empty() {
            writeln!(out, "\nFIELDS:")?;
        }
        for (index, field) in self.fields.iter().enumerate() {
            if index > 0 {
                out.push('\n');
            }
            writeln!(out, "  {field}")?;
            wrap(&mut out, &field.description, 4);
            extras(&mut out, field, 4);
        }
        Ok(out)
    }
}

fn extras(out: &mut String, field: &FieldDoc, indent: usize) {
    if field.choices.len() > 1 {
        wrap(out, &format!("One of: {}.", field.choices.join(", ")), indent);
    }
    if let Some(default) = &field.default {
        wrap(out, &format!("Default: {default}."), indent);
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text()?.trim_end())
    }
}
