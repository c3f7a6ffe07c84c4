"""The example configurations that come along with the package, found from any folder."""

from __future__ import annotations

import difflib
from pathlib import Path

from moh_megatron.io.errors import UserError

_FOLDER = "configs"


def examples_folder() -> Path:
    """``configs/``: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).parents[1]
    return next((path for path in (package / _FOLDER, package.parent / _FOLDER) if path.is_dir()), package / _FOLDER)


def with_examples(path: str | Path) -> Path:
    """``path``; where nothing lies there and it begins with ``configs/``, the file of that name that came along."""
    path = Path(path)
    if path.parts[:1] == (_FOLDER,) and not path.exists():
        shipped = examples_folder().joinpath(*path.parts[1:])
        if shipped.exists():
            return shipped
    return path


def find_config(name: str | Path) -> Path:
    """The configuration file meant by ``name``: a path, or an example's name without folder and ``.yaml``.

    Raises UserError where a bare name is no example's.
    """
    path = with_examples(name)
    if path.suffix or path.parent != Path() or path.exists():
        return path
    examples = {file.stem: file for file in sorted(examples_folder().rglob("*.yaml"))}
    if path.name in examples:
        return examples[path.name]
    near = difflib.get_close_matches(path.name, examples, n=1)
    meant = f" Did you mean the example {near[0]}?" if near else ""
    known = ", ".join(sorted(examples))
    raise UserError(f"{path}: no such file, and no example of that name.{meant} The examples are: {known}.")
