"""Reads YAML files and ``section.key=value`` overrides into a checked ``Config``, and writes it as YAML.

A file may name another one as ``base:`` (relative to itself); it then holds only the keys that differ from the base.
All mistakes are reported together, one per line, each with the file that holds it.

``deepspeed`` is a free section: a mapping with DeepSpeed's own keys, nested to any depth. It is inherited and
overridden leaf by leaf (``deepspeed.zero_optimization.reduce_scatter=false``).
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

from pydantic import TypeAdapter, ValidationError

from moh_megatron.config import core_yaml
from moh_megatron.config.examples import find_config
from moh_megatron.config.nesting import depth, leaves, nested, within
from moh_megatron.config.schema import Config
from moh_megatron.config.validate import violations
from moh_megatron.io.errors import UserError
from moh_megatron.io.small_file import read_small_file

COMMAND_LINE = "command line"
_EXPONENTS = {"": 0, "k": 3, "m": 6, "g": 9, "b": 9, "t": 12}
"""The powers of ten that people write behind a number."""
_NUMBER_WITH_UNIT = re.compile(r"([-+]?[0-9]+(?:[_, ][0-9]{3})*(?:\.[0-9]+)?) ?([kmgbt]?)", re.IGNORECASE)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read ``path`` and its bases, then the overrides ``section.key=value``; the last one of a key wins.

    An empty value means null. Raises UserError with every mistake found.
    """
    draft = _Draft(str(path))
    for file, mapping in reversed(_chain(path, draft.problems)):
        draft.add(mapping, file)
    for override in overrides:
        draft.override(override)
    return draft.finish()


