"""What the bench scripts count and how they compare times; the times themselves are not tested."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from moh_megatron.monitor.flops import flops_per_token

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def bench_step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    import bench_step  # pyright: ignore[reportMissingImports]

    return bench_step


def test_the_dense_twin_computes_twice_as_many_heads(bench_step: ModuleType) -> None:
    path = REPOSITORY / "configs" / "pretrain" / "llm_s_moh50.yaml"
    configs = bench_step.twins(path, 4096, 2)
    moh, dense = (flops_per_token(configs[name], "cpu").executed.layers for name in ("moh", "dense"))
    router = 2 * 2 * 3 * 768 * 14
    assert dense - (moh - router) == 2 * 2 * 7 * 6 * 64 * 4097 / 2


def test_extrapolation_adds_layers_and_keeps_embedding_and_head(bench_step: ModuleType) -> None:
    stack, whole = [{"moh": 1.0, "dense": 2.0}], [{"moh": 11.0, "dense": 12.0}]
    assert bench_step.with_all_layers(stack, whole, 6) == [{"moh": 16.0, "dense": 22.0}]


def test_ratios_compare_candidates_within_a_turn(bench_step: ModuleType) -> None:
    turns = bench_step.take_turns({"a": lambda: None, "b": lambda: None}, 3)
    assert [set(turn) for turn in turns] == [{"a", "b"}] * 3
    assert bench_step.ratios([{"a": 1.0, "b": 2.0}, {"a": 3.0, "b": 4.0}], "a", "b") == [0.5, 0.75]
    assert bench_step.median_and_range([0.5, 0.75, 0.6]) == "0.60 (0.50-0.75)"


@pytest.mark.usefixtures("bench_step")
@pytest.mark.parametrize(("share", "active_in_group"), [(0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_choices_in_kv_groups_are_even_and_share_the_first_head(share: float, active_in_group: int) -> None:
    import bench_attention  # pyright: ignore[reportMissingImports]

    shapes = bench_attention.shapes(64, in_groups=True)
    assert [(shape.heads, shape.groups, shape.size) for shape in shapes] == [(16, 4, 64), (32, 8, 128)]
    for shape in shapes:
        *_, active, _ = bench_attention.inputs(shape, share)
        in_groups = active.unflatten(-1, (shape.groups, 4))
        assert (in_groups.sum(-1) == active_in_group).all()
        assert in_groups[..., 0].all()
        assert in_groups.any(0).all() == (share > 0.25)
        for backend in ("sdpa", "slots", "cpu"):
            bench_attention.candidate(backend, shape, share, True)()


@pytest.mark.usefixtures("bench_step")
def test_choices_among_all_heads_share_a_quarter_of_them() -> None:
    import bench_attention  # pyright: ignore[reportMissingImports]

    for shape in bench_attention.shapes(64):
        *_, active, _ = bench_attention.inputs(shape, 0.5)
        assert (active.sum(-1) == shape.heads // 2).all()
        assert active[..., : shape.heads // 4].all()
        assert len(active.unflatten(-1, (4, -1)).sum(-1).unique()) > 1


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--backends", "slots"], "--backends slots needs --routing-groups kv"),
        (["--routing-groups", "kv", "--shares", "0.6"], "--shares must be of 0.25 0.5 0.75 1.0"),
    ],
)
@pytest.mark.usefixtures("bench_step")
def test_bench_refuses_choices_that_are_not_even(
    words: list[str], complaint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import bench_attention  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr("sys.argv", ["bench_attention.py", *words])
    with pytest.raises(SystemExit) as ended:
        bench_attention.main()
    assert ended.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.usefixtures("bench_step", "one_rank")
def test_the_engine_is_timed_in_steps_of_the_training_loop(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    import bench_engine  # pyright: ignore[reportMissingImports]

    from moh_megatron.train import loop

    bench_engine.initialize_distributed(bench_engine.World(0, 1, 0))
    called: list[str] = []
    for owner, methods in {
        loop.Telemetry: ("begin_step", "before_update", "end_step"),
        loop.Watchdog: ("progress",),
        loop.Health: ("applied",),
        loop.AsyncSaver: ("advance",),
        loop._Training: ("_stop_agreed",),
    }.items():
        for method in methods:
            monkeypatch.setattr(owner, method, recording(called, method, getattr(owner, method)))
    sizes = {"train.global_batch_size": 1, "train.micro_batch_size": 1, "parallel.zero_stage": 0}
    inside = bench_engine.Stopwatch()
    step = bench_engine.engine_step(tiny({"run.dir": str(tmp_path)} | sizes), torch.arange(34).view(2, 17), inside)
    step()
    assert called == ["begin_step", "progress", "before_update", "end_step", "applied", "advance", "_stop_agreed"]
    assert inside.turns[0] > 0


def recording(called: list[str], name: str, function: Any) -> Any:
    def call(*arguments: Any, **options: Any) -> Any:
        called.append(name)
        return function(*arguments, **options)

    return call
