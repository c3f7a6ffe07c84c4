import signal
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from moh_megatron.checkpoint.manifest import MANIFEST, Manifest, Topology, relative_files, write_manifest
from moh_megatron.config.load import config_from_mapping, dump_config
from moh_megatron.config.schema import Config
from moh_megatron.io.hashing import hash_file

# A busy machine is no reason to fail.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

_TINY = {
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
    "train": {"sequence_length": 16, "total_tokens": 6400, "global_batch_size": 4, "precision": "fp32"},
    "optimizer": {"learning_rate": 1e-3},
}


@pytest.fixture(scope="session")
def tiny_mapping() -> dict[str, dict[str, Any]]:
    """What ``tiny`` starts from; not to be changed."""
    return _TINY


@pytest.fixture(scope="session")
def grouped() -> dict[str, Any]:
    """Changes of ``tiny``: two of four heads in each of two KV groups, the first of them shared; not to be changed."""
    return {"model.num_query_groups": 2, "moh.routing_groups": "kv", "moh.shared_placement": "spread"}


@pytest.fixture(scope="session")
def tiny() -> Callable[[dict[str, Any] | None], Config]:
    """tiny({"parallel.tensor": 2, ...}): a small valid configuration with some values replaced."""

    def tiny(changes: dict[str, Any] | None = None) -> Config:
        mapping: dict[str, dict[str, Any]] = deepcopy(_TINY)
        for name, value in (changes or {}).items():
            section, key = name.split(".")
            mapping.setdefault(section, {})[key] = value
        return config_from_mapping(mapping, "test")

    return tiny


@pytest.fixture(scope="session")
def fake_checkpoint() -> Callable[..., Path]:
    """A checkpoint folder that is complete by its manifest, with a few bytes in place of tensors."""

    def fake_checkpoint(folder: Path, config: Config, *, step: int = 1, data: str = "d" * 64) -> Path:
        (folder / "optimizer").mkdir(parents=True)
        (folder / "weights").mkdir()
        (folder / "config.yaml").write_text(dump_config(config))
        (folder / "optimizer" / "state.pt").write_bytes(b"optimizer state %d" % step)
        (folder / "weights" / "tp_rank_00_of_01.safetensors").write_bytes(b"weights %d" % step)
        files = {name: hash_file(folder / name) for name in relative_files(folder)}
        topology = Topology(config.parallel.tensor, 1, config.parallel.zero_stage, config.train.precision)
        write_manifest(folder, Manifest(step, step * 64, topology, data, {"torch": "2"}, files))
        assert (folder / MANIFEST).is_file()
        return folder

    return fake_checkpoint


@pytest.fixture(scope="module")
def one_rank() -> Iterator[None]:
    """Process groups of a world of one."""
    # Imported here: the tests of the configuration need neither.
    from moh_megatron.model.single import init_single_process
    from moh_megatron.parallel import groups

    init_single_process(seed=1)
    yield
    groups.destroy()


@pytest.fixture
def own_signal_mask() -> Iterator[None]:
    """Restore the signal mask: commands that start ranks block signals, and later tests inherit that."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    yield
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
