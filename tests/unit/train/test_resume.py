"""Where a run starts, and what keeps it from being resumed."""

import json
import logging
import re
from dataclasses import replace

import pytest

from moh_megatron.checkpoint.manifest import read_manifest, write_manifest
from moh_megatron.config.validate import gradient_accumulation_steps
from moh_megatron.data.tokenizer.sentencepiece_bpe import train_tokenizer
from moh_megatron.data.tokenizer.tokenizer import load_tokenizer
from moh_megatron.io.errors import Fault, UserError
from moh_megatron.io.hashing import hash_file
from moh_megatron.train.resume import check_same_run, check_same_tokenizer, newest_good, weights_to_start_from

DATA = "d" * 64


@pytest.fixture
def config(tiny, tmp_path):
    """config({...}): a small configuration of the run folder tmp_path/run."""
    return lambda changes=None: tiny({"run.dir": str(tmp_path / "run"), **(changes or {})})


@pytest.fixture
def checkpoint(config, fake_checkpoint, tmp_path):
    """checkpoint(step, changes): a complete checkpoint of the run."""

    def checkpoint(step=5, changes=None):
        folder = tmp_path / "run" / "checkpoints" / f"step_{step:08d}"
        return fake_checkpoint(folder, config(changes), step=step, data=DATA)

    return checkpoint


@pytest.fixture(autouse=True)
def log_everything(caplog):
    caplog.set_level(logging.INFO)


def warnings(caplog):
    """The messages of warnings; there must be no other records."""
    assert {record.levelno for record in caplog.records} <= {logging.WARNING}
    return caplog.messages


# --- newest_good ---------------------------------------------------------------------------------------------------


def test_a_run_without_checkpoints_starts_anew(config, tmp_path, caplog):
    assert newest_good(config()) is None
    (tmp_path / "run" / "checkpoints" / ".partial_step_00000005").mkdir(parents=True)
    assert newest_good(config()) is None
    assert newest_good(config({"train.resume": "never"})) is None
    assert caplog.messages == []


def test_the_newest_checkpoint_is_taken(config, checkpoint, caplog):
    checkpoint(5)
    newest = checkpoint(10)
    assert newest_good(config()) == newest
    assert caplog.messages == []


def test_damaged_checkpoints_are_passed_over_with_a_warning(config, checkpoint, caplog):
    good, damaged = checkpoint(5), checkpoint(10)
    (damaged / "optimizer" / "state.pt").unlink()
    assert newest_good(config()) == good
    assert warnings(caplog) == [f"{damaged} is passed over: optimizer/state.pt is missing"]


def test_resume_never_refuses_a_run_folder_with_checkpoints(config, checkpoint, tmp_path, caplog):
    checkpoint(5)
    checkpoint(10)
    message = (
        f"{tmp_path}/run/checkpoints already holds checkpoints and train.resume is never. "
        "Set run.dir to a new folder, or train.resume=auto to go on from step_00000010."
    )
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        newest_good(config({"train.resume": "never"}))
    assert caplog.messages == []


def test_a_fault_where_every_checkpoint_is_damaged(config, checkpoint, tmp_path, caplog):
    for step in (5, 10):
        (checkpoint(step) / "manifest.json").unlink()
    with pytest.raises(Fault, match=f"^every checkpoint in {tmp_path}/run/checkpoints is damaged"):
        newest_good(config())
    assert len(warnings(caplog)) == 2


# --- check_same_run ------------------------------------------------------------------------------------------------


def test_the_same_run_is_resumed(config, checkpoint):
    assert check_same_run(checkpoint(5), config(), 1, DATA).step == 5


@pytest.mark.parametrize(
    ("key", "saved", "current"),
    [
        ("model.num_layers", 2, 3),
        ("model.norm_epsilon", 1e-05, 1e-06),
        ("moh.active_heads", 4, 5),
        ("moh.balance_coefficient", 0.01, 0.02),
        ("moh.gating", "normalized", "paper"),
        ("data.document_mask", False, True),
        ("run.seed", 1234, 1),
        ("train.sequence_length", 16, 32),
        ("train.global_batch_size", 4, 8),
        ("train.total_tokens", 6400, 12800),
    ],
)
def test_resume_refuses_another_value_and_names_both(config, checkpoint, key, saved, current):
    folder = checkpoint(5)
    with pytest.raises(UserError) as caught:
        check_same_run(folder, config({key: current}), 1, DATA)
    first, *differences, remedy = str(caught.value).splitlines()
    assert first == f"{folder} was made with other values:"
    assert differences == [f"  {key}: expected {saved}, got {current}"]
    # Weights that do not fit would be refused in a new run, too.
    assert (f"train.init_from={folder}" in remedy) == (key not in ("model.num_layers", "model.norm_epsilon"))


