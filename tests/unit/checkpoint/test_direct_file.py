"""What is written past the page cache is there, whatever its size, and a disk that refuses is heard of."""

import errno
import hashlib
import os
import threading

import pytest

from moh_megatron.checkpoint import direct_file
from moh_megatron.checkpoint.direct_file import DirectFile

BLOCK, BLOCKS = 8192, 3


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(direct_file, "_BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(direct_file, "_BLOCKS", BLOCKS)


def written(path, content: bytes, step: int) -> str:
    """Write ``content`` in pieces out of memory that is used again; returns its hash."""
    file = DirectFile(path, hashed=True)
    for start in range(0, len(content), step):
        piece = bytearray(content[start : start + step])
        file.write(memoryview(piece))
        piece[:] = bytes(len(piece))
    file.finish()
    return file.sha256


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, BLOCK - 1, BLOCK, BLOCK + 1, 20 * BLOCK, 20 * BLOCK + 4097])
@pytest.mark.parametrize("step", [5000, 3 * BLOCK + 1])
def test_every_size_is_written_whole(tmp_path, size, step):
    content = os.urandom(size)
    (tmp_path / "file").write_bytes(b"an earlier one, longer than nothing")
    assert written(tmp_path / "file", content, step) == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("place", ["open", "write"])
def test_a_file_system_without_direct_writing(tmp_path, monkeypatch, place):
    direct, refused, usual = direct_file._DIRECT, [], getattr(os, place)

    def refuse(first, second, *more):
        flags = second if place == "open" else direct_file.fcntl.fcntl(first, direct_file.fcntl.F_GETFL)
        if flags & direct:
            refused.append(place)
            raise OSError(errno.EINVAL, "Invalid argument")
        return usual(first, second, *more)

    monkeypatch.setattr(os, place, refuse)
    content = os.urandom(5 * BLOCK + 3)
    assert written(tmp_path / "file", content, 5000) == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "file").read_bytes() == content
    assert refused == [place]


def test_a_system_that_knows_no_direct_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(direct_file, "_DIRECT", 0)
    content = os.urandom(5 * BLOCK + 3)
    written(tmp_path / "file", content, 5000)
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("blocks", [1, 20])
def test_a_full_disk_is_heard_of(tmp_path, monkeypatch, blocks):
    usual = os.write

    def full(handle, data):
        if os.lseek(handle, 0, os.SEEK_CUR) >= (blocks - 1) // 2 * BLOCK:
            raise OSError(errno.ENOSPC, "No space left on device")
        return usual(handle, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        written(tmp_path / "file", os.urandom(blocks * BLOCK), BLOCK)


def test_a_refused_file_names_itself(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no/file"):
        DirectFile(tmp_path / "no/file", hashed=False)


def test_what_is_abandoned_is_closed(tmp_path):
    before = threading.active_count(), len(os.listdir("/proc/self/fd"))
    file = DirectFile(tmp_path / "file", hashed=True)
    file.write(memoryview(bytes(5 * BLOCK)))
    assert threading.active_count() > before[0]
    file.abandon()
    file.abandon()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == before
