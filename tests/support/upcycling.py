"""Random checkpoints to start a tuning from, and stand-ins for its data."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch

from moh_megatron.checkpoint.hf.checkpoint_writer import write_checkpoint
from moh_megatron.checkpoint.hf.hf_extras import TOKEN_IDS, HFExtras
from moh_megatron.checkpoint.mapping import rules
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError


class FakeTokenizer:
    sha256, eos_token_id = "t" * 64, 1

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)


class FakeData:
    hash, settings = "d" * 64, SimpleNamespace(fits=True)

    def tokenizer(self) -> FakeTokenizer:
        return FakeTokenizer()

    def check_fits(self, config: Config) -> None:
        if not self.settings.fits:
            raise UserError("model.vocab_size must be at least 99")


def write_source(config: Config, seed: int = 4) -> Path:
    """Write random weights of ``config`` as the checkpoint train.init_from."""
    assert config.train.init_from is not None
    folder, generator = Path(config.train.init_from), torch.Generator().manual_seed(seed)
    folder.mkdir()
    table = rules(config)
    dtypes = {rule.megatron: torch.float32 for rule in table}
    weights = ((rule.megatron, 0.2 * torch.randn(rule.shape, generator=generator)) for rule in table)
    ids = {TOKEN_IDS: b'{"bos_token_id": 5, "eos_token_id": [1, 7]}'}
    write_checkpoint(folder, config, dtypes, weights, HFExtras(None, ids))
    return folder
