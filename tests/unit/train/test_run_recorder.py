"""What the recorder writes and logs on the first rank, and that it does nothing on other ranks."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moh_megatron.config.load import load_config
from moh_megatron.config.schema import Config
from moh_megatron.monitor.accumulator import Interval, StepMetrics
from moh_megatron.monitor.metrics_logger import IntervalStats
from moh_megatron.train.fault_tolerance.world import World
from moh_megatron.train.run_recorder import RunRecorder
from moh_megatron.train.startup_clock import StartupClock
from moh_megatron.train.summary import summary_lines
from moh_megatron.train.validation import Validation


@pytest.fixture
def config(tiny: Callable[..., Config], tmp_path: Path) -> Config:
    file = str(tmp_path / "run.prom")
    return tiny({"run.dir": str(tmp_path / "run"), "monitor.tensorboard": False, "monitor.prometheus": file})


def recorder_of(config: Config, rank: int = 0, start_step: int = 0) -> RunRecorder:
    session: Any = SimpleNamespace(
        config=config,
        device=torch.device("cpu"),
        world=World(rank, 2, rank),
        first=rank == 0,
        start_step=start_step,
        data=SimpleNamespace(baselines={"unigram_entropy": 4.5}),
    )
    return RunRecorder(session, [], StartupClock())


def step_metrics(step: int, *, skipped: bool = False) -> StepMetrics:
    return StepMetrics(step, 64 * step, 3.0, 2.0, 0.5, 1e-3, 100.0, skipped)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_first_rank_writes_the_files_of_a_run(config: Config, tmp_path: Path) -> None:
    recorder, run = recorder_of(config), tmp_path / "run"
    assert load_config(run / "config.yaml") == config
    with recorder.training():
        recorder.step_done(1)
        recorder.interval(Interval([step_metrics(1), step_metrics(2, skipped=True)], None), IntervalStats(), 2)
    recorder.validation(Validation(2.5, {"a": 2.0, "b": 3.0}, "text"), 2)
    recorder.finish(Validation(2.25, {"only": 2.25}, "end"), 2)
    recorder.close()
    records = lines(run / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2]
    assert [record["loss"] for record in records] == [3.0 + config.moh.balance_weight * 2.0] * 2
    validation = {"step": 2, "loss": 2.5, "sources": {"a": 2.0, "b": 3.0}, "sample": "text"}
    assert lines(run / "validation.jsonl") == [validation]
    assert (run / "skipped.jsonl").read_text() == ""
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["train_loss"], summary["val_loss"], summary["sample_text"]) == (3.0, 2.25, "end")
    assert (summary["skipped_steps"], summary["unigram_entropy"]) == (1, 4.5)
    assert {"imports", "first step"} <= summary["startup_seconds"].keys()
    assert 'moh_run_bad_steps{run="run"} 1.0' in (tmp_path / "run.prom").read_text()


def test_summary_is_told_in_words() -> None:
    summary: dict[str, Any] = {
        "steps": 257,
        "tokens": 1052672,
        "seconds": 160.2,
        "tokens_per_second": 6571.1,
        "startup_seconds": {"launcher": 2.0, "imports": 8.5, "first step": 1.0},
        "skipped_steps": 0,
        "train_loss": 4.03125,
        "val_loss": 4.0,
        "unigram_entropy": 6.29,
        "bigram_entropy": None,
        "parameters": 1315840,
        "layers": 4,
        "active_head_fraction": 0.5,
        "attention_backend": "cpu",
        "tensor_parallel": 2,
        "data_parallel": 1,
        "zero_stage": 1,
        "precision": "fp32",
        "hf_max_logit_diff": None,
        "sample_text": "It was",
    }
    assert summary_lines(summary) == [
        "training: 257 steps, 1,052,672 tokens, 160.2 s, 6,571 tokens a second",
        "start: 11.5 s until the end of the first step: launcher 2.0 s, imports 8.5 s, first step 1.0 s",
        "loss in nats a token: training 4.0312, validation 4.0000, counts of single tokens 6.2900",
        "model: 1,315,840 parameters, 4 layers, 50% of the heads for each token, attention backend cpu",
        "layout: tensor-parallel size 2, data-parallel size 1, ZeRO stage 1, fp32",
        "sample: It was",
    ]
    nothing = {"startup_seconds": {}, "tokens_per_second": None, "sample_text": None, "skipped_steps": 2}
    losses = {"train_loss": None, "val_loss": None, "unigram_entropy": None}
    assert [line.partition(":")[0] for line in summary_lines(summary | nothing | losses)] == [
        "training",
        "model",
        "layout",
    ]
    assert summary_lines(summary | nothing)[0].endswith("160.2 s, 2 steps skipped")


def test_finished_run_logs_no_python_values(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    recorder = recorder_of(config)
    with recorder.training():
        recorder.step_done(1)
        recorder.interval(Interval([step_metrics(1)], None), IntervalStats(), 1)
    recorder.finish(Validation(2.25, {"only": 2.25}, "end"), 1)
    recorder.close()
    assert [message for message in caplog.messages if "{" in message or "None" in message] == []
    assert "  sample: end" in caplog.messages


def test_other_ranks_write_and_log_nothing(config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    recorder = recorder_of(config, rank=1)
    with recorder.training():
        recorder.step_done(1)
        recorder.interval(Interval([step_metrics(1)], None), IntervalStats(), 1)
    recorder.validation(Validation(2.5, {"only": 2.5}, "text"), 1)
    recorder.evaluation({"piqa": 0.5}, 1)
    recorder.finish(Validation(2.5, {"only": 2.5}, "text"), 1)
    recorder.close()
    assert recorder.skipped_records is None
    assert caplog.messages == []
    assert list(tmp_path.iterdir()) == []


def test_validation_is_logged(config: Config, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    recorder = recorder_of(config)
    recorder.validation(Validation(2.5, {"a": 2.0, "b": 3.0}, "It was"), 20)
    recorder.validation(Validation(None, {}, "It is"), 40)
    recorder.close()
    assert caplog.messages == [
        "step 20: validation loss 2.5000, perplexity 12.2",
        "  a 2.0000, b 3.0000",
        "  | It was",
        "  | It is",
    ]


def test_a_resumed_run_cuts_records_and_counts_bad_steps_and_restarts(config: Config, tmp_path: Path) -> None:
    first = recorder_of(config)
    with first.training():
        steps = [step_metrics(1, skipped=True), step_metrics(2), step_metrics(3, skipped=True)]
        first.interval(Interval(steps, None), IntervalStats(), 3)
    first.validation(Validation(2.5, {}, "text"), 2)
    first.close()
    resumed = recorder_of(config, start_step=2)
    with resumed.training():
        resumed.interval(Interval([step_metrics(3)], None), IntervalStats(), 3)
    resumed.close()
    assert [record["skipped"] for record in lines(tmp_path / "run" / "metrics.jsonl")] == [True, False, False]
    assert lines(tmp_path / "run" / "validation.jsonl") == [], "the validation after step 2 is done again"
    shown = (tmp_path / "run.prom").read_text()
    assert 'moh_run_bad_steps{run="run"} 1.0' in shown
    assert 'moh_run_restarts{run="run"} 1.0' in shown


def test_a_finished_run_keeps_its_summary(config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text('{"steps": 100}')
    recorder = recorder_of(config, start_step=100)
    recorder.finish(Validation(2.5, {}, "text"), 100)
    recorder.close()
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == {"steps": 100}
    assert caplog.messages == [f"{tmp_path / 'run'}: finished before, nothing to do; the summary stays as it is"]
