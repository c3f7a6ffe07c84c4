"""The initial checkpoint of continue-tuning, made of a small dense checkpoint in this process."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

import pytest
import torch
from support.messages import NONE_IS
from support.upcycling import FakeData, FakeTokenizer, write_source

from moh_megatron.checkpoint import layout
from moh_megatron.checkpoint.hf.hf_extras import read_extras
from moh_megatron.config.paths import checkpoint_dir
from moh_megatron.io.errors import Fault, UserError
from moh_megatron.upcycle import initial_checkpoint
from moh_megatron.upcycle.initial_checkpoint import prepare, resolve
from moh_megatron.upcycle.loss_and_kl import without_moh
from moh_megatron.upcycle.source import initial_checkpoint_folder

pytestmark = pytest.mark.usefixtures("one_rank", "data")


def warnings_in(logged: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in logged.records if record.levelno == logging.WARNING]


def test_initial_checkpoint_equals_the_dense_model_and_logs_the_kl(make, logged):
    source = write_source(without_moh(make()))
    prepare(make())
    kl, made = logged.messages
    assert float(kl.removeprefix("with all heads active: KL from the dense model ").split()[0]) < 1e-8
    assert made.endswith(f"start: made of {source}")
    folder = initial_checkpoint_folder(make())
    assert layout.problem_with(folder) is None
    assert read_extras(folder / "tokenizer") == read_extras(source / "tokenizer") != {}


def test_another_rotary_base_is_warned_of_and_the_kl_is_measured_with_the_sources(make, logged):
    write_source(without_moh(make()))
    prepare(make({"model.rotary_base": 7e4}))
    (warning,) = warnings_in(logged)
    assert warning.startswith("model.rotary_base is 70000.0, and ")
    assert "was made with 10000.0" in warning
    assert "KL from the dense model" in logged.messages[1]


def test_another_epsilon_of_the_norms_is_refused(make):
    write_source(without_moh(make()))
    with pytest.raises(UserError, match=r"model\.norm_epsilon: expected 1e-05, got 0\.0001"):
        prepare(make({"model.norm_epsilon": 1e-4}))


def test_a_model_that_differs_from_the_dense_one_is_a_fault_and_leaves_nothing(make, monkeypatch):
    config, correct = make({"moh.router": "learned"}), initial_checkpoint.initial_routers
    write_source(without_moh(config))
    monkeypatch.setattr(
        initial_checkpoint,
        "initial_routers",
        lambda config: ((name, router * 1e11) for name, router in correct(config)),
    )
    with pytest.raises(Fault, match=r"source: with all heads active the KL divergence of the MoH model made of it is"):
        prepare(config)
    assert not Path(config.run.dir).exists(), "the folder of the run was left behind"


def test_a_kl_just_above_the_limit_is_a_fault(make, monkeypatch):
    write_source(without_moh(make()))
    monkeypatch.setattr(initial_checkpoint, "kl_divergence", lambda target, log_probs: torch.tensor(1.01e-8))
    with pytest.raises(Fault, match=r"is 1\.01e-08; less than 1e-08 is required"):
        prepare(make())


@pytest.mark.parametrize("in_the_way", ["file", "folder", "source"])
def test_files_in_place_of_the_initial_checkpoint_are_kept(make, in_the_way):
    config = make()
    folder = initial_checkpoint_folder(config)
    folder.parent.mkdir()
    if in_the_way == "file":
        folder.write_text("thesis")
    elif in_the_way == "folder":
        folder.mkdir()
        (folder / "thesis.tex").write_text("thesis")
    else:
        config = make({"train.init_from": str(folder)})
    write_source(without_moh(config))
    before = {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"start: must be new or empty"):
        prepare(config)
    assert {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()} == before


def test_no_initial_checkpoint_is_made_for_a_run_of_another_model(make, fake_checkpoint):
    write_source(without_moh(make()))
    fake_checkpoint(checkpoint_dir(make()) / "step_00000003", without_moh(make()))
    with pytest.raises(
        UserError, match=r"moh\.enabled: expected False, got True\nUse the same, or another run\.dir\.$"
    ):
        prepare(make())
    assert not initial_checkpoint_folder(make()).exists()
    assert prepare(without_moh(make())) == without_moh(make()), "the dense run goes on"


def test_a_deleted_initial_checkpoint_is_made_again_for_its_run(make, fake_checkpoint):
    write_source(without_moh(make()))
    resolved = prepare(make())
    fake_checkpoint(checkpoint_dir(make()) / "step_00000003", resolved)
    shutil.rmtree(initial_checkpoint_folder(make()))
    assert prepare(make()) == resolved


def test_a_larger_vocabulary_without_a_grown_tokenizer_is_refused(make, monkeypatch):
    write_source(without_moh(make()))
    monkeypatch.setattr(initial_checkpoint, "new_pieces", lambda old, new: {})
    monkeypatch.setattr(initial_checkpoint, "load_tokenizer", lambda folder: FakeTokenizer())
    with pytest.raises(UserError, match=r"model\.vocab_size 104 is more than the 96 .* tokenizer\.grow_to"):
        prepare(make({"model.vocab_size": 104}))
    assert not initial_checkpoint_folder(make()).exists()


def test_the_source_may_be_given_by_another_path(make, tmp_path, monkeypatch):
    write_source(without_moh(make()))
    prepared = prepare(make())
    monkeypatch.chdir(tmp_path)
    for name in ("source", "../" + tmp_path.name + "/source/"):
        assert prepare(make({"train.init_from": name})) == prepared


@pytest.mark.parametrize("content", ["{", "5", "[]", "[" * 100_000])
def test_a_damaged_provenance_record_is_refused(make, content):
    write_source(without_moh(make()))
    prepare(make())
    (initial_checkpoint_folder(make()) / "asked.json").write_text(content)
    with pytest.raises(UserError, match=rf"asked\.json: {NONE_IS} what a start was made of.* Delete .*start to make"):
        resolve(make())
    with pytest.raises(UserError, match=r"start is damaged: asked\.json has"):
        prepare(make())


def test_a_damaged_initial_checkpoint_is_refused_before_any_rank_is_started(make, fake_checkpoint):
    write_source(without_moh(make()))
    resolved = prepare(make())
    folder = initial_checkpoint_folder(make())
    (weights,) = (folder / "weights").iterdir()
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"start is damaged: weights/.* Delete the folder to make it again"):
        prepare(make())
    # A run with checkpoints of its own does not need the weights, but it needs the configuration for its heads.
    fake_checkpoint(checkpoint_dir(make()) / "step_00000003", resolved)
    assert prepare(make()) == resolved
    (folder / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"start is damaged: config\.yaml is missing\. Delete the folder"):
        prepare(make())


def test_a_moh_source_with_a_larger_vocabulary_keeps_its_routers(make, monkeypatch):
    source = write_source(make({"moh.router": "learned"}))
    monkeypatch.setattr(initial_checkpoint, "new_pieces", lambda old, new: {99: [3, 4]})
    monkeypatch.setattr(initial_checkpoint, "load_tokenizer", lambda folder: FakeTokenizer())
    config = make({"moh.router": "learned", "model.vocab_size": 104})
    prepare(config)
    before, after = (layout.read_weights(folder) for folder in (source, initial_checkpoint_folder(config)))
    routers = [name for name in before if ".router." in name]
    assert len(routers) == 6
    assert all(torch.equal(before[name], after[name]) for name in routers)
    assert len(after["embedding.word_embeddings.weight"]) == 104


def test_a_tokenizer_that_does_not_fit_is_refused_before_anything_is_written(make, data):
    write_source(without_moh(make()))
    data.fits = False
    with pytest.raises(UserError, match=r"model\.vocab_size must be at least 99"):
        prepare(make())
    assert not initial_checkpoint_folder(make()).exists()


def test_wrong_gating_and_teacher_are_refused_before_the_calibration(make, fake_checkpoint, tmp_path):
    calibrated = {"moh.shared_placement": "calibrated", "moh.calibration_sequences": 2}
    write_source(without_moh(make()))
    with pytest.raises(UserError, match=r"moh\.gating must be normalized .* Got paper"):
        prepare(make({**calibrated, "moh.router": "learned", "moh.gating": "paper"}))
    teacher = fake_checkpoint(tmp_path / "step_00000001", make())
    with pytest.raises(UserError, match=r"distillation\.teacher must be a dense model"):
        prepare(make({**calibrated, "distillation.teacher": str(teacher)}))
    assert not (tmp_path / "run").exists()


def test_a_calibration_under_other_conditions_is_refused(make, tmp_path, monkeypatch):
    changes = {"moh.shared_placement": "calibrated", "moh.calibration_sequences": 2}
    write_source(without_moh(make()))
    prepared = prepare(make(changes))
    again = make({**changes, "run.dir": str(tmp_path / "again")})
    (tmp_path / "again").mkdir()
    written = (tmp_path / "run" / "calibration.json").read_bytes()
    (tmp_path / "again" / "calibration.json").write_bytes(written)
    assert prepare(again).moh.shared_heads == prepared.moh.shared_heads
    third = tmp_path / "third"
    third.mkdir()
    (third / "calibration.json").write_bytes(written)
    other = make({**changes, "run.dir": str(third), "moh.calibration_sequences": 3})
    with pytest.raises(UserError, match=r"moh\.calibration_sequences: expected 2, got 3"):
        prepare(other)
    moved = dataclasses.replace(other, moh=dataclasses.replace(other.moh, calibration_sequences=2))
    monkeypatch.setattr(FakeData, "hash", "e" * 64)
    with pytest.raises(UserError, match=r"data: expected dddd\w+, got eeee\w+"):
        prepare(moved)


def test_a_calibration_of_other_weights_is_refused(make, tmp_path):
    changes = {"moh.shared_placement": "calibrated", "moh.calibration_sequences": 2}
    write_source(without_moh(make()))
    prepare(make(changes))
    elsewhere = {"train.init_from": str(tmp_path / "elsewhere"), "run.dir": str(tmp_path / "again")}
    write_source(without_moh(make({**elsewhere, "model.init_method_std": 0.1})), seed=5)
    (tmp_path / "again").mkdir()
    shutil.copyfile(tmp_path / "run" / "calibration.json", tmp_path / "again" / "calibration.json")
    with pytest.raises(UserError, match=r"measured something else:\n  weights: expected \w{12}, got \w{12}\nDelete"):
        prepare(make({**changes, **elsewhere}))


FOUR = {"moh.shared_heads": 4, "moh.active_heads": 6}
CALIBRATED = {"moh.shared_placement": "calibrated", "moh.calibration_sequences": 2}


@pytest.mark.parametrize(
    ("first_changes", "then_changes", "difference"),
    [
        (FOUR, {**FOUR, "moh.shared_placement": "spread"}, "moh.shared_placement: expected first, got spread"),
        ({}, CALIBRATED, "moh.shared_placement: expected first, got calibrated"),
        ({}, {"moh.shared_heads": 3}, "moh.shared_heads: expected 2, got 3"),
        ({}, {"train.init_from": "elsewhere"}, "train.init_from: expected {source}, got elsewhere"),
        (CALIBRATED, {}, "moh.shared_placement: expected calibrated, got first"),
        (CALIBRATED, {**CALIBRATED, "moh.shared_heads": 3}, "moh.shared_heads: expected 2, got 3"),
        (CALIBRATED, {**CALIBRATED, "moh.calibration_sequences": 3}, "moh.calibration_sequences: expected 2, got 3"),
        (CALIBRATED, {**CALIBRATED, "run.seed": 99}, "run.seed: expected {seed}, got 99"),
        ({"moh.router": "learned"}, {"moh.router": "learned", "moh.gating": "paper"}, "expected normalized, got paper"),
        ({}, {"moh.router": "learned"}, "moh.router: expected query_norm, got learned"),
        ({}, {"moh.enabled": False}, "moh.enabled: expected True, got False"),
        ({}, {"model.vocab_size": 104}, "model.vocab_size: expected 96, got 104"),
    ],
)
def test_another_configuration_does_not_use_the_initial_checkpoint(make, first_changes, then_changes, difference):
    source = write_source(without_moh(make()))
    first, then = make(first_changes), make(then_changes)
    prepared = prepare(first)
    assert resolve(first) == prepared
    for function in (prepare, resolve):
        with pytest.raises(UserError) as caught:
            function(then)
        lines = str(caught.value).splitlines()
        assert lines[0] == f"{initial_checkpoint_folder(first)} was made with other values:"
        assert any(line.endswith(difference.format(source=source, seed=first.run.seed)) for line in lines)
        assert lines[-1] == "Name the same, or another run.dir, or delete the folder to make it again."


def test_an_initial_checkpoint_calibrated_on_other_data_is_refused(make, monkeypatch):
    write_source(without_moh(make()))
    for name, changes in (("first", {}), ("measured", CALIBRATED)):
        prepare(make({**changes, "run.dir": str(Path(make().run.dir) / name)}))
    monkeypatch.setattr(FakeData, "hash", "e" * 64)
    prepare(make({"run.dir": str(Path(make().run.dir) / "first")}))
    with pytest.raises(UserError, match=r"data: expected dddd\w+, got eeee\w+"):
        prepare(make({**CALIBRATED, "run.dir": str(Path(make().run.dir) / "measured")}))


def test_a_source_with_other_weights_is_warned_of(make, logged):
    source = write_source(without_moh(make()))
    prepare(make())
    logged.clear()
    prepare(make())
    shutil.rmtree(source)
    prepare(make())
    assert logged.messages == []
    write_source(without_moh(make()), seed=5)
    prepare(make())
    (message,) = logged.messages
    assert message.startswith(f"{source} holds other weights, ")
    assert warnings_in(logged) == [message]


def test_a_source_run_with_a_newer_checkpoint_is_warned_of(make, tmp_path, logged):
    for step, seed in ((1, 3), (2, 5)):
        folder = tmp_path / "dense" / "checkpoints" / f"step_0000000{step}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_source(without_moh(make({"train.init_from": str(folder)})), seed=seed)
        logged.clear()
        prepare(make({"train.init_from": str(tmp_path / "dense")}))
    (message,) = logged.messages
    assert message.startswith(f"{tmp_path / 'dense'} holds other weights, ")
    assert warnings_in(logged) == [message]


def test_calibrated_heads_with_a_larger_vocabulary_are_refused(make):
    write_source(without_moh(make()))
    with pytest.raises(UserError, match=r"shared_placement: calibrated measures .* Got model\.vocab_size 104: let"):
        prepare(make({**CALIBRATED, "model.vocab_size": 104}))
