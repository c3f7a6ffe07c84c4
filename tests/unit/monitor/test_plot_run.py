"""tools/plot_run.py draws what the files of a run folder hold, and says when there is nothing to draw."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from moh_megatron.config.load import dump_config
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError
from moh_megatron.monitor.tensorboard import TensorBoard

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.fixture
def plot_run(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    import plot_run  # pyright: ignore[reportMissingImports]

    return plot_run


@pytest.fixture
def dense_run(tiny: Callable[..., Config], tmp_path: Path) -> Path:
    """Three steps, one of them without a finite loss, two validations, no head load."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(tiny()))
    losses = {1: 7.0, 2: None, 3: 4.0}
    write_records(run / "metrics.jsonl", [{"step": n, "tokens": 64 * n, "lm_loss": losses[n]} for n in losses])
    write_records(run / "validation.jsonl", [{"step": 2, "loss": None}, {"step": 3, "loss": 4.1}])
    return run


def write_records(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def draw(plot_run: ModuleType, run: Path, monkeypatch: pytest.MonkeyPatch) -> Image.Image:
    picture = run.parent / "picture.png"
    monkeypatch.setattr(sys, "argv", ["plot_run.py", str(run), "--out", str(picture)])
    plot_run.main()
    with Image.open(picture) as image:
        return image.convert("RGB")


def test_dense_run_shows_losses_and_entropies(
    plot_run: ModuleType, dense_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_entropies = draw(plot_run, dense_run, monkeypatch)
    (dense_run / "summary.json").write_text(json.dumps({"unigram_entropy": 6.3, "bigram_entropy": 4.2}))
    with_entropies = draw(plot_run, dense_run, monkeypatch)
    assert with_entropies.size == without_entropies.size
    assert with_entropies.tobytes() != without_entropies.tobytes()


def test_moh_run_shows_a_map_of_head_load_beside_the_losses(
    plot_run: ModuleType, dense_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses_alone = draw(plot_run, dense_run, monkeypatch)
    events = TensorBoard(dense_run, 0)
    for head, share in enumerate((1.0, 1.0, 0.25, 0.75)):
        events.scalars({f"head_load/layer_00/head_{head:02d}": share}, 3)
    events.close()
    both = draw(plot_run, dense_run, monkeypatch)
    assert both.width == 2 * losses_alone.width
    colors = np.unique(np.asarray(both, dtype=int).reshape(-1, 3), axis=0)
    assert np.count_nonzero(colors[:, 2] > colors[:, 0] + 60) > 3, (
        "shared heads, routed heads and the colour bar differ"
    )


def test_run_without_a_logged_step_is_refused(
    plot_run: ModuleType, dense_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_records(dense_run / "metrics.jsonl", [])
    with pytest.raises(UserError, match=r"metrics\.jsonl must hold a step with a loss"):
        draw(plot_run, dense_run, monkeypatch)
    assert not (dense_run.parent / "picture.png").exists()


@pytest.mark.parametrize(
    ("name", "expected"), [("picture.xyz", "must end in .png"), ("missing/picture.png", "no such folder")]
)
def test_file_that_cannot_be_a_picture_is_refused(
    plot_run: ModuleType,
    dense_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    expected: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["plot_run.py", str(dense_run), "--out", str(dense_run / name)])
    with pytest.raises(SystemExit):
        plot_run.main()
    assert expected in capsys.readouterr().err
