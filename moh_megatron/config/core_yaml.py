"""Reads and writes YAML by the core schema of YAML 1.2 <https://yaml.org/spec/1.2.2/#103-core-schema>.

PyYAML follows YAML 1.1, where ``2e11`` and ``6e-5`` are text, ``on`` is true, ``010`` is eight, ``12:30`` is 750 and
``2024-01-01`` a date. The loader and the dumper are private subclasses, so PyYAML's own classes are unchanged.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from moh_megatron.io.errors import UserError

_PREFIX = "tag:yaml.org,2002:"
_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z")
_FLOAT = re.compile(
    r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
)


LONGEST_BYTES = 2**20
"""The most bytes of a YAML file: hundreds of times what a configuration needs."""
MOST_NODES = 100_000
"""The most values of a YAML document, counting those below an alias once for each alias."""
DEEPEST = 64
"""The most levels of a YAML document."""
TOO_DEEP = f"nested too deeply. Expected at most {DEEPEST} levels; take some out."


class _Loader(yaml.SafeLoader):
    """Reads null, booleans, numbers, text, lists and mappings; collects duplicate keys."""

    # Empty tables of this class, so that nothing is added to PyYAML's or inherited from them.
    yaml_implicit_resolvers = {}  # noqa: RUF012 (PyYAML declares it as an instance variable)
    yaml_constructors = {None: yaml.SafeLoader.construct_undefined}  # noqa: RUF012

    def __init__(self, stream: str):
        super().__init__(stream)
        self.duplicates: list[str] = []
        self._nodes = 0
        self._depth = 0
        self._sizes: dict[int, int] = {}
        """The nodes at and below each composed node, by its id: what an alias of it adds."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Bound the size of what is built: aliases of aliases double it again and again."""
        is_alias, before = self.check_event(yaml.AliasEvent), self._nodes
        self._depth += 1
        if self._depth > DEEPEST:
            raise UserError(f"not valid YAML: {TOO_DEEP}")
        node = super().compose_node(parent, index)
        self._depth -= 1
        if is_alias:
            self._nodes += self._sizes.get(id(node), 1)
        else:
            self._nodes += 1
            self._sizes[id(node)] = self._nodes - before
        if self._nodes > MOST_NODES:
            raise UserError(f"not valid YAML: expected at most {MOST_NODES:,} values, aliases expanded. Got more.")
        return node

    def construct_list(self, node: yaml.Node) -> list[Any]:
        if not isinstance(node, yaml.SequenceNode):
            raise _invalid(node, "not a list")
        return [self.construct_object(item, deep=True) for item in node.value]

    def construct_keys(self, node: yaml.Node) -> dict[str, Any]:
        if not isinstance(node, yaml.MappingNode):
            raise _invalid(node, "not a mapping")
        lines: dict[str, int] = {}
        mapping = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _invalid(key_node, "a key must be plain text")
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in lines:
                self.duplicates.append(f"line {line}: duplicate key '{key}', first given in line {lines[key]}.")
            lines.setdefault(key, line)
            mapping[key] = self.construct_object(value_node, deep=True)
        return mapping


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as another type; writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        # Outside double quotes PyYAML writes some line separators unescaped, and reads them back as a space.
        return self.represent_scalar(_PREFIX + "str", text, style=None if text.isprintable() else '"')


def _invalid(node: yaml.Node, problem: str) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def _scalar(pattern: re.Pattern[str], what: str, convert: Any) -> Any:
    def construct(loader: _Loader, node: yaml.Node) -> Any:
        # An explicit tag (!!int abc) may precede any node.
        if not isinstance(node, yaml.ScalarNode) or not pattern.match(node.value):
            raise _invalid(node, f"not {what}")
        try:
            return convert(node.value)
        except ValueError as error:
            raise _invalid(node, f"not {what} that can be read ({error})") from None

    return construct


def _integer(text: str) -> int:
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


def _float(text: str) -> float:
    return float(text.replace(".", "", 1) if text[-1] in "fFnN" else text)


for _name, _pattern, _first, _what, _convert in (
    ("null", _NULL, ["~", "n", "N", ""], "null", lambda text: None),
    ("bool", _BOOL, list("tTfF"), "true or false", lambda text: text.lower() == "true"),
    ("int", _INT, list("-+0123456789"), "an integer", _integer),
    ("float", _FLOAT, list("-+.0123456789"), "a number", _float),
):
    _Loader.add_implicit_resolver(_PREFIX + _name, _pattern, _first)
    _Loader.add_constructor(_PREFIX + _name, _scalar(_pattern, _what, _convert))
    _Dumper.add_implicit_resolver(_PREFIX + _name, _pattern, _first)
_Dumper.add_representer(str, _Dumper.represent_text)
_Loader.add_constructor(_PREFIX + "str", _Loader.construct_yaml_str)
_Loader.add_constructor(_PREFIX + "seq", _Loader.construct_list)
_Loader.add_constructor(_PREFIX + "map", _Loader.construct_keys)


def parse(text: str) -> tuple[Any, list[str]]:
    """The value of a YAML document, and a sentence for each duplicate key of a mapping.

    Raises:
        UserError: the text is not YAML; the message gives line and column.
    """
    loader = None
    try:
        loader = _Loader(text)
        return loader.get_single_data(), loader.duplicates
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        position = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise UserError(f"{position}not valid YAML: {error.problem or error.context}.") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise UserError(f"line {line}: not valid YAML: character {error.character!r} is not allowed.") from None
    except RecursionError:
        raise UserError(f"not valid YAML: {TOO_DEEP}") from None
    finally:
        if loader is not None:
            loader.dispose()


def dump(value: dict[str, Any]) -> str:
    """YAML text that ``parse`` reads back as an equal value (tuples become lists)."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
