"""A dense model continue-tuned into MoH: upcycled, distilled, stopped and resumed; and with a larger vocabulary."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.runs import Run, command, finish

from moh_megatron.checkpoint import layout
from moh_megatron.data.tokenizer.tokenizer import load_tokenizer
from moh_megatron.upcycle.vocabulary import new_pieces

UPCYCLED = (
    "moh.router=query_norm",
    "moh.shared_placement=calibrated",
    "moh.calibration_sequences=2",
    "moh.activation_schedule_steps=5",
    "train.total_tokens=3072",  # 12 steps
    "parallel.zero_stage=2",
)


@pytest.fixture(scope="module")
def dense(new_run: Callable[[], Run]) -> Run:
    run = new_run()
    done = run.finish("moh.enabled=false")
    assert done.returncode == 0, done.stdout + done.stderr
    return run


def tune(run: Run, source: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    paths = (f"run.dir={run.folder}", f"data.dir={run.data}", f"train.init_from={source}")
    return finish(command("continue_tune.py", run.config, *arguments, *paths))


@pytest.fixture(scope="module")
def tuned(dense: Run, new_run: Callable[[], Run]) -> tuple[Run, str]:
    run = new_run()
    done = tune(run, dense.folder, "--nproc-per-node", 2, *UPCYCLED, f"distillation.teacher={dense.folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    return run, done.stderr


def test_initial_checkpoint_with_all_heads_active_is_the_dense_model(tuned: tuple[Run, str]) -> None:
    (line,) = (line for line in tuned[1].splitlines() if line.startswith("with all heads active"))
    assert float(line.split("KL from the dense model ")[1].split()[0]) < 1e-8


def test_training_starts_from_the_dense_weights_with_calibrated_heads(tuned: tuple[Run, str], dense: Run) -> None:
    run, _ = tuned
    start = run.folder / "start"
    original, tuned_weights = layout.read_weights(layout.resolve_checkpoint(dense.folder)), layout.read_weights(start)
    assert all(torch.equal(original[name], tuned_weights[name]) for name in original)
    report = run.json("calibration.json")
    listed = [sorted(ranking[:2]) for ranking in report["ranking"]]
    config = layout.read_config(layout.resolve_checkpoint(run.folder))
    assert [list(heads) for heads in config.moh.shared_heads or ()] == listed  # type: ignore[union-attr]
    assert config.train.init_from == str(start)
    # The schedule begins with all heads, so that the first loss is that of the dense model.
    assert run.records()[0]["lm_loss"] < dense.records()[-1]["lm_loss"] + 0.3


@pytest.mark.slow
def test_stopped_run_resumes_bit_for_bit(tuned: tuple[Run, str], dense: Run) -> None:
    uninterrupted, output = tuned
    run = replace(uninterrupted, folder=uninterrupted.folder.with_name("stopped"))
    arguments = ("--nproc-per-node", 2, *UPCYCLED, f"distillation.teacher={dense.folder}")
    stopped = tune(run, dense.folder, *arguments, "train.max_seconds=0.01")
    assert stopped.returncode == 75, stopped.stdout + stopped.stderr
    assert run.records()[-1]["step"] == 1
    resumed = tune(run, dense.folder, *arguments)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert "made of" in output, "the initial checkpoint is written once"
    assert "made of" not in resumed.stdout + resumed.stderr
    for one, other in zip(run.records(), uninterrupted.records(), strict=True):
        assert (one["lm_loss"], one["grad_norm"]) == (other["lm_loss"], other["grad_norm"])


def test_new_tokens_start_from_the_mean_of_their_pieces(dense: Run, new_run: Callable[[], Run], tmp_path: Path) -> None:
    run = replace(new_run(), data=tmp_path / "data")
    old = dense.data / "tokenizer"
    grown = ("moh.enabled=false", "model.vocab_size=416")
    growing = (f"data.dir={run.data}", f"tokenizer.path={old}", "tokenizer.grow_to=410")
    made = finish(command("prepare_data.py", run.config, *growing, *grown))
    assert made.returncode == 0, made.stderr
    done = tune(run, dense.folder, "--prepare", *grown)
    assert done.returncode == 0, done.stdout + done.stderr
    original, grown_weights = (
        layout.read_weights(layout.resolve_checkpoint(dense.folder)),
        layout.read_weights(run.folder / "start"),
    )
    pieces = new_pieces(load_tokenizer(old), load_tokenizer(run.data / "tokenizer"))
    assert len(pieces) == 26
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert grown_weights[name].shape == (416, 64)
        assert torch.equal(grown_weights[name][:384], original[name])
        for number, parts in pieces.items():
            torch.testing.assert_close(grown_weights[name][number], original[name][parts].mean(0))
    trained = tune(run, dense.folder, *grown, "parallel.tensor=1", "train.total_tokens=1024")
    assert trained.returncode == 0, trained.stdout + trained.stderr
    assert layout.read_config(layout.resolve_checkpoint(run.folder)).model.vocab_size == 416


def test_report_compares_the_choices_of_shared_heads(dense: Run, tuned: tuple[Run, str], tmp_path: Path) -> None:
    done = finish(
        [
            *command("../tools/upcycle_report.py", dense.config, "--out", tmp_path, "--documents", 5),
            *(f"data.dir={dense.data}", f"train.init_from={dense.folder}", f"run.dir={tmp_path / 'run'}"),
            *("moh.router=query_norm", "moh.shared_heads=4", "moh.active_heads=6"),
        ]
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [(row["choice"], row["share"]) for row in rows if row["scope"] == "global"] == [
        (choice, share)
        for choice in ("first", "spread", "calibrated")
        for share in (100, 90, 75, 50)
        if (choice, share) != ("spread", 50)
    ]
    assert all((row["divergence"]["value"] < 1e-8) == (row["share"] == 100) for row in rows)
    assert (tmp_path / "report.png").stat().st_size > 1000
    text = (tmp_path / "report.md").read_text()
    assert "| global | first | 4 (50 %) | 3 |" in text
    assert "| grouped | calibrated | 8 (100 %) | 4 |" in text
    assert "no such choice: spread at 50 %." in text
    assert "Not grouped, because 4 KV groups need equally many shared and active heads each: first at" in text


@pytest.mark.slow
def test_table_shows_the_recovered_loss(dense: Run, tuned: tuple[Run, str], tmp_path: Path) -> None:
    run, _ = tuned
    control = replace(run, folder=run.folder.with_name("control"))
    done = tune(control, dense.folder, "moh.enabled=false", "train.total_tokens=3072", "parallel.tensor=1")
    assert done.returncode == 0, done.stdout + done.stderr
    table = command("../tools/tuning_table.py", control.folder, run.folder, "--out", tmp_path / "table.md")
    shown = finish(table)
    assert shown.returncode == 0, shown.stderr
    assert "| 4 of 8, 2 shared | 3,072 |" in shown.stdout
    measured = (run.folder / "documents.json").read_bytes()
    again = finish(table)
    assert again.stdout == shown.stdout
    assert (run.folder / "documents.json").read_bytes() == measured


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train.init_from=",), "train.init_from must name the checkpoint to tune"),
        (("model.num_layers=3",), "model.num_layers: expected 2, got 3"),
        (("model.vocab_size=380",), "must hold the 384 entries"),
        (("moh.gating=paper", "moh.router=learned"), "moh.gating must be normalized"),
    ],
    ids=["no source", "other layers", "smaller vocabulary", "gates that are not 1"],
)
def test_model_that_cannot_be_tuned_is_refused_without_a_folder(
    dense: Run, new_run: Callable[[], Run], arguments: tuple[str, ...], message: str
) -> None:
    run = new_run()
    paths = (f"run.dir={run.folder}", f"data.dir={run.data}", f"train.init_from={dense.folder}")
    done = finish(command("continue_tune.py", run.config, *paths, *arguments))
    assert done.returncode == 2, done.stdout + done.stderr
    assert message in done.stderr
    assert not (run.folder / "start").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--choices", "first", "moh.shared_heads=4"), "section.key=value stands before --choices"),
        (("--out", "taken"), "must be a folder to write into. Got a file: taken"),
        (("--shares", "75", "101"), "must be a whole number of per cent from 1 to 100. Got 101"),
        (("--documents", "1"), "must be a whole number of at least 2. Got 1"),
    ],
)
def test_arguments_of_the_report_are_checked_before_anything_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    done = finish([*command("../tools/upcycle_report.py", "absent.yaml", "--out", "report"), *arguments])
    assert done.returncode == 2
    assert message in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["taken"]
