"""Tool declarations in the TypeScript-like form that Kimi K2.5 was trained on."""

import json
from collections.abc import Mapping
from typing import Any

Schema = Mapping[str, Any] | bool

_CONSTRAINTS = {
    "string": ("maxLength", "minLength", "pattern"),
    "number": ("maximum", "minimum"),
    "integer": ("maximum", "minimum"),
    "array": ("maxItems", "minItems"),
}
_UNION_MEMBERS = {
    "string": "string",
    "number": "number",
    "integer": "number",
    "boolean": "boolean",
    "null": "null",
    "object": "{}",
    "array": "Array<any>",
}


def to_typescript(tools: list[Mapping[str, Any]]) -> str:
    """The text of all tools of type `function`; empty when there is none.

    A schema that the form cannot express raises ValueError, a malformed one any exception.
    """
    functions = [_function(tool["function"]) for tool in tools if tool.get("type") == "function"]
    if not functions:
        return ""
    return "\n".join(["# Tools", "", "## functions", "namespace functions {", *functions, "}", ""])


def _function(function: Mapping[str, Any]) -> str:
    interfaces, parameters = _Writer(function.get("parameters") or {}).write()
    lines = [
        *interfaces,
        *_comment(function.get("description"), ""),
        f"type {function.get('name', 'function')} = (_: {parameters}) => any;",
    ]
    return "\n".join(lines)


class _Writer:
    """Writes the parameter schema of one function and remembers whether it refers to itself (`#`)."""

    def __init__(self, root: Mapping[str, Any]):
        self._root = root
        self._definitions: dict[str, Schema] = {}
        self._root_is_referenced = False

    def write(self) -> tuple[list[str], str]:
        """The lines of the interfaces and the type of the parameters."""
        parameters = self._object(self._root, "")
        interfaces = []
        if self._root_is_referenced:
            parameters = "parameters"
            fields = [self._field(name, self._root, "  ") for name in self._root.get("properties", {})]
            interfaces.append(f"interface parameters {_braces(fields, '')}")
        for name, schema in list(self._definitions.items()):
            interfaces += _comment(schema.get("description"), "")
            interfaces.append(f"interface {name} {self._type(schema, '')}")
        return interfaces, parameters

    def _type(self, schema: Schema, indent: str) -> str:
        if schema is True or schema == {}:
            return "any"
        if schema is False:
            return "null"
        if "$ref" in schema:
            return self._reference(schema["$ref"])
        if "anyOf" in schema:
            return " | ".join(self._type(member, indent) for member in schema["anyOf"])
        if "enum" in schema:
            return " | ".join(f'"{v}"' if isinstance(v, str) else str(v) for v in schema["enum"])
        return self._typed(schema, indent)

    def _typed(self, schema: Mapping[str, Any], indent: str) -> str:
        kind = schema.get("type")
        if isinstance(kind, list):
            return " | ".join(_UNION_MEMBERS[member] for member in kind)
        if kind == "object":
            return self._object(schema, indent)
        if kind == "array":
            return self._array(schema.get("items") or {}, indent)
        if not isinstance(kind, str):
            raise ValueError(f"tool schema {schema!r} has no type, expected $ref, anyOf, enum or type")
        return "number" if kind == "integer" else kind

    def _reference(self, reference: str) -> str:
        if reference == "#":
            self._root_is_referenced = True
            return "parameters"
        path, _, name = reference.rpartition("/")
        if path != "#/$defs" or name not in self._definitions:
            raise ValueError(f"tool schema has $ref {reference!r}, expected '#' or one of $defs")
        return name

    def _object(self, schema: Mapping[str, Any], indent: str) -> str:
        self._definitions |= schema.get("$defs", {})
        inner = indent + "  "
        required = schema.get("required", [])
        names = sorted(schema.get("properties", {}), key=lambda name: (name not in required, name))
        fields = [self._field(name, schema, inner) for name in names]
        extra = schema.get("additionalProperties")
        if extra is not None:
            fields.append(f"{inner}[k: string]: {'never' if extra is False else self._type(extra, inner)}")
        return _braces(fields, indent)

    def _field(self, name: str, parent: Mapping[str, Any], indent: str) -> str:
        schema = parent["properties"][name]
        lines = _docs(schema, indent)
        default = schema.get("default") if isinstance(schema, Mapping) else None
        if default is not None:
            lines.append(f"{indent}// Default: {_default(default)}")
        mark = "" if name in parent.get("required", []) else "?"
        return "\n".join([*lines, f"{indent}{name}{mark}: {self._type(schema, indent)}"])

    def _array(self, items: Schema, indent: str) -> str:
        inner = indent + "  "
        docs = _docs(items, inner)
        if not docs:
            return f"Array<{self._type(items, indent)}>"
        return "\n".join(["Array<", *docs, f"{inner}{self._type(items, inner)}", f"{indent}>"])


def _braces(fields: list[str], indent: str) -> str:
    return "{\n" + ",\n".join(fields) + f"\n{indent}}}" if fields else "{}"


def _docs(schema: Schema, indent: str) -> list[str]:
    if not isinstance(schema, Mapping):
        return []
    lines = _comment(schema.get("description"), indent)
    plain = not {"$ref", "anyOf", "enum"} & schema.keys() and isinstance(schema.get("type"), str)
    keys = _CONSTRAINTS.get(schema["type"], ()) if plain else ()
    found = ", ".join(f"{key}: {schema[key]}" for key in keys if key in schema)
    return [*lines, f"{indent}// {found}"] if found else lines


def _comment(text: str | None, indent: str) -> list[str]:
    return [f"{indent}// {line}" if line else "" for line in text.split("\n")] if text else []


def _default(value: Any) -> str:
    return repr(value) if isinstance(value, int | float) else json.dumps(value, ensure_ascii=False)
