use super::*;
use serde_json::json;

/// Which values fit is the package jsonschema's word (tests/golden/schemas.py).
#[test]
fn texts_are_those_of_all_values_that_fit() {
    let golden: Value = serde_json::from_str(include_str!("../../../tests/golden/schemas.json")).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() >= 20);
    for case in cases {
        let mut expected: Vec<String> =
            case["values"].as_array().unwrap().iter().map(Value::to_string).collect();
        let mut found =
            texts(&case["schema"]).unwrap_or_else(|problem| panic!("{}: {problem}", case["name"]));
        expected.sort_unstable();
        found.sort_unstable();
        assert_eq!(found, expected, "{}", case["name"]);
    }
}

#[test]
fn schemas_that_do_not_list_their_values_are_refused_by_place() {
    let yes = json!({"const": "yes"});
    let object = |schema: Value, required: &[&str]| json!({"type": "object", "properties": {"a": schema}, "required": required});
    for (schema, words) in [
        (json!({"type": "object"}), &["lists its values"][..]),
        (json!({}), &["lists its values"]),
        (json!({"type": "string"}), &["lists its values"]),
        (json!([]), &["expected an object as the schema"]),
        (json!({"enum": []}), &["some value fits"]),
        (json!({"type": "string", "enum": [1]}), &["some value fits"]),
        (json!({"type": "string", "pattern": "[0-9]"}), &["`pattern`", "not followed"]),
        (json!({"enum": ["yes"], "minLength": 9}), &["`minLength`"]),
        (json!({"enum": ["yes"], "const": "yes"}), &["one of `enum` and `const`"]),
        (json!({"enum": "yes"}), &["`enum`"]),
        (object(yes.clone(), &[]), &["every property in `required`", "\"a\""]),
        (object(yes.clone(), &["a", "b"]), &["name properties", "\"b\""]),
        (object(json!({"type": "string"}), &["a"]), &["at `properties.a`"]),
        (
            json!({"properties": {"a": yes}, "required": ["a"], "additionalProperties": {}}),
            &["additionalProperties"],
        ),
        (json!({"anyOf": [yes, {"type": "number"}]}), &["at `anyOf[1]`"]),
        (json!({"allOf": [yes, yes]}), &["a list of one"]),
        (json!({"$ref": "#/$defs/none"}), &["`$ref`", "#/$defs/none"]),
        (json!({"$ref": "#"}), &["at most 16 schemas"]),
        (json!({"$ref": "https://example.com"}), &["`$ref`"]),
        (json!({"enum": (0..1025).collect::<Vec<_>>()}), &["at most 1024"]),
    ] {
        let problem = texts(&schema).unwrap_err();
        words.iter().for_each(|word| assert!(problem.contains(word), "{schema}: {word} is not in {problem}"));
    }
    // Six properties of five values each are too many together.
    let five = json!({"enum": [1, 2, 3, 4, 5]});
    let properties: Map<String, Value> = ('a'..='f').map(|name| (name.to_string(), five.clone())).collect();
    let required: Vec<&String> = properties.keys().collect();
    let problem = texts(&json!({"properties": properties, "required": required})).unwrap_err();
    assert!(problem.contains("at most 1024"), "{problem}");
}
