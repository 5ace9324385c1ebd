//! Forms of JSON Schema that no kind uses yet, and that the next one will.

use serde_json::json;

use super::*;
use crate::load::{Limits, document};

/// The value and the problems' messages of `text` checked against `schema`.
#[track_caller]
fn checked(schema: &Json, text: &str) -> (Option<Json>, Vec<String>) {
    let shapes = Shapes::compile(schema);
    let parsed = document::parse(text, 0..text.len(), &Limits::default());
    assert!(parsed.problems.is_empty(), "{:?}", parsed.problems);
    let root = parsed.root.unwrap();
    let mut problems = Vec::new();
    let value = check(&shapes, &root, Path::Field(&Path::Root, "spec"), root.span, &mut problems);
    (value, problems.into_iter().map(|problem| problem.message).collect())
}

#[track_caller]
fn accepts(schema: &Json, text: &str, expected: Json) {
    assert_eq!(checked(schema, text), (Some(expected), Vec::new()), "{text}");
}

#[track_caller]
fn refuses(schema: &Json, text: &str, expected: &[&str]) {
    assert_eq!(checked(schema, text).1, expected, "{text}");
}

#[test]
fn unions_take_what_fits_best() {
    let schema = json!({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string"}, {"type": "null"}]});
    accepts(&schema, "7", json!(7));
    accepts(&schema, "seven", json!("seven"));
    accepts(&schema, "~", json!(null));
    refuses(&schema, "0", &["`spec` is 0; it must be at least 1"]);
    refuses(&schema, "[1]", &["`spec` must be an integer or a text, but is a list"]);
    let object = |name: &str, kind: &str| json!({"type": "object", "required": [name], "additionalProperties": false, "properties": {name: {"type": kind}}});
    let schema = json!({"oneOf": [object("access", "integer"), object("trunk", "string")]});
    accepts(&schema, "access: 10", json!({"access": 10}));
    accepts(&schema, "trunk: a", json!({"trunk": "a"}));
    refuses(&schema, "trunk: [10]", &["`spec.trunk` must be a text, but is a list"]);
    let schema = json!({"oneOf": [{"const": "A", "description": "one"}, {"const": "B"}]});
    accepts(&schema, "A", json!("A"));
    refuses(&schema, "a", &["`spec` can't be `a`"]);
}

#[test]
fn types_may_contain_themselves() {
    let schema = json!({
        "$ref": "#/$defs/Tree",
        "$defs": {"Tree": {
            "type": "object",
            "required": ["name"],
            "additionalProperties": false,
            "properties": {"name": {"type": "string"}, "below": {"type": "array", "items": {"$ref": "#/$defs/Tree"}}},
        }},
    });
    let text = "name: a\nbelow:\n  - name: b\n    below: [{name: c}]\n";
    accepts(&schema, text, json!({"name": "a", "below": [{"name": "b", "below": [{"name": "c"}]}]}));
    refuses(
        &schema,
        "name: a\nbelow: [{nam: b}, {name: 3}]\n",
        &[
            "unknown field `nam` in `spec.below[0]`",
            "`spec.below[1].name` must be a text, but is an integer: `3`",
        ],
    );
    let endless = json!({
        "$ref": "#/$defs/A",
        "$defs": {"A": {"type": "object", "required": ["a"], "properties": {"a": {"$ref": "#/$defs/A"}}}},
    });
    refuses(&endless, "{}", &["`spec` lacks the field `a`"]);
}

#[test]
fn sizes_and_ranges_hold() {
    let schema =
        json!({"type": "array", "minItems": 1, "maxItems": 2, "items": {"type": "string", "minLength": 1}});
    accepts(&schema, "[a]", json!(["a"]));
    refuses(&schema, "[]", &["`spec` has 0 entries; it needs at least 1"]);
    refuses(&schema, "[a, b, c]", &["`spec` has 3 entries; at most 2 are allowed"]);
    refuses(&schema, "['']", &["`spec[0]` is empty"]);
    let ratio = json!({"type": "number", "minimum": 0.5, "maximum": 4});
    accepts(&ratio, "1.5", json!(1.5));
    accepts(&ratio, "2", json!(2.0));
    refuses(&ratio, "0.1", &["`spec` is 0.1; it must be between 0.5 and 4"]);
    refuses(&ratio, ".nan", &["`spec` is .nan; it must be between 0.5 and 4"]);
    let wide = json!({"type": "integer", "format": "uint64", "minimum": 0});
    accepts(&wide, "18446744073709551615", json!(u64::MAX));
    accepts(&wide, "0x10", json!(16));
    refuses(&wide, "-1", &["`spec` is -1; it must be at least 0"]);
    refuses(
        &wide,
        "18446744073709551616",
        &["`spec` is 18446744073709551616; it must be between 0 and 18446744073709551615"],
    );
    let signed = json!({"type": "integer", "format": "int64"});
    accepts(&signed, "-9223372036854775808", json!(i64::MIN));
}

#[test]
fn free_values_and_maps_keep_what_is_written() {
    accepts(&json!({}), "{a: [1, 1.5, x, ~, true]}", json!({"a": [1, 1.5, "x", null, true]}));
    let map = json!({"type": "object", "additionalProperties": {"type": "integer"}});
    accepts(&map, "{a: 1, 'yes': 2}", json!({"a": 1, "yes": 2}));
    refuses(
        &map,
        "{a: x, no: 2}",
        &[
            "`spec.a` must be an integer, but is a text: `x`",
            "the key `no` is not a text to every YAML reader",
        ],
    );
    accepts(&json!({"type": "string"}), "!!str 10", json!("10"));
    accepts(&json!({"type": "integer"}), "!!int \"10\"", json!(10));
    refuses(&json!({"type": "integer"}), "!!int ten", &["`spec` must be an integer, but is a text: `ten`"]);
}
