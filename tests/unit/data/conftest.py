import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.corpora import write_jsonl

from moh_megatron.config import schema

AUSTEN = Path(__file__).parents[3] / "configs" / "data" / "austen.jsonl.gz"


@pytest.fixture(scope="session")
def chapters() -> list[str]:
    with gzip.open(AUSTEN, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., schema.Config]:
    """Makes configurations of a tiny model; keywords replace values: vocab_size, seed, train=..., data=..., ..."""

    def make(inputs: list[Path], *, vocab_size: int = 400, seed: int = 1, **sections: dict[str, Any]) -> schema.Config:
        data = {"dir": str(tmp_path / "dataset"), "validation_fraction": 0.3, **sections.get("data", {})}
        train = {"sequence_length": 16, "total_tokens": 640, "global_batch_size": 4, **sections.get("train", {})}
        return schema.Config(
            run=schema.RunConfig(dir=str(tmp_path / "run"), seed=seed),
            model=schema.ModelConfig(
                num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=2, vocab_size=vocab_size
            ),
            moh=schema.MoHConfig(enabled=False),
            train=schema.TrainConfig(**train),
            optimizer=schema.OptimizerConfig(learning_rate=1e-3),
            tokenizer=schema.TokenizerConfig(**sections.get("tokenizer", {})),
            data=schema.DataConfig(inputs=tuple(map(str, inputs)), **data),
        )

    return make


@pytest.fixture(scope="session")
def paragraphs(chapters: list[str]) -> list[str]:
    """Forty short documents."""
    return [paragraph for chapter in chapters[:2] for paragraph in chapter.split("\n") if paragraph][:40]


@pytest.fixture
def corpus(tmp_path: Path, paragraphs: list[str]) -> Path:
    """A file with the paragraphs."""
    return write_jsonl(tmp_path / "corpus.jsonl", paragraphs)
