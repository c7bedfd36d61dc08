"""The TypeScript-like text of tool declarations."""

import pytest
from kimi_native.tool_schema import to_typescript

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather\nfor a location",
        "parameters": {
            "type": "object",
            "properties": {
                "unit": {
                    "type": "string",
                    "description": "Unit",
                    "enum": ["celsius", "fahrenheit"],
                    "default": "celsius",
                },
                "location": {"type": "string", "description": "City", "minLength": 1},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
                "o": {
                    "type": "object",
                    "properties": {"x": {"type": "number"}},
                    "additionalProperties": False,
                },
                "opt": {"type": ["string", "null"]},
                "tags": {"type": "array", "items": {"type": "string", "description": "a tag"}},
            },
            "required": ["location"],
        },
    },
}
NOOP = {"type": "function", "function": {"name": "noop"}}

GOLDEN = """# Tools

## functions
namespace functions {
// Get the current weather
// for a location
type get_weather = (_: {
  // City
  // minLength: 1
  location: string,
  // maximum: 7, minimum: 1
  days?: number,
  o?: {
    x?: number,
    [k: string]: never
  },
  opt?: string | null,
  tags?: Array<
    // a tag
    string
  >,
  // Unit
  // Default: "celsius"
  unit?: "celsius" | "fahrenheit"
}) => any;
type noop = (_: {}) => any;
}
"""


def declaration(parameters, **function):
    """What stands between the braces of the namespace."""
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters} | function}
    text = to_typescript([tool])
    head, tail = "# Tools\n\n## functions\nnamespace functions {\n", "\n}\n"
    assert text.startswith(head) and text.endswith(tail)
    return text[len(head) : -len(tail)]


def type_of(schema):
    """The type of one required field, at indent 2."""
    text = declaration({"type": "object", "properties": {"p": schema}, "required": ["p"]})
    head, tail = "type f = (_: {\n  p: ", "\n}) => any;"
    assert text.startswith(head) and text.endswith(tail)
    return text[len(head) : -len(tail)]


def test_golden_text_of_two_tools():
    assert to_typescript([WEATHER, NOOP]) == GOLDEN


def test_only_functions_count():
    plugin = {"type": "_plugin", "plugin": {"name": "p"}}
    assert to_typescript([WEATHER, plugin, NOOP]) == GOLDEN
    assert to_typescript([plugin]) == ""
    assert to_typescript([]) == ""


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "integer"}, "number"),
        ({"type": "number"}, "number"),
        ({"type": "boolean"}, "boolean"),
        ({"type": "null"}, "null"),
        ({"type": "any"}, "any"),
        ({}, "any"),
        (True, "any"),
        (False, "null"),
        ({"type": "array"}, "Array<any>"),
        ({"type": "array", "items": {"type": "integer"}}, "Array<number>"),
        (
            {"type": "array", "items": {"type": "array", "items": {"type": "string", "pattern": "^a"}}},
            "Array<Array<\n    // pattern: ^a\n    string\n  >>",
        ),
        (
            {"type": "array", "items": {"type": "object", "description": "d", "properties": {"x": {}}}},
            "Array<\n    // d\n    {\n      x?: any\n    }\n  >",
        ),
        ({"type": ["object", "array", "integer"]}, "{} | Array<any> | number"),
        ({"enum": ["a", "é", None, True, 1, 2.5]}, '"a" | "é" | None | True | 1 | 2.5'),
        (
            {"anyOf": [{"type": "string"}, {"type": "object", "properties": {"x": {}}}]},
            "string | {\n    x?: any\n  }",
        ),
        ({"type": "object"}, "{}"),
        ({"type": "object", "additionalProperties": True}, "{\n    [k: string]: any\n  }"),
        ({"type": "object", "additionalProperties": {}}, "{\n    [k: string]: any\n  }"),
        (
            {"type": "object", "additionalProperties": {"type": "integer"}},
            "{\n    [k: string]: number\n  }",
        ),
        ({"anyOf": [{"type": "null"}], "enum": [1], "type": "string"}, "null"),
        ({"enum": [1], "type": "string"}, "1"),
    ],
)
def test_types(schema, expected):
    assert type_of(schema) == expected


