"""Files written and read a piece at a time are the library's files."""

import hashlib
import json
import os
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

from moh_megatron.checkpoint.hf.safetensors_stream import DTYPES, SafetensorsFile, SafetensorsWriter, Scratch
from moh_megatron.io.errors import UserError

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
def test_the_library_reads_what_is_written(tmp_path_factory, specification):
    tensors, path = drawn(specification), tmp_path_factory.mktemp("written") / "a.safetensors"
    described = {name: (each.dtype, tuple(each.shape)) for name, each in tensors.items()}
    with SafetensorsWriter(path, described, hashed=True) as writer:
        for name, tensor in tensors.items():
            for row in tensor.split(2):
                writer.append(name, row)
    again = load_file(path)
    assert again.keys() == tensors.keys()
    assert all(again[name].dtype == each.dtype and torch.equal(again[name], each) for name, each in tensors.items())
    assert writer.entry.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert writer.entry.bytes == path.stat().st_size
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


@given(TENSORS)
def test_what_the_library_writes_is_read(tmp_path_factory, specification):
    tensors, path = drawn(specification), tmp_path_factory.mktemp("read") / "a.safetensors"
    tensors["scalar"] = torch.tensor(3.0)
    save_file(tensors, path)
    file, scratch = SafetensorsFile(path), Scratch()
    for name, tensor in tensors.items():
        assert torch.equal(file.read(name, scratch), tensor)
        if tensor.dim():
            assert torch.equal(file.rows(name, len(tensor) // 2, len(tensor), scratch), tensor[len(tensor) // 2 :])
    file.close()


def test_of_many_files_only_those_that_are_being_filled_hold_threads(tmp_path):
    before = threading.active_count()
    with ExitStack() as stack:
        for number in range(5):
            path = tmp_path / f"{number}.safetensors"
            writer = stack.enter_context(SafetensorsWriter(path, {"a": (torch.float32, (4,))}, hashed=True))
            writer.append("a", torch.ones(4))
            assert threading.active_count() == before
            assert torch.equal(load_file(path)["a"], torch.ones(4))


def test_a_file_that_is_not_written_whole_is_closed(tmp_path):
    before = len(os.listdir("/dev/fd"))
    with (
        pytest.raises(AssertionError, match="is not written whole"),
        SafetensorsWriter(tmp_path / "a.safetensors", {"a": (torch.float32, (4,))}),
    ):
        pass
    assert len(os.listdir("/dev/fd")) == before


def test_memory_is_used_again():
    scratch = Scratch()
    first, second = scratch.take(100), scratch.take(10)
    scratch.reset()
    assert scratch.take(50).data_ptr() == first.data_ptr()
    assert scratch.take(10).data_ptr() == second.data_ptr()
    assert scratch.take(10).data_ptr() not in (first.data_ptr(), second.data_ptr())


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"weight": torch.zeros(100, 100)}, path)
    file = SafetensorsFile(path)
    with path.open("r+b") as stream:
        stream.truncate(1000)
    with pytest.raises(UserError, match="ends inside weight"):
        file.read("weight", Scratch())
    file.close()


def test_a_failed_read_names_its_file(tmp_path, monkeypatch):
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
def test_numbers_of_a_header_are_whole(tmp_path, shape, offsets):
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
def test_tensors_fill_a_file(tmp_path, offsets, size, message):
    path = tmp_path / "a.safetensors"
    write_file(
        path,
        {name: {"dtype": "F32", "shape": [4], "data_offsets": each} for name, each in offsets.items()},
        bytes(size),
    )
    with pytest.raises(UserError, match=message):
        SafetensorsFile(path)
