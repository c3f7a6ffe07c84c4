"""layout: which checkpoint a path names, and which are passed over."""

import logging
import re

import pytest

from moh_megatron.checkpoint.layout import (
    checkpoint_name,
    complete_checkpoints,
    problem_with,
    read_config,
    resolve_checkpoint,
    step_folders,
    topology_of,
)
from moh_megatron.io.errors import UserError


@pytest.fixture
def run(tmp_path, tiny, fake_checkpoint):
    """A run folder with checkpoints of steps 5, 10 and 15."""
    for step in (5, 15, 10):
        fake_checkpoint(tmp_path / "run" / "checkpoints" / checkpoint_name(step), tiny(), step=step)
    return tmp_path / "run"


DAMAGED = "weights/tp_rank_00_of_01.safetensors"


def damage(folder):
    (folder / DAMAGED).write_bytes(b"")


def test_folder_of_a_run_or_of_checkpoints_means_the_newest(run):
    newest = run / "checkpoints" / "step_00000015"
    assert resolve_checkpoint(run / "checkpoints") == newest
    assert resolve_checkpoint(run) == newest
    assert resolve_checkpoint(str(run)) == newest


def test_checkpoints_are_sorted_by_number(tmp_path, tiny, fake_checkpoint):
    for step in (9, 100, 99_999_999, 20):
        fake_checkpoint(tmp_path / checkpoint_name(step), tiny(), step=step)
    assert [folder.name[-3:] for folder in step_folders(tmp_path)] == ["999", "100", "020", "009"]
    assert [manifest.step for _, manifest in complete_checkpoints(tmp_path)] == [99_999_999, 100, 20, 9]


def test_damaged_checkpoints_are_passed_over_with_a_warning(run, caplog):
    root = run / "checkpoints"
    damage(root / "step_00000015")
    (root / "step_00000010" / "manifest.json").unlink()
    assert resolve_checkpoint(run) == root / "step_00000005"
    assert caplog.messages == [
        f"{root}/step_00000015 is passed over: {DAMAGED} has 0 bytes, expected 10",
        f"{root}/step_00000010 is passed over: it has no manifest.json",
    ]


def test_good_checkpoints_cause_no_warning(run, caplog):
    resolve_checkpoint(run)
    assert caplog.messages == []


def test_checkpoint_named_directly_is_used(run, monkeypatch):
    named = run / "checkpoints" / "step_00000005"
    assert resolve_checkpoint(named) == named
    assert resolve_checkpoint(f"{named}/") == named
    monkeypatch.chdir(named)
    assert resolve_checkpoint(".").resolve() == named.resolve()


def test_checkpoint_under_another_name_is_used_and_checked(run):
    best = run / "best"
    (run / "checkpoints" / "step_00000010").rename(best)
    assert resolve_checkpoint(best) == best
    damage(best)
    with pytest.raises(UserError, match=r"is not a complete checkpoint: weights/.* has 0 bytes"):
        resolve_checkpoint(best)


def test_damaged_checkpoint_named_directly_is_refused(run):
    named = run / "checkpoints" / "step_00000015"
    damage(named)
    reason = f"{DAMAGED} has 0 bytes, expected 10"
    message = f"{named} is not a complete checkpoint: {reason}. Use another one, or make it again."
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        resolve_checkpoint(named)


def test_run_folder_whose_name_begins_like_a_checkpoints_is_a_run_folder(run):
    other = run.rename(run.with_name("step_by_step"))
    assert resolve_checkpoint(other) == other / "checkpoints" / "step_00000015"


@pytest.mark.parametrize("name", [".partial_step_00000020", "step_20", "step_000000020", "step_00000020.old", "notes"])
def test_folders_of_other_names_are_no_checkpoints(run, tiny, fake_checkpoint, name):
    fake_checkpoint(run / "checkpoints" / name, tiny(), step=20)
    assert resolve_checkpoint(run).name == "step_00000015"
    assert len(step_folders(run / "checkpoints")) == 3


def test_file_named_like_a_checkpoint_is_passed_over(run):
    (run / "checkpoints" / "step_00000020").write_text("")
    assert resolve_checkpoint(run).name == "step_00000015"


def test_folder_without_checkpoints_is_a_user_error(tmp_path):
    (tmp_path / "checkpoints" / ".partial_step_00000020").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(UserError, match=f"^{re.escape(str(folder))} holds no complete checkpoint"):
            resolve_checkpoint(folder)
    with pytest.raises(UserError, match=r"absent: no such folder\. Expected a checkpoint, a folder of checkpoints, or"):
        resolve_checkpoint(tmp_path / "absent")
    (tmp_path / "config.json").touch()
    with pytest.raises(UserError, match=r"Got a Hugging Face folder; make one of it: moh-convert hf-to-megatron"):
        resolve_checkpoint(tmp_path)
    with pytest.raises(UserError, match=r"config\.json: a file\. Expected a checkpoint"):
        resolve_checkpoint(tmp_path / "config.json")


def test_only_damaged_checkpoints_are_a_user_error(run, caplog):
    for folder in step_folders(run / "checkpoints"):
        damage(folder)
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        resolve_checkpoint(run)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 3


def test_complete_checkpoints_leaves_out_unreadable_manifests(run):
    (run / "checkpoints" / "step_00000015" / "manifest.json").write_text("{")
    assert [manifest.step for _, manifest in complete_checkpoints(run / "checkpoints")] == [10, 5]
    assert list(complete_checkpoints(run / "absent")) == []


def test_complete_checkpoints_up_to_a_step(run):
    found = complete_checkpoints(run / "checkpoints", up_to=10)
    assert [manifest.step for _, manifest in found] == [10, 5]


def test_good_checkpoint_has_no_problem_and_returns_its_configuration(run, tiny):
    folder = run / "checkpoints" / "step_00000010"
    assert problem_with(folder) is None
    assert read_config(folder) == tiny()


def test_weights_are_usable_without_the_optimizer_state(run):
    folder = run / "checkpoints" / "step_00000015"
    (folder / "optimizer" / "state.pt").write_bytes(b"")
    assert resolve_checkpoint(run) == folder
    assert problem_with(folder) == "optimizer/state.pt has 0 bytes, expected 18"


def test_topology_follows_the_configuration(tiny):
    config = tiny({"parallel.tensor": 2, "parallel.zero_stage": 2, "train.precision": "bf16"})
    assert str(topology_of(config, 8)) == "TP 2 x DP 4, ZeRO 2, bf16"
