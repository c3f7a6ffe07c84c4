"""What tools/inspect_dataset.py shows of a prepared dataset."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from moh_megatron.config.errors import UserError
from moh_megatron.data.indexed import Index, open_tokens
from moh_megatron.data.manifest import SPLITS, Manifest, hash_file, load_dataset_tokenizer, load_manifest


def lengths(folder: Path, split: str) -> dict[str, int]:
    """Quantiles of the tokens a document; empty for a split without tokens."""
    values = Index(folder / split).lengths
    if not len(values):
        return {}
    quantiles = {"shortest": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}
    return {name: int(np.quantile(values, share)) for name, share in quantiles.items()} | {"mean": int(values.mean())}


def draw_lengths(folder: Path, picture: Path) -> None:
    """Histograms of the tokens a document, on a logarithmic axis, as a picture file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for split in SPLITS:
        values = Index(folder / split).lengths
        if len(values):
            edges = np.unique(np.geomspace(1, max(int(values.max()), 2) + 1, 60).astype(int))
            axes.hist(values, bins=list(edges), histtype="step", label=f"{split}: {len(values):,} documents")
    axes.set(xscale="log", yscale="log", xlabel="tokens a document", ylabel="documents", title=str(folder))
    axes.legend()
    figure.savefig(picture)


def sample(folder: Path, split: str, position: int, most: int) -> tuple[int, int, str]:
    """Number, tokens and text of the document at ``position``, of which a negative one counts from the end.

    At most ``most`` tokens are decoded. Raises UserError where there is no such document.
    """
    manifest = load_manifest(folder)
    index = Index(folder / split)
    count = len(index.documents) - 1
    if not -count <= position < count:
        raise UserError(f"{folder}: {split} has {count:,} documents. Got the position {position}.")
    number = position % count
    first, end = (int(each) for each in index.documents[number : number + 2])
    if first == end:  # a document without tokens
        return number, 0, ""
    start, length = int(index.pointers[first]) // index.dtype.itemsize, int(index.lengths[first:end].sum())
    tokens = open_tokens(folder / split)[start : start + min(length, most)]
    return number, length, load_dataset_tokenizer(folder, manifest).decode(tokens.tolist())


def problems(folder: Path) -> list[str]:
    """What is not as the manifest says: hashes of the dataset and of the inputs that are there, tokenizer, index."""
    manifest = load_manifest(folder)
    found: list[str] = []
    for split in SPLITS:
        for record in manifest.split(split).files:
            if (digest := hash_file(folder / record.path)) != record.sha256:
                found.append(f"{folder / record.path}: expected sha256 {record.sha256}. Got {digest}.")
        index, tokens = Index(folder / split), manifest.split(split).tokens
        if int(index.lengths.sum(dtype=np.int64)) != tokens:
            found.append(f"{folder / split}.idx: expected {tokens:,} tokens. Got {int(index.lengths.sum()):,}.")
        if tokens and (largest := _largest(folder, split)) >= manifest.tokenizer.entries:
            found.append(f"{folder / split}.bin: token {largest} is not among {manifest.tokenizer.entries} entries.")
    try:
        load_dataset_tokenizer(folder, manifest)
    except UserError as error:
        found.append(str(error))
    for record in manifest.inputs:
        path = Path(record.path)
        if record.sha256 is not None and path.is_file() and hash_file(path) != record.sha256:
            found.append(f"{path}: the input has changed since: expected sha256 {record.sha256}.")
    return found


def _largest(folder: Path, split: str) -> int:
    tokens = open_tokens(folder / split)
    return max(int(tokens[start : start + (1 << 24)].max()) for start in range(0, len(tokens), 1 << 24))


def differences(here: Manifest, there: Manifest) -> list[str]:
    """One line for each value that differs, by its place: ``here -> there``. The command is left out."""
    one, other = (_flat("", {**asdict(each), "command": None}) for each in (here, there))
    lines = []
    for key in [*one, *(key for key in other if key not in one)]:
        if one.get(key) != other.get(key):
            lines.append(f"{key}: {one.get(key, 'nothing')} -> {other.get(key, 'nothing')}")
    return lines


def _flat(place: str, value: Any) -> dict[str, Any]:
    match value:
        case dict():
            items = [(f"{place}.{key}" if place else str(key), each) for key, each in value.items()]
        case list() | tuple():
            named = [each.get("path") if isinstance(each, dict) else None for each in value]
            items = [
                (f"{place}[{name or number}]", each)
                for number, (name, each) in enumerate(zip(named, value, strict=True))
            ]
        case _:
            return {place: value}
    return {key: leaf for name, each in items for key, leaf in _flat(name, each).items()}