def test_resume_accepts_a_teacher_at_another_path_and_refuses_a_missing_one(config, checkpoint):
    distilled = {"distillation.teacher": "dense"}
    folder = checkpoint(5, distilled)
    assert check_same_run(folder, config({"distillation.teacher": "/else/dense/step_00000005"}), 1, DATA)
    for changes, difference in (
        ({}, "distillation.teacher: expected given, got null"),
        ({**distilled, "distillation.weight": 0.5}, "distillation.weight: expected 1.0, got 0.5"),
    ):
        with pytest.raises(UserError, match=difference.replace(".", "[.]")):
            check_same_run(folder, config(changes), 1, DATA)


def test_resume_refuses_another_precision(config, checkpoint):
    with pytest.raises(UserError, match=r"  train\.precision: expected fp32, got bf16"):
        check_same_run(checkpoint(5), config({"train.precision": "bf16"}), 1, DATA)


@pytest.mark.parametrize(
    ("changes", "world_size", "topology"),
    [
        ({}, 2, "TP 1 x DP 2, ZeRO 1, fp32"),
        ({"parallel.tensor": 2}, 2, "TP 2 x DP 1, ZeRO 1, fp32"),
        ({"parallel.zero_stage": 2}, 1, "TP 1 x DP 1, ZeRO 2, fp32"),
    ],
)
def test_resume_at_another_topology_is_reported(config, checkpoint, changes, world_size, topology, caplog):
    assert check_same_run(checkpoint(5), config(changes), world_size, DATA).step == 5
    resharded = f"step_00000005 was written at TP 1 x DP 1, ZeRO 1, fp32; it is resharded to {topology}"
    assert caplog.messages == [resharded]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parallel.sequence": True}, "parallel.sequence is True from here on; it was False"),
        ({"train.recompute": "full"}, "train.recompute is full from here on; it was none"),
        ({"parallel.offload_optimizer": True}, "parallel.offload_optimizer is True from here on; it was False"),
        ({"moh.backend": "dense"}, "moh.backend is dense from here on; it was auto"),
        (
            {"deepspeed.zero_optimization": {"overlap_comm": False}},
            "deepspeed.zero_optimization is {'overlap_comm': False} from here on; it was not set",
        ),
    ],
)
def test_resume_with_settings_that_change_rounding_warns(config, checkpoint, changes, message, caplog):
    folder = checkpoint(5, {"parallel.tensor": 2})
    check_same_run(folder, config({"parallel.tensor": 2, **changes}), 1, DATA)
    expected = f"{message} up to step_00000005; losses agree to rounding, not bit for bit"
    assert ("WARNING", expected) in [(record.levelname, record.message) for record in caplog.records]


def test_resume_with_other_micro_batches_warns(config, checkpoint, caplog):
    assert check_same_run(checkpoint(5), config({"train.micro_batch_size": 2}), 1, DATA).step == 5
    assert warnings(caplog) == [
        "train.micro_batch_size is 2 from here on; it was 1 up to step_00000005; the data stay the same, "
        "the balance loss is that of other micro-batches"
    ]


def test_resume_accepts_the_micro_batch_that_a_refusal_advises(config, checkpoint):
    batch = {"train.global_batch_size": 8, "train.micro_batch_size": 4}
    folder = checkpoint(5, batch)
    with pytest.raises(UserError, match=r"; or set train\.micro_batch_size to 2\.$"):
        gradient_accumulation_steps(config(batch), 4)
    advised = config(batch | {"train.micro_batch_size": 2})
    assert gradient_accumulation_steps(advised, 4) == 1
    assert check_same_run(folder, advised, 4, DATA).step == 5


def test_an_older_format_is_refused_by_name_and_its_weights_are_taken(config, checkpoint, tmp_path):
    folder = checkpoint(5)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": 1}))
    (folder / "manifest.sha256").unlink()  # that format had none
    assert newest_good(config()) == folder
    message = rf"^{folder} has format version 1, .* it needs version 2\. .*train\.init_from={folder}\.$"
    with pytest.raises(UserError, match=message):
        check_same_run(folder, config(), 1, DATA)
    changes = {"run.dir": "other", "train.init_from": str(tmp_path / "run")}
    assert weights_to_start_from(config(changes)) == folder


def test_resume_refuses_another_dataset(config, checkpoint):
    with pytest.raises(UserError, match=f"  data: expected {'d' * 12}, got {'e' * 12}"):
        check_same_run(checkpoint(5), config(), 1, "e" * 64)


