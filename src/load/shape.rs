//! A JSON Schema, read once into what the check needs. Knows the part of JSON Schema 2020-12 that
//! schemars writes for our wire types; what it doesn't know it leaves to `kinds::decode`.

use std::collections::HashMap;
use std::sync::OnceLock;

use serde_json::Value;

use crate::kinds;
use crate::name::Kind;

/// Place of a shape in its `Shapes`.
pub type ShapeId = usize;

/// The shapes of one schema. Shapes refer to one another by place, so a recursive type is no trouble.
#[derive(Debug)]
pub struct Shapes {
    shapes: Vec<Shape>,
    root: ShapeId,
}

#[derive(Clone, Debug)]
pub struct Shape {
    pub nullable: bool,
    pub form: Form,
}

#[derive(Clone, Debug)]
pub enum Form {
    Any,
    Bool,
    Int {
        min: i128,
        max: i128,
    },
    Number {
        min: f64,
        max: f64,
    },
    /// With `choices`, one of these; else any text of at least `min_chars`.
    Text {
        choices: Vec<String>,
        min_chars: usize,
    },
    Seq {
        item: ShapeId,
        min: usize,
        max: usize,
    },
    Map(MapForm),
    OneOf(Vec<ShapeId>),
}

#[derive(Clone, Debug, Default)]
pub struct MapForm {
    /// By name, in the schema's order.
    pub fields: Vec<Field>,
    /// What keys that are no fields hold; None: there are no such keys.
    pub others: Option<ShapeId>,
}

#[derive(Clone, Debug)]
pub struct Field {
    pub name: String,
    pub shape: ShapeId,
    pub required: bool,
    /// First sentence of the description.
    pub summary: String,
}

impl Shapes {
    pub fn compile(schema: &Value) -> Self {
        let mut compiler = Compiler { schema, shapes: Vec::new(), known: HashMap::new() };
        let root = compiler.shape(schema);
        Self { shapes: compiler.shapes, root }
    }

    /// The shapes of a kind's spec, compiled at first use.
    pub fn of(kind: Kind) -> &'static Shapes {
        static ALL: OnceLock<Vec<Shapes>> = OnceLock::new();
        let all = ALL.get_or_init(|| {
            let compile = |kind| Shapes::compile(kinds::spec_schema(kind).as_value());
            Kind::ALL.into_iter().map(compile).collect()
        });
        // `ALL` has a row for every kind, in the order of the enum.
        &all[kind as usize]
    }

    pub fn root(&self) -> ShapeId {
        self.root
    }

    pub fn get(&self, id: ShapeId) -> &Shape {
        &self.shapes[id]
    }
}

struct Compiler<'s> {
    schema: &'s Value,
    shapes: Vec<Shape>,
    /// Shapes of `$ref`s, also of those that are being compiled.
    known: HashMap<&'s str, ShapeId>,
}

const ANY: Shape = Shape { nullable: true, form: Form::Any };

impl<'s> Compiler<'s> {
    fn push(&mut self, shape: Shape) -> ShapeId {
        self.shapes.push(shape);
        self.shapes.len() - 1
    }

    fn shape(&mut self, schema: &'s Value) -> ShapeId {
        let id = self.push(ANY);
        self.shapes[id] = self.build(schema);
        id
    }

    fn build(&mut self, schema: &'s Value) -> Shape {
        if let Some(reference) = schema.get("$ref").and_then(Value::as_str) {
            let Some(pointer) = reference.strip_prefix('#') else { return ANY };
            if !self.known.contains_key(reference) {
                let Some(target) = self.schema.pointer(pointer) else { return ANY };
                self.known.insert(reference, self.shapes.len());
                self.shape(target);
            }
            let id = self.known[reference];
            // A copy of what is there; a type that is being compiled is reached through a union of one.
            return match &self.shapes[id] {
                Shape { form: Form::Any, .. } => Shape { nullable: false, form: Form::OneOf(vec![id]) },
                shape => shape.clone(),
            };
        }
        for key in ["anyOf", "oneOf"] {
            if let Some(list) = schema.get(key).and_then(Value::as_array) {
                return self.union(list);
            }
        }
        if let Some([one]) = schema.get("allOf").and_then(Value::as_array).map(Vec::as_slice) {
            return self.build(one);
        }
        if let Some(text) = schema.get("const").and_then(Value::as_str) {
            return Shape {
                nullable: false,
                form: Form::Text { choices: vec![text.to_owned()], min_chars: 0 },
            };
        }
        let mut types: Vec<&str> = match schema.get("type") {
            Some(Value::String(one)) => vec![one],
            Some(Value::Array(list)) => list.iter().filter_map(Value::as_str).collect(),
            _ if schema.get("enum").is_some() => vec!["string"],
            _ => return ANY,
        };
        let nullable = types.contains(&"null");
        types.retain(|name| *name != "null");
        let forms: Vec<Form> = types.iter().map(|name| self.form(name, schema)).collect();
        match <[Form; 1]>::try_from(forms) {
            Ok([form]) => Shape { nullable, form },
            Err(forms) => {
                let mut ids = Vec::new();
                for form in forms {
                    ids.push(self.shapes.len());
                    self.shapes.push(Shape { nullable: false, form });
                }
                Shape { nullable, form: Form::OneOf(ids) }
            }
        }
    }

