"""SafetensorsFile and SafetensorsWriter: files written and read in chunks are those of the library."""

import errno
import hashlib
import io
import json
import os
import resource
import struct
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from moh_megatron.io import safetensors_stream
from moh_megatron.io.errors import UserError
from moh_megatron.io.hashing import hash_file
from moh_megatron.io.safetensors_stream import DTYPES, SafetensorsFile, SafetensorsWriter, Scratch

TENSORS = st.lists(
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), min_size=1, max_size=3)), max_size=5
)


def drawn(specification):
    generator = torch.Generator().manual_seed(1)
    return {
        f"tensor.{index}": torch.randint(-99, 99, shape, generator=generator).to(DTYPES[name])
        for index, (name, shape) in enumerate(specification)
    }


@given(TENSORS)
def test_library_reads_what_the_writer_wrote(tmp_path_factory, specification):
    tensors, path = drawn(specification), tmp_path_factory.mktemp("written") / "a.safetensors"
    described = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, described, hashed=True) as writer:
        for name, tensor in tensors.items():
            for row in tensor.split(2):
                writer.append(name, row)
    again = load_file(path)
    assert again.keys() == tensors.keys()
    assert all(again[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert writer.entry.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert writer.entry.bytes == path.stat().st_size
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


@given(TENSORS)
def test_reader_reads_what_the_library_wrote(tmp_path_factory, specification):
    tensors, path = drawn(specification), tmp_path_factory.mktemp("read") / "a.safetensors"
    tensors["scalar"] = torch.tensor(3.0)
    save_file(tensors, path)
    file, scratch = SafetensorsFile(path), Scratch()
    for name, tensor in tensors.items():
        assert torch.equal(file.read(name, scratch), tensor)
        if tensor.dim():
            assert torch.equal(file.rows(name, len(tensor) // 2, len(tensor), scratch), tensor[len(tensor) // 2 :])
    file.close()


def held() -> tuple[int, int]:
    """Threads and open files of this process."""
    return threading.active_count(), len(os.listdir("/dev/fd"))


@pytest.fixture
def frequent_flush(monkeypatch):
    """The writer flushes every 8 KiB."""
    monkeypatch.setattr(safetensors_stream, "_FLUSH_BYTES", 8192)


def written(path: Path, rows: Tensor, step: int) -> SafetensorsWriter:
    """Write ``rows`` in chunks of ``step`` rows, from memory that is overwritten afterwards."""
    with SafetensorsWriter(path, {"a": (rows.dtype, tuple(rows.shape))}, hashed=True) as writer:
        for chunk in rows.split(step):
            buffer = chunk.clone()
            writer.append("a", buffer)
            buffer.zero_()
    return writer


@pytest.mark.usefixtures("frequent_flush")
@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000])
@pytest.mark.parametrize("step", [7, 200])
def test_file_of_any_size_is_written_completely(tmp_path, count, step):
    rows, before = torch.randn(count, 32), held()
    (tmp_path / "a").write_bytes(b"an earlier file" * 100_000)
    writer = written(tmp_path / "a", rows, step)
    assert torch.equal(load_file(tmp_path / "a")["a"], rows)
    assert writer.entry == hash_file(tmp_path / "a")
    assert held() == before


def test_complete_file_is_on_the_disk_and_closed_before_the_block_ends(tmp_path, monkeypatch):
    flushed, fsync, before = [], os.fsync, held()
    monkeypatch.setattr(os, "fsync", lambda handle: flushed.append(os.fstat(handle).st_size) or fsync(handle))
    with ExitStack() as stack:
        for number in range(5):
            path = tmp_path / f"{number}.safetensors"
            writer = stack.enter_context(SafetensorsWriter(path, {"a": (torch.float32, (4,))}, hashed=True))
            writer.append("a", torch.ones(4))
            assert flushed == [path.stat().st_size] * (number + 1)
            assert held() == before
            assert torch.equal(load_file(path)["a"], torch.ones(4))
    assert len(flushed) == 5


class ShortWrites(io.FileIO):
    """Writes fewer bytes than it is given."""

    def write(self, data: Any) -> int:
        return super().write(memoryview(data)[:1000])


@pytest.mark.usefixtures("frequent_flush")
def test_short_writes_continue_where_they_ended(tmp_path, monkeypatch):
    rows = torch.randn(1000, 32)
    monkeypatch.setattr(Path, "open", lambda path, mode, buffering: ShortWrites(path, mode))
    written(tmp_path / "a", rows, 200)
    monkeypatch.undo()
    assert torch.equal(load_file(tmp_path / "a")["a"], rows)


@pytest.mark.usefixtures("frequent_flush")
@pytest.mark.parametrize("refused", [0, 9000, 100_000, 128_000])
def test_write_refused_at_any_position_is_raised_and_the_file_closed(tmp_path, refused):
    before, (soft, hard) = held(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (refused, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            written(tmp_path / "a", torch.randn(1000, 32), 7)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert held() == before


@pytest.mark.usefixtures("frequent_flush")
@pytest.mark.parametrize("failing", [1, 2, 15])
def test_failed_flush_is_raised_and_the_file_closed(tmp_path, monkeypatch, failing):
    calls, before, fsync = [], held(), os.fsync

    def refuse(handle: int) -> None:
        calls.append(handle)
        if len(calls) == failing:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(OSError, match="quota"):
        written(tmp_path / "a", torch.randn(1000, 32), 7)
    assert held() == before


def test_file_that_cannot_be_opened_is_named(tmp_path):
    before = held()
    with pytest.raises(FileNotFoundError, match=r"absent/file"):
        SafetensorsWriter(tmp_path / "absent/file", {})
    assert held() == before


def test_incomplete_file_is_closed(tmp_path):
    before = len(os.listdir("/dev/fd"))
    with (
        pytest.raises(AssertionError, match="is not written completely"),
        SafetensorsWriter(tmp_path / "a.safetensors", {"a": (torch.float32, (4,))}),
    ):
        pass
    assert len(os.listdir("/dev/fd")) == before


def test_scratch_reuses_its_buffers_after_reset():
    scratch = Scratch()
    first, second = scratch.take(100), scratch.take(10)
    scratch.reset()
    assert scratch.take(50).data_ptr() == first.data_ptr()
    assert scratch.take(10).data_ptr() == second.data_ptr()
    assert scratch.take(10).data_ptr() not in (first.data_ptr(), second.data_ptr())


def test_file_that_shrinks_while_it_is_read_is_a_user_error(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"weight": torch.zeros(100, 100)}, path)
    file = SafetensorsFile(path)
    with path.open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(UserError, match="ends inside weight"):
        file.read("weight", Scratch())
    file.close()


def test_failed_read_names_its_file(tmp_path, monkeypatch):
    save_file({"a": torch.zeros(4)}, tmp_path / "a.safetensors")
    file = SafetensorsFile(tmp_path / "a.safetensors")

    def fail(*arguments):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.preadv", fail)
    with pytest.raises(OSError, match=r"Input/output error.*a\.safetensors"):
        file.read("a", Scratch())
    file.close()


def write_file(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize(
    ("shape", "offsets"), [([2.0, 2], [0, 16]), ([2, 2], [0.0, 16]), ([2, 2], [False, 16]), ([True, 4], [0, 16])]
)
def test_header_with_other_numbers_than_integers_is_refused(tmp_path, shape, offsets):
    path = tmp_path / "a.safetensors"
    write_file(path, {"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}, bytes(16))
    with pytest.raises(UserError, match=r"a\.safetensors: a must have a shape and data_offsets of whole numbers"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    ("offsets", "size", "message"),
    [
        ({"a": (0, 16), "b": (8, 24)}, 24, r"b must begin at byte \d+, where a ends\. Got"),
        ({"a": (0, 16), "b": (0, 16)}, 16, r"b must begin at byte \d+, where a ends\. Got"),
        ({"a": (0, 16), "b": (32, 48)}, 48, r"b must begin at byte \d+, where a ends\. Got"),
        ({"a": (8, 24)}, 24, r"a must begin at byte \d+, where the header ends\. Got"),
        ({"a": (0, 16)}, 17, r"a\.safetensors: must end at byte \d+, with a\. Got \d+ bytes"),
    ],
)
def test_tensors_that_overlap_or_leave_gaps_are_refused(tmp_path, offsets, size, message):
    path = tmp_path / "a.safetensors"
    write_file(
        path,
        {name: {"dtype": "F32", "shape": [4], "data_offsets": span} for name, span in offsets.items()},
        bytes(size),
    )
    with pytest.raises(UserError, match=message):
        SafetensorsFile(path)
