from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest

from moh_megatron.config.load import config_from_mapping
from moh_megatron.config.schema import Config

_SMALL = {
    "run": {"dir": "runs/x"},
    "model": {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "vocab_size": 96,
    },
    "moh": {"shared_heads": 2, "active_heads": 4},
    "train": {"sequence_length": 16, "total_tokens": 6400, "global_batch_size": 4},
    "optimizer": {"learning_rate": 1e-3},
}


@pytest.fixture
def small() -> dict[str, dict[str, Any]]:
    """The nested mapping of a small valid configuration of 100 steps."""
    return deepcopy(_SMALL)


@pytest.fixture(scope="session")
def configure() -> Callable[..., Config]:
    """configure({"parallel.tensor": 2, ...}): the small configuration with some values replaced."""

    def configure(changes: dict[str, Any] | None = None) -> Config:
        mapping: dict[str, dict[str, Any]] = deepcopy(_SMALL)
        for name, value in (changes or {}).items():
            section, key = name.split(".")
            mapping.setdefault(section, {})[key] = value
        return config_from_mapping(mapping, "test")

    return configure
