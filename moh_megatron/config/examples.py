"""Finds the example configurations and suites that are shipped with the package, from any folder."""

from __future__ import annotations

import difflib
from pathlib import Path

from moh_megatron.io.errors import UserError

_FOLDER = "configs"
_SUITES = "eval"


def examples_folder() -> Path:
    """Return ``configs/``: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).parents[1]
    return next((path for path in (package / _FOLDER, package.parent / _FOLDER) if path.is_dir()), package / _FOLDER)


def shipped_file(path: str | Path) -> Path:
    """Return ``path``, or the shipped file of that name if ``path`` begins with ``configs/`` and does not exist."""
    path = Path(path)
    if path.parts[:1] == (_FOLDER,) and not path.exists():
        shipped = examples_folder().joinpath(*path.parts[1:])
        if shipped.exists():
            return shipped
    return path


def find_config(name: str | Path) -> Path:
    """Return the configuration that ``name`` means: a path, or an example's name without folder and ``.yaml``.

    Raises UserError where a bare name is not that of an example.
    """
    suites = examples_folder() / _SUITES
    files = sorted(examples_folder().rglob("*.yaml"))
    return _find(name, "example", [file for file in files if not file.is_relative_to(suites)])


def find_suite(name: str | Path) -> Path:
    """Return the suite of evaluation tasks that ``name`` means, as ``find_config`` does for configurations."""
    return _find(name, "suite", sorted((examples_folder() / _SUITES).glob("*.yaml")))


def _find(name: str | Path, kind: str, files: list[Path]) -> Path:
    path = shipped_file(name)
    if path.suffix or path.parent != Path() or path.is_file():
        return path
    known = {file.stem: file for file in files}
    if path.name in known:
        return known[path.name]
    if path.exists():  # Reading it as a file reports that it is a folder.
        return path
    near = difflib.get_close_matches(path.name, known, n=1)
    meant = f" Did you mean the {kind} {near[0]}?" if near else ""
    raise UserError(f"{path}: no such file, and no {kind} of that name.{meant} The {kind}s are: {', '.join(known)}.")
