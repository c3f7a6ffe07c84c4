"""What an earlier evaluation left in the folder: added to and measured again, but not replaced by something else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moh_megatron.evaluate.paired_test import QUESTIONS
from moh_megatron.evaluate.results import RESULTS
from moh_megatron.io.errors import UserError


def read_earlier(folder: Path, planned: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Results and answers in ``folder``; both empty where there are none.

    Raises UserError where ``planned``, as results without their numbers, is of another model, suite, limit or data: it
    would destroy what lies there.
    """
    path = folder / RESULTS
    if not path.exists():
        return {}, []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        there, here = _subjects(found), _subjects(planned)
        answers = (folder / QUESTIONS).read_text(encoding="utf-8") if (folder / QUESTIONS).exists() else ""
        questions = [json.loads(line) for line in answers.splitlines()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: must be the results of an evaluation, to add to them. They cannot be read: {error!r}. Remove "
            "them or name another folder with --out."
        ) from None
    for name, value in here.items():
        if name in there and there[name] != value:
            raise UserError(
                f"{folder}: holds an evaluation whose {name} is {there[name]}. Here it is {value}: name another folder "
                "with --out, or remove that one."
            )
    return found, questions


def _subjects(found: dict[str, Any]) -> dict[str, Any]:
    """{name: value} of what each part of results was measured on."""
    model = {**found["model"], "path": str(Path(found["model"]["path"]).resolve())}
    parts: dict[str, dict[str, Any]] = {"model": model, "software": found["software"]}
    if "validation" in found:
        parts["validation"] = found["validation"]["of"]
    if "suite" in found:
        suite = found["suite"]
        tasks = ", ".join(f"{each['task']} {each['metric']} {each['shots']}-shot" for each in suite["tasks"])
        parts["suite"] = {"name": suite["name"], "limit": suite["limit"], "tasks": tasks}
    if "comparison" in found:
        parts["comparison"] = {"against": found["comparison"]["against"]}
    named = {f"{part}.{name}": value for part, values in parts.items() for name, value in values.items()}
    return {"dtype": found["dtype"], **named}
