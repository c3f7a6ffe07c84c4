import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moh_megatron.config.load import config_from_mapping, dump_config, load_config, mapping_of
from moh_megatron.io.errors import UserError

_REPOSITORY = Path(__file__).parents[3]

_SMALL = """\
run: {dir: runs/x}
model:
  num_layers: 2
  hidden_size: 32
  ffn_hidden_size: 48
  num_attention_heads: 8
  vocab_size: 96
moh: {shared_heads: 2, active_heads: 4}
train: {sequence_length: 16, total_tokens: 6.4e3, global_batch_size: 4}
optimizer:
  learning_rate: 6e-4
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The working directory, which holds a valid small.yaml."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(_SMALL)
    return tmp_path


def complaint(path, *overrides):
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_values_are_converted_to_their_types():
    config = load_config("small.yaml")
    assert config.train.total_tokens == 6400
    assert type(config.train.total_tokens) is int
    assert config.optimizer.learning_rate == 6e-4
    assert config.parallel.tensor == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run.dir = "elsewhere"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("key", "text", "form"),
    [
        ("train.total_tokens", "500k", "5e5"),
        ("train.total_tokens", "1M", "1e6"),
        ("train.total_tokens", "2.5B", "2.5e9"),
        ("train.total_tokens", "1.5 T", "1.5e12"),
        ("train.total_tokens", "1_000_000", "1e6"),
        ("train.total_tokens", "131,072", "131072"),
        ("train.eval_samples", "2K", "2e3"),
        ("optimizer.weight_decay", "1k", "1e3"),
    ],
)
def test_refused_number_is_shown_in_the_form_that_works(key, text, form):
    assert complaint("small.yaml", f"{key}={text}").endswith(f'Got the text "{text}"; write {form}.')
    section, name = key.split(".")
    assert getattr(getattr(load_config("small.yaml", [f"{key}={form}"]), section), name) == float(form)


@pytest.mark.parametrize("text", ["many", "1 2", "1,00", "1x", "k", "12:30"])
def test_refused_text_that_is_no_number_gets_no_advice(text):
    assert "write" not in complaint("small.yaml", f"train.total_tokens={text}")


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.total_tokens=2e11", "train", "total_tokens", 200_000_000_000),
        ("optimizer.learning_rate=6e-5", "optimizer", "learning_rate", 6e-5),
        ("optimizer.weight_decay=+.5", "optimizer", "weight_decay", 0.5),
        ("optimizer.weight_decay=1", "optimizer", "weight_decay", 1.0),
        ("train.eval_samples=", "train", "eval_samples", None),
        ("train.eval_samples=null", "train", "eval_samples", None),
        ("run.dir=runs/a=b", "run", "dir", "runs/a=b"),
        ("run.dir=2024-01-01", "run", "dir", "2024-01-01"),
        ("run.dir='12'", "run", "dir", "12"),
        ("run.dir=on", "run", "dir", "on"),
        ("moh.enabled=false", "moh", "enabled", False),
        ("data.inputs=[a.txt, b.txt]", "data", "inputs", ("a.txt", "b.txt")),
        ("generate.prompts=['Hello: you', \"\"]", "generate", "prompts", ("Hello: you", "")),
    ],
)
def test_override_sets_a_value_of_its_type(override, section, key, value):
    got = getattr(getattr(load_config("small.yaml", [override]), section), key)
    assert got == value
    assert type(got) is type(value)


def test_last_override_wins():
    assert load_config("small.yaml", ["run.seed=1", "run.seed=2"]).run.seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("moh.active_head=3", "moh.active_head: unknown key; did you mean 'active_heads'?"),
        ("train.learning_rate=3", "train.learning_rate: unknown key; did you mean 'optimizer.learning_rate'?"),
        (
            "moh.a.b=3",
            "moh.a.b: unknown key; moh has the keys enabled, shared_heads, shared_placement, active_heads, ",
        ),
        ("mho.router=learned", "mho: unknown section; did you mean 'moh'?"),
        ("zzz.router=learned", "zzz: unknown section; the sections are run, model, moh, train, "),
        ("base.x=small.yaml", "base: unknown section; "),
        ("active_heads=3", "'active_heads=3': must have the form section.key=value."),
        ("moh.active_heads", "'moh.active_heads': must have the form section.key=value."),
        ("run.seed=1.5", "run.seed: must be an integer. Got 1.5."),
        ("run.seed='1'", 'run.seed: must be an integer. Got the text "1".'),
        ("run.seed=true", "run.seed: must be an integer. Got true."),
        ("run.seed=-1", "run.seed: must be at least 0. Got -1."),
        ("run.seed=.inf", "run.seed: must be an integer. Got Infinity."),
        ("model.num_layers=", "model.num_layers: must be an integer. Got null."),
        ("model.num_layers=0", "model.num_layers: must be greater than 0. Got 0."),
        ("model.num_layers={a: 1}", "model.num_layers: must be an integer. Got a mapping."),
        ("moh.enabled=yes", 'moh.enabled: must be true or false. Got the text "yes".'),
        ("moh.enabled=1", "moh.enabled: must be true or false. Got 1."),
        ("moh.router=learnd", "moh.router: must be 'learned' or 'query_norm'. Got the text \"learnd\"."),
        ("optimizer.learning_rate=fast", 'optimizer.learning_rate: must be a number. Got the text "fast".'),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate: must be a finite number. Got NaN."),
        ("optimizer.weight_decay=" + "9" * 400, "optimizer.weight_decay: must be a number. Got a huge number."),
        ("optimizer.adam_beta1=1", "optimizer.adam_beta1: must be less than 1. Got 1."),
        ("optimizer.decay_fraction=1.5", "optimizer.decay_fraction: must be at most 1. Got 1.5."),
        ('run.dir="a\\0b"', "run.dir: must be a path, and no path holds a NUL character. Got"),
        ("run.dir=''", 'run.dir: must be a path; a single dot names the current folder. Got the text "".'),
        ("data.dir=''", 'data.dir: must be a path; a single dot names the current folder. Got the text "".'),
        (
            f"data.dir=a/{'n' * 256}",
            "data.dir: must be a path of at most 4095 bytes, whose names have at most 255. Got",
        ),
        (f"run.dir={'n/' * 2100}", "run.dir: must be a path of at most 4095 bytes, whose names have at most 255. Got"),
        (f"deepspeed.{'a.' * 400}b=1", "deepspeed: nested too deeply. Expected at most 64 levels; take some out."),
        (f"deepspeed.a={'{a: ' * 400}1{'}' * 400}", "deepspeed.a: not valid YAML: nested too deeply."),
        ("run.dir=12", "run.dir: must be text (in quotes, if it looks like something else). Got 12."),
        ("data.inputs=a.txt", 'data.inputs: must be a list, as in [a, b]. Got the text "a.txt".'),
        ("data.inputs=[a, 3]", "data.inputs[1]: must be text (in quotes, if it looks like something else). Got 3."),
        ("data.inputs=[a", "data.inputs: line 1, column 3: not valid YAML: expected ',' or ']'"),
        ("data.inputs={a: 1, a: 2}", "data.inputs: line 1: duplicate key 'a', first given in line 1."),
        ("run.dir=\udcff", "run.dir: line 1: not valid YAML: character"),
        (
            "moh.active_heads=40",
            "moh.active_heads must be greater than moh.shared_heads (2) and at most model.num_attention_heads (8). "
            "Got 40.",
        ),
    ],
)
def test_bad_override_is_reported(override, message):
    first_line = complaint("small.yaml", override).splitlines()[0]
    assert first_line.startswith(f"command line: {message}")


def test_all_mistakes_are_reported_together_with_their_files(folder):
    (folder / "bad.yaml").write_text(
        "base: small.yaml\n"
        "runs: {dir: x}\n"
        "active_heads: 3\n"
        "model: {num_layers: two, 5: 1}\n"
        "moh:\n  active_head: 3\n  gating: paper\n  gating: paper\n"
        "train: 7\n"
        "optimizer: {learning_rate: null}\n"
    )
    assert complaint("bad.yaml", "run.seed=x", "moh.routr=learned").splitlines() == [
        "bad.yaml: line 8: duplicate key 'gating', first given in line 7.",
        "bad.yaml: runs: unknown section; did you mean 'run'?",
        "bad.yaml: active_heads: unknown section; did you mean 'moh.active_heads'?",
        "bad.yaml: model.5: unknown key; model has the keys num_layers, hidden_size, ffn_hidden_size, "
        "num_attention_heads, vocab_size, vocab_padding, num_query_groups, kv_channels, max_position_embeddings, "
        "rotary_base, rope_scaling, norm_epsilon, tie_word_embeddings, init_method_std, scaled_residual_init.",
        "bad.yaml: moh.active_head: unknown key; did you mean 'active_heads'?",
        "bad.yaml: train: must be a mapping of keys. Got 7.",
        "command line: moh.routr: unknown key; did you mean 'router'?",
        'command line: run.seed: must be an integer. Got the text "x".',
        'bad.yaml: model.num_layers: must be an integer. Got the text "two".',
        "bad.yaml: optimizer.learning_rate: must be a number. Got null.",
    ]


def test_missing_keys_and_sections_are_reported(folder):
    (folder / "part.yaml").write_text("run:\nmodel: {num_layers: 2}\noptimizer: {learning_rate: 1}\nmoh: {}\n")
    assert complaint("part.yaml").splitlines() == [
        "part.yaml: run.dir: missing; it has no default.",
        "part.yaml: model.hidden_size: missing; it has no default.",
        "part.yaml: model.ffn_hidden_size: missing; it has no default.",
        "part.yaml: model.num_attention_heads: missing; it has no default.",
        "part.yaml: model.vocab_size: missing; it has no default.",
        "part.yaml: train: missing section; it has the keys sequence_length, total_tokens, global_batch_size, "
        "micro_batch_size, precision, recompute, resume, init_from, eval_interval, eval_samples, max_seconds, "
        "timeout_seconds, max_bad_steps, spike_zscore, spike_window, skip_spikes.",
    ]


def test_base_is_inherited_key_by_key(folder):
    (folder / "sub").mkdir()
    (folder / "sub/middle.yaml").write_text("base: ../small.yaml\nmoh: {active_heads: 5}\nrun: {seed: 7}\ndata:\n")
    (folder / "sub/top.yaml").write_text("base: middle.yaml\nmoh: {shared_heads: 3}\nmodel: {num_layers: 9}\n")
    config = load_config("sub/top.yaml", ["run.seed=8"])
    assert (config.moh.shared_heads, config.moh.active_heads) == (3, 5)
    assert (config.model.num_layers, config.model.hidden_size) == (9, 32)
    assert (config.run.dir, config.run.seed) == ("runs/x", 8)


def test_free_section_is_inherited_leaf_by_leaf(folder):
    (folder / "base.yaml").write_text(
        f"{_SMALL}deepspeed:\n  wall_clock_breakdown: true\n"
        "  zero_optimization: {reduce_scatter: true, x: {y: [1, 2]}}\n"
    )
    (folder / "top.yaml").write_text("base: base.yaml\ndeepspeed: {zero_optimization: {reduce_scatter: false, x: 3}}\n")
    assert load_config("small.yaml").deepspeed == {}
    assert load_config("top.yaml").deepspeed == {
        "wall_clock_breakdown": True,
        "zero_optimization": {"reduce_scatter": False, "x": 3},
    }
    config = load_config("top.yaml", ["deepspeed.zero_optimization.x.y=6e3", "deepspeed.aio={block_size: 1}"])
    assert config.deepspeed == {
        "wall_clock_breakdown": True,
        "zero_optimization": {"reduce_scatter": False, "x": {"y": 6e3}},
        "aio": {"block_size": 1},
    }
    (folder / "again.yaml").write_text(dump_config(config))
    assert load_config("again.yaml") == config
    assert complaint("small.yaml", "deepspeed=3").endswith("must have the form section.key=value.")
    (folder / "bad.yaml").write_text("base: small.yaml\ndeepspeed: 3\n")
    assert complaint("bad.yaml") == "bad.yaml: deepspeed: must be a mapping of keys. Got 3."


def test_message_names_the_file_that_set_the_value(folder):
    (folder / "middle.yaml").write_text("base: small.yaml\nmoh: {active_heads: 9}\nrun: {seed: x}\n")
    (folder / "top.yaml").write_text("base: middle.yaml\ntrain: {micro_batch_size: y}\n")
    assert complaint("top.yaml").splitlines() == [
        'middle.yaml: run.seed: must be an integer. Got the text "x".',
        'top.yaml: train.micro_batch_size: must be an integer. Got the text "y".',
    ]
    assert complaint("top.yaml", "run.seed=1", "train.micro_batch_size=3").splitlines() == [
        "middle.yaml: moh.active_heads must be greater than moh.shared_heads (2) and at most "
        "model.num_attention_heads (8). Got 9.",
        "small.yaml: train.global_batch_size must be divisible by train.micro_batch_size (3). Got 4; nearest: 3 or 6.",
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"base: bad.yaml\n", "bad.yaml: base: forms a cycle: bad.yaml -> bad.yaml."),
        (
            b"base: loop/other.yaml\n",
            "loop/other.yaml: base: forms a cycle: bad.yaml -> loop/other.yaml -> bad.yaml.",
        ),
        (b"base: none.yaml\n", "bad.yaml: base: none.yaml: no such file; write the path of a YAML file."),
        (b"base: loop\n", "bad.yaml: base: loop: cannot be read: Is a directory."),
        (b"base: [small.yaml]\n", "bad.yaml: base: must be the path of a YAML file. Got a list."),
        (b"", "bad.yaml: must be a mapping of sections (run, model, ...). Got null."),
        (b"- run\n", "bad.yaml: must be a mapping of sections (run, model, ...). Got a list."),
        (b"run: {\xff}", "bad.yaml: must be UTF-8 text. Got the byte 0xff at position 6."),
        (b"run:\n  dir: a: b\n", "bad.yaml: line 2, column 9: not valid YAML: mapping values are not allowed here."),
    ],
)
def test_unreadable_file_is_reported(folder, content, message):
    (folder / "loop").mkdir()
    (folder / "loop/other.yaml").write_text("base: ../bad.yaml\n")
    (folder / "bad.yaml").write_bytes(content)
    assert complaint("bad.yaml") == message


@pytest.mark.parametrize("path", ["none.yaml", "no/such/folder.yaml"])
def test_missing_file_is_reported(path):
    assert complaint(path) == f"{path}: no such file; write the path of a YAML file."


def test_path_with_nul_character_is_reported():
    # The last words are Python's, and differ between its versions.
    assert ": cannot be read: " in complaint("a\0b.yaml")
    assert "embedded null" in complaint("a\0b.yaml")


def test_byte_order_mark_is_ignored(folder):
    (folder / "marked.yaml").write_bytes(b"\xef\xbb\xbf" + _SMALL.encode())
    assert load_config("marked.yaml") == load_config("small.yaml")


_names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)
_rates = st.floats(min_value=1e-12, max_value=1.0)


@settings(deadline=None)
@given(
    directory=_names,
    prompts=st.lists(st.text(), max_size=3),
    rate=_rates,
    decay=st.sampled_from([6e-5, 1e-7, 0.0, 1.0]),
)
def test_dumped_configuration_is_read_back(tmp_path_factory, configure, directory, prompts, rate, decay):
    config = configure(
        {
            "run.dir": directory,
            "generate.prompts": prompts,
            "optimizer.learning_rate": rate,
            "optimizer.weight_decay": decay,
        }
    )
    file = tmp_path_factory.getbasetemp() / "round_trip.yaml"
    file.write_text(dump_config(config), encoding="utf-8")
    assert load_config(file) == config


def test_stored_mapping_is_checked_like_a_file(small):
    config = config_from_mapping(small, "step_3/config")
    assert config_from_mapping(mapping_of(config), "again") == config
    small["moh"]["active_head"] = 1
    small["base"] = "small.yaml"
    with pytest.raises(UserError) as caught:
        config_from_mapping(small, "step_3/config")
    assert [line.split(";")[0] for line in str(caught.value).splitlines()] == [
        "step_3/config: moh.active_head: unknown key",
        "step_3/config: base: unknown section",
    ]


def test_reading_a_configuration_does_not_import_torch():
    code = (
        "import sys\n"
        "from moh_megatron import cli\n"
        "from moh_megatron.config import load, parameter_count, paths, validate\n"
        "load.load_config('configs/smoke.yaml')\n"
        "print({'torch', 'numpy', 'megatron', 'deepspeed', 'transformers'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=_REPOSITORY, capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"


def test_stored_mapping_that_is_nested_too_deeply_is_refused(small):
    for _ in range(2000):
        small["deepspeed"] = {"a": small.get("deepspeed", 1)}
    with pytest.raises(UserError, match=r"^checkpoint: deepspeed: nested too deeply\. Expected at most 64 levels"):
        config_from_mapping(small, "checkpoint")
