"""moh-convert megatron-to-hf, in this process, on checkpoints as a training run writes them."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moh_megatron.checkpoint import mapping
from moh_megatron.checkpoint.hf import convert
from moh_megatron.checkpoint.hf.verify import verification_tokens
from moh_megatron.checkpoint.manifest import Manifest, Topology, relative_files, write_manifest
from moh_megatron.checkpoint.mapping import Rule, rules, split_shard
from moh_megatron.config.load import dump_config
from moh_megatron.config.schema import (
    Config,
    ModelConfig,
    MoHConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from moh_megatron.data.tokenizer.sentencepiece_bpe import train_tokenizer
from moh_megatron.io.hashing import hash_file

pytestmark = pytest.mark.usefixtures("process_groups")

SCRIPT = Path(__file__).parents[2] / "pipelines" / "convert.py"


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["some words to learn "] * 9, vocab_size=280, character_coverage=1.0, out_dir=folder)
    return folder


def make_config(heads: int = 8, groups: int = 4, tie: bool = False, precision: Any = "fp32", **moh: Any) -> Config:
    settings: dict[str, Any] = {"shared_heads": 2, "active_heads": 4} | moh
    return Config(
        run=RunConfig(dir="unused"),
        model=ModelConfig(
            num_layers=2,
            hidden_size=8 * heads,
            ffn_hidden_size=48,
            num_attention_heads=heads,
            num_query_groups=groups,
            vocab_size=280,
            tie_word_embeddings=tie,
        ),
        moh=MoHConfig(**settings),
        parallel=ParallelConfig(tensor=2 if groups % 2 == 0 else 1),
        train=TrainConfig(sequence_length=48, total_tokens=48, global_batch_size=1, precision=precision),
        optimizer=OptimizerConfig(learning_rate=1e-3),
    )


def random_tensor(rule: Rule, generator: torch.Generator) -> torch.Tensor:
    if rule.dtype is not None:
        return torch.randint(-40, 41, rule.shape, generator=generator, dtype=rule.dtype)
    return 0.15 * torch.randn(rule.shape, generator=generator)


def write_checkpoint(root: Path, config: Config, tokenizer_dir: Path, scale: float = 1.0) -> Path:
    """Write a run folder with one checkpoint of random weights, sharded for ``config.parallel.tensor``."""
    folder = root / "checkpoints" / "step_00000007"
    (folder / "weights").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    for file in tokenizer_dir.iterdir():
        (folder / "tokenizer" / file.name).write_bytes(file.read_bytes())
    (folder / "config.yaml").write_text(dump_config(config))
    generator = torch.Generator().manual_seed(11)
    size = config.parallel.tensor
    full_tensors = {rule: scale * random_tensor(rule, generator) for rule in rules(config)}
    for rank in range(size):
        shards = {
            rule.megatron: split_shard(tensor, rule.dim, rule.stride, rank, size).contiguous()
            for rule, tensor in full_tensors.items()
        }
        save_file(shards, folder / "weights" / f"tp_rank_{rank:02d}_of_{size:02d}.safetensors")
    files = {name: hash_file(folder / name) for name in relative_files(folder)}
    write_manifest(folder, Manifest(7, 336, Topology(size, 1, 1, config.train.precision), "", {}, files))
    return folder


def run_script(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "megatron-to-hf", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.parametrize(
    "config",
    [
        make_config(),
        make_config(gating="paper", shared_heads=1),
        make_config(shared_heads=0, head_layout="contiguous"),
        make_config(heads=9, groups=3, tie=True, router="query_norm", active_heads=5),
        make_config(enabled=False),
        make_config(shared_heads=8, active_heads=8),
        make_config(shared_heads=4, shared_placement="spread", active_heads="75%", activation_schedule_steps=1),
        make_config(shared_heads=((7, 2), (0, 5, 3)), active_heads=(3, 6), balancing="bias", bias_update_rate=0.03),
        make_config(shared_heads=((1,), (6, 0)), active_heads=5, balancing="bias", router="query_norm"),
    ],
    ids=[
        "learned",
        "paper_one_shared",
        "none_shared_contiguous",
        "query_norm_9_in_3_tied",
        "dense",
        "all_shared",
        "spread",
        "lists_bias",
        "lists_bias_query_norm",
    ],
)
def test_exported_model_computes_the_logits_of_the_checkpoint(config, tokenizer_dir, tmp_path):
    checkpoint = write_checkpoint(tmp_path, config, tokenizer_dir)
    difference = convert.megatron_to_hf(checkpoint, tmp_path / "hf")
    assert difference is not None
    assert difference < 1e-5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    tokens = verification_tokens(config, 0)
    assert tokens.shape == (2, 48)
    with torch.no_grad():
        assert model(tokens).logits.std() > 0.1, "nearly constant logits would agree whatever the weights"


def test_command_exports_run_and_updates_its_summary(tokenizer_dir, tmp_path, monkeypatch, capsys):
    write_checkpoint(tmp_path, make_config(), tokenizer_dir)
    summary, folder = tmp_path / "summary.json", tmp_path / "hf"
    summary.write_text('{"tokens": 336}')
    arguments = ("--load-dir", tmp_path, "--hf-dir", folder)

    assert run_script(monkeypatch, *arguments, "--dry-run") == 0
    assert "num_query_groups: 4" in capsys.readouterr().out
    assert not folder.exists()

    assert run_script(monkeypatch, *arguments, "--dtype", "bf16", "--summary", summary, "--json") == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["hf_max_logit_diff"] < 1e-5
    assert json.loads(summary.read_text()) == {"tokens": 336, "hf_max_logit_diff": printed["hf_max_logit_diff"]}
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert "7 steps (336 tokens)" in (folder / "README.md").read_text()


def test_command_ends_in_a_sentence_that_names_both_sides_and_the_difference(
    tokenizer_dir, tmp_path, monkeypatch, capsys
):
    checkpoint = write_checkpoint(tmp_path, make_config(), tokenizer_dir)
    assert run_script(monkeypatch, "--load-dir", tmp_path, "--hf-dir", tmp_path / "hf") == 0
    (line,) = capsys.readouterr().out.splitlines()
    before, _, difference = line.removesuffix(".").rpartition(" ")
    assert before == (
        f"{checkpoint} is now the Hugging Face folder {tmp_path / 'hf'}. "
        "The logits of the reloaded folder differ from the source's by at most"
    )
    assert float(difference) < 1e-5

    monkeypatch.setattr(convert.hf_import, "auto_verify", lambda config: False)
    assert run_script(monkeypatch, "--load-dir", tmp_path, "--hf-dir", tmp_path / "hf") == 0
    assert capsys.readouterr().out.endswith("The logits were not compared; --verify compares them.\n")


def test_wrong_export_is_a_fault_and_leaves_nothing(tokenizer_dir, tmp_path, monkeypatch, capsys):
    write_checkpoint(tmp_path, make_config(), tokenizer_dir)
    split_qkv = mapping.split_qkv

    def wrong(*arguments):
        query, key, value = split_qkv(*arguments)
        return query.roll(8, 0), key, value

    monkeypatch.setattr(mapping, "split_qkv", wrong)
    assert run_script(monkeypatch, "--load-dir", tmp_path, "--hf-dir", tmp_path / "hf") == 1
    captured = capsys.readouterr().err
    assert "the exported model's logits differ from the checkpoint's" in captured
    assert "Traceback" not in captured
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_user_errors_exit_with_2_and_one_message(tokenizer_dir, tmp_path, monkeypatch, capsys):
    checkpoint = write_checkpoint(tmp_path / "run", make_config(), tokenizer_dir, scale=1e6)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("mine")
    for load, folder, message in (
        (tmp_path / "absent", tmp_path / "hf", "absent: no such folder"),
        (tmp_path / "run", tmp_path / "taken", "must be empty or an earlier export"),
        (tmp_path / "run", checkpoint / "hf", "/hf: must lie outside what is converted"),
        (tmp_path / "run", tmp_path / "hf", "every value must be finite"),
    ):
        assert run_script(monkeypatch, "--load-dir", load, "--hf-dir", folder, "--dtype", "fp16") == 2
        captured = capsys.readouterr().err
        assert message in captured
        assert "Traceback" not in captured
    absent = ("--load-dir", tmp_path / "run", "--hf-dir", tmp_path / "hf", "--summary", tmp_path / "no.json")
    assert run_script(monkeypatch, *absent) == 2
    assert "no.json: no such file. Expected the summary.json of a run." in capsys.readouterr().err
    assert (tmp_path / "taken" / "thesis.tex").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "taken"]
    assert not (checkpoint / "hf").exists()