def test_resume_names_every_difference_at_once(config, checkpoint):
    with pytest.raises(UserError) as caught:
        check_same_run(checkpoint(5), config({"run.seed": 1, "moh.active_heads": 5}), 2, "e" * 64)
    assert len(str(caught.value).splitlines()) == 1 + 3 + 1


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer.learning_rate": 2e-3},
        {"checkpoint.interval": 7, "monitor.log_interval": 1},
        {"train.eval_interval": 3, "generate.max_new_tokens": 2},
    ],
)
def test_resume_accepts_changes_that_touch_neither_model_nor_data(config, checkpoint, changes):
    assert check_same_run(checkpoint(5), config(changes), 1, DATA).step == 5


# --- weights_to_start_from -----------------------------------------------------------------------------------------


CHOICES = {"moh.routing_groups": ("kv", 1), "moh.gate_softmax": ("group", "layer")}


@pytest.mark.parametrize("reverse", [False, True], ids=["grouped first", "grouped then"])
@pytest.mark.parametrize("key", CHOICES)
def test_weights_that_choose_among_other_heads_are_refused_and_both_forms_named(
    config, checkpoint, grouped, key, reverse
):
    saved, current = reversed(CHOICES[key]) if reverse else CHOICES[key]
    folder = checkpoint(5, {**grouped, key: saved})
    difference = f"  {key}: expected {saved}, got {current}"
    with pytest.raises(UserError) as resumed:
        check_same_run(folder, config({**grouped, key: current}), 1, DATA)
    assert str(resumed.value).splitlines()[1:] == [difference, "Use the same, or another run.dir."]
    with pytest.raises(UserError) as started:
        weights_to_start_from(config({**grouped, key: current, "train.init_from": str(folder)}))
    assert str(started.value).splitlines()[1:] == [
        difference,
        "train.init_from needs weights of the same architecture.",
        "Routers choose otherwise with other routing groups or gates: set the values of the checkpoint, or start from "
        "the dense model it was made of.",
    ]


def test_a_checkpoint_from_before_there_were_routing_groups_chooses_among_all_heads(config, checkpoint, grouped):
    everywhere = {**grouped, "moh.routing_groups": 1}
    folder = checkpoint(5, everywhere)
    file = folder / "config.yaml"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if not re.match(r" +(routing_groups|gate_softmax):", line)))
    assert len(file.read_text().splitlines()) == len(lines) - 2
    manifest = read_manifest(folder)
    write_manifest(folder, replace(manifest, files={**manifest.files, file.name: hash_file(file)}))
    assert check_same_run(folder, config(everywhere), 1, DATA).step == 5
    assert weights_to_start_from(config({**everywhere, "train.init_from": str(folder)})) == folder
    with pytest.raises(UserError, match=r"moh\.routing_groups: expected 1, got kv"):
        check_same_run(folder, config(grouped), 1, DATA)


def test_a_single_kv_group_is_all_heads(config, checkpoint, grouped):
    one = {**grouped, "model.num_query_groups": 1}
    folder = checkpoint(5, {**one, "moh.gate_softmax": "group"})
    everywhere = config({**one, "moh.routing_groups": 1, "train.init_from": str(folder)})
    assert weights_to_start_from(everywhere) == folder


def test_no_initial_weights_without_init_from(config):
    assert weights_to_start_from(config()) is None


@pytest.mark.parametrize("where", ["", "checkpoints", "checkpoints/step_00000005"])
def test_init_from_accepts_weights_of_the_same_architecture(config, checkpoint, tmp_path, where):
    folder = checkpoint(5)
    changes = {"run.dir": "other", "run.seed": 9, "train.total_tokens": 64, "moh.active_heads": 6}
    changes |= {"parallel.tensor": 2, "train.precision": "bf16", "train.init_from": str(tmp_path / "run" / where)}
    assert weights_to_start_from(config(changes)) == folder


@pytest.mark.parametrize(
    ("key", "saved", "current"),
    [
        ("model.num_layers", 2, 3),
        ("model.hidden_size", 32, 64),
        ("model.ffn_hidden_size", 48, 64),
        ("model.num_query_groups", 4, 8),
        ("model.vocab_size", 96, 128),
        ("model.tie_word_embeddings", False, True),
        ("model.norm_epsilon", 1e-05, 1e-06),
        ("moh.shared_heads", 2, 1),
        ("moh.router", "learned", "query_norm"),
        ("moh.head_layout", "interleaved", "contiguous"),
    ],
)
def test_init_from_refuses_weights_of_another_architecture(config, checkpoint, key, saved, current):
    folder = checkpoint(5)
    with pytest.raises(UserError) as caught:
        weights_to_start_from(config({"train.init_from": str(folder), key: current}))
    assert str(caught.value).splitlines() == [
        f"{folder} was made with other values:",
        f"  {key}: expected {saved}, got {current}",
        "train.init_from needs weights of the same architecture.",
    ]