def completed_config(
    defaults: Callable[[Mapping[str, Mapping[str, Any]]], Mapping[str, Any]],
    source: str,
    path: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Config:
    """``load_config`` of an optional file, completed by ``defaults``.

    ``defaults`` gets the given values by section and key, and returns values for keys that are not given. ``source``
    names their origin in messages.
    """
    draft = _Draft(source)
    for file, mapping in reversed(_chain(path, draft.problems)) if path is not None else ():
        draft.add(mapping, file)
    for override in overrides:
        draft.override(override)
    draft.complete(defaults(draft.values()), source)
    return draft.finish()


def config_from_mapping(mapping: Mapping[str, Any], source: str) -> Config:
    """The configuration of a nested mapping, as a checkpoint stores it; ``source`` names it in messages.

    Raises UserError with every mistake found.
    """
    draft = _Draft(source)
    draft.add(mapping, source)
    return draft.finish()


def mapping_of(config: Config) -> dict[str, dict[str, Any]]:
    """Every value by section and key; ``config_from_mapping`` turns it back into an equal Config."""
    return TypeAdapter(Config).dump_python(config, by_alias=True)


def dump_config(config: Config) -> str:
    """YAML with every value; ``load_config`` reads it back as an equal Config."""
    return core_yaml.dump(mapping_of(config))


class _Setting(NamedTuple):
    value: Any
    source: str


class _Draft:
    """A configuration under construction: the values set so far, their sources, and the problems found."""

    def __init__(self, source: str):
        self.source = source
        """The source that messages name for values that are not set."""
        self.settings: dict[str, dict[str, _Setting]] = {}
        self.problems: list[str] = []
        self.keys = {
            section: [field.alias or name for name, field in getattr(cls, "__pydantic_fields__", {}).items()]
            for section, cls in get_type_hints(Config).items()
        }
        self.free = {section for section, keys in self.keys.items() if not keys}
        self.refused_sections: set[str] = set()

    def add(self, mapping: Mapping[str, Any], source: str) -> None:
        """Set the values of ``mapping``, replacing earlier ones."""
        for section, values in mapping.items():
            if section not in self.keys:
                self.problems.append(f"{source}: {section}: unknown section; {self._nearest_section(section)}")
                continue
            self.settings.setdefault(section, {})
            if not isinstance(values, Mapping | None):
                self.problems.append(f"{source}: {section}: must be a mapping of keys. Got {_shown(values)}.")
                self.refused_sections.add(section)
                continue
            if section in self.free:
                self._add_leaves(section, values or {}, source)
                continue
            for key, value in (values or {}).items():
                if key in self.keys[section]:
                    self.settings[section][key] = _Setting(value, source)
                else:
                    self.problems.append(
                        f"{source}: {section}.{key}: unknown key; {self._nearest_key(section, str(key))}"
                    )

    def _add_leaves(self, section: str, values: Mapping[str, Any], source: str) -> None:
        """``add`` for a free section, whose settings are leaves by dotted path."""
        settings = self.settings[section]
        if depth(values) > core_yaml.DEEPEST:
            self.problems.append(f"{source}: {section}: {core_yaml.TOO_DEEP}")
            return
        for path, value in leaves(values):
            for other in [other for other in settings if within(other, path) or within(path, other)]:
                del settings[other]
            settings[path] = _Setting(value, source)

    def override(self, text: str) -> None:
        """Set one ``section.key=value``, replacing an earlier value."""
        name, equals, value_text = text.partition("=")
        section, dot, key = name.partition(".")
        if not (equals and section and dot and key):
            self.problems.append(f"{COMMAND_LINE}: '{text}': must have the form section.key=value.")
            return
        try:
            value, duplicates = core_yaml.parse(value_text)
        except UserError as error:
            self.problems.append(f"{COMMAND_LINE}: {name}: {error}")
            return
        self.problems += [f"{COMMAND_LINE}: {name}: {duplicate}" for duplicate in duplicates]
        self.add({section: {key: value}}, COMMAND_LINE)

    def complete(self, mapping: Mapping[str, Mapping[str, Any]], source: str) -> None:
        """Set the values of ``mapping`` that are not set yet."""
        for section, values in mapping.items():
            settings = self.settings.setdefault(section, {})
            for key, value in values.items():
                settings.setdefault(key, _Setting(value, source))

    def values(self) -> dict[str, dict[str, Any]]:
        """The values set so far, by section and key."""
        return {
            section: {key: setting.value for key, setting in settings.items()}
            for section, settings in self.settings.items()
        }

    def finish(self) -> Config:
        config, values = None, self.values()
        for section in self.free & values.keys():
            values[section] = nested(values[section])
        try:
            config = TypeAdapter(Config).validate_python(values)
        except ValidationError as error:
            for detail in error.errors(include_url=False):
                if detail["loc"][0] not in self.refused_sections:
                    self.problems.append(self._message(detail))
        if config is None or self.problems:
            raise UserError("\n".join(self.problems))
        if found := violations(config):
            raise UserError("\n".join(f"{self._origin(*key.split('.'))}: {message}" for key, message in found))
        return config

    def _origin(self, section: str, key: str) -> str:
        setting = self.settings.get(section, {}).get(key)
        return setting.source if setting else self.source

    def _message(self, detail: Any) -> str:
        section, *rest = detail["loc"]
        if not rest:  # a required section is missing
            return f"{self.source}: {section}: missing section; it has the keys {', '.join(self.keys[section])}."
        key, *index = rest
        location = f"{self._origin(section, key)}: {section}.{key}" + "".join(f"[{part}]" for part in index)
        if detail["type"] == "missing":
            return f"{location}: missing; it has no default."
        return f"{location}: {_expected(detail)}. Got {_shown(detail['input'])}{_written_as_number(detail)}."

    def _nearest_section(self, name: str) -> str:
        if owners := [section for section, keys in self.keys.items() if name in keys]:
            return f"did you mean '{owners[0]}.{name}'?"
        return nearest(str(name), self.keys, "the sections are")

    def _nearest_key(self, section: str, name: str) -> str:
        if owners := [other for other, keys in self.keys.items() if name in keys]:
            return f"did you mean '{owners[0]}.{name}'?"
        return nearest(name, self.keys[section], f"{section} has the keys")


def nearest(name: str, candidates: Iterable[str], otherwise: str) -> str:
    """A message that suggests the candidate closest to ``name``; if none is close, ``otherwise`` and all candidates."""
    names = list(candidates)
    close = difflib.get_close_matches(name, names, n=1)
    return f"did you mean '{close[0]}'?" if close else f"{otherwise} {', '.join(names)}."


def _expected(detail: Any) -> str:
    """What the schema expects, in words, from pydantic's error type."""
    context = detail.get("ctx", {})
    match detail["type"]:
        case "int_type" | "int_from_float" | "int_parsing" | "int_parsing_size":
            return "must be an integer"
        case "float_type" | "float_parsing":
            return "must be a number"
        case "finite_number":
            return "must be a finite number"
        case "bool_type":
            return "must be true or false"
        case "string_type":
            return "must be text (in quotes, if it looks like something else)"
        case "tuple_type":
            return "must be a list, as in [a, b]"
        case "dataclass_type" | "dict_type":
            return "must be a mapping of keys"
        case "unexpected_keyword_argument":
            return "is an unknown key"
        case "expected":
            return detail["msg"]
        case "literal_error":
            return f"must be {context['expected']}"
        case "greater_than":
            return f"must be greater than {context['gt']:g}"
        case "greater_than_equal":
            return f"must be at least {context['ge']:g}"
        case "less_than":
            return f"must be less than {context['lt']:g}"
        case "less_than_equal":
            return f"must be at most {context['le']:g}"
        case _:
            return "is not acceptable"


def _written_as_number(detail: Any) -> str:
    """The form in which YAML reads a text as the number that it means, such as 5e5 for 500k; empty for other texts."""
    if not detail["type"].startswith(("int_", "float_")) or not isinstance(detail["input"], str):
        return ""
    match = _NUMBER_WITH_UNIT.fullmatch(detail["input"])
    if match is None or detail["input"].isdigit():  # Digits alone are in quotes, as the message shows.
        return ""
    digits, unit = match.groups()
    number = Decimal(re.sub("[_, ]", "", digits)).scaleb(_EXPONENTS[unit.lower()]).normalize()
    return f"; write {str(number).replace('E+', 'e')}"


def _shown(value: Any) -> str:
    match value:
        case None | bool() | float():
            return json.dumps(value)
        case int():
            return str(value) if abs(value) < 10**30 else "a huge number"
        case str():
            return f"the text {json.dumps(value if len(value) <= 60 else value[:57] + '...', ensure_ascii=False)}"
        case Mapping():
            return "a mapping"
        case list() | tuple():
            return "a list"
        case _:
            return repr(value)


def _chain(path: str | Path, problems: list[str]) -> list[tuple[str, dict[str, Any]]]:
    """The file and its bases, nearest first, each with its mapping; duplicate keys are added to ``problems``."""
    chain: list[tuple[str, dict[str, Any]]] = []
    seen: list[Path] = []
    current: Path | None = find_config(path)
    named_by = ""
    while current is not None:
        mapping = _read(current, named_by, problems)
        if current.resolve() in seen:
            raise UserError(f"{named_by}forms a cycle: {' -> '.join([*(file for file, _ in chain), str(current)])}.")
        seen.append(current.resolve())
        base = mapping.pop("base", None)
        chain.append((str(current), mapping))
        named_by = f"{current}: base: "
        if not isinstance(base, str | None):
            raise UserError(f"{named_by}must be the path of a YAML file. Got {_shown(base)}.")
        current = Path(os.path.normpath(current.parent / base)) if base is not None else None
    return chain


def _read(path: Path, named_by: str, problems: list[str]) -> dict[str, Any]:
    """The top-level mapping of one file."""
    try:
        text = read_small_file(path, core_yaml.LONGEST_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{named_by}{path}: no such file; write the path of a YAML file.") from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: must be UTF-8 text. Got the byte 0x{error.object[error.start]:02x} at position {error.start}."
        ) from None
    except UserError as error:
        raise UserError(f"{named_by}{error}") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL character in the path
        raise UserError(f"{named_by}{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    try:
        mapping, duplicates = core_yaml.parse(text)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    problems += [f"{path}: {duplicate}" for duplicate in duplicates]
    if not isinstance(mapping, dict):
        raise UserError(f"{path}: must be a mapping of sections (run, model, ...). Got {_shown(mapping)}.")
    return mapping
