"""What is written past the page cache is there, whatever its size, and a disk that refuses is heard of."""

import errno
import hashlib
import os
import threading
import time

import pytest
from support.slow_digest import SlowDigest

from moh_megatron.checkpoint import direct_file
from moh_megatron.checkpoint.direct_file import DirectFile

BLOCK, BLOCKS, FLAG = 8192, 3, 1 << 30


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(direct_file, "_BLOCK_BYTES", BLOCK)


def held() -> tuple[int, int]:
    """Threads and open files of this process."""
    return threading.active_count(), len(os.listdir("/dev/fd"))


def written(path, content: bytes, step: int) -> str:
    """Write ``content`` in pieces out of memory that is used again; returns its hash."""
    file = DirectFile(path, hashed=True, blocks=BLOCKS)
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
    usual_open, usual_write, refused = os.open, os.write, []

    def refuse():
        refused.append(place)
        raise OSError(errno.EINVAL, "Invalid argument")

    def opened(path, flags, *more):
        if flags & FLAG and place == "open":
            refuse()
        return usual_open(path, flags & ~FLAG, *more)

    def write(handle, data):
        if place == "write" and not refused:
            refuse()
        return usual_write(handle, data)

    # Whatever the file system of this test says to direct writing, and where the flag is unknown.
    monkeypatch.setattr(direct_file, "_DIRECT", FLAG)
    monkeypatch.setattr(direct_file.fcntl, "fcntl", lambda handle, command, *flags: 0 if flags else FLAG)
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "write", write)
    content = os.urandom(5 * BLOCK + 3)
    assert written(tmp_path / "file", content, 5000) == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "file").read_bytes() == content
    assert refused == [place]


@pytest.mark.parametrize("most", [1, 100, 4097, BLOCK - 1])
def test_short_writes_go_on_where_they_ended(tmp_path, monkeypatch, most):
    usual = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: usual(handle, data[:most]))
    content = os.urandom(3 * BLOCK + 3)
    written(tmp_path / "file", content, 5000)
    assert (tmp_path / "file").read_bytes() == content


def test_a_system_that_knows_no_direct_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(direct_file, "_DIRECT", 0)
    content = os.urandom(5 * BLOCK + 3)
    written(tmp_path / "file", content, 5000)
    assert (tmp_path / "file").read_bytes() == content


@pytest.mark.parametrize("failing", [1, 2, 9, 19, 20])
def test_a_full_disk_is_heard_of_whatever_block_fills_it(tmp_path, monkeypatch, failing):
    usual, before, calls = os.write, held(), []

    def full(handle, data):
        calls.append(len(data))
        if len(calls) == failing:
            time.sleep(0.05)
            raise OSError(errno.ENOSPC, "No space left on device")
        return usual(handle, data)

    monkeypatch.setattr(os, "write", full)
    file = DirectFile(tmp_path / "file", hashed=True, blocks=BLOCKS)

    def write():
        for _ in range(20):
            file.write(memoryview(bytes(BLOCK)))
        file.finish()

    with pytest.raises(OSError, match="No space left"):
        write()
    file.abandon()
    assert held() == before


def test_what_is_finished_is_on_the_disk_and_closed(tmp_path, monkeypatch):
    flushed, usual, before = [], os.fsync, held()
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_size) or usual(handle))
    file = DirectFile(tmp_path / "file", hashed=True)
    file.write(memoryview(bytes(5 * BLOCK + 1)))
    file.finish()
    file.finish()
    file.abandon()
    assert flushed == [5 * BLOCK + 1]
    assert held() == before
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask


def test_a_failed_close_closes_nothing_else(tmp_path, monkeypatch):
    file, closed = DirectFile(tmp_path / "file", hashed=False), []

    def fail(handle):
        closed.append(handle)
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as patched:
        patched.setattr(os, "close", fail)
        with pytest.raises(OSError, match="quota"):
            file.finish()
    file.abandon()
    os.close(closed[0])
    assert len(closed) == 1


def test_memory_is_bounded_and_used_again(tmp_path, monkeypatch):
    made, usual, slow = [], direct_file.mmap, os.write
    monkeypatch.setattr(direct_file, "mmap", lambda *size: made.append(size) or usual(*size))
    file = DirectFile(tmp_path / "quick", hashed=False, blocks=BLOCKS)
    assert not made
    for _ in range(9):
        file.write(memoryview(bytes(BLOCK)))
        time.sleep(0.02)
    file.finish()
    assert made == [(-1, BLOCK)] * len(made)
    assert len(made) < BLOCKS
    made.clear()
    monkeypatch.setattr(os, "write", lambda handle, data: time.sleep(0.01) or slow(handle, data))
    written(tmp_path / "slow", bytes(20 * BLOCK), BLOCK)
    assert len(made) == BLOCKS


def test_a_refused_file_names_itself(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no/file"):
        DirectFile(tmp_path / "no/file", hashed=False)


def test_what_is_abandoned_is_closed(tmp_path):
    before = held()
    file = DirectFile(tmp_path / "file", hashed=True)
    file.write(memoryview(bytes(5 * BLOCK)))
    assert threading.active_count() > before[0]
    file.abandon()
    file.abandon()
    assert held() == before


def test_no_block_is_filled_again_before_it_is_hashed(tmp_path, monkeypatch):
    content = os.urandom(8 * BLOCK)
    expected = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(direct_file.hashlib, "sha256", SlowDigest)
    assert written(tmp_path / "file", content, BLOCK) == expected
