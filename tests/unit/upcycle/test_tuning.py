"""What is no run of continue-tuning, and runs that cannot be compared."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from moh_megatron.config.errors import UserError
from moh_megatron.config.load import dump_config
from moh_megatron.upcycle import tuning


@pytest.fixture
def arm(tiny, tmp_path):
    """arm("name", {...}): a run folder with a configuration."""

    def arm(name, changes=None):
        (tmp_path / name).mkdir()
        made = tiny({"train.init_from": "somewhere", "data.dir": str(tmp_path / "data"), **(changes or {})})
        (tmp_path / name / "config.yaml").write_text(dump_config(made))
        return tuning.Arm(tmp_path / name)

    return arm


def test_folders_that_are_no_such_run(arm, tmp_path):
    with pytest.raises(UserError, match=r"absent: no such folder\. Expected the folder of a run"):
        tuning.Arm(tmp_path / "absent")
    with pytest.raises(UserError, match=r": must be the folder of a run\. Got one without config\.yaml"):
        tuning.Arm(tmp_path)
    with pytest.raises(UserError, match=r"must be a run of pipelines/continue_tune\.py\. Got train\.init_from: null"):
        arm("pretrained", {"train.init_from": None})


@pytest.mark.parametrize("change", [{"train.sequence_length": 32}, {"data.dir": "elsewhere"}])
def test_runs_over_other_documents_are_not_compared(arm, monkeypatch, change):
    monkeypatch.setattr(tuning, "load_prepared", lambda config: SimpleNamespace(hash=str(config.data.dir) * 12))
    with pytest.raises(UserError, match=r"other: must have the data and train\.sequence_length of .*control"):
        tuning.as_markdown(arm("control"), [arm("other", change)])
