"""Reads the files of a run folder, for reports."""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moh_megatron.config.load import load_config, mapping_of
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError
from moh_megatron.io.small_file import read_small_text
from moh_megatron.monitor.event_files import event_folder
from moh_megatron.monitor.records import HEAD_LOAD, read_sound_records
from moh_megatron.monitor.restarts import START_FILES

logger = logging.getLogger(__name__)

_LAYER_AND_HEAD = re.compile(r"head_load/layer_([0-9]{1,6})/head_([0-9]{1,6})")
_LARGEST = 1e100
"""The largest number of a chart. Above it the arithmetic of charts overflows, and no run measures anything."""
_Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
_Number = Annotated[float, Field(strict=True, ge=-_LARGEST, le=_LARGEST)] | None
_LAST_SECOND = 253402300799  # of the year 9999


@pydantic_dataclass
class _Step:
    """What a report reads of a line of metrics.jsonl."""

    step: _Count
    tokens: _Count
    lm_loss: _Number = None
    balance_loss: _Number = None
    grad_norm: _Number = None
    lr: _Number = None
    tokens_per_second: _Number = None
    skipped: bool = False


@pydantic_dataclass
class _Validation:
    """What a report reads of a line of validation.jsonl."""

    step: _Count
    loss: _Number
    sources: dict[str, _Number] = field(default_factory=dict)


@pydantic_dataclass
class _HeadLoad:
    """What a report reads of head_load.json."""

    load: list[list[Annotated[float, Field(strict=True, ge=0, le=1)]]]


@pydantic_dataclass
class _Start:
    """What a report reads of a line of restarts.jsonl."""

    step: _Count
    time: Annotated[float, Field(strict=True, ge=0, le=_LAST_SECOND)] = 0


@pydantic_dataclass
class _Ending:
    """What a report reads of exit.json."""

    reason: str = ""


_STEP, _VALIDATION, _START, _ENDING = (TypeAdapter(kind) for kind in (_Step, _Validation, _Start, _Ending))
_HEAD_LOAD = TypeAdapter(_HeadLoad)
_ANY_OBJECT, _ANYTHING = TypeAdapter(dict[str, Any]), TypeAdapter(Any)


@dataclass(frozen=True)
class RunFolder:
    """One run; files and lines that are missing or damaged are left out, and the damaged ones counted."""

    path: Path
    config: Config
    steps: list[dict[str, Any]]
    """metrics.jsonl"""
    validations: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    """restarts.jsonl: one record for each start of the run."""
    ending: dict[str, Any]
    """exit.json"""
    stored_head_load: list[list[float]]
    """head_load.json; empty for a dense model and a run of an earlier version."""
    evaluations: dict[str, dict[str, Any]]
    """results.json of each evaluation, by the name of its folder."""
    damaged: dict[str, int]
    """How many damaged lines of a file were left out, by the file's name; a whole file counts as one."""

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @cached_property
    def settings(self) -> dict[str, str]:
        """Every value of the configuration, as {section.key: value}."""
        return {
            f"{section}.{key}": json.dumps(value)
            for section, values in mapping_of(self.config).items()
            for key, value in values.items()
        }

    @cached_property
    def head_load(self) -> list[list[float]]:
        """[L][N] the newest share of tokens that used each head; empty for a dense model.

        Runs of earlier versions have it in the event files only.
        """
        return self.stored_head_load or _newest_loads(self._events)

    @cached_property
    def alarms(self) -> list[tuple[int, str]]:
        """(step, message) of each alarm in the event files."""
        return [
            (event.step, event.tensor_proto.string_val[0].decode(errors="replace"))
            for event in (self._events.Tensors("alarms/text_summary") if "alarms/text_summary" in self._texts else ())
            if event.tensor_proto.string_val
        ]

    def series(self, tag: str) -> list[tuple[int, float]]:
        """(step, value) of a scalar in the event files."""
        if tag not in self._events.Tags()["scalars"]:
            return []
        return [(event.step, event.value) for event in self._events.Scalars(tag) if is_number(event.value)]

    @property
    def _texts(self) -> list[str]:
        return self._events.Tags()["tensors"]

    @cached_property
    def _events(self) -> EventAccumulator:
        sizes = {"scalars": 2000, "images": 1, "tensors": 0}  # 0 keeps all of them: no alarm may be missing.
        events = EventAccumulator(str(event_folder(self.path)), size_guidance=sizes)
        events.Reload()
        return events


def open_run(path: Path) -> RunFolder:
    """Read the run folder ``path``; raises UserError where it is none."""
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path}: must be a run folder, with the config.yaml that a training writes. There is none.")
    damaged: dict[str, int] = {}

    def records(name: str, kind: TypeAdapter[Any]) -> list[dict[str, Any]]:
        found, count = read_sound_records(path / name, lambda record: _fits(kind, record))
        if count:
            damaged[name] = count
        return found

    def json_file(file: Path, kind: TypeAdapter[Any]) -> Any:
        """The content of ``file``; None where there is none of this ``kind``."""
        try:
            content = json.loads(read_small_text(file))
            if _fits(kind, content):
                return content
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError):
            pass
        damaged[file.relative_to(path).as_posix()] = 1
        return None

    config = load_config(path / "config.yaml")
    results = {file.parent.name: json_file(file, _ANYTHING) for file in sorted(path.glob("eval/*/results.json"))}
    run = RunFolder(
        path=path,
        config=config,
        steps=records("metrics.jsonl", _STEP),
        validations=records("validation.jsonl", _VALIDATION),
        skipped=records("skipped.jsonl", _ANY_OBJECT),
        starts=[start for name in START_FILES for start in records(name, _START)],
        ending=json_file(path / "exit.json", _ENDING) or {},
        stored_head_load=(json_file(path / HEAD_LOAD, _HEAD_LOAD) or {"load": []})["load"],
        evaluations={name: content for name, content in results.items() if content is not None},
        damaged=damaged,
    )
    for name, count in damaged.items():
        logger.warning(f"{path / name}: {count:,} damaged {'line' if count == 1 else 'lines'} left out.")
    return run


def is_number(value: Any) -> bool:
    """Whether ``value`` is a number that a chart can show."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _fits(kind: TypeAdapter[Any], content: Any) -> bool:
    try:
        kind.validate_python(content)
    except (ValidationError, OverflowError):
        return False
    return True


def _newest_loads(events: EventAccumulator) -> list[list[float]]:
    loads: dict[int, dict[int, float]] = {}
    for tag in events.Tags()["scalars"]:
        if match := _LAYER_AND_HEAD.fullmatch(tag):
            layer, head = map(int, match.groups())
            value = events.Scalars(tag)[-1].value
            loads.setdefault(layer, {})[head] = value if is_number(value) else 0.0
    return [[heads[head] for head in sorted(heads)] for _, heads in sorted(loads.items())]