def test_required_fields_come_first_and_both_groups_are_sorted():
    fields = {"a": {"type": "null"}, "d": {"type": "null"}, "c": {"type": "null"}, "b": {"type": "null"}}
    text = declaration({"type": "object", "properties": fields, "required": ["d", "b"]})
    assert text == "type f = (_: {\n  b: null,\n  d: null,\n  a?: null,\n  c?: null\n}) => any;"


@pytest.mark.parametrize(
    ("schema", "docs"),
    [
        (
            {"type": "string", "pattern": "x", "maxLength": 3, "minLength": 1},
            ["maxLength: 3, minLength: 1, pattern: x"],
        ),
        ({"type": "number", "minimum": 0.5, "minLength": 1}, ["minimum: 0.5"]),
        (
            {"type": "array", "maxItems": 2, "minItems": 1, "description": "d"},
            ["d", "maxItems: 2, minItems: 1"],
        ),
        ({"type": "string", "enum": ["a"], "minLength": 1}, []),
        ({"anyOf": [{"type": "string"}], "type": "string", "minLength": 1}, []),
        ({"type": ["string", "null"], "minLength": 1, "description": "d"}, ["d"]),
        ({"type": "string", "default": "日本"}, ['Default: "日本"']),
        ({"type": "array", "default": [True, None]}, ["Default: [true, null]"]),
        ({"type": "boolean", "default": False}, ["Default: False"]),
        ({"type": "integer", "default": 0}, ["Default: 0"]),
        ({"type": "number", "default": 1e-7}, ["Default: 1e-07"]),
        ({"type": "string", "default": None}, []),
        ({"type": "object", "description": "", "minLength": 1}, []),
    ],
)
def test_comments_of_a_field(schema, docs):
    text = declaration({"type": "object", "properties": {"p": schema}})
    assert text.splitlines()[1:-1][: len(docs)] == [f"  // {line}" for line in docs]
    assert text.splitlines()[1 + len(docs)].startswith("  p?: ")


def test_an_empty_line_of_a_description_stays_empty():
    text = declaration({"properties": {"p": {"type": "null", "description": "a\n\nb"}}}, description="c\n\nd")
    assert text == "// c\n\n// d\ntype f = (_: {\n  // a\n\n  // b\n  p?: null\n}) => any;"


def test_definitions_become_interfaces():
    parameters = {
        "$defs": {
            "Node": {
                "type": "object",
                "description": "A node",
                "properties": {"next": {"$ref": "#/$defs/Node"}, "kind": {"$ref": "#/$defs/Kind"}},
            },
            "Kind": {"enum": ["x"]},
        },
        "type": "object",
        "properties": {"head": {"$ref": "#/$defs/Node", "type": "string", "description": "first"}},
        "required": ["head"],
    }
    assert declaration(parameters, description="about f") == "\n".join(
        [
            "// A node",
            "interface Node {",
            "  kind?: Kind,",
            "  next?: Node",
            "}",
            'interface Kind "x"',
            "// about f",
            "type f = (_: {",
            "  // first",
            "  head: Node",
            "}) => any;",
        ]
    )


def test_a_reference_to_the_root_names_the_parameters():
    parameters = {
        "type": "object",
        "properties": {"z": {"type": "array", "items": {"$ref": "#"}}, "a": {"type": "string"}},
        "required": ["a"],
    }
    interface = "interface parameters {\n  z?: Array<parameters>,\n  a: string\n}"
    assert declaration(parameters) == f"{interface}\ntype f = (_: parameters) => any;"


def test_a_function_without_a_name():
    assert "type function = (_: {}) => any;" in to_typescript([{"type": "function", "function": {}}])


@pytest.mark.parametrize(
    "schema",
    [
        {"description": "no type"},
        {"$ref": "#/$defs/Missing"},
        {"$ref": "https://example.com/schema"},
        {"oneOf": [{"type": "string"}]},
        {"type": ["string", "file"]},
        {"type": 5},
        {"anyOf": 5},
        {"type": "object", "properties": {"x": None}},
        5,
        "string",
    ],
)
def test_an_unknown_schema_raises(schema):
    with pytest.raises((ValueError, TypeError, KeyError, AttributeError)):
        type_of(schema)
