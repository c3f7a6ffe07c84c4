"""moh-convert hf-to-megatron: the checkpoint computes what the model of transformers computes."""

import io
import json

import pytest
import sentencepiece
import torch
from support.convert import LLAMA3, llama_folder, run_convert
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaForCausalLM

from moh_megatron.checkpoint import layout
from moh_megatron.checkpoint.hf.hf_config_reader import HFConfigReader
from moh_megatron.model.build import token_losses
from moh_megatron.model.single import build_single_process, logits

pytestmark = pytest.mark.usefixtures("process_groups")


@pytest.mark.parametrize(
    ("settings", "transformers_4"),
    [
        ({"num_key_value_heads": 8}, True),
        ({"tie_word_embeddings": True}, False),
        (LLAMA3 | {"tie_word_embeddings": True}, True),
        (LLAMA3 | {"head_dim": 32, "hidden_act": "swish"}, False),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, True),
        ({"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 144}, True),
    ],
    ids=["llama_2", "tied", "llama_3_2", "head_dim_and_swish", "linear", "9_heads"],
)
@pytest.mark.parametrize("tensor", [1, 2, 3])
def test_imported_model_computes_the_logits_of_transformers(settings, transformers_4, tensor, tmp_path, capsys):
    hf_dir, save_dir = llama_folder(tmp_path / "hf", transformers_4=transformers_4, **settings), tmp_path / "native"
    model = LlamaForCausalLM.from_pretrained(hf_dir).eval()
    capsys.readouterr()  # Loading it, Transformers may import DeepSpeed, which writes to standard output.
    arguments = ("hf-to-megatron", "--hf-dir", hf_dir, "--save-dir", save_dir, f"parallel.tensor={tensor}")
    if model.config.num_key_value_heads % tensor:
        assert run_convert(*arguments) == 2
        assert "parallel.tensor must divide model.num_attention_heads" in capsys.readouterr().err
        assert not save_dir.exists()
        return
    assert run_convert(*arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{hf_dir} is now the checkpoint {save_dir}.\n"
    warnings = [line for line in captured.err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert "has no tokenizer" in warnings[0]
    checkpoint = layout.resolve_checkpoint(save_dir)
    config = layout.read_config(checkpoint)
    assert (config.parallel.tensor, config.model.tokens) == (tensor, model.config.vocab_size)
    assert config.model.vocab_size % tensor == 0
    tokens = torch.randint(model.config.vocab_size, (2, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens).logits
    ours = build_single_process(config, layout.read_weights(checkpoint))
    got = logits(ours, tokens)
    assert expected.std() > 0.1
    assert (got[..., model.config.vocab_size :] == -torch.inf).all()
    difference = (got[..., : model.config.vocab_size] - expected).norm() / expected.norm()
    assert difference < 1e-5
    labels = tokens[:, 1:].flatten()
    losses = cross_entropy(expected[:, :-1].flatten(0, 1), labels, reduction="none").view(2, -1)
    torch.testing.assert_close(token_losses(ours, tokens), losses, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [("model", "rotary_base", 1e4), ("model", "norm_epsilon", 0.1), ("moh", "active_heads", 4)],
)
def test_verify_detects_misread_config_json(section, key, value, tmp_path, monkeypatch, capsys):
    hf_dir = llama_folder(tmp_path / "hf", **LLAMA3)
    if section == "moh":  # The source is an export of this project.
        routed = ("moh.enabled=true", "moh.router=query_norm", "moh.shared_heads=2", "moh.active_heads=6")
        assert run_convert("hf-to-megatron", "--hf-dir", hf_dir, "--save-dir", tmp_path / "moh", *routed) == 0
        hf_dir = tmp_path / "export"
        assert run_convert("megatron-to-hf", "--load-dir", tmp_path / "moh", "--hf-dir", hf_dir) == 0
    into = ("hf-to-megatron", "--hf-dir", hf_dir, "--save-dir", tmp_path / "native", "--verify")
    sections = HFConfigReader.sections
    monkeypatch.setattr(
        HFConfigReader, "sections", lambda self: (read := sections(self)) | {section: read[section] | {key: value}}
    )
    assert run_convert(*into) == 1
    assert "logits differ from those of" in capsys.readouterr().err
    assert not (tmp_path / "native").exists()
    monkeypatch.setattr(HFConfigReader, "sections", sections)
    assert run_convert(*into) == 0


@pytest.mark.parametrize(
    ("settings", "before", "after"),
    [({"add_bos_token": True}, [1], []), ({"add_bos_token": True, "add_eos_token": True}, [1], [2]), ({}, [], [])],
    ids=["bos", "bos_and_eos", "neither"],
)
def test_export_of_imported_sentencepiece_folder_puts_the_same_special_tokens_around_a_text(
    settings, before, after, tmp_path
):
    """Like LLaMA-2's folder: tokenizer.model without a tokenizer.json; <s> is 1, </s> is 2."""
    hf_dir, save_dir, export = llama_folder(tmp_path / "hf", vocab_size=300), tmp_path / "native", tmp_path / "export"
    text, tokenizer = "some words to learn", io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=iter([text] * 99),
        model_writer=tokenizer,
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    (hf_dir / "tokenizer.model").write_bytes(tokenizer.getvalue())
    (hf_dir / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **settings}))
    assert run_convert("hf-to-megatron", "--hf-dir", hf_dir, "--save-dir", save_dir) == 0
    assert run_convert("megatron-to-hf", "--load-dir", save_dir, "--hf-dir", export) == 0
    inner = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.getvalue()).encode(text)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    for folder in (hf_dir, export):
        opened = AutoTokenizer.from_pretrained(folder)
        assert opened(text)["input_ids"] == [*before, *inner, *after], folder
        assert opened(text, add_special_tokens=False)["input_ids"] == inner, folder
