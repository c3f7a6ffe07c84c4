"""Describes SkyworkAI's published ("official") form of MoH-LLaMA: LLaMA's names and settings.

Its modelling file hard-codes the routing: it ranks heads by query norm, shares the first half of them and lets each
token choose a quarter. Its config.json, of transformers 4.40.2, does not mention that.
"""

from __future__ import annotations

from typing import Any

import torch

from moh_megatron.checkpoint.hf.hf_extras import SpecialTokenIds
from moh_megatron.config.layer_heads import layer_heads, routing_groups
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError

_HEADS_DIVISOR = 4
"""The number of heads must be a multiple of 4: half of them are shared, a quarter is chosen."""

_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "pretraining_tp": 1,
    "use_cache": True,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "return_dict": True,
    "output_hidden_states": False,
    "output_attentions": False,
    "torchscript": False,
    "use_bfloat16": False,
    "tf_legacy_loss": False,
    "pruned_heads": {},
    "chunk_size_feed_forward": 0,
    "is_encoder_decoder": False,
    "is_decoder": False,
    "cross_attention_hidden_size": None,
    "add_cross_attention": False,
    "tie_encoder_decoder": False,
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "early_stopping": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "num_return_sequences": 1,
    "output_scores": False,
    "return_dict_in_generate": False,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "remove_invalid_values": False,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "architectures": ["LlamaForCausalLM"],
    "finetuning_task": None,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "label2id": {"LABEL_0": 0, "LABEL_1": 1},
    "tokenizer_class": None,
    "prefix": None,
    "sep_token_id": None,
    "decoder_start_token_id": None,
    "task_specific_params": None,
    "problem_type": None,
    "transformers_version": "4.40.2",
    "model_type": "llama",
}
"""What LlamaConfig of transformers 4.40.2 writes besides the model's own settings."""


def skywork_moh_section(heads: int) -> dict[str, Any]:
    """Return the section moh of a model in the official form.

    Raises:
        UserError: a quarter of ``heads`` is no whole number.
    """
    if heads % _HEADS_DIVISOR:
        raise UserError(f"The official form needs num_attention_heads divisible by {_HEADS_DIVISOR}. Got {heads}.")
    shared, chosen = heads // 2, heads // _HEADS_DIVISOR
    return {"enabled": True, "router": "query_norm", "shared_heads": shared, "active_heads": shared + chosen}


def skywork_config(config: Config, dtype: torch.dtype, token_ids: SpecialTokenIds) -> dict[str, Any]:
    """Build config.json for the official modelling file.

    Raises:
        UserError: the official file cannot compute this model.
    """
    model, moh = config.model, config.moh
    heads = model.num_attention_heads
    try:
        expected = skywork_moh_section(heads)
    except UserError as error:
        raise UserError(f"--format official: {error} Use --format moh.") from None
    same_heads = all(
        layer.shared == tuple(range(expected["shared_heads"])) and layer.active == expected["active_heads"]
        for layer in layer_heads(model, moh)
    )
    whole_layer = routing_groups(model, moh) == 1
    if not (moh.enabled and moh.router == "query_norm" and moh.balancing == "loss" and whole_layer and same_heads):
        raise UserError(
            f"--format official needs moh.router query_norm without biases, moh.routing_groups 1, the first "
            f"{expected['shared_heads']} heads shared and {expected['active_heads']} active in every layer: all else "
            f"is hard-coded there. Got moh.enabled {moh.enabled}, moh.router {moh.router}, moh.balancing "
            f"{moh.balancing}, moh.routing_groups {moh.routing_groups}, moh.shared_heads {moh.shared_heads}, "
            f"moh.active_heads {moh.active_heads}; use --format moh."
        )
    if model.head_dim * heads != model.hidden_size:
        raise UserError(
            f"--format official needs heads of model.hidden_size / model.num_attention_heads channels: LlamaConfig "
            f"of transformers 4.40.2 has no head_dim. Got {model.head_dim}; use --format moh."
        )
    scaling = model.rope_scaling
    if scaling is not None and scaling.type != "linear":
        raise UserError(
            f"--format official needs model.rope_scaling null or linear: transformers 4.40.2 knows no "
            f"{scaling.type}. Use --format moh."
        )
    return _DEFAULTS | {
        "vocab_size": model.tokens,
        "max_position_embeddings": model.max_position_embeddings or config.train.sequence_length,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": model.query_groups,
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rotary_base,
        "rope_scaling": None if scaling is None else {"type": scaling.type, "factor": scaling.factor},
        "tie_word_embeddings": model.tie_word_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "bos_token_id": token_ids.bos,
        "eos_token_id": token_ids.eos,
        "pad_token_id": token_ids.pad,
    }
