"""The initial checkpoint of a model that chooses its heads in each KV group."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from support.upcycling import write_source

from moh_megatron.io.errors import UserError
from moh_megatron.upcycle.calibrate import read_calibration
from moh_megatron.upcycle.initial_checkpoint import initial_checkpoint_folder, prepare, resolve
from moh_megatron.upcycle.loss_and_kl import without_moh

pytestmark = pytest.mark.usefixtures("one_rank", "data")

CALIBRATED = {"moh.shared_placement": "calibrated", "moh.calibration_sequences": 2}


@pytest.mark.parametrize("router", ["learned", "query_norm"])
def test_heads_calibrated_in_each_kv_group_make_a_model_that_equals_the_dense_one(make, grouped, router, logged):
    changes = {**grouped, **CALIBRATED, "moh.router": router}
    write_source(without_moh(make(changes)))
    prepared = prepare(make(changes))
    assert "KL from the dense model" in logged.messages[-2]
    removal = read_calibration(Path(prepared.run.dir) / "calibration.json").removal
    best = tuple(
        tuple(max(range(4 * group, 4 * group + 4), key=rises.__getitem__) for group in (0, 1)) for rises in removal
    )
    assert prepared.moh.shared_heads == best
    assert (prepared.moh.routing_groups, prepared.moh.shared_placement) == ("kv", "first")
    assert resolve(make(changes)) == prepared


def test_a_calibration_serves_both_choices_of_heads(make, grouped, tmp_path):
    grouped = {**grouped, **CALIBRATED}
    write_source(without_moh(make(grouped)))
    prepare(make(grouped))
    other = make({**grouped, "moh.routing_groups": 1, "run.dir": str(tmp_path / "other")})
    (tmp_path / "other").mkdir()
    shutil.copyfile(tmp_path / "run" / "calibration.json", tmp_path / "other" / "calibration.json")
    calibration = read_calibration(tmp_path / "run" / "calibration.json")
    assert prepare(other).moh.shared_heads == calibration.shared(2)


@pytest.mark.parametrize(
    ("then_changes", "difference"),
    [
        ({"moh.routing_groups": 1}, "  moh.routing_groups: expected kv, got 1"),
        ({"moh.gate_softmax": "group"}, "  moh.gate_softmax: expected layer, got group"),
    ],
)
def test_another_choice_of_heads_does_not_use_the_initial_checkpoint(make, grouped, then_changes, difference):
    changes = {**grouped, "moh.router": "learned"}
    write_source(without_moh(make(changes)))
    prepare(make(changes))
    for function in (prepare, resolve):
        with pytest.raises(UserError, match=f"^.*start was made with other values:\n{re.escape(difference)}\nName the"):
            function(make({**changes, **then_changes}))


def test_a_record_from_before_there_were_routing_groups_means_the_choice_among_all_heads(make, grouped):
    changes = {**grouped, "moh.routing_groups": 1}
    write_source(without_moh(make(changes)))
    prepared = prepare(make(changes))
    file = initial_checkpoint_folder(prepared) / "asked.json"
    record = json.loads(file.read_text())
    for key in ("moh.routing_groups", "moh.gate_softmax"):
        del record[key]
    file.write_text(json.dumps(record))
    assert resolve(make(changes)) == prepared
    with pytest.raises(UserError, match=r"moh\.routing_groups: expected 1, got kv"):
        resolve(make(grouped))


def test_a_moh_source_that_chooses_among_other_heads_is_refused(make, grouped):
    write_source(make(grouped))
    with pytest.raises(UserError, match=r"(?s)moh\.routing_groups: expected kv, got 1.*start from the dense model"):
        prepare(make({**grouped, "moh.routing_groups": 1, "model.vocab_size": 104}))
