"""The JSON Schema of a line of results.jsonl, from the class that writes it."""

from __future__ import annotations

import dataclasses
import json
import typing
from typing import Any, Literal

from transfer.evaluation.results import Result
from transfer.protocols_command import explained

TYPES = {
    "str": "string",
    "int": "integer",
    "float": "number",
    "None": "null",
    "list": "array",
    "dict": "object",
}
INSIDE = {
    "dict[str, float]": {"additionalProperties": {"type": "number"}},
    "dict[str, str]": {"additionalProperties": {"type": "string"}},
    "list[str]": {"items": {"type": "string"}},
}


def schema() -> dict[str, Any]:
    """Draft 2020-12; fields of later versions are allowed."""
    hints, docs = typing.get_type_hints(Result), explained(Result)
    properties = {}
    for field in dataclasses.fields(Result):
        hint, annotation = hints[field.name], str(field.type)
        if typing.get_origin(hint) is Literal:
            kind: dict[str, Any] = {"enum": list(typing.get_args(hint))}
        else:
            kinds = [TYPES[part.partition("[")[0]] for part in annotation.split(" | ")]
            kind = {"type": kinds[0] if len(kinds) == 1 else kinds} | INSIDE.get(annotation, {})
        properties[field.name] = kind | ({"description": docs[field.name]} if field.name in docs else {})
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A line of results.jsonl",
        "description": " ".join((Result.__doc__ or "").split()),
        "type": "object",
        "properties": properties,
        "required": [f.name for f in dataclasses.fields(Result)],
    }


def as_text() -> str:
    """As it stands in docs/results.schema.json."""
    return json.dumps(schema(), indent=2, ensure_ascii=False) + "\n"
