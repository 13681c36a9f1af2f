//! JSON schemas that few values match: the JSON texts of all these values, for answers that must be one of them.
//!
//! Supported are `enum` and `const`, booleans and null; objects whose properties are such schemas and are all required;
//! `anyOf`, `oneOf` and `$ref`, and an `allOf` of one schema. The texts are compact JSON, with an object's properties
//! in the order of their names.

use serde_json::{Map, Value};

/// Most texts of a schema.
pub(super) const MAX_TEXTS: usize = 1024;
/// Most nested schemas, including references.
const MAX_DEPTH: usize = 16;

/// Keywords that do not restrict values.
const NOTES: [&str; 12] = [
    "$schema", "$id", "$comment", "$defs", "definitions", "title", "description", "default", "examples",
    "deprecated", "readOnly", "writeOnly",
];

/// Supported keywords.
const FOLLOWED: [&str; 10] = [
    "type", "enum", "const", "properties", "required", "additionalProperties", "anyOf", "oneOf", "allOf",
    "$ref",
];

/// Supported keywords that list values.
const LISTING: [&str; 7] = ["enum", "const", "properties", "anyOf", "oneOf", "allOf", "$ref"];

/// The texts of all values that match a schema, in the schema's order, without duplicates.
///
/// # Errors
/// Returns a message about a keyword that is not supported, with its location in the schema, or about a schema that
/// matches no value or too many.
pub(super) fn texts(schema: &Value) -> Result<Vec<String>, String> {
    let mut texts: Vec<String> = Vec::new();
    let reader = Reader { root: schema };
    for value in reader.values(schema, "", 0)? {
        let text = value.to_string();
        if !texts.contains(&text) {
            texts.push(text);
        }
    }
    if texts.is_empty() {
        return Err("expected a schema that some value fits, found none".into());
    }
    Ok(texts)
}

struct Reader<'a> {
    root: &'a Value,
}

