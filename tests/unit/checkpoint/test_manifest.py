"""Manifests: every way in which a checkpoint's files may differ from what was saved."""

import dataclasses
import errno
import json

import pytest

from moh_megatron.checkpoint.manifest import (
    FORMAT_VERSION,
    Manifest,
    Topology,
    damage,
    read_manifest,
    relative_files,
    write_manifest,
)
from moh_megatron.io.hashing import hash_file

CONTENT = {"config.yaml": b"run: {}\n", "weights/a.safetensors": bytes(range(256)) * 9, "engine/state.pt": b"state"}


def make(folder):
    for name, content in CONTENT.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(content)
    files = {name: hash_file(folder / name) for name in relative_files(folder)}
    manifest = Manifest(7, 448, Topology(2, 1, 1, "fp32"), "d" * 64, {"torch": "2.13.0"}, files)
    write_manifest(folder, manifest)
    return manifest


@pytest.fixture
def checkpoint(tmp_path):
    make(tmp_path / "step_00000007")
    return tmp_path / "step_00000007"


def test_the_manifest_lists_every_file_but_itself(checkpoint):
    assert relative_files(checkpoint) == sorted(CONTENT)


def test_what_is_written_is_read_back_and_no_damage_is_found(tmp_path):
    manifest = make(tmp_path)
    assert read_manifest(tmp_path) == manifest
    assert manifest.format_version == FORMAT_VERSION == 2
    assert sorted(manifest.files) == sorted(CONTENT)
    assert damage(tmp_path, manifest) is None


def test_a_topology_reads_well():
    assert str(Topology(2, 4, 1, "bf16")) == "TP 2 x DP 4, ZeRO 1, bf16"


def test_missing(checkpoint):
    (checkpoint / "engine/state.pt").unlink()
    assert damage(checkpoint, read_manifest(checkpoint)) == "engine/state.pt is missing"
    (checkpoint / "engine/state.pt").mkdir()
    assert damage(checkpoint, read_manifest(checkpoint)) == "engine/state.pt is missing"


@pytest.mark.parametrize("size", [0, 1, 2303, 2305])
def test_another_size(checkpoint, size):
    (checkpoint / "weights/a.safetensors").write_bytes((CONTENT["weights/a.safetensors"] + b"!")[:size])
    expected = f"weights/a.safetensors has {size} bytes, expected 2304"
    assert damage(checkpoint, read_manifest(checkpoint)) == expected


def test_any_flipped_bit(checkpoint):
    manifest, path = read_manifest(checkpoint), checkpoint / "weights/a.safetensors"
    for position, bit in ((0, 0), (1, 7), (1024, 3), (2303, 0)):
        content = bytearray(CONTENT["weights/a.safetensors"])
        content[position] ^= 1 << bit
        path.write_bytes(content)
        assert damage(checkpoint, manifest) == "weights/a.safetensors does not have the content it was saved with"


def test_a_file_the_disk_does_not_give_back(checkpoint, monkeypatch):
    def refuse(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("moh_megatron.checkpoint.manifest.hash_file", refuse)
    found = damage(checkpoint, read_manifest(checkpoint))
    assert found == "config.yaml cannot be read (Input/output error)"


@pytest.mark.parametrize("question", ["is_file", "stat"])
def test_a_file_the_server_does_not_know_any_more(checkpoint, monkeypatch, question):
    def refuse(path, **options):
        raise OSError(errno.ESTALE, "Stale file handle")

    manifest = read_manifest(checkpoint)
    monkeypatch.setattr(f"pathlib.Path.{question}", refuse)
    assert damage(checkpoint, manifest) == "config.yaml cannot be read (Stale file handle)"


def test_a_share_of_the_files_can_be_checked(checkpoint):
    (checkpoint / "engine/state.pt").unlink()
    manifest = read_manifest(checkpoint)
    assert damage(checkpoint, manifest, ["config.yaml", "weights/a.safetensors"]) is None
    assert damage(checkpoint, manifest, ["engine/state.pt"]) == "engine/state.pt is missing"


def test_further_files_do_no_harm(checkpoint):
    (checkpoint / "notes.txt").write_text("mine")
    assert damage(checkpoint, read_manifest(checkpoint)) is None


# --- manifests that cannot be used ---------------------------------------------------------------------------------


def rewrite(checkpoint, change):
    path = checkpoint / "manifest.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(change(raw)))


def test_no_manifest(checkpoint):
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"^it has no manifest\.json$"):
        read_manifest(checkpoint)


def test_another_format_version(checkpoint):
    rewrite(checkpoint, lambda raw: raw | {"format_version": 99, "something": "new"})
    with pytest.raises(ValueError, match=r"^it has format version 99, this program reads versions up to 2$"):
        read_manifest(checkpoint)


def test_any_other_byte_in_the_manifest_or_its_hash(checkpoint):
    for name in ("manifest.json", "manifest.sha256"):
        whole = (checkpoint / name).read_bytes()
        for position in range(len(whole)):
            others = range(256) if whole[:position].endswith(b'"format_version": ') else (whole[position] ^ 1,)
            for other in set(others) - {whole[position]}:
                (checkpoint / name).write_bytes(whole[:position] + bytes([other]) + whole[position + 1 :])
                with pytest.raises(ValueError, match=r"^its manifest\.json |^it has format version "):
                    read_manifest(checkpoint)
        for shorter in (b"", whole[:-1]):
            (checkpoint / name).write_bytes(shorter)
            with pytest.raises(ValueError, match=r"^its manifest\.json "):
                read_manifest(checkpoint)
        (checkpoint / name).write_bytes(whole)
    read_manifest(checkpoint)


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"step": 7', b"\xff\xfe\x00", b"\0" * 64, b"[]", b"7", b"null", b"{}", b"[" * 100_000]
)
def test_a_manifest_that_is_none(checkpoint, content):
    (checkpoint / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"^its manifest\.json cannot be read \("):
        read_manifest(checkpoint)


def test_a_manifest_torn_anywhere(checkpoint):
    path = checkpoint / "manifest.json"
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"^its manifest\.json cannot be read \("):
            read_manifest(checkpoint)


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(Manifest)])
def test_a_manifest_that_lacks_a_key(checkpoint, key):
    rewrite(checkpoint, lambda raw: {name: value for name, value in raw.items() if name != key})
    with pytest.raises(ValueError, match=r"^its manifest\.json cannot be read \("):
        read_manifest(checkpoint)


@pytest.mark.parametrize(
    "wrong",
    [{"files": []}, {"files": {"a": 1}}, {"files": {"a": {"bytes": 1}}}, {"topology": []}, {"topology": {"tp": 1}}],
)
def test_a_manifest_of_another_shape(checkpoint, wrong):
    rewrite(checkpoint, lambda raw: raw | wrong)
    with pytest.raises(ValueError, match=r"^its manifest\.json cannot be read \("):
        read_manifest(checkpoint)


def test_a_manifest_that_is_a_folder_or_lies_below_a_file(tmp_path):
    (tmp_path / "a" / "manifest.json").mkdir(parents=True)
    (tmp_path / "b").write_text("")
    for folder in (tmp_path / "a", tmp_path / "b"):
        with pytest.raises(ValueError, match=r"^its manifest\.json cannot be read \("):
            read_manifest(folder)


def test_writing_leaves_the_old_manifest_where_it_fails(checkpoint):
    old = read_manifest(checkpoint)
    broken = dataclasses.replace(old, versions={"torch": object()})  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        write_manifest(checkpoint, broken)
    assert read_manifest(checkpoint) == old
