"""Prepared data as fixed-length sequences, read through megatron.core.datasets."""

from __future__ import annotations

import fcntl
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch import Tensor, distributed
from torch.utils.data import Dataset

from moh_megatron.config.errors import Fault
from moh_megatron.config.paths import data_dir
from moh_megatron.config.schema import Config
from moh_megatron.data.manifest import SPLITS, Manifest
from moh_megatron.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Place:
    """Where a part of a sample stands in the prepared data."""

    document: int
    token: int
    """First token of the part, in the document."""


class Sequences(Dataset[Tensor]):
    """``length`` samples, each int64 tokens [S+1]: S inputs and, one to the right, S targets.

    ``files`` are what they are read from, memory-mapped: a file that vanishes or shrinks is a Fault at the next sample,
    where it would be a bus error, or a run that cannot be resumed.
    """

    def __init__(self, samples: Dataset[dict[str, Tensor]], length: int, files: Sequence[Path] = ()) -> None:
        self._samples = samples
        self._length = length
        self._sizes = {file: file.stat().st_size for file in files}

    @property
    def name(self) -> str:
        """The files' common name."""
        return str(next((file.with_suffix("") for file in self._sizes), "memory"))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self._length:
            raise IndexError(f"sample {index} of {self._length}")
        self._check_files()
        return self._samples[index]["tokens"]

    def places(self, index: int) -> list[Place]:
        """The documents that sample ``index`` is made of, in order; none where the samples do not know."""
        return self._samples.places(index) if isinstance(self._samples, _Tokens) else []

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


def build_train_dataset(config: Config, manifest: Manifest, tokenizer: Tokenizer) -> Sequences:
    """The samples of the whole run in order, train.steps * train.global_batch_size, over as many epochs as it takes.

    The order is a function of run.seed, train.sequence_length, the number of samples and the data. Every rank calls
    this: where torch.distributed is up, rank 0 builds the index and the others wait for it.

    Raises UserError where the data is too little for a sequence, Fault where the index cannot be written.
    """
    return _build(config, manifest, tokenizer, "train", config.train.steps * config.train.global_batch_size)


def build_validation_dataset(config: Config, manifest: Manifest, tokenizer: Tokenizer) -> Sequences:
    """train.eval_samples sequences drawn from one pass over the validation split, or all of that pass if it has fewer.

    As ``build_train_dataset`` otherwise.
    """
    return _build(config, manifest, tokenizer, "validation", None)


class _Tokens(GPTDataset):
    """Samples as they are stored. GPTDataset itself would turn padding ids, which may end documents too, into id 0."""

    def __getitem__(self, idx: int | None) -> dict[str, Tensor]:
        tokens, _ = self._query_document_sample_shuffle_indices(idx or 0)
        return {"tokens": torch.from_numpy(tokens)}

    def places(self, idx: int) -> list[Place]:
        """As ``Sequences.places``."""
        _, documents = self._query_document_sample_shuffle_indices(idx)
        assert self.shuffle_index is not None, "loaded by the call above"
        _, offset = self.sample_index[self.shuffle_index[idx]]
        return [Place(int(document), int(offset) if place == 0 else 0) for place, document in enumerate(documents)]


def _build(config: Config, manifest: Manifest, tokenizer: Tokenizer, split: str, samples: int | None) -> Sequences:
    manifest.check_fits(config)
    folder = data_dir(config).resolve()
    sequence_length, seed = config.train.sequence_length, config.run.seed
    place = SPLITS.index(split)
    blends: list[tuple[list[str], None] | None] = [None, None, None]  # training, validation, test
    blends[place] = ([str(folder / split)], None)
    sizes: list[int | None] = [0, 0, 0]
    sizes[place] = samples
    cache = folder / "cache" / f"{split}-{samples or 'all'}-{sequence_length}-{seed}"
    with _index_cache(cache), warnings.catch_warnings():
        # That padding shares an id with the end of documents matters only to a reader that pads.
        warnings.filterwarnings("ignore", message="The pad token id in the tokenizer collides")
        dataset_config = GPTDatasetConfig(
            random_seed=seed,
            sequence_length=sequence_length,
            blend_per_split=blends,  # pyright: ignore[reportArgumentType]
            path_to_cache=str(cache),
            tokenizer=tokenizer,  # pyright: ignore[reportArgumentType]
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        builder = BlendedMegatronDatasetBuilder(_Tokens, sizes, lambda: True, dataset_config)  # pyright: ignore[reportArgumentType]
        dataset = builder.build()[place]
    assert dataset is not None
    wanted = config.train.eval_samples if samples is None else samples
    length = len(dataset) if wanted is None else min(wanted, len(dataset))
    files = [folder / f"{split}{suffix}" for suffix in (".bin", ".idx")]
    return Sequences(dataset, length, files)  # pyright: ignore[reportArgumentType]


@contextmanager
def _index_cache(cache: Path) -> Iterator[None]:
    """Let rank 0 build into ``cache`` alone, runs that share the dataset included, and build half an index anew.

    The other ranks read only behind the builder's own barrier, when rank 0 has built.
    """
    if distributed.is_initialized() and distributed.get_rank() != 0:
        yield
        return
    complete = cache / "complete"
    if complete.exists():
        yield  # nothing to write: the folder may be read-only
        return
    try:
        cache.parent.mkdir(exist_ok=True)
        with open(cache.parent / "lock", "w") as lock:
            with suppress(OSError):  # a file system without locks: two runs that start at once may meet
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not complete.exists():
                shutil.rmtree(cache, ignore_errors=True)
            yield
            complete.touch()
    except OSError as error:
        raise Fault(
            f"Cannot write the index cache {cache}: {error.strerror or error}. Make the folder writable once, or copy "
            f"the dataset and set data.dir."
        ) from error
