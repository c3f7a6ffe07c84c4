"""Writes, reads and checks the manifest of a checkpoint: the list of its files with sizes and hashes, written last."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from moh_megatron.io.errors import UserError
from moh_megatron.io.hashing import FileEntry, hash_file
from moh_megatron.io.small_file import read_small_file, read_small_text

FORMAT_VERSION = 2
"""Version 1 held DeepSpeed's own optimizer files, which fit one topology only: its weights can be read."""
_READABLE = (1, FORMAT_VERSION)
MANIFEST = "manifest.json"
WEIGHTS, OPTIMIZER = "weights", "optimizer"
"""The folders of a checkpoint with the files of all ranks."""
_MANIFEST_HASH = "manifest.sha256"
_PACKAGES = ("torch", "megatron-core", "deepspeed")


@dataclass(frozen=True)
class Topology:
    """How the ranks of a run share the work. A run may be resumed with another topology, but not another precision."""

    tensor_parallel: int
    data_parallel: int
    zero_stage: int
    precision: str

    def __str__(self) -> str:
        return f"TP {self.tensor_parallel} x DP {self.data_parallel}, ZeRO {self.zero_stage}, {self.precision}"


@dataclass(frozen=True)
class Manifest:
    """Everything about a checkpoint that is not a tensor."""

    step: int
    tokens: int
    topology: Topology
    data: str
    """One hash over the dataset's files; only over the same dataset does the order of samples continue."""
    versions: dict[str, str]
    files: dict[str, FileEntry]
    format_version: int = FORMAT_VERSION

    @property
    def weights_sha256(self) -> str:
        """One hash over the files of weights."""
        hashes = [entry.sha256 for name, entry in sorted(self.files.items()) if name.startswith("weights/")]
        return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def package_versions() -> dict[str, str]:
    """Versions of the packages that decide what is saved."""
    return {package: version(package) for package in _PACKAGES}


def relative_files(folder: Path) -> list[str]:
    """Paths of all files below ``folder`` except the manifest and its hash, sorted."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name not in (MANIFEST, _MANIFEST_HASH))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and its own hash, each atomically, and flush them to the disk."""
    _write_flushed(folder / MANIFEST, json.dumps(asdict(manifest), indent=1))
    _write_flushed(folder / _MANIFEST_HASH, _hash_line(folder))


def _write_flushed(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _hash_line(folder: Path) -> str:
    """The line that sha256sum writes for the manifest, which ``sha256sum -c`` can check."""
    return f"{hashlib.sha256(read_small_file(folder / MANIFEST)).hexdigest()}  {MANIFEST}\n"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint. Raises ValueError, which says what is wrong with it."""
    try:
        raw = json.loads(read_small_text(folder / MANIFEST))
        if raw["format_version"] not in _READABLE:
            raise ValueError(
                f"it has format version {raw['format_version']}, this program reads versions up to {FORMAT_VERSION}"
            )
        files = {name: FileEntry(**entry) for name, entry in raw.pop("files").items()}
        manifest = Manifest(topology=Topology(**raw.pop("topology")), files=files, **raw)
        hashed = manifest.format_version > 1 or (folder / _MANIFEST_HASH).exists()  # Version 1 did not always have it.
        if hashed and read_small_file(folder / _MANIFEST_HASH) != _hash_line(folder).encode():
            raise ValueError(f"its {MANIFEST} does not have the content that {_MANIFEST_HASH} says")
        return manifest
    except FileNotFoundError as error:
        raise ValueError(f"it has no {Path(error.filename).name}") from None
    except (
        OSError,
        json.JSONDecodeError,
        UnicodeDecodeError,
        RecursionError,
        LookupError,
        TypeError,
        AttributeError,
        UserError,
    ) as error:
        raise ValueError(f"its {MANIFEST} cannot be read ({error})") from None


def damage(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> str | None:
    """The first difference between a checkpoint's files, or those of ``names``, and its manifest; None without any."""
    for name in manifest.files if names is None else names:
        path, expected = folder / name, manifest.files[name]
        try:
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != expected.bytes:
                return f"{name} has {size} bytes, expected {expected.bytes}"
            found = hash_file(path)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found.sha256 != expected.sha256:
            return f"{name} does not have the content it was saved with"
    return None
