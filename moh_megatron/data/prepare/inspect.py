"""Reads statistics, documents, damage and differences of prepared datasets, for tools/inspect_dataset.py."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from moh_megatron.data.dataset_manifest import SPLITS, Manifest, file_sha256, load_dataset_tokenizer, load_manifest
from moh_megatron.data.prepare.indexed_writer import Index, open_tokens
from moh_megatron.io.errors import UserError


def lengths(folder: Path, split: str) -> dict[str, int]:
    """Quantiles and mean of the tokens a document; empty for a split without tokens."""
    values = Index(folder / split).lengths
    if not len(values):
        return {}
    quantiles = {"shortest": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1.0}
    return {name: int(np.quantile(values, share)) for name, share in quantiles.items()} | {"mean": int(values.mean())}


def draw_lengths(folder: Path, picture: Path) -> None:
    """Draw histograms of the tokens a document, on logarithmic axes, into the file ``picture``.

    Raises UserError if ``folder`` is no prepared dataset.
    """
    load_manifest(folder)
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
    """The label of a tick on a logarithmic axis: only 1, 2, 5, 10, 20, ... have one."""
    return f"{value:,.0f}" if value >= 1 and f"{value:e}"[0] in "125" else ""


def sample(folder: Path, split: str, position: int, most: int) -> tuple[int, int, str]:
    """The number, the number of tokens and the text of the document at ``position``; negative ones count from the end.

    At most ``most`` tokens are decoded. Raises UserError if there is no such document.
    """
    manifest = load_manifest(folder)
    index = Index(folder / split)
    count = len(index.documents) - 1
    if not -count <= position < count:
        raise UserError(f"{folder}: {split} has {count:,} documents. Got the position {position}.")
    number = position % count
    first, end = index.documents[number : number + 2].tolist()
    if first == end:  # a document without tokens
        return number, 0, ""
    start, length = int(index.pointers[first]) // index.dtype.itemsize, int(index.lengths[first:end].sum())
    tokens = open_tokens(folder / split)[start : start + min(length, most)]
    return number, length, load_dataset_tokenizer(folder, manifest).decode(tokens.tolist())


def problems(folder: Path) -> list[str]:
    """One line for each file of the dataset, and each input that exists, that is not as the manifest says."""
    manifest = load_manifest(folder)
    found: list[str] = []
    for split in SPLITS:
        for record in manifest.split(split).files:
            found += _changes(folder / record.path, record.bytes, record.sha256)
        index, tokens = Index(folder / split), manifest.split(split).tokens
        if int(index.lengths.sum(dtype=np.int64)) != tokens:
            found.append(f"{folder / split}.idx: expected {tokens:,} tokens. Got {int(index.lengths.sum()):,}.")
        if tokens and (largest := _largest_token(folder, split)) >= manifest.tokenizer.entries:
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
    """What ``problems`` cannot compare: inputs that do not exist, and files that an older manifest has no hash of."""
    files = [record.path for record in manifest.inputs if record.sha256 is not None]
    missing = [path for path in files if not Path(path).is_file()]
    lines = [f"{path}: the input is not there (working directory: {Path.cwd()}), not compared" for path in missing]
    lines += [f"{record.path}: a hub dataset, not compared" for record in manifest.inputs if record.sha256 is None]
    if not manifest.others:
        lines.append("rejects.jsonl and the files of tokenizer/: the manifest is older than their hashes, not compared")
    return lines


def _changes(path: Path, size: int | None, sha256: str) -> list[str]:
    try:
        digest = file_sha256(path)
    except UserError as error:
        return [str(error)]
    if digest == sha256:
        return []
    return [f"{path}: expected sha256 {sha256} ({size:,} bytes). Got {digest} ({path.stat().st_size:,} bytes)."]


def _largest_token(folder: Path, split: str) -> int:
    tokens = open_tokens(folder / split)
    return max(int(tokens[start : start + (1 << 24)].max()) for start in range(0, len(tokens), 1 << 24))


def differences(first: Manifest, second: Manifest) -> list[str]:
    """One line for each value that differs: its path, and both values. The command is left out."""
    left, right = (_flatten("", {**asdict(manifest), "command": None}) for manifest in (first, second))
    lines = []
    for key in [*left, *(key for key in right if key not in left)]:
        if left.get(key) != right.get(key):
            lines.append(f"{key}: {left.get(key, 'nothing')} -> {right.get(key, 'nothing')}")
    return lines


def _flatten(path: str, value: Any) -> dict[str, Any]:
    """The leaves of ``value`` by their paths below ``path``; a file in a list goes by its own path, not its index."""
    match value:
        case dict():
            items = [(f"{path}.{key}" if path else str(key), item) for key, item in value.items()]
        case list() | tuple():
            names = [item.get("path") if isinstance(item, dict) else None for item in value]
            items = [
                (f"{path}[{name or index}]", item) for index, (name, item) in enumerate(zip(names, value, strict=True))
            ]
        case _:
            return {path: value}
    return {key: leaf for name, item in items for key, leaf in _flatten(name, item).items()}
