"""One small model with random weights, as a checkpoint and as an exported folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moh_megatron.checkpoint.hf import hf_export
from moh_megatron.checkpoint.hf.checkpoint_writer import write_checkpoint
from moh_megatron.checkpoint.hf.hf_extras import HFExtras
from moh_megatron.checkpoint.hf.weight_readers import HeldWeights
from moh_megatron.checkpoint.mapping import rules
from moh_megatron.config import head_layout
from moh_megatron.config.schema import Config
from moh_megatron.data.tokenizer.sentencepiece_bpe import train_tokenizer
from moh_megatron.data.tokenizer.tokenizer import load_tokenizer

LETTERS = "the quick brown fox jumps over a lazy dog while vexing jackdaws love my big sphinx of quartz "


@pytest.fixture(scope="session")
def letters() -> str:
    """A text with all letters."""
    return LETTERS


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([LETTERS * 3], vocab_size=320, character_coverage=1.0, out_dir=folder)
    return folder


@pytest.fixture
def config(tiny: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Config:
    """The configuration of the model; a test may change it by indirect parametrisation."""
    # Every interleaving is its own inverse, which would hide a mistake; a rotation is not.
    monkeypatch.setattr(head_layout, "_interleaved", lambda groups: (*range(1, groups), 0))
    size = {"model.num_attention_heads": 16, "model.num_query_groups": 8, "model.hidden_size": 64}
    heads = {"moh.shared_heads": 4, "moh.active_heads": 9}
    return tiny({**size, "model.vocab_size": 320, **heads, **getattr(request, "param", {})})


@pytest.fixture
def weights(config: Config) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {rule.megatron: 0.2 * torch.randn(rule.shape, generator=generator) for rule in rules(config)}


@pytest.fixture
def checkpoint(
    config: Config, weights: dict[str, torch.Tensor], tokenizer_dir: Path, tmp_path: Path, one_rank: None
) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    dtypes = {name: tensor.dtype for name, tensor in weights.items()}
    write_checkpoint(folder, config, dtypes, iter(weights.items()), HFExtras(load_tokenizer(tokenizer_dir), {}))
    return folder


@pytest.fixture
def export(
    config: Config, weights: dict[str, torch.Tensor], tokenizer_dir: Path, tmp_path: Path
) -> Callable[[torch.dtype], Path]:
    """export(dtype): an exported folder with weights in this precision."""

    def export(dtype: torch.dtype) -> Path:
        with hf_export.atomic_export(tmp_path / "hf") as partial:
            source = HeldWeights(weights, config)
            hf_export.write_folder(partial, config, source, tokenizer_dir, dtype, step=12, tokens=3456)
        return tmp_path / "hf"

    return export


@pytest.fixture
def exported(export: Callable[[torch.dtype], Path]) -> Path:
    return export(torch.float32)
