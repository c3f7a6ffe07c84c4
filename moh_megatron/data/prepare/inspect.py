"""What tools/inspect_dataset.py shows of a prepared dataset."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from moh_megatron.data.dataset_manifest import SPLITS, Manifest, hash_file, load_dataset_tokenizer, load_manifest
from moh_megatron.data.prepare.indexed_writer import Index, open_tokens
from moh_megatron.io.errors import UserError


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
        index = Index(folder / split)
        values = index.lengths
        if len(values):
            edges = np.unique(np.geomspace(1, max(int(values.max()), 2) + 1, 60).astype(int))
            empty = len(index.documents) - 1 - len(values)
            label = f"{split}: {len(values):,} documents" + (f", and {empty:,} empty, not drawn" if empty else "")
            axes.hist(values, bins=list(edges), histtype="step", label=label)
    axes.set(xscale="log", yscale="log", xlabel="tokens a document", ylabel="documents", title=str(folder))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_label)
        axis.set_minor_formatter(_label)
    axes.tick_params(which="both", labelsize="small")
    axes.legend()
    figure.savefig(picture)


def _label(value: float, _: float) -> str:
    """Of a place on a logarithmic axis: 1, 2, 5, 10, 20, ..."""
    return f"{value:,.0f}" if value >= 1 and f"{value:e}"[0] in "125" else ""


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
    """What is not as the manifest says: every file of the dataset, the inputs that are there, tokenizer, index."""
    manifest = load_manifest(folder)
    found: list[str] = []
    for split in SPLITS:
        for record in manifest.split(split).files:
            found += _changes(folder / record.path, record.bytes, record.sha256)
        index, tokens = Index(folder / split), manifest.split(split).tokens
        if int(index.lengths.sum(dtype=np.int64)) != tokens:
            found.append(f"{folder / split}.idx: expected {tokens:,} tokens. Got {int(index.lengths.sum()):,}.")
        if tokens and (largest := _largest(folder, split)) >= manifest.tokenizer.entries:
            found.append(f"{folder / split}.bin: token {largest} is not among {manifest.tokenizer.entries} entries.")
    try:
        load_dataset_tokenizer(folder, manifest)
    except UserError as error:
        found.append(str(error))
    for record in manifest.others:
        found += _changes(folder / record.path, record.bytes, record.sha256)
    for record in manifest.inputs:
        if record.sha256 is not None and Path(record.path).is_file():
            changes = _changes(Path(record.path), record.bytes, record.sha256)
            found += [f"the input has changed since: {change}" for change in changes]
    return found


def unverified(manifest: Manifest) -> list[str]:
    """What ``problems`` cannot look at: inputs that are not there, and what an older manifest has no hash of."""
    gone = [each.path for each in manifest.inputs if each.sha256 is not None and not Path(each.path).is_file()]
    lines = [f"{path}: the input is not there (working directory: {Path.cwd()}), not compared" for path in gone]
    lines += [f"{each.path}: a hub dataset, not compared" for each in manifest.inputs if each.sha256 is None]
    if not manifest.others:
        lines.append("rejects.jsonl and the files of tokenizer/: the manifest is older than their hashes, not compared")
    return lines


def _changes(path: Path, size: int | None, sha256: str) -> list[str]:
    try:
        digest = hash_file(path)
    except UserError as error:
        return [str(error)]
    if digest == sha256:
        return []
    return [f"{path}: expected sha256 {sha256} ({size:,} bytes). Got {digest} ({path.stat().st_size:,} bytes)."]


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
