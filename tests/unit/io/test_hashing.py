"""hash_file: size and SHA-256 of files of any size."""

import hashlib
import os

import pytest
from support.slow_digest import SlowDigest

from moh_megatron.io import hashing
from moh_megatron.io.hashing import FileEntry, hash_file

EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
ABC_SHA256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_hash_file_returns_size_and_sha256(tmp_path):
    (tmp_path / "empty").touch()
    assert hash_file(tmp_path / "empty") == FileEntry(0, EMPTY_SHA256)
    (tmp_path / "abc").write_bytes(b"abc")
    assert hash_file(tmp_path / "abc") == FileEntry(3, ABC_SHA256)


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 8192, 5 * 4096 + 3])
def test_file_of_several_blocks_is_hashed_completely(tmp_path, monkeypatch, size):
    monkeypatch.setattr(hashing, "_BLOCK_BYTES", 4096)
    content = os.urandom(size)
    (tmp_path / "long").write_bytes(content)
    expected = hashlib.sha256(content).hexdigest()
    # Finds out whether a block is overwritten before it is hashed.
    monkeypatch.setattr(hashing.hashlib, "sha256", SlowDigest)
    assert hash_file(tmp_path / "long") == FileEntry(size, expected)


def test_flush_writes_to_the_disk_first(tmp_path, monkeypatch):
    (tmp_path / "abc").write_bytes(b"abc")
    flushed, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_size) or fsync(handle))
    assert hash_file(tmp_path / "abc", flush=True) == FileEntry(3, ABC_SHA256)
    assert flushed == [3]
