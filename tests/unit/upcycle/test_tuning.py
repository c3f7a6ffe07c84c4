"""What is no run of continue-tuning, runs that cannot be compared, and the numbers of those that can."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from moh_megatron.config.load import dump_config
from moh_megatron.io.errors import UserError
from moh_megatron.upcycle import tuning
from moh_megatron.upcycle.loss_and_kl import mean, recovered

DENSE = {"moh.enabled": False}


@pytest.fixture
def run(tiny, fake_checkpoint, tmp_path):
    """run("name", {...}): a run folder with a checkpoint, whose start was made of tmp_path/source."""

    def run(name, changes=None, *, step=5, data="d" * 64, source="source"):
        folder, changes = tmp_path / name, {"run.dir": str(tmp_path / name), **(changes or {})}
        made = tiny({**changes, "train.init_from": str(tmp_path / source)})
        if made.moh.enabled:
            fake_checkpoint(folder / "start", made, step=0)
            made = tiny({**changes, "train.init_from": str(folder / "start")})
        fake_checkpoint(folder / "checkpoints" / f"step_{step:08d}", made, step=step, data=data)
        (folder / "config.yaml").write_text(dump_config(made))
        return tuning.Arm(folder)

    return run


@pytest.fixture
def prepared(monkeypatch):
    """The hash of the prepared data, to be changed."""
    now = SimpleNamespace(hash="d" * 64)
    monkeypatch.setattr(tuning, "load_prepared", lambda config: now)
    return now


def test_folders_that_are_no_such_run(run, tiny, tmp_path):
    with pytest.raises(UserError, match=r"absent: no such folder\. Expected the folder of a run"):
        tuning.Arm(tmp_path / "absent")
    with pytest.raises(UserError, match=r": must be the folder of a run\. Got one without config\.yaml"):
        tuning.Arm(tmp_path)
    (tmp_path / "config.yaml").write_text(dump_config(tiny()))
    with pytest.raises(UserError, match=r"must be a run of pipelines/continue_tune\.py\. Got train\.init_from: null"):
        tuning.Arm(tmp_path)


@pytest.mark.parametrize(
    ("changes", "more", "difference"),
    [
        ({"train.sequence_length": 32}, {}, r"train\.sequence_length: \d+ there, 32 here"),
        ({"train.total_tokens": 640}, {}, r"train\.total_tokens: \d+ there, 640 here"),
        ({"train.global_batch_size": 8}, {}, r"train\.global_batch_size: \d+ there, 8 here"),
        ({"optimizer.learning_rate": 0.5}, {}, r"optimizer\.learning_rate: \S+ there, 0\.5 here"),
        ({"run.seed": 77}, {}, r"run\.seed: \d+ there, 77 here"),
        ({}, {"source": "elsewhere"}, r"train\.init_from: \S+source there, \S+elsewhere here"),
        ({}, {"step": 6}, r"tokens: 320 there, 384 here"),
        ({}, {"data": "e" * 64}, r"data: dddd\w+ there, eeee\w+ here"),
    ],
)
def test_runs_under_other_conditions_are_not_compared(run, prepared, changes, more, difference):
    control, arm = run("control", DENSE), run("other", changes, **more)
    with pytest.raises(UserError) as caught:
        tuning.as_markdown(control, [arm])
    first, second = str(caught.value).splitlines()
    assert first == f"{arm.folder} cannot be compared with {control.folder}:"
    assert re.fullmatch(f"  {difference}", second)


def test_the_control_is_dense(run, prepared):
    with pytest.raises(UserError, match=r"the control, named first, must be of a dense model\. Got 4 of 8, 2 shared"):
        tuning.as_markdown(run("control"), [])


def test_data_prepared_anew_holds_nothing_out(run, prepared):
    prepared.hash = "e" * 64
    with pytest.raises(UserError, match=r"control: was trained on the dataset dddd\w+\. Got eeee\w+ in .*data: "):
        tuning.as_markdown(run("control", DENSE), [])


def test_the_table_holds_every_loss_where_it_belongs(run, prepared, tmp_path, monkeypatch, fake_checkpoint, tiny):
    control, arm = run("control", DENSE), run("arm")
    fake_checkpoint(tmp_path / "source", tiny(DENSE), step=0)
    losses = {
        tmp_path / "source": [3.0, 3.5, 3.25],
        control.folder / "checkpoints" / "step_00000005": [2.0, 2.5, 2.75],
        arm.folder / "start": [6.0, 7.0, 6.5],
        arm.folder / "checkpoints" / "step_00000005": [2.5, 3.5, 3.25],
    }
    asked = []
    monkeypatch.setattr(tuning.layout, "read_weights", lambda checkpoint: checkpoint)
    monkeypatch.setattr(
        tuning, "build_single_process", lambda config, weights: SimpleNamespace(to=lambda device: weights)
    )
    monkeypatch.setattr(tuning, "held_out", lambda config, most: asked.append(most))
    monkeypatch.setattr(tuning, "document_losses", lambda model, documents: losses[model])
    dense, tuned_dense, before, after = losses.values()
    share = recovered(before, after, tuned_dense)
    assert share.value == pytest.approx((19.5 - 9.25) / (19.5 - 7.25))
    text = tuning.as_markdown(control, [arm])
    assert f"| control | 8 of 8 | 320 | {mean(dense)} | {mean(tuned_dense)} | | |" in text
    above = mean([0.5, 1.0, 0.5])
    assert (
        f"| arm | 4 of 8, 2 shared | 320 | {mean(before)} | {mean(after)} | {above} "
        f"| {100 * share.value:.1f} ± {100 * share.error:.1f} % |"
    ) in text
    assert asked == [None] * 4
    # What is known is not measured again; what cannot be read is not measured over.
    again = tuning.as_markdown(tuning.Arm(control.folder), [tuning.Arm(arm.folder)])
    assert (again, len(asked)) == (text, 4)
    (arm.folder / "documents.json").write_text("{")
    with pytest.raises(
        UserError, match=r"documents\.json: cannot be read as JSON .*\. Expected losses by document\. Delete it to"
    ):
        tuning.as_markdown(control, [tuning.Arm(arm.folder)])
