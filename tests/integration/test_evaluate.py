"""moh-evaluate on the checkpoint of a run and on its export."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.runs import Run, command, finish


def evaluated(*arguments: object) -> dict[str, Any]:
    out = Path(str(arguments[arguments.index("--out") + 1]))
    done = finish(command("evaluate.py", *arguments))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "results.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def exported(uninterrupted: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "hf"
    done = finish(command("convert.py", "megatron-to-hf", "--load-dir", uninterrupted.folder, "--hf-dir", folder))
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_validation_loss_equals_that_of_the_training_run(uninterrupted: Run, exported: Path, tmp_path: Path) -> None:
    lines = (uninterrupted.folder / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    expected = json.loads(lines[-1])["loss"]
    checkpoint = evaluated(uninterrupted.folder, "--out", tmp_path / "checkpoint")
    folder = evaluated(exported, "--config", uninterrupted.folder / "config.yaml", "--out", tmp_path / "folder")
    for results, kind in ((checkpoint, "checkpoint"), (folder, "folder")):
        source = results["validation"]["sources"]["data"]
        assert results["validation"]["loss"] == pytest.approx(expected, rel=1e-5)
        assert source["loss"] == results["validation"]["loss"]
        assert source["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
        assert (source["sequences"], source["tokens"]) == (8, 8 * 32)
        assert source["standard_error"] > 0
        assert (results["model"]["kind"], results["model"]["step"]) == (kind, 30)
    table = (tmp_path / "folder" / "results.md").read_text(encoding="utf-8")
    assert f"{expected:.4f} ± " in table


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["nowhere"], "nowhere: no such folder"),
        (["{exported}"], "no training configuration lies in or beside it"),
        (["{broken}", "--config", "{run}/config.yaml"], "It does not load"),
        (["{run}", "--no-validation"], "leaves nothing to measure"),
        (["{run}", "--against", "{exported}"], "needs --suite"),
        (["{run}", "data.dir=nowhere"], "nowhere"),
        (["{run}", "--device", "tpu"], "--device must be"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, list) else "",
)
def test_wrong_arguments_are_refused_without_results(
    arguments: list[str], expected: str, uninterrupted: Run, exported: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken, ignore=shutil.ignore_patterns("*.safetensors"))  # The tokenizer is sound.
    (broken / "config.json").write_text('{"model_type": "llama"}')
    places = {"exported": exported, "broken": broken, "run": uninterrupted.folder}
    given = [argument.format(**places) for argument in arguments]
    done = finish(command("evaluate.py", *given, "--out", tmp_path / "out"))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert expected in done.stderr
    assert not (tmp_path / "out").exists()
