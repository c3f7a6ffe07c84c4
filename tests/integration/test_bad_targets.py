"""Targets of conversions that are missing, links, or impossible names: complete, or refused with nothing left."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.convert import llama_folder, run_convert

from moh_megatron.checkpoint import layout


@pytest.fixture
def folder(tmp_path) -> Path:
    return llama_folder(tmp_path / "hf")


@pytest.mark.parametrize("missing", [True, False])
def test_refused_import_leaves_no_parent_folders(folder, tmp_path, missing):
    if missing:
        folder.rename(tmp_path / "moved")
    else:
        (folder / "config.json").write_text("{")
    assert run_convert("hf-to-megatron", "--hf-dir", folder, "--save-dir", tmp_path / "n1" / "n2" / "ckpt") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["moved" if missing else "hf"]


def test_import_refuses_target_inside_the_source(folder, tmp_path, capsys):
    before = sorted(path.name for path in folder.iterdir())
    for target in (folder, folder / "ckpt", folder / "n1" / "ckpt"):
        assert run_convert("hf-to-megatron", "--hf-dir", folder, "--save-dir", target) == 2
        assert f"{target}: must lie outside what is converted, {folder}" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == before


def test_targets_may_be_links(folder, tmp_path):
    for name in ("ckpt", "back"):
        (tmp_path / "disk" / name).mkdir(parents=True)
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
    (tmp_path / "dangling").symlink_to(tmp_path / "disk" / "new")
    assert run_convert("hf-to-megatron", "--hf-dir", folder, "--save-dir", tmp_path / "ckpt") == 0
    assert run_convert("hf-to-megatron", "--hf-dir", folder, "--save-dir", tmp_path / "dangling") == 0
    for _ in range(2):  # The second export replaces the first.
        assert run_convert("megatron-to-hf", "--load-dir", tmp_path / "ckpt", "--hf-dir", tmp_path / "back") == 0
    assert all((tmp_path / name).is_symlink() for name in ("ckpt", "back", "dangling"))
    assert (tmp_path / "disk" / "back" / "config.json").is_file()
    assert all(layout.problem_with(tmp_path / "disk" / name) is None for name in ("ckpt", "new"))


@pytest.mark.parametrize("name", [".", "x/..", "", "n" * 300, "n1/" + "n" * 300])
def test_impossible_target_names_are_refused(folder, tmp_path, capsys, monkeypatch, name):
    assert run_convert("hf-to-megatron", "--hf-dir", folder, "--save-dir", tmp_path / "ckpt") == 0
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    capsys.readouterr()
    for command in (
        ("hf-to-megatron", "--hf-dir", folder, "--save-dir"),
        ("megatron-to-hf", "--load-dir", tmp_path / "ckpt", "--hf-dir"),
    ):
        assert run_convert(*command, name) == 2
        messages = capsys.readouterr().err
        expected = "must be another folder than the one this command runs in"
        if "n" in name:
            expected = "cannot be a folder"
        elif not name:
            expected = "must name a file or folder, such as . for the current one. Got an empty text"
        assert expected in messages
        assert "Traceback" not in messages
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "current", "hf"]
    assert not list((tmp_path / "current").iterdir())