def test_init_from_ignores_router_settings_of_dense_models(config, checkpoint):
    dense = {"moh.enabled": False}
    folder = checkpoint(5, dense)
    routing = {"moh.router": "query_norm", "moh.shared_heads": 3, "moh.shared_placement": "calibrated"}
    routing |= {"moh.routing_groups": "kv", "moh.gate_softmax": "group"}
    made = config({**dense, **routing, "train.init_from": str(folder)})
    assert weights_to_start_from(made) == folder
    with pytest.raises(UserError, match=r"moh\.head_layout: expected interleaved, got contiguous"):
        weights_to_start_from(config({**dense, "moh.head_layout": "contiguous", "train.init_from": str(folder)}))


def test_init_from_accepts_an_epsilon_rounded_to_single_precision(config, checkpoint):
    folder = checkpoint(5, {"model.norm_epsilon": 9.999999747378752e-06})
    made = config({"train.init_from": str(folder), "model.norm_epsilon": 1e-05})
    assert weights_to_start_from(made) == folder


@pytest.mark.parametrize(
    ("key", "current"), [("model.rotary_base", 5e5), ("model.rope_scaling", {"type": "linear", "factor": 4.0})]
)
def test_init_from_warns_of_other_positions_with_both_values(config, checkpoint, key, current, caplog):
    folder = checkpoint(5)
    made = config({"train.init_from": str(folder), key: current})
    assert weights_to_start_from(made) == folder
    (message,) = warnings(caplog)
    assert message.startswith(f"{key} is ")
    assert f"{folder} was made with {'10000.0' if key == 'model.rotary_base' else 'None'}: " in message


def test_init_from_accepts_other_settings_of_the_same_architecture(config, checkpoint):
    folder = checkpoint(5)
    changes = {"model.kv_channels": 4, "model.vocab_size": 99, "model.vocab_padding": 3, "parallel.tensor": 1}
    assert weights_to_start_from(config({"train.init_from": str(folder)} | changes)) == folder


def test_init_from_refuses_a_missing_folder(config, tmp_path):
    with pytest.raises(UserError, match="absent: no such folder"):
        weights_to_start_from(config({"train.init_from": str(tmp_path / "absent")}))


def test_init_from_refuses_damaged_weights(config, checkpoint):
    folder = checkpoint(5)
    (folder / "weights" / "tp_rank_00_of_01.safetensors").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"is not a complete checkpoint: weights/tp_rank_00_of_01\.safetensors has 0 bytes"
    ):
        weights_to_start_from(config({"train.init_from": str(folder)}))


# --- tokenizers and shares of sources ------------------------------------------------------------------------------


def test_weights_of_another_tokenizer_are_refused(checkpoint, tmp_path):
    folder = checkpoint()
    words = ["the same words ", "and then others "]
    for text, out_dir in zip(words, (folder / "tokenizer", tmp_path / "other"), strict=True):
        train_tokenizer([text * 9], vocab_size=280, character_coverage=1.0, out_dir=out_dir)
    check_same_tokenizer(folder, load_tokenizer(folder / "tokenizer"))
    with pytest.raises(UserError, match=r"another tokenizer, \w{12}, than the data, \w{12}\. .*tokenizer\.path="):
        check_same_tokenizer(folder, load_tokenizer(tmp_path / "other"))


def test_resume_accepts_other_source_weights_for_later_steps_only(config, checkpoint, caplog):
    def blend(*changes):
        sources = [{"name": "a", "weight": 1.0}, {"name": "b", "weight": 3.0}]
        steps = [{"step": step, "weights": {"a": weight}} for step, weight in changes]
        return {"data.sources": sources, "data.weight_changes": steps, "tokenizer.path": "t"}

    folder = checkpoint(5, blend())
    for later in (blend((5, 2.0)), blend((9, 0.0)), blend((2, 1.0))):
        check_same_run(folder, config(later), 1, DATA)
    assert caplog.messages == []
    with pytest.raises(UserError, match=r"shares of the sources so far: expected .*0\.25.*, got .*0\.4.*"):
        check_same_run(folder, config(blend((4, 2.0))), 1, DATA)
