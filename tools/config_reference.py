#!/usr/bin/env python
"""Prints every configuration key as Markdown: .venv/bin/python tools/config_reference.py > docs/configuration.md"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from moh_megatron.config import schema

_INTRODUCTION = """\
# Configuration

This page lists every key of a configuration file. `tools/config_reference.py` prints it from
`moh_megatron/config/schema.py`; change it there.

A key is written `section: {key: value}` in YAML and `section.key=value` on the command line; the command line wins.
A file may name another one with `base: other.yaml` (relative to itself) and then holds only the keys that differ.
Numbers may be written as `2e11` or `6e-5`. *(ours)* marks values that the MoH paper does not give.
Unknown keys, wrong types and combinations that cannot work are refused before anything is loaded, all in one message.
"""
_HEAD = "| key | value | default | meaning |\n|---|---|---|---|"
_WORDS = {int: "integer", float: "number", bool: "true or false", str: "text", NoneType: "null"}


_ENTRIES: dict[type, str] = {
    schema.RopeScaling: "model.rope_scaling",
    schema.SourceConfig: "An entry of data.sources",
    schema.WeightChange: "An entry of data.weight_changes",
}


def field_docstrings(section: type) -> dict[str, str]:
    """The docstring below each field of a class, on one line; fields without one are left out."""
    body, found = _definition(section).body, {}
    for field, following in itertools.pairwise(body):
        match field, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = _prose(text)
    return found


def kind(hint: Any) -> str:
    """The values that a field's type allows, in words."""
    arguments = get_args(hint)
    match get_origin(hint):
        case origin if origin is Annotated and isinstance(arguments[-1], str):
            return arguments[-1]
        case origin if origin is Annotated:
            bounds = [bound for field in arguments[1:] if isinstance(field, FieldInfo) for bound in _bounds(field)]
            return " ".join([kind(arguments[0]), ", ".join(bounds)]).strip()
        case origin if origin is Literal:
            return ", ".join(f"`{value}`" for value in arguments)
        case origin if origin in (Union, UnionType):
            return ", or ".join(map(kind, arguments))
        case origin if origin is dict:
            return f"mapping of {kind(arguments[0])} to {kind(arguments[1])}"
        case origin if origin is tuple:
            return f"list of {kind(arguments[0])}"
        case _:
            return _WORDS[hint]


def _bounds(field: FieldInfo) -> list[str]:
    found = []
    for bound in field.metadata:
        match bound:
            case Gt(gt=value):
                found.append(f"above {value}")
            case Ge(ge=value):
                found.append(f"at least {value}")
            case Lt(lt=value):
                found.append(f"below {value}")
            case Le(le=value):
                found.append(f"at most {value}")
    return found


def reference() -> str:
    """The complete page."""
    page = [_INTRODUCTION]
    for name, section in get_type_hints(schema.Config).items():
        page.append(f"## {name}\n")
        if get_origin(section) is dict:
            page += [_HEAD, f"| `{name}` | mapping | `{{}}` | {field_docstrings(schema.Config)[name]} |", ""]
            continue
        if description := ast.get_docstring(_definition(section)):
            page.append(f"{_prose(description)}\n")
        page.append(_HEAD)
        hints, docstrings = get_type_hints(section, include_extras=True), field_docstrings(section)
        for field in dataclasses.fields(section):
            required = field.default is dataclasses.MISSING
            default = "required" if required else f"`{json.dumps(field.default)}`"
            key = section.__pydantic_fields__[field.name].alias or field.name
            page.append(f"| `{name}.{key}` | {kind(hints[field.name])} | {default} | {docstrings[field.name]} |")
        page.append("")
    for section, title in _ENTRIES.items():
        page.append(f"## {title}\n\n{_prose(ast.get_docstring(_definition(section)) or '')}\n")
        page += ["| field | value | default | meaning |", "|---|---|---|---|"]
        hints, docstrings = get_type_hints(section, include_extras=True), field_docstrings(section)
        for field in dataclasses.fields(section):
            default = "required" if field.default is dataclasses.MISSING else f"`{json.dumps(field.default)}`"
            page.append(f"| {field.name} | {kind(hints[field.name])} | {default} | {docstrings[field.name]} |")
        page.append("")
    return "\n".join(page)


def _definition(section: type) -> ast.ClassDef:
    (definition,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(definition, ast.ClassDef)
    return definition


def _prose(docstring: str) -> str:
    return " ".join(docstring.split()).replace("``", "`").replace("|", "\\|").replace("<", "\\<")


if __name__ == "__main__":
    print(reference(), end="")
