"""Makes the text of a record from one of its fields, or from several by a template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from string import Formatter
from typing import Any

from moh_megatron.config.schema import DataConfig


@dataclass(frozen=True)
class Template:
    """Literal texts, each but the last followed by a field."""

    literals: tuple[str, ...]
    fields: tuple[str, ...]
    described: str
    """What messages call the fields."""
    key: str
    """The configuration key to change if records do not fit."""

    @property
    def shortest_record(self) -> bytes:
        """The JSON of the shortest record that fits."""
        record = dict.fromkeys(self.fields, "")
        return json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace")

    def fill(self, record: Any) -> str:
        """The text of ``record``. Raises ValueError with the reason if it lacks a field, or if one is not a string."""
        if not isinstance(record, dict):
            raise ValueError(f"expected a JSON object with {self.described}. Got {type(record).__name__}")
        for field in self.fields:
            if field not in record:
                present = ", ".join(map(repr, record)) or "none of them"
                raise ValueError(f"no field {field!r}; the record has {present}. Set {self.key}")
            if not isinstance(record[field], str):
                raise ValueError(f"field {field!r} must be a string. Got {type(record[field]).__name__}")
        text = self.literals[0]
        for field, literal in zip(self.fields, self.literals[1:], strict=True):
            text += record[field] + literal
        return text


def text_template(data: DataConfig) -> Template:
    """data.template, or else the template of the field data.text_key alone."""
    if data.template is None:
        return Template(("", ""), (data.text_key,), f"field {data.text_key!r}", "data.text_key")
    parts = list(Formatter().parse(data.template))
    literals, fields = [""], []
    for literal, field, _, _ in parts:
        literals[-1] += literal
        if field is not None:
            fields.append(field)
            literals.append("")
    return Template(tuple(literals), tuple(fields), f"data.template {data.template!r}", "data.template")
