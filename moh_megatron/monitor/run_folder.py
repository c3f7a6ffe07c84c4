"""Reads the files of a run folder, for reports."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from moh_megatron.config.load import load_config, mapping_of
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError
from moh_megatron.monitor.records import read_records
from moh_megatron.monitor.restarts import read_starts

_LAYERED = "head_load/layer_"


@dataclass(frozen=True)
class RunFolder:
    """One run; files and lines that are missing or damaged are left out."""

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
    evaluations: dict[str, dict[str, Any]]
    """results.json of each evaluation, by the name of its folder."""

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
        """[L][N] the newest share of tokens that used each head, from the event files; empty for a dense model."""
        return _newest_loads(self._events)

    @cached_property
    def alarms(self) -> list[tuple[int, str]]:
        """(step, message) of each alarm in the event files."""
        return [
            (event.step, event.tensor_proto.string_val[0].decode())
            for event in (self._events.Tensors("alarms/text_summary") if "alarms/text_summary" in self._texts else ())
        ]

    def series(self, tag: str) -> list[tuple[int, float]]:
        """(step, value) of a scalar in the event files."""
        if tag not in self._events.Tags()["scalars"]:
            return []
        return [(event.step, event.value) for event in self._events.Scalars(tag)]

    @property
    def _texts(self) -> list[str]:
        return self._events.Tags()["tensors"]

    @cached_property
    def _events(self) -> EventAccumulator:
        sizes = {"scalars": 2000, "images": 1, "tensors": 0}  # 0 keeps all of them: no alarm may be missing.
        events = EventAccumulator(str(self.path / "tensorboard"), size_guidance=sizes)
        if (self.path / "tensorboard").is_dir():
            events.Reload()
        return events


def open_run(path: Path) -> RunFolder:
    """Read the run folder ``path``; raises UserError where it is none."""
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path}: must be a run folder, with the config.yaml that a training writes. There is none.")
    try:
        ending = json.loads((path / "exit.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        ending = None
    evaluations = {}
    for file in sorted(path.glob("eval/*/results.json")):
        try:
            evaluations[file.parent.name] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return RunFolder(
        path=path,
        config=load_config(path / "config.yaml"),
        steps=_records_with("tokens", path / "metrics.jsonl"),
        validations=_records_with("loss", path / "validation.jsonl"),
        skipped=read_records(path / "skipped.jsonl"),
        starts=read_starts(path),
        ending=ending if isinstance(ending, dict) else {},
        evaluations=evaluations,
    )


def _records_with(key: str, path: Path) -> list[dict[str, Any]]:
    return [record for record in read_records(path) if key in record]


def _newest_loads(events: EventAccumulator) -> list[list[float]]:
    loads: dict[int, dict[int, float]] = {}
    for tag in events.Tags()["scalars"]:
        if tag.startswith(_LAYERED):
            layer, head = (int(part.rpartition("_")[2]) for part in tag.split("/")[1:])
            loads.setdefault(layer, {})[head] = events.Scalars(tag)[-1].value
    return [[heads[head] for head in sorted(heads)] for _, heads in sorted(loads.items())]
