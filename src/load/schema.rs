//! JSON Schemas of whole manifests, made from the kinds' wire types: for editors (YAML language
//! servers), for `vmctl schema` and `explain`, and in `schemas/`.

use serde_json::{Map, Value, json};

use super::API_VERSION;
use crate::kinds;
use crate::name::Kind;

const DIALECT: &str = "https://json-schema.org/draft/2020-12/schema";

/// JSON Schema of one kind's manifests, envelope and all.
pub fn document_schema(kind: Kind) -> Value {
    let mut spec = kinds::spec_schema(kind).to_value();
    let mut take = |key: &str| spec.as_object_mut().and_then(|spec| spec.remove(key));
    let definitions = take("$defs");
    let (_, _) = (take("$schema"), take("title"));
    let description = take("description").unwrap_or_default();
    let mut schema = json!({
        "$schema": DIALECT,
        "title": kind.as_str(),
        "description": description,
        "type": "object",
        "required": ["apiVersion", "kind", "metadata", "spec"],
        "additionalProperties": false,
        "properties": {
            "apiVersion": {"description": "The version of the manifest's form.", "type": "string", "const": API_VERSION},
            "kind": {"description": "What the object is.", "type": "string", "const": kind.as_str()},
            "metadata": metadata_schema(),
            "spec": spec,
            "status": {"description": "What the host has. Written by `vmctl get -o yaml`, ignored when read."},
        },
    });
    schema["properties"]["spec"]["description"] = json!("What the host shall have.");
    if let Some(definitions) = definitions {
        schema["$defs"] = definitions;
    }
    schema
}

fn metadata_schema() -> Value {
    let map = |description: &str| json!({"description": description, "type": ["object", "null"], "additionalProperties": {"type": "string"}});
    json!({
        "description": "The object's name and what is noted about it.",
        "type": "object",
        "required": ["name"],
        "additionalProperties": false,
        "properties": {
            "name": {
                "description": "The object's name, unique among its kind: lower-case letters, digits and `-` (RFC 1123 label).",
                "type": "string",
                "minLength": 1,
                "maxLength": 63,
                "pattern": "^[a-z0-9]([-a-z0-9]*[a-z0-9])?$",
            },
            "labels": map("Texts to select objects by (`-l app=web`), in the syntax of Kubernetes."),
            "annotations": map("Texts for people and tools. Those that begin with `vmctl.dev/` are instructions to vmctl."),
        },
    })
}

/// JSON Schema of any manifest: what to give an editor for a directory of them.
pub fn all_schema() -> Value {
    let mut definitions = Map::new();
    let mut choices = Vec::new();
    for kind in Kind::ALL {
        let mut schema = document_schema(kind);
        rename_references(&mut schema, kind);
        if let Some(object) = schema.as_object_mut() {
            object.remove("$schema");
            if let Some(Value::Object(own)) = object.remove("$defs") {
                definitions.extend(own.into_iter().map(|(name, value)| (format!("{kind}.{name}"), value)));
            }
        }
        definitions.insert(kind.to_string(), schema);
        choices.push(json!({
            "if": {"required": ["kind"], "properties": {"kind": {"const": kind.as_str()}}},
            "then": {"$ref": format!("#/$defs/{kind}")},
        }));
    }
    json!({
        "$schema": DIALECT,
        "title": "vmctl manifest",
        "type": "object",
        "required": ["apiVersion", "kind"],
        "properties": {
            "apiVersion": {"type": "string", "const": API_VERSION},
            "kind": {"type": "string", "enum": Kind::ALL.map(Kind::as_str)},
        },
        "allOf": choices,
        "$defs": definitions,
    })
}

/// `#/$defs/Port` as `#/$defs/Bridge.Port`: the definitions of all kinds live in one place.
fn rename_references(schema: &mut Value, kind: Kind) {
    match schema {
        Value::Object(object) => {
            for (key, value) in object {
                match value {
                    Value::String(text) if key == "$ref" => {
                        if let Some(name) = text.strip_prefix("#/$defs/") {
                            *text = format!("#/$defs/{kind}.{name}");
                        }
                    }
                    value => rename_references(value, kind),
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|value| rename_references(value, kind)),
        _ => {}
    }
}

/// The files of `schemas/`, by name: one for each kind, and `vmctl.json` for all.
pub fn files() -> Vec<(String, String)> {
    let mut files: Vec<(String, Value)> =
        Kind::ALL.into_iter().map(|kind| (format!("{kind}.json"), document_schema(kind))).collect();
    files.push(("vmctl.json".to_owned(), all_schema()));
    files.into_iter().map(|(name, schema)| (name, format!("{schema:#}\n"))).collect()
}
