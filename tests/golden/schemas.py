"""Which of some values fit JSON schemas, as the package jsonschema says: tests/golden/schemas.json.

    pip install jsonschema==4.26.0
    python tests/golden/schemas.py
"""

import importlib.metadata
import itertools
import json
import pathlib

import jsonschema

SCALARS = [None, True, False, 0, 1, 2.5, -3, "", "yes", "no", "none", "0", "1", "a \"b\"", "caf\u00e9", "two\nlines"]
LABELS = ["yes", "no", "none", True, 1]
OBJECTS = [{}] + [{"label": a} for a in LABELS] + [{"label": a, "sure": b} for a, b in itertools.product(LABELS, [*LABELS, False])]
POOL = SCALARS + [["yes"], [1, 2]] + OBJECTS + [{"inner": o} for o in OBJECTS[1:6]]


def answer(properties, **more):
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False, **more}


YES_NO = {"type": "string", "enum": ["yes", "no"]}
# pydantic's form of an Enum in a model.
BY_REFERENCE = answer({"label": {"$ref": "#/$defs/Label"}}, title="Answer", **{"$defs": {"Label": {**YES_NO, "title": "Label"}}})
SCHEMAS = {
    "strings": YES_NO,
    "strings without a type": {"enum": ["no", "none", "no"]},
    "values of several types": {"enum": [1, "1", None, True, "yes", 2.5, ["yes"], {"label": "no"}]},
    "a type leaves some out": {"type": "string", "enum": [0, "0", None, "yes"]},
    "several types": {"type": ["string", "null"], "enum": ["yes", 1, None]},
    "integers": {"type": "integer", "enum": [0, 1, 2.5, "1"]},
    "numbers": {"type": "number", "enum": [0, 2.5, "0", True]},
    "a constant": {"const": "caf\u00e9"},
    "a constant to escape": {"type": "string", "const": "a \"b\""},
    "booleans": {"type": "boolean"},
    "null": {"type": "null"},
    "any of": {"anyOf": [{"const": "yes"}, {"enum": ["no", "yes"]}, {"type": "null"}]},
    "one of": {"oneOf": [{"enum": ["yes", "no"]}, {"enum": ["no", "none"]}]},
    "all of one": {"allOf": [YES_NO], "description": "the answer"},
    "an object": answer({"label": YES_NO}),
    "an object of two": answer({"label": YES_NO, "sure": {"type": "boolean"}}),
    "by reference": BY_REFERENCE,
    "an object in an object": answer({"inner": answer({"label": {"enum": ["yes", 1]}})}),
    "objects listed": {"enum": [{"label": "yes"}, {"label": "no", "sure": True}], "$schema": "https://json-schema.org/draft/2020-12/schema"},
    "a reference to the whole's part": {"$ref": "#/definitions/a", "definitions": {"a": {"const": "none"}}},
}


def same(a, b):
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


cases = []
for name, schema in SCHEMAS.items():
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    fitting = [value for value in POOL if validator.is_valid(value)]
    assert fitting and all(not same(a, b) for a, b in itertools.combinations(fitting, 2)), name
    cases.append({"name": name, "schema": schema, "values": fitting})
made = {"made_with": {"jsonschema": importlib.metadata.version("jsonschema")}, "cases": cases}
path = pathlib.Path(__file__).with_name("schemas.json")
path.write_text(json.dumps(made, indent=1) + "\n")
print(f"{len(cases)} cases, {path.stat().st_size} bytes")
