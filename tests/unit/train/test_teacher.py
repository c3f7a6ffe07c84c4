"""Which model may be the teacher of a distillation, and how it is loaded."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.messages import NONE_IS

from moh_megatron.checkpoint import layout
from moh_megatron.checkpoint.hf.checkpoint_writer import write_checkpoint
from moh_megatron.checkpoint.hf.hf_extras import HFExtras
from moh_megatron.checkpoint.mapping import rules
from moh_megatron.config.schema import DistillationConfig
from moh_megatron.io.errors import UserError
from moh_megatron.model.single import build_single_process, logits
from moh_megatron.train.teacher import find_teacher, load_teacher, record_teacher

DENSE = {"moh.enabled": False}


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        ({}, {}, "must be a dense model"),
        ({**DENSE, "model.vocab_size": 128}, {}, r"must know 96 tokens, .* as the model that learns\. Got 128"),
        ({**DENSE, "model.vocab_padding": 2}, {}, r"must know 96 tokens, .* Got 94"),
        ({**DENSE, "model.num_query_groups": 1}, {"parallel.tensor": 4}, r"parallel\.tensor must divide"),
    ],
    ids=["MoH", "another vocabulary", "padding that counts as tokens here", "heads that cannot be cut"],
)
def test_unfit_teachers_are_refused(tiny, fake_checkpoint, tmp_path, teacher, student, message):
    folder = fake_checkpoint(tmp_path / "step_00000001", tiny(teacher))
    with pytest.raises(UserError, match=message):
        find_teacher(tiny({**student, "distillation.teacher": str(folder)}))


def test_a_dense_model_is_accepted(tiny, fake_checkpoint, tmp_path):
    # Its own run was longer than this one, so its warm-up does not matter.
    longer = {"optimizer.warmup_steps": 200, "train.total_tokens": 64000}
    folder = fake_checkpoint(tmp_path / "step_00000001", tiny({**DENSE, **longer}))
    assert find_teacher(tiny({"distillation.teacher": str(folder)})) == folder
    assert find_teacher(tiny()) is None


@pytest.mark.usefixtures("one_rank")
def test_the_teacher_is_padded_as_the_student(tiny, tmp_path):
    teacher_config, student = tiny(DENSE), tiny({"model.vocab_size": 100, "model.vocab_padding": 4})
    folder = tmp_path / "step_00000001"
    folder.mkdir()
    dtypes = {rule.megatron: torch.float32 for rule in rules(teacher_config)}
    weights = ((rule.megatron, 0.2 * torch.randn(rule.shape)) for rule in rules(teacher_config))
    write_checkpoint(folder, teacher_config, dtypes, weights, HFExtras(None, {}))
    config = dataclasses.replace(student, distillation=DistillationConfig(teacher=str(folder)))
    assert find_teacher(config) == folder
    teacher, tokens = load_teacher(folder, config, torch.device("cpu")), torch.arange(16)[None]
    found = logits(teacher, tokens)
    assert found.shape[-1] == 100
    own = logits(build_single_process(teacher_config, layout.read_weights(folder)), tokens)
    assert torch.equal(found[..., :96], own)


def test_a_resumed_run_refuses_another_teacher(tiny, fake_checkpoint, tmp_path):
    first, other = (fake_checkpoint(tmp_path / f"step_{step}", tiny(DENSE), step=step) for step in (1, 2))
    run = tiny({"run.dir": str(tmp_path / "run"), "distillation.teacher": str(first)})
    record_teacher(tiny({"run.dir": str(tmp_path / "run")}), None, resumed=False)
    assert not (tmp_path / "run").exists()
    record_teacher(run, first, resumed=False)
    record_teacher(run, first, resumed=True)
    with pytest.raises(
        UserError, match=r"learned from another teacher than .*step_2:\n  weights: expected \w+, got \w+"
    ):
        record_teacher(run, other, resumed=True)
    record_teacher(run, other, resumed=False)
    record_teacher(run, other, resumed=True)


@pytest.mark.parametrize("content", [None, "[", "[]", "[" * 100_000])
def test_a_damaged_teacher_json_is_named(tiny, fake_checkpoint, tmp_path, content):
    teacher = fake_checkpoint(tmp_path / "step_00000001", tiny(DENSE))
    run = tiny({"run.dir": str(tmp_path), "distillation.teacher": str(teacher)})
    if content is None:
        (tmp_path / "teacher.json").mkdir()
    else:
        (tmp_path / "teacher.json").write_text(content)
    with pytest.raises(UserError, match=rf"teacher\.json: {NONE_IS} the teacher of a run.* Delete it to go on"):
        record_teacher(run, teacher, resumed=True)
