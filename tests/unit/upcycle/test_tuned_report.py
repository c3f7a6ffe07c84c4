"""Tables of tuned runs: folders that are no such run, runs that cannot be compared, and the numbers in the table."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from moh_megatron.config.load import dump_config
from moh_megatron.io.errors import UserError
from moh_megatron.upcycle import tuned_report
from moh_megatron.upcycle.loss_and_kl import mean, recovered_share

DENSE = {"moh.enabled": False}


@pytest.fixture
def run(tiny, fake_checkpoint, tmp_path):
    """run("name", {...}): a run folder with a checkpoint, whose initial checkpoint was made of tmp_path/source."""

    def make_run(name, changes=None, *, step=5, data="d" * 64, source="source"):
        folder, changes = tmp_path / name, {"run.dir": str(tmp_path / name), **(changes or {})}
        config = tiny({**changes, "train.init_from": str(tmp_path / source)})
        if config.moh.enabled:
            fake_checkpoint(folder / "start", config, step=0)
            config = tiny({**changes, "train.init_from": str(folder / "start")})
        fake_checkpoint(folder / "checkpoints" / f"step_{step:08d}", config, step=step, data=data)
        (folder / "config.yaml").write_text(dump_config(config))
        return tuned_report.TunedRun(folder)

    return make_run


@pytest.fixture
def prepared(monkeypatch):
    """Prepared data whose hash a test may change."""
    data = SimpleNamespace(hash="d" * 64)
    monkeypatch.setattr(tuned_report, "load_prepared", lambda config: data)
    return data


def test_a_folder_without_a_tuned_run_is_refused(run, tiny, tmp_path):
    with pytest.raises(UserError, match=r"absent: no such folder\. Expected the folder of a run"):
        tuned_report.TunedRun(tmp_path / "absent")
    with pytest.raises(UserError, match=r": must be the folder of a run\. Got one without config\.yaml"):
        tuned_report.TunedRun(tmp_path)
    (tmp_path / "config.yaml").write_text(dump_config(tiny()))
    with pytest.raises(UserError, match=r"must be a run of moh-tune\. Got train\.init_from: null"):
        tuned_report.TunedRun(tmp_path)


@pytest.mark.parametrize(
    ("changes", "more", "difference"),
    [
        ({"train.sequence_length": 32}, {}, r"train\.sequence_length: expected \d+, got 32"),
        ({"train.total_tokens": 640}, {}, r"train\.total_tokens: expected \d+, got 640"),
        ({"train.global_batch_size": 8}, {}, r"train\.global_batch_size: expected \d+, got 8"),
        ({"optimizer.learning_rate": 0.5}, {}, r"optimizer\.learning_rate: expected \S+, got 0\.5"),
        ({"run.seed": 77}, {}, r"run\.seed: expected \d+, got 77"),
        ({}, {"source": "elsewhere"}, r"train\.init_from: expected \S+source, got \S+elsewhere"),
        ({}, {"step": 6}, r"tokens: expected 320, got 384"),
        ({}, {"data": "e" * 64}, r"data: expected dddd\w+, got eeee\w+"),
    ],
)
def test_runs_under_other_conditions_are_refused(run, prepared, changes, more, difference):
    control, tuned = run("control", DENSE), run("other", changes, **more)
    with pytest.raises(UserError) as caught:
        tuned_report.tuning_table(control, [tuned])
    first, second = str(caught.value).splitlines()
    assert first == f"{tuned.folder} cannot be compared with {control.folder}:"
    assert re.fullmatch(f"  {difference}", second)


def test_a_control_that_is_not_dense_is_refused(run, prepared):
    with pytest.raises(UserError, match=r"the control, named first, must be of a dense model\. Got 4 of 8, 2 shared"):
        tuned_report.tuning_table(run("control"), [])


def test_heads_chosen_in_kv_groups_are_named(run, grouped):
    assert run("tuned", grouped).heads == "4 of 8, 2 shared, in 2 KV groups"


def test_data_that_was_prepared_anew_is_refused(run, prepared):
    prepared.hash = "e" * 64
    with pytest.raises(UserError, match=r"control: was trained on the dataset dddd\w+\. Got eeee\w+ in .*data: "):
        tuned_report.tuning_table(run("control", DENSE), [])


def test_the_table_has_all_losses_each_measured_once(run, prepared, tmp_path, monkeypatch, fake_checkpoint, tiny):
    control, tuned = run("control", DENSE), run("tuned")
    fake_checkpoint(tmp_path / "source", tiny(DENSE), step=0)
    losses = {
        tmp_path / "source": [3.0, 3.5, 3.25],
        control.folder / "checkpoints" / "step_00000005": [2.0, 2.5, 2.75],
        tuned.folder / "start": [6.0, 7.0, 6.5],
        tuned.folder / "checkpoints" / "step_00000005": [2.5, 3.5, 3.25],
    }
    calls = []
    monkeypatch.setattr(tuned_report.layout, "read_weights", lambda checkpoint: checkpoint)
    monkeypatch.setattr(
        tuned_report, "build_single_process", lambda config, weights: SimpleNamespace(to=lambda device: weights)
    )
    monkeypatch.setattr(tuned_report, "held_out_documents", lambda config, max_documents: calls.append(max_documents))
    monkeypatch.setattr(tuned_report, "document_losses", lambda model, documents: losses[model])
    dense, tuned_dense, before, after = losses.values()
    share = recovered_share(before, after, tuned_dense)
    assert share.value == pytest.approx((19.5 - 9.25) / (19.5 - 7.25))
    text = tuned_report.tuning_table(control, [tuned])
    assert f"| control | 8 of 8 | 320 | {mean(dense)} | {mean(tuned_dense)} | | |" in text
    above = mean([0.5, 1.0, 0.5])
    assert (
        f"| tuned | 4 of 8, 2 shared | 320 | {mean(before)} | {mean(after)} | {above} "
        f"| {100 * share.value:.1f} ± {100 * share.error:.1f} % |"
    ) in text
    assert calls == [None] * 4
    # Known losses are not measured again, and an unreadable file is not replaced.
    again = tuned_report.tuning_table(tuned_report.TunedRun(control.folder), [tuned_report.TunedRun(tuned.folder)])
    assert (again, len(calls)) == (text, 4)
    (tuned.folder / "documents.json").write_text("{")
    with pytest.raises(
        UserError, match=r"documents\.json: cannot be read as JSON .*\. Expected losses by document\. Delete it to"
    ):
        tuned_report.tuning_table(control, [tuned_report.TunedRun(tuned.folder)])
