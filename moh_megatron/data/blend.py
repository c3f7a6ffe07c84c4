"""Decides from which source each sample of a run comes, and which sample of that source it is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moh_megatron.config.schema import Config
from moh_megatron.config.source_weights import phases


@dataclass(frozen=True)
class Draws:
    """The source of each sample of a run, in order."""

    sources: NDArray[np.int16]
    """The index of the source of each sample."""
    indices: NDArray[np.int64]
    """The index of each sample within its source, over all epochs; none is drawn twice or left out."""
    counts: list[int]
    """The number of samples drawn from each source."""


def draw(config: Config) -> Draws:
    """The draws of a complete run, by Megatron-core's rule: always the source that lags furthest behind its share.

    What a step draws does not depend on later weights.
    """
    from megatron.core.datasets import helpers

    batch = config.train.global_batch_size
    number = len(config.data.sources)
    counts = np.zeros(number, dtype=np.int64)
    sources, indices = [], []
    for phase in phases(config):
        size = (phase.stop - phase.start) * batch
        shares = np.array(list(phase.shares.values()), dtype=np.float64)
        (drawn,) = np.nonzero(shares)  # among equal sources the rule could draw one without weight
        chosen, index = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
        helpers.build_blending_indices(chosen, index, shares[drawn], len(drawn), size, False)
        source = drawn[chosen].astype(np.int16)
        sources.append(source)
        indices.append(index + counts[source])
        counts = counts + np.bincount(source, minlength=number)
    return Draws(np.concatenate(sources), np.concatenate(indices), counts.tolist())


def draws_name(config: Config) -> str:
    """The name of the cache of ``draw``, which is another one for other draws."""
    inputs = [[asdict(phase) for phase in phases(config)], config.train.global_batch_size]
    return f"blend-{hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]}"


def save_draws(config: Config, folder: Path) -> None:
    """Write the draws of ``config`` into ``folder``."""
    draws = draw(config)
    np.save(folder / "sources.npy", draws.sources)
    # The caches of existing datasets have a file of this name.
    np.save(folder / "places.npy", draws.indices)


def load_draws(folder: Path) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """The sources and indices of ``Draws``, memory-mapped, so that the ranks of a node share them."""
    return np.load(folder / "sources.npy", mmap_mode="r"), np.load(folder / "places.npy", mmap_mode="r")
