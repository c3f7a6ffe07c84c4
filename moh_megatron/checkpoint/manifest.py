"""What makes a checkpoint complete: a list of its files with sizes and hashes, written last."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from moh_megatron.checkpoint.direct_file import read_in_order

FORMAT_VERSION = 2
"""1 held DeepSpeed's own optimizer files, which fit one topology only: its weights are read, a resume is refused."""
_READABLE = (1, FORMAT_VERSION)
MANIFEST = "manifest.json"
_SEAL = "manifest.sha256"
_PACKAGES = ("torch", "megatron-core", "deepspeed")
_BLOCK_BYTES = 1 << 25
"""Hashed at once. Between two blocks the interpreter is asked for: beside another thread's imports, of 256 KB as
hashlib.file_digest takes them, almost nothing was hashed."""


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Topology:
    """How the ranks of a run share the work; another one may resume it, but for the precision."""

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
    """One hash over the dataset's files: the data order continues only over the same dataset."""
    versions: dict[str, str]
    files: dict[str, FileEntry]
    format_version: int = FORMAT_VERSION

    @property
    def weights_sha256(self) -> str:
        """One hash over the files of weights."""
        hashes = [entry.sha256 for name, entry in sorted(self.files.items()) if name.startswith("weights/")]
        return hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def package_versions() -> dict[str, str]:
    """Of the packages that make what is saved."""
    return {package: version(package) for package in _PACKAGES}


def hash_file(path: Path, *, flush: bool = False) -> FileEntry:
    """Size and SHA-256 of a file; ``flush`` makes sure first that what was just written is on the disk."""
    with path.open("rb", buffering=0) as stream, ThreadPoolExecutor(1, "read-ahead") as helper:
        if flush:
            os.fsync(stream.fileno())
        read_in_order(stream.fileno())
        digest, size = hashlib.sha256(), 0
        length = min(_BLOCK_BYTES, os.fstat(stream.fileno()).st_size + 1)
        block, other = (memoryview(bytearray(length)) for _ in range(2))
        reading = helper.submit(stream.readinto, block)
        while count := reading.result():
            reading = helper.submit(stream.readinto, other)
            digest.update(block[:count])
            block, other, size = other, block, size + count
        return FileEntry(size, digest.hexdigest())


def relative_files(folder: Path) -> list[str]:
    """Every file below ``folder`` but the manifest and its hash, sorted."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name not in (MANIFEST, _SEAL))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write it and its own hash, each whole or not at all, and flush them to the disk."""
    _write_flushed(folder / MANIFEST, json.dumps(asdict(manifest), indent=1))
    _write_flushed(folder / _SEAL, _seal_of(folder))


def _write_flushed(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def _seal_of(folder: Path) -> str:
    """A line as sha256sum writes it, so that ``sha256sum -c`` can check it."""
    return f"{hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()}  {MANIFEST}\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint; ValueError says what is wrong with it."""
    try:
        raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if raw["format_version"] not in _READABLE:
            raise ValueError(
                f"it has format version {raw['format_version']}, this program reads versions up to {FORMAT_VERSION}"
            )
        files = {name: FileEntry(**entry) for name, entry in raw.pop("files").items()}
        manifest = Manifest(topology=Topology(**raw.pop("topology")), files=files, **raw)
        sealed = manifest.format_version > 1 or (folder / _SEAL).exists()  # version 1 had no seal
        if sealed and (folder / _SEAL).read_bytes() != _seal_of(folder).encode():
            raise ValueError(f"its {MANIFEST} does not have the content that {_SEAL} says")
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
    ) as error:
        raise ValueError(f"its {MANIFEST} cannot be read ({error})") from None


def damage(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> str | None:
    """What differs between a checkpoint's files and its manifest, or None. ``names`` limits the check to a share."""
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
