"""Calls tools/plan.py as a user does."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]
LLAMA3_8B = """
run: {dir: runs/llama3_8b}
model:
  num_layers: 32
  hidden_size: 4096
  ffn_hidden_size: 14336
  num_attention_heads: 32
  num_query_groups: 8
  vocab_size: 128256
moh: {router: query_norm, shared_heads: 16, active_heads: 24}
train: {sequence_length: 8192, total_tokens: 300e9, global_batch_size: 1024}
optimizer: {learning_rate: 2e-5}
"""
WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = sys.modules["megatron"] = sys.modules["deepspeed"] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Call the tool without torch, Megatron-core and DeepSpeed."""
    command = [sys.executable, "-c", WITHOUT_TORCH, "tools/plan.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


@pytest.fixture
def llama(tmp_path: Path) -> str:
    path = tmp_path / "llama3_8b.yaml"
    path.write_text(LLAMA3_8B, encoding="utf-8")
    return str(path)


def as_json(*arguments: str) -> dict:
    done = call(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_plan_of_llama3_8b_on_512_ranks_has_known_numbers(llama: str) -> None:
    started = time.monotonic()
    plan = as_json(llama, "--world-size", "512", "--gpu-memory", "80")
    assert time.monotonic() - started < 20
    assert plan["parameters"] == {"dense": 8_030_261_248, "router": 0, "total": 8_030_261_248}
    assert (plan["data"], plan["accumulation_steps"], plan["tokens_per_step"]) == (512, 2, 2**23)
    assert plan["steps"] == 35_763
    assert plan["states"]["optimizer"] == pytest.approx(12 * 8_030_261_248 / 512, rel=1e-6)
    assert 50e9 < plan["flops"]["dense_equivalent"]["total"] < 52e9
    assert not plan["fit"]["fits"]
    assert plan["fit"]["needed_bytes"] == plan["device_bytes"]
    needed = [remedy["device_bytes"] for remedy in plan["fit"]["remedies"]]
    assert needed == sorted(needed)
    assert needed[0] < 80 * 2**30 < plan["device_bytes"]


@pytest.mark.parametrize(("name", "world_size"), [("smoke", 4), ("pretrain/llm_b_moh75", 64)])
def test_report_has_every_table(name: str, world_size: int) -> None:
    done = call(f"configs/{name}.yaml", "--world-size", str(world_size), "--gpu-memory", "80")
    assert done.returncode == 0, done.stderr
    for word in ("parameters", "gradients", "optimizer state", "activations", "max / mean", "dense-equivalent"):
        assert word in done.stdout
    for word in ("active heads", "executed, attention dense", "all-reduce", "steps of", "It fits 80.00 GiB"):
        assert word in done.stdout
    assert all(len(line) <= 120 for line in done.stdout.splitlines())


def fit_report(llama: str, overrides: Sequence[str], memory: str) -> list[str]:
    done = call(llama, "--world-size", "8", "--gpu-memory", memory, *overrides)
    lines = done.stdout.splitlines()
    return lines[next(index for index, line in enumerate(lines) if line.startswith("It does")) :]


def test_setting_that_saves_most_is_listed_first(llama: str) -> None:
    first, *rest = fit_report(llama, [], "80")
    assert first.startswith("It does not fit 80.00 GiB: ")
    assert rest[0].startswith("  helps most: ")
    assert any("parallel.zero_stage=3 (now 1) saves" in line for line in rest)
    assert any("train.recompute=full (now none) saves" in line for line in rest)
    assert any("parallel.offload_optimizer=true (now false) saves" in line for line in rest)
    assert not any("micro_batch_size" in line for line in rest), "it is 1 already"


def test_report_says_if_no_single_setting_is_enough(llama: str) -> None:
    lines = fit_report(llama, [], "4")
    assert "still too much" in lines[1]
    assert lines[-1] == "No single one is enough: combine them, or use more ranks."


def test_report_warns_of_uneven_heads(llama: str) -> None:
    done = call(llama, "--world-size", "8", "parallel.tensor=8")
    assert "4.00, 2.00" in done.stdout
    assert "moh.shared_placement=spread" in done.stdout
    even = call(llama, "--world-size", "8", "parallel.tensor=8", "moh.shared_placement=spread")
    assert "warning" not in even.stdout
    assert "even at every" not in even.stdout


def test_plan_of_heads_chosen_in_kv_groups_is_even_and_smaller(llama: str) -> None:
    sizes = ("--world-size", "8", "parallel.tensor=8", "moh.shared_placement=spread")
    grouped = (*sizes, "moh.routing_groups=kv")
    done = call(llama, *grouped)
    assert "executed, attention slots" in done.stdout
    assert "even at every tensor-parallel size: equally many active heads in each of 8 KV groups" in done.stdout
    ours, control = as_json(llama, *grouped), as_json(llama, *sizes)
    (balance,) = ours["head_balance"]
    assert (balance["load"], balance["imbalance"], balance["routing_groups"]) == ([3.0] * 8, 1.0, 8)
    assert control["head_balance"][0]["routing_groups"] == 1
    assert ours["flops"]["executed"]["total"] < control["flops"]["executed"]["total"]
    assert ours["activations"]["layers"] < control["activations"]["layers"]
    assert ours["communication"] == control["communication"]
    calibrated = as_json(llama, *grouped, "moh.shared_placement=calibrated")
    assert calibrated == ours, "which heads of a group are shared changes no number"
    every_head = as_json(llama, *grouped, "moh.active_heads=32")
    assert every_head["backend"] == control["backend"] == "dense"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--world-size", "3", "parallel.tensor=2"], "must be divisible by parallel.tensor (2)"),
        (["--world-size", "3"], "train.global_batch_size must be divisible"),
        (["--world-size", "0"], "must be a whole number of at least 1"),
        (["--world-size", "8", "--gpu-memory", "-1"], "must be above 0 and finite"),
        (["--world-size", "8", "moh.active_head=3"], "did you mean 'active_heads'"),
        ([], "--world-size"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(llama: str, arguments: list[str], complaint: str) -> None:
    done = call(llama, *arguments)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("ranks", ["0", "-4", "2.5", "many"])
def test_impossible_number_of_ranks_is_refused(llama: str, ranks: str) -> None:
    done = call(llama, f"--world-size={ranks}")
    assert done.returncode == 2
    assert f"argument --world-size: must be a whole number of at least 1. Got {ranks}\n" in done.stderr


@pytest.mark.parametrize("memory", ["inf", "nan", "0", "-80", "lots"])
def test_impossible_memory_is_refused(llama: str, memory: str) -> None:
    done = call(llama, "--world-size=512", f"--gpu-memory={memory}")
    assert done.returncode == 2
    assert f"argument --gpu-memory: must be above 0 and finite, such as 80. Got {memory}\n" in done.stderr


def test_depth_above_the_limit_is_refused_and_the_limit_is_planned(llama: str) -> None:
    refused = call(llama, "--world-size=512", "model.num_layers=1000000")
    assert refused.returncode == 2
    assert "model.num_layers: must be at most 10000. Got 1000000." in refused.stderr
    started = time.monotonic()
    assert call(llama, "--world-size=512", "model.num_layers=10000").returncode == 0
    assert time.monotonic() - started < 20
