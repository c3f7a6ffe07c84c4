"""Reads prepared data as fixed-length sequences through megatron.core.datasets."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
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
from moh_megatron.data.index_cache import IndexCache, build_once
from moh_megatron.data.prepared_data import PreparedData, Source
from moh_megatron.data.tokenizer.tokenizer import Tokenizer
from moh_megatron.io.console import warnings_hidden
from moh_megatron.io.errors import Fault

_OPEN_EPOCHS = 2
"""The number of epochs of a source that are open at once: a batch may end one epoch and begin the next."""
_CACHED_EPOCHS = 8
"""The number of epochs up to which all ranks read the same index caches, made before the first step."""
_SMALL_INDEX = 64 * 1024**2
"""Bytes of an epoch's index up to which each rank makes it in its own memory, where a source is read more often."""


@dataclass(frozen=True)
class DocumentPosition:
    """Where a part of a sample begins in the prepared data."""

    source: str
    """Name of the source; ``ONLY`` without data.sources."""
    document: int
    token: int
    """Index of the part's first token in the document."""


def _unknown(index: int) -> list[DocumentPosition]:
    return []


class Sequences(Dataset[Tensor]):
    """``length`` samples, each int64 tokens [S+1]: S inputs and, shifted by one, S targets.

    ``name`` names the files in messages.
    """

    def __init__(
        self,
        sample: Callable[[int], Tensor],
        length: int,
        documents: Callable[[int], list[DocumentPosition]] = _unknown,
        name: str = "memory",
    ) -> None:
        self._sample = sample
        self._length = length
        self._documents = documents
        self.name = name

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        return self._sample(index)

    def documents(self, index: int) -> list[DocumentPosition]:
        """The documents that sample ``index`` is made of, in order, all of one source; empty if unknown."""
        return self._documents(index)


def build_train_dataset(config: Config, data: PreparedData, tokenizer: Tokenizer) -> Sequences:
    """All samples of the run in order: train.steps * train.global_batch_size, over as many epochs as needed.

    The source of a sample depends on the weights alone. Within a source each epoch has its own order, which depends on
    run.seed, the epoch, train.sequence_length and the data, so that a change of weights neither repeats nor leaves out
    a sequence. Every rank calls this; the indices are built once, as ``build_once`` says.

    Raises UserError if the data has too few tokens for a sequence, Fault if an index cannot be written.
    """
    data.check_fits(config)
    samples = config.train.steps * config.train.global_batch_size
    if len(data.sources) == 1:
        only = _Epochs(config, data.sources[0], "train", tokenizer, samples)
        build_once(only.caches())
        return Sequences(only.sample, samples, only.documents, only.name)
    draws = IndexCache(data_dir(config) / "cache" / blend.draws_name(config), partial(blend.save_draws, config))
    counts = blend.draw(config).counts
    epochs = [
        _Epochs(config, source, "train", tokenizer, count) for source, count in zip(data.sources, counts, strict=True)
    ]
    build_once([draws, *(cache for source in epochs for cache in source.caches())])
    sources, indices = blend.load_draws(draws.folder)

    def sample(index: int) -> Tensor:
        return epochs[int(sources[index])].sample(int(indices[index]))

    def documents(index: int) -> list[DocumentPosition]:
        return epochs[int(sources[index])].documents(int(indices[index]))

    return Sequences(sample, samples, documents, ", ".join(source.name for source in epochs))


def build_validation_datasets(config: Config, data: PreparedData, tokenizer: Tokenizer) -> dict[str, Sequences]:
    """The validation sequences of each source: the first train.eval_samples of one pass, or all if there are fewer.

    A source that holds nothing out has none. Otherwise this works as ``build_train_dataset``.
    """
    data.check_fits(config)
    datasets: dict[str, Sequences] = {}
    for source in data.sources:
        if not source.manifest.validation.documents:
            continue
        epochs = _Epochs(config, source, "validation", tokenizer, samples=1)
        build_once(epochs.caches())
        length = epochs.length if config.train.eval_samples is None else min(config.train.eval_samples, epochs.length)
        datasets[source.name] = Sequences(epochs.sample, length, epochs.documents, epochs.name)
    return datasets


class _Tokens(GPTDataset):
    """The samples as they are stored. GPTDataset itself would replace padding ids, which may end documents, by id 0.

    Megatron-core 0.19 also returns the length of each part of a sample, which we do not use.
    """

    def __getitem__(self, idx: int | None) -> dict[str, Tensor]:
        tokens, *_ = self._query_document_sample_shuffle_indices(idx or 0)
        return {"tokens": torch.from_numpy(tokens)}

    def parts(self, idx: int) -> list[tuple[int, int]]:
        """(document, index of the first token in it) of each part of a sample."""
        _, documents, *_ = self._query_document_sample_shuffle_indices(idx)
        assert self.shuffle_index is not None, "loaded by the call above"
        _, offset = self.sample_index[self.shuffle_index[idx]]
        return [(int(document), int(offset) if index == 0 else 0) for index, document in enumerate(documents)]


