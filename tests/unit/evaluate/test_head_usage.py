"""Head usage against masks counted by hand, on a checkpoint's model and on its export."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from moh_megatron.config.schema import Config
from moh_megatron.data.tokenizer.tokenizer import load_tokenizer
from moh_megatron.evaluate.head_usage import HeadUsage, measure_head_usage
from moh_megatron.evaluate.loaded_model import LoadedModel, load_model
from moh_megatron.io.errors import UserError
from moh_megatron.model.build import moh_layers

REPOSITORY = Path(__file__).parents[3]
LENGTH, SEQUENCES = 16, 3


@pytest.fixture
def loaded(checkpoint: Path) -> LoadedModel:
    return load_model(checkpoint, torch.device("cpu"))


def usage_of(loaded: LoadedModel, letters: str) -> HeadUsage:
    return measure_head_usage(loaded, letters * 4, LENGTH, SEQUENCES)


GROUPED = {
    "model.num_query_groups": 4,
    "moh.routing_groups": "kv",
    "moh.shared_placement": "spread",
    "moh.active_heads": 8,
}
"""Two of the four heads in each KV group, the first of them shared."""
BOTH_CHOICES = pytest.mark.parametrize("config", [{}, GROUPED], ids=["global", "grouped"], indirect=True)


@BOTH_CHOICES
def test_loads_are_counted_masks_and_each_output_belongs_to_its_head(
    config: Config, loaded: LoadedModel, letters: str
) -> None:
    usage = usage_of(loaded, letters)
    ids = load_tokenizer(loaded.tokenizer_dir).encode(letters * 4)[: LENGTH * SEQUENCES]
    layers = moh_layers(loaded.model)
    masks: list[list[torch.Tensor]] = [[] for _ in layers]
    for layer_masks, layer in zip(masks, layers, strict=True):
        layer.router.register_forward_hook(
            lambda module, inputs, output, layer_masks=layer_masks: layer_masks.append(output.active.flatten(0, 1))
        )
    loaded.logits(torch.tensor(ids).view(SEQUENCES, LENGTH))
    counts = torch.stack([torch.cat(layer_masks).sum(0) for layer_masks in masks]).double()
    assert usage.tokens == LENGTH * SEQUENCES
    assert torch.equal(usage.load, counts / usage.tokens)
    assert len(usage.load.unique()) > 3
    if config.moh.routing_groups == "kv":
        assert_close(usage.load.unflatten(-1, (4, 4)).sum(-1), torch.full((2, 4), 2.0, dtype=torch.float64))
        assert (usage.load[:, ::4] == 1).all()
    for layer in range(2):
        own = usage.similarity[layer].diagonal()[counts[layer] > 0]
        assert_close(own, torch.ones_like(own), rtol=0, atol=1e-6)  # less where it is the output of another head


@BOTH_CHOICES
def test_a_checkpoint_and_its_export_have_the_same_head_usage(
    config: Config, loaded: LoadedModel, exported: Path, letters: str
) -> None:
    ours = usage_of(loaded, letters)
    theirs = usage_of(load_model(exported, torch.device("cpu")), letters)
    assert torch.equal(ours.load, theirs.load)
    assert_close(ours.similarity, theirs.similarity, rtol=0, atol=1e-4, equal_nan=True)


@pytest.fixture
def plot_heads(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    import plot_heads  # pyright: ignore[reportMissingImports]

    return plot_heads


def test_plot_heads_writes_pictures_and_tables(
    exported: Path, letters: str, plot_heads: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(letters * 4)
    texts = [f"{name}={tmp_path / name}.txt" for name in ("one", "two")]
    size = ["--length", str(LENGTH), "--sequences", str(SEQUENCES)]
    monkeypatch.setattr(sys, "argv", ["plot_heads.py", str(exported), "--texts", *texts, *size, "--out", str(tmp_path)])
    plot_heads.main()
    usage = usage_of(load_model(exported, torch.device("cpu")), letters)
    with (tmp_path / "head_load.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * 2 * 16
    for row in rows:
        assert float(row["load"]) == pytest.approx(float(usage.load[int(row["layer"]), int(row["head"])]), abs=1e-6)
    with (tmp_path / "head_similarity.csv").open(newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 2 * 2 * 16 * 15 / 2
    for name in ("head_load.png", "head_similarity.png"):
        with Image.open(tmp_path / name) as picture:
            assert min(picture.size) > 200
            assert len(picture.convert("L").getcolors() or ()) > 5


@pytest.mark.parametrize("layers", [1, 4])
def test_titles_are_not_cut_off(plot_heads: ModuleType, tmp_path: Path, layers: int) -> None:
    """The border is blank with few layers and long names, which may look like formulas."""
    usage = HeadUsage(1024, torch.rand(layers, 8), torch.rand(layers, 8, 8))
    title = f"head load, runs/{'long/' * 20}step_00000257: $5^{{ to $6"
    plot_heads.draw_load({"price $5^{ to $6": usage}, title, tmp_path / "load.png")
    plot_heads.draw_similarity(usage.similarity, title, tmp_path / "similarity.png")
    for name in ("load.png", "similarity.png"):
        with Image.open(tmp_path / name) as picture:
            pixels = torch.from_numpy(np.array(picture.convert("L")))
        for border in (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]):
            assert border.min() == 255, name


@pytest.mark.parametrize(
    ("out", "texts", "expected"),
    [
        ("out", "novels=nosuch.txt", "^--texts novels: nosuch.txt does not exist"),
        ("file", "novels=nosuch.txt", "file: must be a folder to write to.*name another with --out"),
    ],
)
def test_wrong_arguments_are_refused_before_the_model_is_loaded(
    plot_heads: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str, texts: str, expected: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["p", str(tmp_path), "--texts", texts, "--out", str(tmp_path / out)])
    with pytest.raises(UserError, match=expected):
        plot_heads.main()
