"""A run on two corpora: preparation, mixture, separate validation, and other weights after a resume."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import yaml
from support.runs import SMALL, Run, command, end, finish


def test_two_sources_are_mixed_validated_apart_and_reweighted_on_resume(
    prepared: tuple[Path, Path], tmp_path: Path
) -> None:
    _, data = prepared
    lines = (data.parent / "text.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    sources = []
    for name, part in {"much": lines[:160], "little": lines[160:]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
        sources.append({"name": name, "weight": 1, "inputs": [str(tmp_path / f"{name}.jsonl")]})
    values = {**SMALL, "run": {"dir": str(tmp_path / "run")}, "tokenizer": {"path": str(data / "tokenizer")}}
    values["data"] = {"sources": sources, "validation_fraction": 0.2}
    config = tmp_path / "blend.yaml"
    config.write_text(yaml.safe_dump(values), encoding="utf-8")

    done = finish(command("prepare_data.py", config, f"data.dir={tmp_path / 'data'}"))
    assert done.returncode == 0, done.stderr
    assert "warning: little is read" not in done.stdout
    assert done.stdout.count("50.00 %") == 2
    done = finish(command("prepare_data.py", config, f"data.dir={tmp_path / 'data'}", "--source", "none"))
    assert (done.returncode, "expected one of data.sources (much, little)" in done.stderr) == (2, True)

    run = Run(config, tmp_path / "data", tmp_path / "run")
    process = run.start()
    run.wait_for_step(3, process)
    code, output = end(process, signal.SIGTERM)
    assert code == 75, output
    assert output.count("source, share of the run, tokens, epochs") == 1
    step = run.json("exit.json")["step"]
    past_change = json.dumps([{"step": step - 1, "weights": {"little": 3}}])
    done = run.finish(f"data.weight_changes={past_change}")
    assert (done.returncode, "shares of the sources so far" in done.stderr) == (2, True), done.stderr
    coming_change = json.dumps([{"step": step, "weights": {"little": 3}}])
    done = run.finish(f"data.weight_changes={coming_change}")
    assert done.returncode == 0, done.stdout + done.stderr
    validations = [json.loads(line) for line in (run.folder / "validation.jsonl").read_text().splitlines()]
    last = validations[-1]
    assert set(last["sources"]) == {"much", "little"}
    assert abs(last["loss"] - (last["sources"]["much"] + 3 * last["sources"]["little"]) / 4) < 1e-9
    assert [record["step"] for record in run.records()] == list(range(1, 31))
