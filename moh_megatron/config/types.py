"""The types of configuration values, stricter than YAML's own."""

from __future__ import annotations

import os
import re
from string import Formatter
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator
from pydantic_core import PydanticCustomError

from moh_megatron.io.folders import LONGEST_NAME


def _integral(value: Any) -> Any:
    """Convert ``2e11`` to an integer, because token counts are written so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Strict: "12" is not read as 12, and neither yes nor 1 as true.
Int = Annotated[int, Field(strict=True), BeforeValidator(_integral)]
Float = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Bool = Annotated[bool, Field(strict=True)]
PositiveInt = Annotated[Int, Field(gt=0)]
NonNegativeInt = Annotated[Int, Field(ge=0)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NonNegativeFloat = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, lt=1)]
PositiveFraction = Annotated[Float, Field(gt=0, le=1)]

_SHARD = re.compile(r"([0-9]+)/([0-9]+)")
_LONGEST_PATH = 4095
"""What Linux accepts, in bytes."""
_PERCENTAGE = re.compile(r"(100(\.0*)?|[0-9]{1,2}(\.[0-9]+)?) ?%")


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_set(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_is_count(head, 0) for head in value)


def _head_budget(value: Any) -> int | tuple[int, ...] | str | None:
    if isinstance(value, str) and _PERCENTAGE.fullmatch(value):
        return value
    if value is None or _is_count(_integral(value), 1):
        return _integral(value)
    if isinstance(value, list | tuple) and value and all(_is_count(count, 1) for count in value):
        return tuple(value)
    raise PydanticCustomError(
        "expected", "must be a number of heads above 0, a list of them, one a layer, or a percentage as in 75%"
    )


def _head_set(value: Any) -> int | tuple[tuple[int, ...], ...] | None:
    if value is None or _is_count(_integral(value), 0):
        return _integral(value)
    if isinstance(value, list | tuple) and value and all(_is_set(heads) for heads in value):
        return tuple(tuple(heads) for heads in value)
    raise PydanticCustomError("expected", "must be a number of heads, or for each layer a list of heads counted from 0")


def _path(value: str) -> str:
    if "\0" in value:
        raise PydanticCustomError("expected", "must be a path, and no path holds a NUL character")
    if not value:
        raise PydanticCustomError("expected", "must be a path; a single dot names the current folder")
    encoded = os.fsencode(value)
    if len(encoded) > _LONGEST_PATH or any(len(name) > LONGEST_NAME for name in encoded.split(b"/")):
        raise PydanticCustomError(
            "expected",
            "must be a path of at most {path} bytes, whose names have at most {name}",
            {"path": _LONGEST_PATH, "name": LONGEST_NAME},
        )
    return os.path.expanduser(value)  # "~" is the user's home, as in the shell


def _name(value: str) -> str:
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", value):
        return value
    raise PydanticCustomError("expected", "must be a name of letters, digits, '_', '.' and '-'")


def _shard(value: str | None) -> str | None:
    if value is None or ((match := _SHARD.fullmatch(value)) and 1 <= int(match[1]) <= int(match[2])):
        return value
    raise PydanticCustomError("expected", "must be i/n with 1 <= i <= n, such as 3/16")


def _template(value: str | None) -> str | None:
    if value is None:
        return None
    try:
        fields = [part[1:] for part in Formatter().parse(value) if part[1] is not None]
    except ValueError as error:
        raise PydanticCustomError("expected", "must be a template ({reason})", {"reason": str(error)}) from None
    plain = [
        bool(field) and not set(field) & set(".[]") and not spec and not conversion
        for field, spec, conversion in fields
    ]
    if plain and all(plain):
        return value
    raise PydanticCustomError("expected", "must name fields of the records, such as {example}", {"example": "{text}"})


HeadBudget = Annotated[
    int | tuple[int, ...] | str | None, PlainValidator(_head_budget), "integer, list of integers, percentage, or null"
]
HeadSet = Annotated[
    int | tuple[tuple[int, ...], ...] | None, PlainValidator(_head_set), "integer, list of lists of integers, or null"
]

PathText = Annotated[str, AfterValidator(_path)]
SourceName = Annotated[str, AfterValidator(_name)]
ShardText = Annotated[str | None, AfterValidator(_shard)]
TextTemplate = Annotated[str | None, AfterValidator(_template)]
