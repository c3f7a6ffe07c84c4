"""User errors end with exit code 2 and one message that names the remedy, without a traceback or partial results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.runs import REPOSITORY, Run, command, finish

SMOKE = REPOSITORY / "configs" / "smoke.yaml"


def refused(arguments: list[str], *expected: str) -> None:
    done = finish(arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    for part in expected:
        assert part in done.stderr


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("parallel.tensor=3", "parallel.tensor"),
        ("moh.active_heads=9", "moh.active_heads"),
        ("moh.active_head=4", "did you mean 'active_heads'?"),
        ("parallel.pipeline=2", "parallel.pipeline"),
        ("parallel.context=2", "parallel.context"),
        ("train.precision=fp16", "train.precision"),
        ("train.total_tokens=many", "train.total_tokens"),
    ],
)
def test_invalid_value_is_refused_before_the_run_folder_is_made(override: str, expected: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    refused(command("pretrain.py", SMOKE, "--nproc-per-node", 2, f"run.dir={run}", override), expected)
    assert not run.exists()


def test_missing_configuration_is_refused() -> None:
    refused(command("pretrain.py", "no/such.yaml"), "no/such.yaml")


def test_training_without_prepared_data_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    refused(command("pretrain.py", SMOKE, "--nproc-per-node", 2, f"run.dir={run}"), "Run moh-prepare CONFIG first")
    assert [path.name for path in run.iterdir()] == ["exit.json"]


@pytest.mark.parametrize(
    ("ranks", "overrides", "expected"),
    [
        (3, (), "parallel.tensor"),
        (0, (), "--nproc-per-node"),
        (2, ("parallel.tensor=1", "train.global_batch_size=4"), "train.global_batch_size"),
        (2, ("train.sequence_length=4096", "train.total_tokens=1e6"), "fewer than one sequence"),
        (2, ("model.vocab_size=256",), "model.vocab_size"),
        (2, ("deepspeed.zero_optimization.redcue_scatter=true",), "did you mean 'reduce_scatter'?"),
        (2, ("deepspeed.zero_optimization.stage=2",), "parallel.zero_stage"),
    ],
)
def test_configuration_that_does_not_fit_the_data_or_the_ranks_is_refused(
    new_run: Callable[[], Run], ranks: int, overrides: tuple[str, ...], expected: str
) -> None:
    run = new_run()
    refused(run.arguments(*overrides, ranks=ranks), expected)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "text"),
        (b"\xff\xfe not text", "UTF-8"),
        (b"A single short sentence.", ""),
    ],
)
def test_unusable_text_is_refused(content: bytes, expected: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    run = tmp_path / "run"
    refused(command("prepare_data.py", SMOKE, f"run.dir={run}", f"data.inputs=[{text}]"), expected)
    assert not list(run.glob("data/*"))


def test_missing_text_is_refused(tmp_path: Path) -> None:
    missing = tmp_path / "none.jsonl"
    refused(command("prepare_data.py", SMOKE, f"run.dir={tmp_path}", f"data.inputs=[{missing}]"), str(missing))


def test_conversion_and_generation_without_a_model_are_refused(tmp_path: Path) -> None:
    nothing, target = tmp_path / "nothing", tmp_path / "hf"
    refused(command("convert.py", "megatron-to-hf", "--load-dir", nothing, "--hf-dir", target), str(nothing))
    refused(command("generate.py", SMOKE, f"run.dir={nothing}"), str(nothing))
    assert not target.exists()
