"""Mistakes in arguments, paths and configurations are refused before anything slow is imported and weights are read."""

from __future__ import annotations

import json

import pytest
from support.early import HF_CONFIG, run_without_slow_imports

DENSE = ["moh.enabled=false"]
CONFIG = """
run: {{dir: {run}}}
model: {{num_layers: 1, hidden_size: {hidden}, ffn_hidden_size: 16, num_attention_heads: 4, vocab_size: 320}}
moh: {moh}
data: {{inputs: [text.txt], dir: data}}
train: {{sequence_length: 16, total_tokens: 1024, global_batch_size: 2}}
optimizer: {{learning_rate: 1e-3}}
"""
MOH = "{shared_heads: 1, active_heads: 2}"
TO_HF = ("convert", "megatron-to-hf", "--load-dir")
FROM_HF = ("convert", "hf-to-megatron", "--hf-dir")
OFFICIAL = ("convert", "official-to-hf", "--load-dir")
CASES: list[tuple[tuple[str, ...], str]] = [
    ((*TO_HF, "nowhere", "--hf-dir", "new"), "nowhere: no such folder. Expected a checkpoint"),
    ((*TO_HF, "text.txt", "--hf-dir", "new"), "text.txt: a file. Expected a checkpoint"),
    ((*TO_HF, "empty", "--hf-dir", "new"), "empty holds no complete checkpoint"),
    ((*TO_HF, "llama", "--hf-dir", "new"), "Got a Hugging Face folder; make one of it: moh-convert hf-to-megatron"),
    ((*TO_HF, "moh_run", "--hf-dir", "llama"), "llama: must be empty or an earlier export"),
    ((*TO_HF, "moh_run", "--hf-dir", "text.txt"), "text.txt: must be a folder to export into. Got a file"),
    ((*TO_HF, "moh_run", "--hf-dir", "moh_run/checkpoints/step_00000001/hf"), "must lie outside what is converted"),
    ((*TO_HF, "moh_run", "--hf-dir", "new", "--format", "llama"), "--format llama needs a dense model"),
    ((*TO_HF, "moh_run", "--hf-dir", "new", "--format", "gguf"), "invalid choice: 'gguf'"),
    ((*TO_HF, "moh_run", "--hf-dir", "new", "--dtype", "int8"), "invalid choice: 'int8'"),
    ((*TO_HF, "moh_run", "--hf-dir", "new", "--summary", "none.json"), "none.json"),
    ((*FROM_HF, "nowhere", "--save-dir", "new"), "nowhere: no such folder. Expected the folder of a Hugging Face"),
    ((*FROM_HF, "llama", "--save-dir", "moh_run"), "moh_run: must be new or empty"),
    ((*FROM_HF, "llama", "--save-dir", "llama/new"), "must lie outside what is converted"),
    ((*FROM_HF, "empty", "--save-dir", "new"), "empty: holds no weights. Expected model.safetensors"),
    ((*FROM_HF, "moh_run", "--save-dir", "new"), "holds no weights. Expected model.safetensors"),
    ((*FROM_HF, "pickles", "--save-dir", "new"), "the weights are pickles"),
    ((*FROM_HF, "no_config", "--save-dir", "new"), "no_config/config.json"),
    ((*FROM_HF, "gpt2", "--save-dir", "new"), "another architecture"),
    ((*FROM_HF, "official", "--save-dir", "new"), "use official-to-hf, and import what it makes"),
    ((*FROM_HF, "llama", "--save-dir", "new", "model.hiden_size=8"), "did you mean 'hidden_size'?"),
    ((*FROM_HF, "llama", "--save-dir", "new", "model.hidden_size=16"), "and the configuration disagree"),
    ((*FROM_HF, "llama", "--save-dir", "new", "--config", "none.yaml"), "none.yaml: no such file"),
    ((*OFFICIAL, "nowhere", "--hf-dir", "new"), "nowhere: no such folder"),
    ((*OFFICIAL, "exported", "--hf-dir", "new"), "which says itself how its heads are routed; use hf-to-megatron"),
    ((*OFFICIAL, "llama", "--hf-dir", "moh_run"), "moh_run: must be empty or an earlier export"),
    (("continue_tune", "moh.yaml"), "train.init_from must name the checkpoint to tune. Got null"),
    (("continue_tune", "moh.yaml", "train.init_from=nowhere"), "nowhere: no such folder. Expected a checkpoint"),
    (("continue_tune", "moh.yaml", "train.init_from=llama"), "Got a Hugging Face folder; make one of it"),
    (("continue_tune", "moh.yaml", "train.init_from=empty"), "empty holds no complete checkpoint"),
    (("continue_tune", "moh.yaml", "train.init_form=dense_run"), "did you mean 'init_from'?"),
    (("continue_tune", "moh.yaml", "train.init_from=dense_run"), "No prepared data at data"),
    (("continue_tune", "moh.yaml", "train.init_from=moh_run"), "No prepared data at data"),
    (("continue_tune", "moh.yaml", "--prepare", "train.init_from=wide_run"), "model.hidden_size: expected 16, got 8"),
    (("continue_tune", "moh.yaml", "train.init_from=wide_moh_run"), "model.hidden_size: expected 16, got 8"),
    (
        ("continue_tune", "moh.yaml", "--prepare", "train.init_from=dense_run", "moh.gating=raw"),
        "moh.gating",
    ),
    (
        ("continue_tune", "moh.yaml", "--prepare", "train.init_from=dense_run", "run.dir=started"),
        "started/start: must be new or empty. Got something there; name another run.dir",
    ),
    (
        ("continue_tune", "moh.yaml", "train.init_from=dense_run", "distillation.teacher=nowhere"),
        "nowhere: no such folder. Expected a checkpoint",
    ),
    (("generate", "empty"), "empty holds no complete checkpoint"),
    (("generate", "llama", "generate.temprature=0"), "did you mean 'temperature'?"),
    (("generate", "gpt2"), "another architecture"),
    (("generate", "moh.yaml", "generate.load=empty"), "empty holds no complete checkpoint"),
    (("evaluate", "empty"), "empty holds no complete checkpoint"),
    (("plan", "moh.yaml", "--world-size", "2", "model.hiden_size=8"), "did you mean 'hidden_size'?"),
    (("plan", "none.yaml", "--world-size", "2"), "none.yaml: no such file"),
    (("prepare_data", "moh.yaml", "data.inputs=[none.txt]"), "none.txt"),
    (("prepare_data", "moh.yaml", "tokenizer.path=none"), "none"),
    (("prepare_data", "moh.yaml", "--source", "books"), "books"),
    (("prepare_data", "moh.yaml", "--tokenizer", "llama"), "llama"),
    (("prepare_data", "moh.yaml", "data.inputs=[]"), "data.inputs"),
]


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], tuple[int, str]]:
    """Exit code and errors of every command, which one process runs."""
    folder = tmp_path_factory.mktemp("early")
    (folder / "text.txt").write_text("Some text.\n" * 50)
    (folder / "empty").mkdir()
    (folder / "started" / "start").mkdir(parents=True)
    (folder / "started" / "start" / "notes.txt").touch()
    (folder / "moh.yaml").write_text(CONFIG.format(run="run", hidden=8, moh=MOH))
    for run, hidden, moh in (
        ("moh_run", 8, MOH),
        ("dense_run", 8, "{enabled: false}"),
        ("wide_run", 16, "{enabled: false}"),
        ("wide_moh_run", 16, MOH),
    ):
        checkpoint = folder / run / "checkpoints" / "step_00000001"
        (checkpoint / "weights").mkdir(parents=True)
        (checkpoint / "config.yaml").write_text(CONFIG.format(run=run, hidden=hidden, moh=moh))
    for name, config, marker in (
        ("llama", HF_CONFIG, None),
        ("exported", HF_CONFIG | {"model_type": "moh_llama", "architectures": ["MoHForCausalLM"]}, "moh"),
        ("official", HF_CONFIG, "official"),
        ("gpt2", {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}, None),
        ("no_config", None, None),
    ):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").touch()
        if config is not None:
            (folder / name / "config.json").write_text(json.dumps(config))
        if marker is not None:
            (folder / name / "moh_megatron.json").write_text(json.dumps({"form": marker, "files": []}))
    (folder / "pickles").mkdir()
    (folder / "pickles" / "pytorch_model.bin").touch()
    before = sorted(folder.rglob("*"))
    commands = [case for case, _ in CASES]
    found = dict(zip(commands, run_without_slow_imports(commands, folder), strict=True))
    assert sorted(folder.rglob("*")) == before, "a refused command leaves nothing behind"
    return found


@pytest.mark.parametrize(("command", "expected"), CASES, ids=lambda value: " ".join(value)[:60])
def test_mistake_is_refused_before_anything_slow_is_imported(
    refusals: dict[tuple[str, ...], tuple[int, str]], command: tuple[str, ...], expected: str
) -> None:
    code, errors = refusals[command]
    assert "Traceback" not in errors
    assert expected in errors
    assert code == 2
