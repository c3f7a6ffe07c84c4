"""Reads rows of Parquet files, of folders written by save_to_disk of ``datasets``, and of the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from moh_megatron.io.errors import UserError
from moh_megatron.io.json_file import read_json

HUB = "hf:"
_SAVE_AGAIN = "Save or copy the dataset again."
ROWS = 256
"""Rows held as Python values at once."""

Row = dict[str, Any]


class BadRow(NamedTuple):
    """A row with a text field whose bytes are not UTF-8."""

    field: str
    error: UnicodeDecodeError


def row_groups(path: str) -> int:
    """The number of row groups of a Parquet file."""
    return _parquet(path, None).num_shards


def parquet_rows(path: str, start: int, stop: int | None, fields: tuple[str, ...]) -> Iterator[Row | BadRow]:
    """The rows of row groups [start, stop), with those of ``fields`` that the file has."""
    present = [field for field in fields if field in (_parquet(path, None).column_names or ())]
    groups = _parquet(path, present or None)
    try:
        yield from _shards(groups, start, stop)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: broken Parquet ({error}). Copy or download the file again.") from None


def _parquet(path: str, columns: list[str] | None) -> Any:
    """A Parquet file as a streamed dataset with one shard for each row group."""
    import datasets

    try:
        dataset = datasets.load_dataset(
            "parquet", data_files=path, split="train", streaming=True, columns=columns, batch_size=ROWS
        )
        return dataset.reshard()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a Parquet file ({error}). Copy or download the file again.") from None


def _shards(dataset: Any, start: int, stop: int | None) -> Iterator[Row | BadRow]:
    """The rows of shards [start, stop) of a streamed dataset."""
    dataset = dataset.with_format("arrow")
    total = dataset.num_shards
    for index in range(start, total if stop is None else stop):
        for table in dataset.shard(num_shards=total, index=index).iter(batch_size=ROWS):
            yield from _decoded(table)


def _decoded(table: Any) -> Iterator[Row | BadRow]:
    """The rows of an Arrow table; Arrow does not check that text is UTF-8."""
    try:
        rows = table.to_pylist()
    except UnicodeDecodeError:
        rows = [_decoded_row(table.slice(index, 1)) for index in range(len(table))]
    yield from rows


def _decoded_row(row: Any) -> Row | BadRow:
    values: Row = {}
    for field in row.column_names:
        try:
            (values[field],) = row[field].to_pylist()
        except UnicodeDecodeError as error:
            return BadRow(field, error)
    return values


def is_saved(path: str | Path) -> bool:
    """Whether a folder was written by save_to_disk."""
    return any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json"))


def saved_files(path: Path) -> list[Path]:
    """The data files of a saved dataset, in order. Raises UserError if the folder holds a dictionary of datasets."""
    if (path / "dataset_dict.json").is_file():
        names = _described(path / "dataset_dict.json", "splits")
        splits = ", ".join(str(path / str(name)) for name in names)
        raise UserError(f"data.inputs: {path} holds several datasets; name those to read: {splits}.")
    state = path / "state.json"
    try:
        files = [path / file["filename"] for file in _described(state, "_data_files")]
    except (LookupError, TypeError) as error:
        raise UserError(f"{state}: each of _data_files must have a filename ({error!r}). {_SAVE_AGAIN}") from None
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"data.inputs: {missing[0]} is missing. {_SAVE_AGAIN}")
    return files


def _described(file: Path, key: str) -> list[Any]:
    """The list ``key`` of a file in which save_to_disk describes a dataset."""
    found = read_json(file, "the description of a saved dataset", _SAVE_AGAIN).get(key)
    if not isinstance(found, list):
        raise UserError(f"{file}: {key} must be a list. Got {type(found).__name__}. {_SAVE_AGAIN}")
    return found


def saved_rows(path: str) -> int:
    """The number of rows of a saved dataset."""
    return len(_saved(path))


def saved_row_range(path: str, start: int, stop: int | None, fields: tuple[str, ...]) -> Iterator[Row | BadRow]:
    """Rows [start, stop) of a saved dataset, with those of ``fields`` that it has."""
    dataset = _saved(path)
    present = [field for field in fields if field in dataset.column_names]
    rows = range(start, len(dataset) if stop is None else stop)
    if not present:
        yield from ({} for _ in rows)
        return
    tables = dataset.select(rows).select_columns(present).with_format("arrow")
    for table in tables.iter(batch_size=ROWS):
        yield from _decoded(table)


def _saved(path: str) -> Any:
    import datasets

    try:
        return datasets.load_from_disk(path, keep_in_memory=False)
    except Exception as error:  # broken JSON, broken Arrow files, unknown features: no common class
        raise UserError(f"{path}: not a dataset that save_to_disk wrote ({error}). Save it again.") from None


def hub_revision(name: str) -> str | None:
    """The commit that a hub dataset's name refers to now; None if the hub does not answer, as without a network."""
    import huggingface_hub

    repository, revision, _, _ = _hub_parts(name)
    if Path(repository).exists():  # ``datasets`` opens a folder as it opens a repository
        return None
    try:
        return huggingface_hub.HfApi().dataset_info(repository, revision=revision, timeout=30).sha
    except Exception:  # no common class; if the dataset cannot be opened, opening it says why
        return None


def hub_files(name: str, revision: str | None) -> int:
    """The number of files of a hub dataset; ``revision`` None is the one in its name."""
    return _hub(name, revision).num_shards


def hub_rows(name: str, revision: str | None, start: int, stop: int | None) -> Iterator[Row | BadRow]:
    """The rows of files [start, stop) of a hub dataset, streamed."""
    yield from _shards(_hub(name, revision), start, stop)


def _hub_parts(name: str) -> tuple[str, str | None, str | None, str | None]:
    """The repository, revision, subset and split that a name stands for."""
    repository, _, rest = name.removeprefix(HUB).partition(":")
    subset, _, split = rest.partition(":")
    repository, _, revision = repository.partition("@")
    return repository, revision or None, subset or None, split or None


def _hub(name: str, commit: str | None) -> Any:
    import datasets

    repository, revision, subset, split = _hub_parts(name)
    try:
        return datasets.load_dataset(
            repository, subset, split=split or "train", revision=commit or revision, streaming=True
        )
    except Exception as error:  # no network, no such name, gated, no such split: no common class
        raise UserError(
            f"data.inputs: {name} could not be opened ({type(error).__name__}: {error}). Expected "
            "hf:REPOSITORY[@REVISION][:SUBSET[:SPLIT]], a network, and access to the dataset (hf auth login)."
        ) from None
