"""Prepared data as fixed-length sequences, read through megatron.core.datasets."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from torch import Tensor
from torch.utils.data import Dataset

from moh_megatron.config.paths import data_dir
from moh_megatron.config.schema import Config
from moh_megatron.data import blend
from moh_megatron.data.cache import Cache, build_once
from moh_megatron.data.prepared import PreparedData, Source
from moh_megatron.data.tokenizer.tokenizer import Tokenizer
from moh_megatron.io.errors import Fault


@dataclass(frozen=True)
class Place:
    """Where a part of a sample stands in the prepared data."""

    source: str
    """``ONLY`` without data.sources."""
    document: int
    token: int
    """First token of the part, in the document."""


def _nowhere(index: int) -> list[Place]:
    return []


class Sequences(Dataset[Tensor]):
    """``length`` samples, each int64 tokens [S+1]: S inputs and, one to the right, S targets.

    ``name`` says for people what they are read from, ``places`` from which documents.
    """

    def __init__(
        self,
        sample: Callable[[int], Tensor],
        length: int,
        places: Callable[[int], list[Place]] = _nowhere,
        name: str = "memory",
    ) -> None:
        self._sample = sample
        self._length = length
        self._places = places
        self.name = name

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        return self._sample(index)

    def places(self, index: int) -> list[Place]:
        """The documents that sample ``index`` is made of, in order, all of one source; none where nobody knows."""
        return self._places(index)


def build_train_dataset(config: Config, data: PreparedData, tokenizer: Tokenizer) -> Sequences:
    """The samples of the whole run in order, train.steps * train.global_batch_size, over as many epochs as it takes.

    Which source a sample is from follows from the weights alone. Within a source each epoch has an order of its own: a
    function of run.seed, the epoch's number, train.sequence_length and the data, so that other weights later on neither
    repeat nor leave out a sequence. Every rank calls this; indices are built once, as ``build_once`` says.

    Raises UserError where the data is too little for a sequence, Fault where an index cannot be written.
    """
    data.check_fits(config)
    samples = config.train.steps * config.train.global_batch_size
    epochs = [_Epochs(config, source, "train", tokenizer) for source in data.sources]
    if len(epochs) == 1:
        (only,) = epochs
        build_once([*only.caches(samples)])
        return Sequences(only.sample, samples, only.places, only.name)
    draws = Cache(data_dir(config) / "cache" / blend.draws_name(config), partial(blend.save_draws, config))
    counts = blend.draw(config).counts
    build_once([draws, *(cache for each, count in zip(epochs, counts, strict=True) for cache in each.caches(count))])
    sources, drawn = blend.load_draws(draws.folder)

    def sample(index: int) -> Tensor:
        return epochs[int(sources[index])].sample(int(drawn[index]))

    def places(index: int) -> list[Place]:
        return epochs[int(sources[index])].places(int(drawn[index]))

    return Sequences(sample, samples, places, ", ".join(each.name for each in epochs))


def build_validation_datasets(config: Config, data: PreparedData, tokenizer: Tokenizer) -> dict[str, Sequences]:
    """Of each source train.eval_samples sequences drawn from one pass over its validation split, or all of that pass if
    it has fewer; none of a source that holds nothing out. As ``build_train_dataset`` otherwise.
    """
    data.check_fits(config)
    found: dict[str, Sequences] = {}
    for source in data.sources:
        if not source.manifest.validation.documents:
            continue
        epochs = _Epochs(config, source, "validation", tokenizer)
        build_once([*epochs.caches(1)])
        length = epochs.length if config.train.eval_samples is None else min(config.train.eval_samples, epochs.length)
        found[source.name] = Sequences(epochs.sample, length, epochs.places, epochs.name)
    return found


class _Tokens(GPTDataset):
    """Samples as they are stored. GPTDataset itself would turn padding ids, which may end documents too, into id 0.

    Megatron-core 0.19 also says how long each part of a sample is; nobody here asks.
    """

    def __getitem__(self, idx: int | None) -> dict[str, Tensor]:
        tokens, *_ = self._query_document_sample_shuffle_indices(idx or 0)
        return {"tokens": torch.from_numpy(tokens)}

    def parts(self, idx: int) -> list[tuple[int, int]]:
        """(document, first token in it) of each part of a sample."""
        _, documents, *_ = self._query_document_sample_shuffle_indices(idx)
        assert self.shuffle_index is not None, "loaded by the call above"
        _, offset = self.sample_index[self.shuffle_index[idx]]
        return [(int(document), int(offset) if place == 0 else 0) for place, document in enumerate(documents)]


class _Epochs:
    """The sequences of one split of one source, epoch after epoch.

    The files are memory-mapped: one that vanishes or shrinks is a Fault at the next sample, where it would be a bus
    error, or a run that cannot be resumed.
    """

    def __init__(self, config: Config, source: Source, split: str, tokenizer: Tokenizer) -> None:
        self._identity = source.manifest.split(split).files[0].sha256
        self._prefix = source.folder.resolve() / split
        self._sizes = {file: file.stat().st_size for file in map(self._prefix.with_suffix, (".bin", ".idx"))}
        self._source = source.name
        self._sequence_length, self._seed, self._tokenizer = config.train.sequence_length, config.run.seed, tokenizer
        self._folder = source.folder.resolve() / "cache" / f"{split}-{self._sequence_length}-{self._seed}"
        self.length = (source.manifest.split(split).tokens - 1) // self._sequence_length
        """Of an epoch."""
        self._opened: dict[int, _Tokens] = {}

    @property
    def name(self) -> str:
        """The files' common name."""
        return str(self._prefix)

    def caches(self, samples: int) -> list[Cache]:
        """The indices that so many samples need."""
        return [Cache(self._cache(epoch), partial(self._open, epoch)) for epoch in range(-(-samples // self.length))]

    def sample(self, index: int) -> Tensor:
        epoch, place = divmod(index, self.length)
        return self._epoch(epoch)[place]["tokens"]

    def places(self, index: int) -> list[Place]:
        """As ``Sequences.places``."""
        epoch, place = divmod(index, self.length)
        return [Place(self._source, document, token) for document, token in self._epoch(epoch).parts(place)]

    def _epoch(self, epoch: int) -> _Tokens:
        self._check_files()
        if epoch not in self._opened:
            self._opened[epoch] = self._open(epoch, self._cache(epoch))
        return self._opened[epoch]

    def _check_files(self) -> None:
        for file, size in self._sizes.items():
            try:
                now = file.stat().st_size
            except OSError as error:
                raise Fault(
                    f"{file}: the data can no longer be read: {error.strerror}. Bring the file back and start again."
                ) from error
            if now != size:
                raise Fault(
                    f"{file}: the data has changed: {now} bytes, expected {size}. Bring the file back and start again."
                )

    def _cache(self, epoch: int) -> Path:
        return self._folder / f"epoch-{epoch}"

    def _open(self, epoch: int, cache: Path) -> _Tokens:
        with warnings.catch_warnings():
            # That padding shares an id with the end of documents matters only to a reader that pads.
            warnings.filterwarnings("ignore", message="The pad token id in the tokenizer collides")
            config = GPTDatasetConfig(
                random_seed=(self._seed + epoch * 1_000_003) % 2**32,
                sequence_length=self._sequence_length,
                blend=([str(self._prefix)], None),
                split="1",
                path_to_cache=str(cache),
                tokenizer=self._tokenizer,  # pyright: ignore[reportArgumentType]
                reset_position_ids=False,
                reset_attention_mask=False,
                eod_mask_loss=False,
                create_attention_mask=False,
            )
            stored = IndexedDataset(str(self._prefix), multimodal=False, mmap=True)
            documents = np.arange(len(stored), dtype=np.int32)
            return _Tokens(stored, self._identity, documents, None, Split.train, config)
