"""What may teach."""

from __future__ import annotations

import pytest

from moh_megatron.config.errors import UserError
from moh_megatron.train.teacher import find_teacher

DENSE = {"moh.enabled": False}


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        ({}, {}, "must be a dense model"),
        ({**DENSE, "model.vocab_size": 128}, {}, r"must have model\.vocab_size 96, as the model that learns\. Got 128"),
        ({**DENSE, "model.vocab_padding": 2}, {}, r"must have model\.vocab_padding 0"),
        ({**DENSE, "model.num_query_groups": 1}, {"parallel.tensor": 4}, r"parallel\.tensor must divide"),
    ],
    ids=["MoH", "another vocabulary", "other padding", "heads that cannot be cut"],
)
def test_what_cannot_teach_is_refused(tiny, fake_checkpoint, tmp_path, teacher, student, message):
    folder = fake_checkpoint(tmp_path / "step_00000001", tiny(teacher))
    with pytest.raises(UserError, match=message):
        find_teacher(tiny({**student, "distillation.teacher": str(folder)}), print)


def test_a_dense_model_may(tiny, fake_checkpoint, tmp_path):
    # Its own run was longer than this one: its warm-up does not matter.
    longer = {"optimizer.warmup_steps": 200, "train.total_tokens": 64000}
    folder = fake_checkpoint(tmp_path / "step_00000001", tiny({**DENSE, **longer}))
    assert find_teacher(tiny({"distillation.teacher": str(folder)}), print) == folder
    assert find_teacher(tiny(), print) is None
