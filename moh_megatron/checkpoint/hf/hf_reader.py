"""Reads the weights of a Hugging Face folder in slices; nothing in the folder is executed."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePath
from typing import Any, Protocol

import torch
from torch import Tensor

from moh_megatron.checkpoint.hf.hf_folder import PICKLE, SAFETENSORS, refuse_pickle, weights_file
from moh_megatron.config.paths import require_folder
from moh_megatron.io.errors import UserError
from moh_megatron.io.json_file import read_json
from moh_megatron.io.safetensors_stream import DTYPES, WEIGHT_TYPES, SafetensorsFile, Scratch

_INDEX = "the index of a model's weights"


class TensorInfo(Protocol):
    """Shape and dtype of a tensor that has not been read yet."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...


class Shard(Protocol):
    """One file of weights."""

    path: Path

    @property
    def entries(self) -> Mapping[str, TensorInfo]: ...

    def rows(self, name: str, start: int, stop: int, scratch: Scratch) -> Tensor: ...

    def read(self, name: str, scratch: Scratch) -> Tensor: ...

    def close(self) -> None: ...


class HFWeights:
    """All tensors of a folder; each lies in one of its files."""

    def __init__(self, folder: Path, shard_of: Mapping[str, Shard]) -> None:
        self.folder = folder
        self._shard_of = shard_of
        self.entries: dict[str, TensorInfo] = {name: shard.entries[name] for name, shard in shard_of.items()}

    @property
    def dtypes(self) -> set[torch.dtype]:
        """All dtypes that occur."""
        return {entry.dtype for entry in self.entries.values()}

    def location(self, name: str) -> str:
        """Return a tensor's file and name, for messages."""
        return f"{self._shard_of[name].path}: {name}"

    def rows(self, name: str, start: int, stop: int, scratch: Scratch) -> Tensor:
        """See ``SafetensorsFile.rows``."""
        return self._shard_of[name].rows(name, start, stop, scratch)

    def read(self, name: str, scratch: Scratch) -> Tensor:
        """See ``SafetensorsFile.read``."""
        return self._shard_of[name].read(name, scratch)


class _PickledFile:
    """A file of torch.save that holds tensors and nothing else, mapped into memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_file() and not zipfile.is_zipfile(path):
            raise UserError(
                f"{path}: cannot be read as tensors saved by torch: expected the archive that torch.save writes since "
                "version 1.6. Got another file, cut short or older. Fetch it again, or save it as safetensors."
            )
        try:
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as tensors saved by torch ({error}).") from None
        if not isinstance(held, Mapping) or not all(isinstance(tensor, Tensor) for tensor in held.values()):
            raise UserError(f"{path}: must hold tensors by name. Got something else.")
        self.entries: dict[str, Any] = dict(held)
        for name, tensor in self.entries.items():
            if tensor.dtype not in DTYPES.values():
                raise UserError(f"{path}: {name} must be of {WEIGHT_TYPES}. Got {tensor.dtype}.")

    def rows(self, name: str, start: int, stop: int, scratch: Scratch) -> Tensor:
        return self.entries[name][start:stop]

    def read(self, name: str, scratch: Scratch) -> Tensor:
        return self.entries[name]

    def close(self) -> None:
        self.entries.clear()


def check_index(folder: Path) -> None:
    """Raise UserError where Transformers cannot read the index of the folder's weights, though ``open_weights`` can."""
    for name in (SAFETENSORS, PICKLE):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return
        if index.is_file():
            if not isinstance(got := read_json(index, _INDEX).get("metadata"), dict):
                raise UserError(
                    f"{index}: metadata must be an object where Transformers opens the model too, to compare them. "
                    f'Got {got!r}. Write "metadata": {{}}.'
                )
            return


@contextmanager
def open_weights(folder: Path, *, allow_pickle: bool = False) -> Iterator[HFWeights]:
    """Open the weights of ``folder``: one safetensors file, or an index and its shards.

    Args:
        allow_pickle: also read files of torch.save (.bin), as tensors only.

    Raises:
        UserError: a file is missing or broken, or the folder holds pickles only.
    """
    require_folder(folder, "the folder of a Hugging Face model")
    with ExitStack() as stack:
        yield HFWeights(folder, _shards(stack, folder, allow_pickle))


def _shards(stack: ExitStack, folder: Path, allow_pickle: bool) -> dict[str, Shard]:
    def open_shard(path: Path) -> Shard:
        pickled = refuse_pickle(path, allow_pickle)
        shard: Shard = _PickledFile(path) if pickled else SafetensorsFile(path)
        stack.callback(shard.close)
        return shard

    path = weights_file(folder)
    if path.suffix == ".json":
        return _read_index(folder, path, open_shard)
    shard = open_shard(path)
    return dict.fromkeys(shard.entries, shard)


def _read_index(folder: Path, index: Path, open_shard: Callable[[Path], Shard]) -> dict[str, Shard]:
    weight_map = read_json(index, _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index}: weight_map must name a file for each tensor.")
    shards: dict[str, Shard] = {}
    found: dict[str, Shard] = {}
    for name, file in weight_map.items():
        if PurePath(file).name != file:
            raise UserError(f"{index}: {name} must lie in a file of this folder. Got {file!r}.")
        if file not in shards:
            # Unlike Path.is_file, os.path.isfile returns False for a name that is too long for the file system.
            if not os.path.isfile(folder / file):
                raise UserError(f"{folder / file}: missing; {index.name} says it holds {name}. Fetch it again.")
            shards[file] = open_shard(folder / file)
        if name not in shards[file].entries:
            raise UserError(f"{folder / file}: holds no {name}, though {index.name} says so. Fetch both again.")
        found[name] = shards[file]
    holder: dict[str, Shard] = {}
    for shard in shards.values():
        for name in shard.entries:
            if holder.setdefault(name, shard) is not shard:
                raise UserError(
                    f"{shard.path}: holds {name}, as {holder[name].path} does; each tensor must lie in one file. "
                    "Fetch both again."
                )
    return found
