"""From which source each sample of a run comes, and which of that source's samples it is."""

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
    sources: NDArray[np.int16]
    """Of each sample of the run in order, the number of its source."""
    places: NDArray[np.int64]
    """Which sample of that source, counted over all epochs: none is drawn twice or left out."""
    counts: list[int]
    """Samples drawn of each source."""


def draw(config: Config) -> Draws:
    """The draws of a whole run, by Megatron-core's rule: always the source that lags furthest behind its share.

    What a step draws does not depend on weights that come later.
    """
    from megatron.core.datasets import helpers

    batch = config.train.global_batch_size
    number = len(config.data.sources)
    counts = np.zeros(number, dtype=np.int64)
    sources, places = [], []
    for phase in phases(config):
        size = (phase.stop - phase.start) * batch
        shares = np.array(list(phase.shares.values()), dtype=np.float64)
        (drawn,) = np.nonzero(shares)  # the rule could draw one without weight where all are even
        chosen, place = np.zeros(size, dtype=np.int16), np.zeros(size, dtype=np.int64)
        helpers.build_blending_indices(chosen, place, shares[drawn], len(drawn), size, False)
        source = drawn[chosen].astype(np.int16)
        sources.append(source)
        places.append(place + counts[source])
        counts = counts + np.bincount(source, minlength=number)
    return Draws(np.concatenate(sources), np.concatenate(places), counts.tolist())


def draws_name(config: Config) -> str:
    """A name for the cache of ``draw``: other draws have another."""
    decides = [[asdict(phase) for phase in phases(config)], config.train.global_batch_size]
    return f"blend-{hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:16]}"


def save_draws(config: Config, folder: Path) -> None:
    draws = draw(config)
    np.save(folder / "sources.npy", draws.sources)
    np.save(folder / "places.npy", draws.places)


def load_draws(folder: Path) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """Mapped: the ranks of a node share the memory."""
    return np.load(folder / "sources.npy", mmap_mode="r"), np.load(folder / "places.npy", mmap_mode="r")