class _Epochs:
    """The sequences of one split of one source, epoch after epoch, as many as ``samples`` samples need.

    The order of an epoch is an index. Where the epochs are few or large, all ranks read the same index caches. Where
    they are many and small, each rank makes an epoch's index in memory when it gets there, so that no rank waits for
    another in the middle of a training, and neither files nor open files grow with the epochs. Both give the same
    order.

    The files are memory-mapped. If one disappears or changes its size, the next sample raises a Fault; otherwise the
    process would end by a bus error, or the run could not be resumed.
    """

    def __init__(self, config: Config, source: Source, split: str, tokenizer: Tokenizer, samples: int) -> None:
        self._identity = source.manifest.split(split).files[0].sha256
        self._prefix = source.folder.resolve() / split
        self._sizes = {file: file.stat().st_size for file in map(self._prefix.with_suffix, (".bin", ".idx"))}
        self._source = source.name
        self._sequence_length, self._seed, self._tokenizer = config.train.sequence_length, config.run.seed, tokenizer
        self._folder = source.folder.resolve() / "cache" / f"{split}-{self._sequence_length}-{self._seed}"
        self.length = (source.manifest.split(split).tokens - 1) // self._sequence_length
        """The number of sequences in an epoch."""
        self._epochs = -(-samples // self.length)
        index_bytes = 12 * self.length + 4 * source.manifest.split(split).documents
        self._in_memory = self._epochs > _CACHED_EPOCHS and index_bytes <= _SMALL_INDEX
        self._opened: dict[int, _Tokens] = {}

    @property
    def name(self) -> str:
        """The common path of the files, without suffix."""
        return str(self._prefix)

    def caches(self) -> list[IndexCache]:
        """The index caches that must be built before the first sample."""
        epochs = range(0 if self._in_memory else self._epochs)
        return [IndexCache(self._cache_folder(epoch), partial(self._open, epoch)) for epoch in epochs]

    def sample(self, index: int) -> Tensor:
        """Sample ``index``, counted over all epochs: int64 tokens [S+1]."""
        epoch, position = divmod(index, self.length)
        return self._epoch(epoch)[position]["tokens"]

    def documents(self, index: int) -> list[DocumentPosition]:
        """As ``Sequences.documents``."""
        epoch, position = divmod(index, self.length)
        parts = self._epoch(epoch).parts(position)
        return [DocumentPosition(self._source, document, token) for document, token in parts]

    def _epoch(self, epoch: int) -> _Tokens:
        self._check_files()
        if epoch not in self._opened:
            while len(self._opened) >= _OPEN_EPOCHS:
                del self._opened[next(iter(self._opened))]
            self._opened[epoch] = self._open(epoch, None if self._in_memory else self._cache_folder(epoch))
        return self._opened[epoch]

    @cached_property
    def _stored(self) -> IndexedDataset:
        return IndexedDataset(str(self._prefix), multimodal=False, mmap=True)

    def _check_files(self) -> None:
        for file, size in self._sizes.items():
            try:
                found = file.stat().st_size
            except OSError as error:
                raise Fault(
                    f"{file}: the data can no longer be read: {error.strerror}. Bring the file back and start again."
                ) from error
            if found != size:
                raise Fault(
                    f"{file}: the data has changed: {found} bytes, expected {size}. "
                    "Bring the file back and start again."
                )

    def _cache_folder(self, epoch: int) -> Path:
        return self._folder / f"epoch-{epoch}"

    def _open(self, epoch: int, cache: Path | None) -> _Tokens:
        """The sequences of ``epoch``, with its index in the folder ``cache`` or, where that is None, in memory."""
        with _without_expected_warnings():
            config = GPTDatasetConfig(
                random_seed=(self._seed + epoch * 1_000_003) % 2**32,
                sequence_length=self._sequence_length,
                blend=([str(self._prefix)], None),
                split="1",
                path_to_cache=None if cache is None else str(cache),
                tokenizer=self._tokenizer,  # pyright: ignore[reportArgumentType]
                reset_position_ids=False,
                reset_attention_mask=False,
                eod_mask_loss=False,
                create_attention_mask=False,
            )
            # Without a folder, Megatron-core writes the index beside the data, except for what it calls mock data.
            config.mock = cache is None
            documents = np.arange(len(self._stored), dtype=np.int32)
            return _Tokens(self._stored, self._identity, documents, None, Split.train, config)


@contextmanager
def _without_expected_warnings() -> Iterator[None]:
    """Hide two warnings of Megatron-core: of padding that shares its id with the end of documents, since our sequences
    are never padded, and of an index that is kept in memory."""
    with warnings_hidden("megatron.core.datasets.gpt_dataset"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The pad token id in the tokenizer collides")
        yield