impl Reader<'_> {
    /// The values that match `schema`, whose location is `place`.
    fn values(&self, schema: &Value, place: &str, depth: usize) -> Result<Vec<Value>, String> {
        let Some(map) = schema.as_object() else {
            return Err(format!("expected an object as the schema{}, found another value", location(place)));
        };
        if depth == MAX_DEPTH {
            return Err(format!(
                "expected at most {MAX_DEPTH} schemas inside one another, found more{}",
                location(place)
            ));
        }
        let unknown =
            map.keys().find(|key| !NOTES.contains(&key.as_str()) && !FOLLOWED.contains(&key.as_str()));
        if let Some(key) = unknown {
            return Err(unfollowed(key, place));
        }
        let mut values = self.candidates(map, place, depth)?;
        values.retain(|value| fits(value, map));
        if values.len() > MAX_TEXTS {
            return Err(too_many(place));
        }
        Ok(values)
    }

    /// The values of the keyword that lists them. Other keywords then remove some of them.
    fn candidates(&self, map: &Map<String, Value>, place: &str, depth: usize) -> Result<Vec<Value>, String> {
        let mut listing = LISTING.into_iter().filter(|key| map.contains_key(*key));
        let listed = listing.next();
        if let (Some(one), Some(other)) = (listed, listing.next()) {
            return Err(format!("expected one of `{one}` and `{other}`{}, found both", location(place)));
        }
        let wrong =
            |key: &str, expected: &str| Err(format!("`{key}`{}: expected {expected}", location(place)));
        match (listed, listed.map(|key| &map[key]), map.get("type").and_then(Value::as_str)) {
            (Some("enum"), Some(Value::Array(list)), _) => Ok(list.clone()),
            (Some("const"), Some(value), _) => Ok(vec![value.clone()]),
            (Some("$ref"), Some(Value::String(reference)), _) => {
                let target = reference.strip_prefix('#').and_then(|pointer| self.root.pointer(pointer));
                match target {
                    Some(target) => self.values(target, place, depth + 1),
                    None => wrong("$ref", &format!("a part of the schema, found {reference:?}")),
                }
            }
            (Some("properties"), Some(Value::Object(properties)), _) => {
                self.objects(properties, map, place, depth)
            }
            (Some("allOf"), Some(Value::Array(one)), _) if one.len() != 1 => wrong("allOf", "a list of one"),
            (Some(key @ ("anyOf" | "oneOf" | "allOf")), Some(Value::Array(schemas)), _) => {
                let each = schemas.iter().enumerate();
                let each =
                    each.map(|(i, inner)| self.values(inner, &format!("{place}{key}[{i}]."), depth + 1));
                let values = each.collect::<Result<Vec<_>, _>>()?.concat();
                Ok(if key == "oneOf" { exactly_once(&values) } else { values })
            }
            (Some(key), _, _) => wrong(key, "another type of value"),
            (None, _, Some("boolean")) => Ok(vec![true.into(), false.into()]),
            (None, _, Some("null")) => Ok(vec![Value::Null]),
            _ => Err(format!(
                "expected a schema that lists its values{}, by `enum`, `const`, or an object of such properties; found \
                 none",
                location(place)
            )),
        }
    }

    /// All objects with the properties' values.
    fn objects(
        &self,
        properties: &Map<String, Value>,
        map: &Map<String, Value>,
        place: &str,
        depth: usize,
    ) -> Result<Vec<Value>, String> {
        let required = map.get("required").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
        let optional = properties.keys().find(|name| !required.iter().any(|key| key == name.as_str()));
        let unknown =
            required.iter().find(|key| key.as_str().is_none_or(|key| !properties.contains_key(key)));
        match (optional, unknown) {
            (Some(name), _) => {
                return Err(format!(
                    "expected every property in `required`{}, found {name:?} not there",
                    location(place)
                ));
            }
            (_, Some(key)) => {
                return Err(format!(
                    "expected `required` to name properties{}, found {key}",
                    location(place)
                ));
            }
            _ => {}
        }
        if map.get("additionalProperties").is_some_and(|more| *more != Value::Bool(false)) {
            return Err(format!("expected `additionalProperties` false or absent{}", location(place)));
        }
        let mut objects = vec![Map::new()];
        for (name, schema) in properties {
            let values = self.values(schema, &format!("{place}properties.{name}."), depth + 1)?;
            if objects.len() * values.len() > MAX_TEXTS {
                return Err(too_many(place));
            }
            let with = |object: &Map<String, Value>, value: &Value| {
                let mut object = object.clone();
                object.insert(name.clone(), value.clone());
                object
            };
            objects = objects
                .iter()
                .flat_map(|object| values.iter().map(move |value| with(object, value)))
                .collect();
        }
        Ok(objects.into_iter().map(Value::Object).collect())
    }
}

/// Whether a value has the type that the schema names.
fn fits(value: &Value, map: &Map<String, Value>) -> bool {
    let is = |name: &Value| match name.as_str() {
        Some("string") => value.is_string(),
        Some("boolean") => value.is_boolean(),
        Some("null") => value.is_null(),
        Some("object") => value.is_object(),
        Some("array") => value.is_array(),
        Some("number") => value.is_number(),
        Some("integer") => value.as_f64().is_some_and(|number| number.fract() == 0.0),
        _ => false,
    };
    match map.get("type") {
        None => true,
        Some(Value::Array(names)) => names.iter().any(is),
        Some(name) => is(name),
    }
}

/// The values that occur exactly once.
fn exactly_once(values: &[Value]) -> Vec<Value> {
    let count = |value: &&Value| values.iter().filter(|other| other == value).count();
    values.iter().filter(|value| count(value) == 1).cloned().collect()
}

fn unfollowed(key: &str, place: &str) -> String {
    format!(
        "the keyword `{key}`{} is not followed by this server: {} are",
        location(place),
        FOLLOWED.join(", ")
    )
}

fn too_many(place: &str) -> String {
    format!("expected a schema of at most {MAX_TEXTS} values{}, found more", location(place))
}

/// The location in words.
fn location(place: &str) -> String {
    if place.is_empty() { String::new() } else { format!(" at `{}`", place.trim_end_matches('.')) }
}

#[cfg(test)]
mod tests;
