"""Converts nested mappings to flat ones and back: ``{a: {b: 1}}`` <-> ``{a.b: 1}``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def leaves(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted path and value of every entry that is not a mapping; an empty mapping has none."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def depth(values: Mapping[str, Any]) -> int:
    """The levels of the mappings that ``nested`` makes of ``leaves``, where a key may be a dotted path."""
    deepest, level = 0, [(0, values)]
    while level:
        above, mapping = level.pop()
        for key, value in mapping.items():
            below = above + 1 + str(key).count(".")
            deepest = max(deepest, below)
            if isinstance(value, Mapping):
                level.append((below, value))
    return deepest


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``leaves``."""
    root: dict[str, Any] = {}
    for path, value in flat.items():
        *above, key = path.split(".")
        mapping = root
        for name in above:
            mapping = mapping.setdefault(name, {})
        mapping[key] = value
    return root


def within(path: str, above: str) -> bool:
    """Whether ``path`` equals ``above`` or lies below it."""
    return f"{path}.".startswith(f"{above}.")