    fn union(&mut self, list: &'s [Value]) -> Shape {
        let is_null = |schema: &Value| schema.get("type").and_then(Value::as_str) == Some("null");
        let nullable = list.iter().any(is_null);
        let rest: Vec<&Value> = list.iter().filter(|schema| !is_null(schema)).collect();
        if let [one] = rest[..] {
            let shape = self.build(one);
            return Shape { nullable: nullable || shape.nullable, form: shape.form };
        }
        let ids: Vec<ShapeId> = rest.into_iter().map(|schema| self.shape(schema)).collect();
        // An enum with a description for each value comes as a union of constants.
        let mut all = Vec::new();
        for &id in &ids {
            match &self.shapes[id].form {
                Form::Text { choices, .. } if !choices.is_empty() => all.extend(choices.iter().cloned()),
                _ => return Shape { nullable, form: Form::OneOf(ids) },
            }
        }
        Shape { nullable, form: Form::Text { choices: all, min_chars: 0 } }
    }

    fn form(&mut self, name: &str, schema: &'s Value) -> Form {
        let number = |key: &str| schema.get(key).and_then(Value::as_f64);
        let size = |key: &str| schema.get(key).and_then(Value::as_u64).map(|n| n as usize);
        match name {
            "boolean" => Form::Bool,
            "integer" => {
                let (low, high) = format_range(schema.get("format").and_then(Value::as_str));
                let whole = |key: &str| {
                    let value = schema.get(key)?;
                    value
                        .as_i64()
                        .map(i128::from)
                        .or(value.as_u64().map(i128::from))
                        .or(value.as_f64().map(|f| f as i128))
                };
                Form::Int {
                    min: whole("minimum").unwrap_or(low).max(low),
                    max: whole("maximum").unwrap_or(high).min(high),
                }
            }
            "number" => Form::Number {
                min: number("minimum").unwrap_or(f64::NEG_INFINITY),
                max: number("maximum").unwrap_or(f64::INFINITY),
            },
            "string" => {
                let choices = schema.get("enum").and_then(Value::as_array);
                let choices = choices.into_iter().flatten().filter_map(Value::as_str).map(str::to_owned);
                Form::Text { choices: choices.collect(), min_chars: size("minLength").unwrap_or(0) }
            }
            "array" => Form::Seq {
                item: match schema.get("items") {
                    Some(items) => self.shape(items),
                    None => self.push(ANY),
                },
                min: size("minItems").unwrap_or(0),
                max: size("maxItems").unwrap_or(usize::MAX),
            },
            "object" => Form::Map(self.map_form(schema)),
            _ => Form::Any,
        }
    }

    fn map_form(&mut self, schema: &'s Value) -> MapForm {
        let required: Vec<&str> = schema
            .get("required")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        let mut fields = Vec::new();
        for (name, field) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
            let description = field.get("description").and_then(Value::as_str).unwrap_or("");
            fields.push(Field {
                name: name.clone(),
                shape: self.shape(field),
                required: required.contains(&name.as_str()),
                summary: summary(description),
            });
        }
        let others = match schema.get("additionalProperties") {
            Some(Value::Bool(false)) => None,
            Some(other) => Some(self.shape(other)),
            None => Some(self.push(ANY)),
        };
        MapForm { fields, others }
    }
}

/// The first sentence of a description, on one line.
pub fn summary(description: &str) -> String {
    let paragraph = description.split("\n\n").next().unwrap_or("");
    let line = paragraph.split_whitespace().collect::<Vec<_>>().join(" ");
    match line.find(". ") {
        Some(end) => line[..end].to_owned(),
        None => line.trim_end_matches('.').to_owned(),
    }
}

/// The integers that a schemars `format` allows.
fn format_range(format: Option<&str>) -> (i128, i128) {
    match format {
        Some("uint8") => (0, u8::MAX.into()),
        Some("uint16") => (0, u16::MAX.into()),
        Some("uint32") => (0, u32::MAX.into()),
        Some("uint64" | "uint") => (0, u64::MAX.into()),
        Some("int8") => (i8::MIN.into(), i8::MAX.into()),
        Some("int16") => (i16::MIN.into(), i16::MAX.into()),
        Some("int32") => (i32::MIN.into(), i32::MAX.into()),
        // JSON values hold no larger integers.
        _ => (i64::MIN.into(), u64::MAX.into()),
    }
}
