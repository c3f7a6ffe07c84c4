"""small_file: what is no regular file, or a huge one, is refused in place of being read."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from moh_megatron.io.errors import UserError
from moh_megatron.io.small_file import check_small_files, read_small_file, read_small_text

# One process for all cases: a read that hangs ends with its timeout, and not with the test session's.
_READERS = """
import os, sys
from pathlib import Path
from moh_megatron.checkpoint.hf.hf_config_reader import HFConfigReader
from moh_megatron.checkpoint.hf.hf_extras import read_extras
from moh_megatron.checkpoint.manifest import read_manifest
from moh_megatron.config.load import load_config
from moh_megatron.data.dataset_manifest import load_manifest
from moh_megatron.data.tokenizer.tokenizer import _settings, load_tokenizer
from moh_megatron.evaluate.suite import load_suite
from moh_megatron.io.safetensors_stream import SafetensorsFile
from moh_megatron.io.small_file import check_small_files

folder = Path(sys.argv[1])
os.mkfifo(folder / "pipe.yaml")
(folder / "based.yaml").write_text(f"base: {folder}/pipe.yaml")
(folder / "zero.yaml").write_text("base: /dev/zero")
for name in ("manifest.json", "config.json", "tokenizer_config.json", "generation_config.json", "tokenizer.json"):
    os.mkfifo(folder / name)
os.mkfifo(folder / "model.safetensors")
for read in (
    lambda: load_config(folder / "pipe.yaml"),
    lambda: load_config(folder / "based.yaml"),
    lambda: load_config(folder / "zero.yaml"),
    lambda: load_suite(folder / "pipe.yaml"),
    lambda: load_manifest(folder),
    lambda: read_manifest(folder),
    lambda: HFConfigReader(folder),
    lambda: read_extras(folder),
    lambda: _settings(folder / "tokenizer_config.json"),
    lambda: load_tokenizer(folder / "tokenizer.json"),
    lambda: SafetensorsFile(folder / "model.safetensors"),
    lambda: check_small_files(folder),
):
    try:
        print("read", read())
    except ValueError as error:
        print(type(error).__name__, str(error).replace(sys.argv[1], "F"))
"""


def test_no_reader_waits_for_the_writer_of_a_pipe_or_reads_a_device(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", _READERS, str(tmp_path)], capture_output=True, text=True, timeout=300, check=True
    )
    pipe = "must be a regular file. Got a named pipe. Put the file itself in its place."
    json = "Fetch or write it again."
    assert ran.stdout.splitlines() == [
        f"UserError F/pipe.yaml: {pipe}",
        f"UserError F/based.yaml: base: F/pipe.yaml: {pipe}",
        f"UserError F/zero.yaml: base: /dev/zero: {pipe.replace('named pipe', 'device')}",
        f"UserError F/pipe.yaml: {pipe}",
        f"UserError F/manifest.json: {pipe}",
        f"ValueError its manifest.json cannot be read (F/manifest.json: {pipe})",
        f"UserError F/config.json: {pipe} Expected the settings of a Hugging Face model. {json}",
        f"UserError F/generation_config.json: {pipe} Expected the settings of generation. {json}",
        f"UserError F/tokenizer_config.json: {pipe} Expected the settings of a tokenizer. {json}",
        "UserError F/tokenizer.json: must be a regular file. Got something else, or a link to nothing. Put the file "
        "itself in its place.",
        "UserError F/model.safetensors: must be a safetensors file. Got no regular file.",
        f"UserError F/config.json: {pipe}",
    ]


def test_file_at_the_limit_is_read_and_a_longer_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_bytes("é12".encode())
    assert read_small_file(file, 4) == "é12".encode()
    assert read_small_text(file, 4) == "é12"
    with pytest.raises(UserError, match=rf"^{file}: must have at most 3 bytes, .* Got more\. Name the right file\.$"):
        read_small_file(file, 3)


def test_file_whose_length_the_system_does_not_state_is_bounded_too() -> None:
    file = Path("/proc/self/status")
    assert os.stat(file).st_size == 0
    with pytest.raises(UserError, match="at most 10 bytes"):
        read_small_file(file, 10)


def test_socket_folder_and_absent_file_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # The path of a socket is short.
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        with pytest.raises(UserError, match=r"^socket: must be a regular file\. Got a socket\."):
            read_small_file(Path("socket"))
    with pytest.raises(IsADirectoryError):
        read_small_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_small_file(tmp_path / "absent")


@pytest.mark.parametrize(("name", "reason"), [("loop", "Too many levels"), ("n" * 256, "File name too long")])
def test_path_that_leads_nowhere_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=f"{name}: cannot be read: {reason}.* Name the file by another path"):
        read_small_file(tmp_path / name)


def test_folder_for_a_library_may_hold_folders_links_and_large_weights(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("absent")
    for name in ("model.safetensors", "config.json"):
        with (tmp_path / name).open("wb") as stream:
            stream.truncate(2**28 + (name == "model.safetensors"))
    check_small_files(tmp_path)
    with (tmp_path / "config.json").open("r+b") as stream:
        stream.truncate(2**28 + 1)
    with pytest.raises(UserError, match=r"config\.json: must have at most 268,435,456 bytes"):
        check_small_files(tmp_path)
