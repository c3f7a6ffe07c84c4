"""The start of continue-tuning, made of a small dense checkpoint in this process."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.messages import NONE_IS

from moh_megatron.checkpoint import layout
from moh_megatron.checkpoint.hf.checkpoint_writer import write_checkpoint
from moh_megatron.checkpoint.hf.hf_extras import TOKEN_IDS, HFExtras, read_extras
from moh_megatron.checkpoint.mapping import rules
from moh_megatron.config.paths import checkpoint_dir
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import Fault, UserError
from moh_megatron.upcycle import initial_checkpoint
from moh_megatron.upcycle.loss_and_kl import dense_twin

pytestmark = pytest.mark.usefixtures("one_rank", "data")


class FakeTokenizer:
    sha256, eos_token_id = "t" * 64, 1

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)


class FakeData:
    hash, settings = "d" * 64, SimpleNamespace(fits=True)

    def tokenizer(self) -> FakeTokenizer:
        return FakeTokenizer()

    def check_fits(self, config: Config) -> None:
        if not self.settings.fits:
            raise UserError("model.vocab_size must be at least 99")


@pytest.fixture
def data(monkeypatch) -> SimpleNamespace:
    """Prepared data that is not there."""
    rows = torch.randint(96, (4, 17), generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(initial_checkpoint, "load_prepared", lambda config: FakeData())
    monkeypatch.setattr(initial_checkpoint, "build_train_dataset", lambda config, data, tokenizer: rows)
    monkeypatch.setattr(FakeData, "settings", SimpleNamespace(fits=True))
    return FakeData.settings


@pytest.fixture
def make(tiny, tmp_path) -> Callable[..., Config]:
    """make({...}): what is tuned, from a checkpoint of random weights in tmp_path/source."""

    def make(changes: dict[str, Any] | None = None) -> Config:
        places = {"run.dir": str(tmp_path / "run"), "train.init_from": str(tmp_path / "source")}
        return tiny({**places, "moh.router": "query_norm", "model.init_method_std": 0.2, **(changes or {})})

    return make


def write_source(config: Config, seed: int = 4) -> Path:
    """The checkpoint train.init_from of ``config``, a model of it with random weights."""
    assert config.train.init_from is not None
    folder, generator = Path(config.train.init_from), torch.Generator().manual_seed(seed)
    folder.mkdir()
    table = rules(config)
    dtypes = {rule.megatron: torch.float32 for rule in table}
    weights = ((rule.megatron, 0.2 * torch.randn(rule.shape, generator=generator)) for rule in table)
    ids = {TOKEN_IDS: b'{"bos_token_id": 5, "eos_token_id": [1, 7]}'}
    write_checkpoint(folder, config, dtypes, weights, HFExtras(None, ids))
    return folder


def test_the_start_is_the_dense_model_and_says_so(make):
    source = write_source(dense_twin(make()))
    told: list[str] = []
    initial_checkpoint.prepare(make(), told.append)
    kl, made = told
    assert float(kl.removeprefix("with all heads active: KL from the dense model ").split()[0]) < 1e-8
    assert made.endswith(f"start: made of {source}")
    folder = initial_checkpoint.start_folder(make())
    assert layout.problem_with(folder) is None
    assert read_extras(folder / "tokenizer") == read_extras(source / "tokenizer") != {}


def test_other_positions_are_told_and_the_proof_is_against_the_sources_own(make):
    write_source(dense_twin(make()))
    told: list[str] = []
    initial_checkpoint.prepare(make({"model.rotary_base": 7e4}), told.append)
    assert told[0].startswith("warning: model.rotary_base is 70000.0, and ")
    assert "was made with 10000.0" in told[0]
    assert "KL from the dense model" in told[1]


def test_another_epsilon_of_the_norms_is_refused(make):
    write_source(dense_twin(make()))
    with pytest.raises(UserError, match=r"model\.norm_epsilon: 1e-05 there, 0\.0001 here"):
        initial_checkpoint.prepare(make({"model.norm_epsilon": 1e-4}), print)


def test_a_start_that_is_not_the_dense_model_is_a_fault_and_leaves_nothing(make, monkeypatch):
    config, right = make({"moh.router": "learned"}), initial_checkpoint.initial_routers
    write_source(dense_twin(config))
    monkeypatch.setattr(
        initial_checkpoint, "initial_routers", lambda config: ((name, each * 1e11) for name, each in right(config))
    )
    with pytest.raises(Fault, match=r"source: with all heads active the KL divergence of the MoH model made of it is"):
        initial_checkpoint.prepare(config, print)
    assert not Path(config.run.dir).exists(), "nor the folder that was made for it"


def test_a_small_divergence_is_one_too(make, monkeypatch):
    write_source(dense_twin(make()))
    monkeypatch.setattr(initial_checkpoint, "divergence", lambda wanted, here: torch.tensor(1.01e-8))
    with pytest.raises(Fault, match=r"is 1\.01e-08; less than 1e-08 is required"):
        initial_checkpoint.prepare(make(), print)


@pytest.mark.parametrize("in_the_way", ["file", "folder", "source"])
def test_what_stands_where_the_start_goes_is_kept(make, in_the_way):
    config = make()
    place = initial_checkpoint.start_folder(config)
    place.parent.mkdir()
    if in_the_way == "file":
        place.write_text("thesis")
    elif in_the_way == "folder":
        place.mkdir()
        (place / "thesis.tex").write_text("thesis")
    else:
        config = make({"train.init_from": str(place)})
    write_source(dense_twin(config))
    before = {path: path.read_bytes() for path in place.parent.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"start: must be new or empty"):
        initial_checkpoint.prepare(config, print)
    assert {path: path.read_bytes() for path in place.parent.rglob("*") if path.is_file()} == before


def test_no_start_is_made_for_a_run_that_began_as_another_model(make, fake_checkpoint):
    write_source(dense_twin(make()))
    fake_checkpoint(checkpoint_dir(make()) / "step_00000003", dense_twin(make()))
    with pytest.raises(UserError, match=r"moh\.enabled: False there, True here\nUse the same, or another run\.dir\.$"):
        initial_checkpoint.prepare(make(), print)
    assert not initial_checkpoint.start_folder(make()).exists()
    assert initial_checkpoint.prepare(dense_twin(make()), print) == dense_twin(make()), "it goes on"


def test_a_start_that_was_deleted_is_made_again_for_its_run(make, fake_checkpoint):
    write_source(dense_twin(make()))
    resolved = initial_checkpoint.prepare(make(), print)
    fake_checkpoint(checkpoint_dir(make()) / "step_00000003", resolved)
    shutil.rmtree(initial_checkpoint.start_folder(make()))
    assert initial_checkpoint.prepare(make(), print) == resolved


def test_a_larger_vocabulary_needs_a_grown_tokenizer(make, monkeypatch):
    write_source(dense_twin(make()))
    monkeypatch.setattr(initial_checkpoint, "new_pieces", lambda old, new: {})
    monkeypatch.setattr(initial_checkpoint, "load_tokenizer", lambda folder: FakeTokenizer())
    with pytest.raises(UserError, match=r"model\.vocab_size 104 is more than the 96 .* tokenizer\.grow_to"):
        initial_checkpoint.prepare(make({"model.vocab_size": 104}), print)
    assert not initial_checkpoint.start_folder(make()).exists()


def test_the_source_may_be_named_in_another_way(make, tmp_path, monkeypatch):
    write_source(dense_twin(make()))
    prepared = initial_checkpoint.prepare(make(), print)
    monkeypatch.chdir(tmp_path)
    for name in ("source", "../" + tmp_path.name + "/source/"):
        assert initial_checkpoint.prepare(make({"train.init_from": name}), print) == prepared


@pytest.mark.parametrize("content", ["{", "5", "[]", "[" * 100_000])
def test_a_damaged_record_of_what_was_asked_is_named(make, content):
    write_source(dense_twin(make()))
    initial_checkpoint.prepare(make(), print)
    (initial_checkpoint.start_folder(make()) / "asked.json").write_text(content)
    with pytest.raises(UserError, match=rf"asked\.json: {NONE_IS} what a start was made of.* Delete .*start to make"):
        initial_checkpoint.resolve(make(), print)
    with pytest.raises(UserError, match=r"start is damaged: asked\.json has"):
        initial_checkpoint.prepare(make(), print)


def test_a_damaged_start_is_told_before_any_rank_is_started(make, fake_checkpoint):
    write_source(dense_twin(make()))
    resolved = initial_checkpoint.prepare(make(), print)
    place = initial_checkpoint.start_folder(make())
    (weights,) = (place / "weights").iterdir()
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"start is damaged: weights/.* Delete the folder to make it again"):
        initial_checkpoint.prepare(make(), print)
    # A run that has begun does not need them; but how its heads are routed is read there.
    fake_checkpoint(checkpoint_dir(make()) / "step_00000003", resolved)
    assert initial_checkpoint.prepare(make(), print) == resolved
    (place / "config.yaml").unlink()
    with pytest.raises(UserError, match=r"start is damaged: config\.yaml is missing\. Delete the folder"):
        initial_checkpoint.prepare(make(), print)


def test_a_trained_moh_model_with_more_entries_need_not_be_dense(make, monkeypatch):
    source = write_source(make({"moh.router": "learned"}))
    monkeypatch.setattr(initial_checkpoint, "new_pieces", lambda old, new: {99: [3, 4]})
    monkeypatch.setattr(initial_checkpoint, "load_tokenizer", lambda folder: FakeTokenizer())
    config = make({"moh.router": "learned", "model.vocab_size": 104})
    initial_checkpoint.prepare(config, print)
    there, here = (layout.read_weights(each) for each in (source, initial_checkpoint.start_folder(config)))
    routers = [name for name in there if ".router." in name]
    assert len(routers) == 6
    assert all(torch.equal(there[name], here[name]) for name in routers)
    assert len(here["embedding.word_embeddings.weight"]) == 104


def test_a_tokenizer_that_does_not_fit_is_refused_first(make, data):
    write_source(dense_twin(make()))
    data.fits = False
    with pytest.raises(UserError, match=r"model\.vocab_size must be at least 99"):
        initial_checkpoint.prepare(make(), print)
    assert not initial_checkpoint.start_folder(make()).exists()


def test_what_the_configuration_forbids_is_refused_before_anything_is_measured(make, fake_checkpoint, tmp_path):
    calibrated = {"moh.shared_placement": "calibrated", "moh.calibration_sequences": 2}
    write_source(dense_twin(make()))
    with pytest.raises(UserError, match=r"moh\.gating must be normalized .* Got paper"):
        initial_checkpoint.prepare(make({**calibrated, "moh.router": "learned", "moh.gating": "paper"}), print)
    teacher = fake_checkpoint(tmp_path / "step_00000001", make())
    with pytest.raises(UserError, match=r"distillation\.teacher must be a dense model"):
        initial_checkpoint.prepare(make({**calibrated, "distillation.teacher": str(teacher)}), print)
    assert not (tmp_path / "run").exists()


def test_a_calibration_of_something_else_is_refused(make, tmp_path, monkeypatch):
    changes = {"moh.shared_placement": "calibrated", "moh.calibration_sequences": 2}
    write_source(dense_twin(make()))
    prepared = initial_checkpoint.prepare(make(changes), print)
    again = make({**changes, "run.dir": str(tmp_path / "again")})
    (tmp_path / "again").mkdir()
    written = (tmp_path / "run" / "calibration.json").read_bytes()
    (tmp_path / "again" / "calibration.json").write_bytes(written)
    assert initial_checkpoint.prepare(again, print).moh.shared_heads == prepared.moh.shared_heads
    third = tmp_path / "third"
    third.mkdir()
    (third / "calibration.json").write_bytes(written)
    other = make({**changes, "run.dir": str(third), "moh.calibration_sequences": 3})
    with pytest.raises(UserError, match=r"moh\.calibration_sequences: 2 there, 3 here"):
        initial_checkpoint.prepare(other, print)
    moved = dataclasses.replace(other, moh=dataclasses.replace(other.moh, calibration_sequences=2))
    monkeypatch.setattr(FakeData, "hash", "e" * 64)
    with pytest.raises(UserError, match=r"data: dddd\w+ there, eeee\w+ here"):
        initial_checkpoint.prepare(moved, print)


def test_a_calibration_of_other_weights_is_refused(make, tmp_path):
    changes = {"moh.shared_placement": "calibrated", "moh.calibration_sequences": 2}
    write_source(dense_twin(make()))
    initial_checkpoint.prepare(make(changes), print)
    elsewhere = {"train.init_from": str(tmp_path / "elsewhere"), "run.dir": str(tmp_path / "again")}
    write_source(dense_twin(make({**elsewhere, "model.init_method_std": 0.1})), seed=5)
    (tmp_path / "again").mkdir()
    shutil.copyfile(tmp_path / "run" / "calibration.json", tmp_path / "again" / "calibration.json")
    with pytest.raises(UserError, match=r"measured something else:\n  weights: \w{12} there, \w{12} here\nDelete"):
        initial_checkpoint.prepare(make({**changes, **elsewhere}), print)


FOUR = {"moh.shared_heads": 4, "moh.active_heads": 6}
CALIBRATED = {"moh.shared_placement": "calibrated", "moh.calibration_sequences": 2}


@pytest.mark.parametrize(
    ("asked_first", "asked_then", "difference"),
    [
        (FOUR, {**FOUR, "moh.shared_placement": "spread"}, "moh.shared_placement: first there, spread here"),
        ({}, CALIBRATED, "moh.shared_placement: first there, calibrated here"),
        ({}, {"moh.shared_heads": 3}, "moh.shared_heads: 2 there, 3 here"),
        ({}, {"train.init_from": "elsewhere"}, "train.init_from: {source} there, elsewhere here"),
        (CALIBRATED, {}, "moh.shared_placement: calibrated there, first here"),
        (CALIBRATED, {**CALIBRATED, "moh.shared_heads": 3}, "moh.shared_heads: 2 there, 3 here"),
        (CALIBRATED, {**CALIBRATED, "moh.calibration_sequences": 3}, "moh.calibration_sequences: 2 there, 3 here"),
        (CALIBRATED, {**CALIBRATED, "run.seed": 99}, "run.seed: {seed} there, 99 here"),
        ({"moh.router": "learned"}, {"moh.router": "learned", "moh.gating": "paper"}, "normalized there, paper here"),
        ({}, {"moh.router": "learned"}, "moh.router: query_norm there, learned here"),
        ({}, {"moh.enabled": False}, "moh.enabled: True there, False here"),
        ({}, {"model.vocab_size": 104}, "model.vocab_size: 96 there, 104 here"),
    ],
)
def test_a_start_is_not_taken_for_another_one(make, asked_first, asked_then, difference):
    source = write_source(dense_twin(make()))
    first, then = make(asked_first), make(asked_then)
    again = initial_checkpoint.prepare(first, print)
    assert initial_checkpoint.resolve(first, print) == again
    for look in (initial_checkpoint.prepare, initial_checkpoint.resolve):
        with pytest.raises(UserError) as caught:
            look(then, print)
        found = str(caught.value).splitlines()
        assert found[0] == f"{initial_checkpoint.start_folder(first)} was made with other values:"
        assert any(line.endswith(difference.format(source=source, seed=first.run.seed)) for line in found)
        assert found[-1] == "Name the same, or another run.dir, or delete the folder to make it again."


def test_a_start_measured_on_other_data_is_refused(make, monkeypatch):
    write_source(dense_twin(make()))
    for name, changes in (("first", {}), ("measured", CALIBRATED)):
        initial_checkpoint.prepare(make({**changes, "run.dir": str(Path(make().run.dir) / name)}), print)
    monkeypatch.setattr(FakeData, "hash", "e" * 64)
    initial_checkpoint.prepare(make({"run.dir": str(Path(make().run.dir) / "first")}), print)
    with pytest.raises(UserError, match=r"data: dddd\w+ there, eeee\w+ here"):
        initial_checkpoint.prepare(make({**CALIBRATED, "run.dir": str(Path(make().run.dir) / "measured")}), print)


def test_a_source_that_changed_is_told(make):
    source = write_source(dense_twin(make()))
    initial_checkpoint.prepare(make(), print)
    told: list[str] = []
    initial_checkpoint.prepare(make(), told.append)
    shutil.rmtree(source)
    initial_checkpoint.prepare(make(), told.append)
    assert told == []
    write_source(dense_twin(make()), seed=5)
    initial_checkpoint.prepare(make(), told.append)
    (message,) = told
    assert message.startswith(f"warning: {source} holds other weights, ")


def test_a_source_run_that_went_on_is_told(make, tmp_path):
    for step, seed in ((1, 3), (2, 5)):
        folder = tmp_path / "dense" / "checkpoints" / f"step_0000000{step}"
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_source(dense_twin(make({"train.init_from": str(folder)})), seed=seed)
        told: list[str] = []
        initial_checkpoint.prepare(make({"train.init_from": str(tmp_path / "dense")}), told.append)
    (message,) = told
    assert message.startswith(f"warning: {tmp_path / 'dense'} holds other weights, ")


def test_calibrated_heads_and_a_larger_vocabulary_exclude_each_other(make):
    write_source(dense_twin(make()))
    with pytest.raises(UserError, match=r"shared_placement: calibrated measures .* Got model\.vocab_size 104: let"):
        initial_checkpoint.prepare(make({**CALIBRATED, "model.vocab_size": 104}), print)
