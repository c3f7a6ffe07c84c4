"""manifest: every difference between a checkpoint's files and what was saved is found."""

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


def test_relative_files_leaves_out_the_manifest(checkpoint):
    assert relative_files(checkpoint) == sorted(CONTENT)


def test_manifest_round_trips_and_finds_no_damage(tmp_path):
    manifest = make(tmp_path)
    assert read_manifest(tmp_path) == manifest
    assert manifest.format_version == FORMAT_VERSION == 2
    assert sorted(manifest.files) == sorted(CONTENT)
    assert damage(tmp_path, manifest) is None


def test_topology_is_readable():
    assert str(Topology(2, 4, 1, "bf16")) == "TP 2 x DP 4, ZeRO 1, bf16"


def test_missing_file_is_damage(checkpoint):
    (checkpoint / "engine/state.pt").unlink()
    assert damage(checkpoint, read_manifest(checkpoint)) == "engine/state.pt is missing"
    (checkpoint / "engine/state.pt").mkdir()
    assert damage(checkpoint, read_manifest(checkpoint)) == "engine/state.pt is missing"


@pytest.mark.parametrize("size", [0, 1, 2303, 2305])
def test_file_of_another_size_is_damage(checkpoint, size):
    (checkpoint / "weights/a.safetensors").write_bytes((CONTENT["weights/a.safetensors"] + b"!")[:size])
    expected = f"weights/a.safetensors has {size} bytes, expected 2304"
    assert damage(checkpoint, read_manifest(checkpoint)) == expected


def test_flipped_bit_is_damage(checkpoint):
    manifest, path = read_manifest(checkpoint), checkpoint / "weights/a.safetensors"
    for position, bit in ((0, 0), (1, 7), (1024, 3), (2303, 0)):
        content = bytearray(CONTENT["weights/a.safetensors"])
        content[position] ^= 1 << bit
        path.write_bytes(content)
        assert damage(checkpoint, manifest) == "weights/a.safetensors does not have the content it was saved with"


def test_file_that_the_disk_cannot_read_is_damage(checkpoint, monkeypatch):
    def refuse(path):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("moh_megatron.checkpoint.manifest.hash_file", refuse)
    found = damage(checkpoint, read_manifest(checkpoint))
    assert found == "config.yaml cannot be read (Input/output error)"


@pytest.mark.parametrize("question", ["is_file", "stat"])
def test_stale_file_handle_is_damage(checkpoint, monkeypatch, question):
    def refuse(path, **options):
        raise OSError(errno.ESTALE, "Stale file handle")

    manifest = read_manifest(checkpoint)
    monkeypatch.setattr(f"pathlib.Path.{question}", refuse)
    assert damage(checkpoint, manifest) == "config.yaml cannot be read (Stale file handle)"


def test_damage_checks_only_the_named_files(checkpoint):
    (checkpoint / "engine/state.pt").unlink()
    manifest = read_manifest(checkpoint)
    assert damage(checkpoint, manifest, ["config.yaml", "weights/a.safetensors"]) is None
    assert damage(checkpoint, manifest, ["engine/state.pt"]) == "engine/state.pt is missing"


def test_additional_file_is_no_damage(checkpoint):
    (checkpoint / "notes.txt").write_text("mine")
    assert damage(checkpoint, read_manifest(checkpoint)) is None


# --- manifests that cannot be used ---------------------------------------------------------------------------------


def rewrite(checkpoint, change):
    path = checkpoint / "manifest.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps(change(raw)))


def test_missing_manifest_is_refused(checkpoint):
    (checkpoint / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"^it has no manifest\.json$"):
        read_manifest(checkpoint)


def test_unknown_format_version_is_refused(checkpoint):
    rewrite(checkpoint, lambda raw: raw | {"format_version": 99, "something": "new"})
    with pytest.raises(ValueError, match=r"^it has format version 99, this program reads versions up to 2$"):
        read_manifest(checkpoint)


def test_any_changed_byte_of_the_manifest_or_its_hash_is_refused(checkpoint):
    for name in ("manifest.json", "manifest.sha256"):
        content = (checkpoint / name).read_bytes()
        for position in range(len(content)):
            others = range(256) if content[:position].endswith(b'"format_version": ') else (content[position] ^ 1,)
            for other in set(others) - {content[position]}:
                (checkpoint / name).write_bytes(content[:position] + bytes([other]) + content[position + 1 :])
                with pytest.raises(ValueError, match=r"^its manifest\.json |^it has format version "):
                    read_manifest(checkpoint)
        for shorter in (b"", content[:-1]):
            (checkpoint / name).write_bytes(shorter)
            with pytest.raises(ValueError, match=r"^its manifest\.json "):
                read_manifest(checkpoint)
        (checkpoint / name).write_bytes(content)
    read_manifest(checkpoint)


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"step": 7', b"\xff\xfe\x00", b"\0" * 64, b"[]", b"7", b"null", b"{}", b"[" * 100_000]
)
def test_file_that_is_no_manifest_is_refused(checkpoint, content):
    (checkpoint / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"^its manifest\.json cannot be read \("):
        read_manifest(checkpoint)


def test_truncated_manifest_is_refused(checkpoint):
    path = checkpoint / "manifest.json"
    content = path.read_bytes()
    for cut in range(len(content)):
        path.write_bytes(content[:cut])
        with pytest.raises(ValueError, match=r"^its manifest\.json cannot be read \("):
            read_manifest(checkpoint)


@pytest.mark.parametrize("key", [field.name for field in dataclasses.fields(Manifest)])
def test_manifest_without_a_key_is_refused(checkpoint, key):
    rewrite(checkpoint, lambda raw: {name: value for name, value in raw.items() if name != key})
    with pytest.raises(ValueError, match=r"^its manifest\.json cannot be read \("):
        read_manifest(checkpoint)


@pytest.mark.parametrize(
    "wrong",
    [{"files": []}, {"files": {"a": 1}}, {"files": {"a": {"bytes": 1}}}, {"topology": []}, {"topology": {"tp": 1}}],
)
def test_manifest_with_values_of_other_types_is_refused(checkpoint, wrong):
    rewrite(checkpoint, lambda raw: raw | wrong)
    with pytest.raises(ValueError, match=r"^its manifest\.json cannot be read \("):
        read_manifest(checkpoint)


def test_manifest_that_is_a_folder_or_below_a_file_is_refused(tmp_path):
    (tmp_path / "a" / "manifest.json").mkdir(parents=True)
    (tmp_path / "b").write_text("")
    for folder in (tmp_path / "a", tmp_path / "b"):
        with pytest.raises(ValueError, match=r"^its manifest\.json cannot be read \("):
            read_manifest(folder)


def test_failed_write_leaves_the_old_manifest(checkpoint):
    old = read_manifest(checkpoint)
    broken = dataclasses.replace(old, versions={"torch": object()})  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        write_manifest(checkpoint, broken)
    assert read_manifest(checkpoint) == old
