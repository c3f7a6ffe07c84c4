"""Builds config.json of an exported model."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import LlamaConfig

from moh_megatron.checkpoint.hf.hf_extras import SpecialTokenIds
from moh_megatron.checkpoint.hf.hf_model.configuration_moh import MoHConfig
from moh_megatron.config.layer_heads import layer_heads, routing_groups
from moh_megatron.config.schema import Config, ModelConfig
from moh_megatron.io.errors import UserError

CODE = ("configuration_moh.py", "modeling_moh.py")
AUTO_MAP = {"AutoConfig": "configuration_moh.MoHConfig", "AutoModelForCausalLM": "modeling_moh.MoHForCausalLM"}


def hf_config(config: Config, dtype: torch.dtype, token_ids: SpecialTokenIds) -> LlamaConfig:
    """Build config.json: a MoHConfig, or a plain LlamaConfig for a dense model.

    Raises:
        UserError: transformers cannot express the model.
    """
    model, moh = config.model, config.moh
    fields: dict[str, Any] = {
        "vocab_size": model.tokens,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_position_embeddings or config.train.sequence_length,
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": _rope_parameters(model),
        "tie_word_embeddings": model.tie_word_embeddings,
        "bos_token_id": token_ids.bos,
        "eos_token_id": token_ids.eos,
        "pad_token_id": token_ids.pad,
        "dtype": dtype,
    }
    if moh.enabled:
        groups = routing_groups(model, moh)
        fields |= {
            **_heads(config),
            "moh_routing_groups": groups,
            "moh_router": moh.router,
            "moh_gating": moh.gating,
            "moh_gate_softmax": moh.gate_softmax if groups > 1 else "layer",
            "moh_balance_loss": moh.balance_loss,
            "moh_balance_coefficient": moh.balance_weight,
            "moh_bias_update_rate": moh.bias_update_rate if moh.balancing == "bias" else None,
            "architectures": ["MoHForCausalLM"],
            "auto_map": AUTO_MAP,
        }
    try:
        return MoHConfig(**fields) if moh.enabled else LlamaConfig(**fields, architectures=["LlamaForCausalLM"])
    except (ValueError, StrictDataclassError) as error:
        raise UserError(f"Transformers cannot express this model: {error}") from error


def _rope_parameters(model: ModelConfig) -> dict[str, Any]:
    scaling, theta = model.rope_scaling, {"rope_theta": model.rotary_base}
    if scaling is None:
        return {"rope_type": "default"} | theta
    if scaling.type == "linear":
        return {"rope_type": "linear", "factor": scaling.factor} | theta
    values = asdict(scaling)
    return {"rope_type": values.pop("type")} | values | theta


def _heads(config: Config) -> dict[str, Any]:
    """Numbers where all layers are equal and share their first heads, else lists with an entry for each layer."""
    layers = layer_heads(config.model, config.moh)
    shared, active = [list(layer.shared) for layer in layers], [layer.active for layer in layers]
    first_heads = list(range(len(shared[0])))
    return {
        "moh_shared_heads": len(first_heads) if all(heads == first_heads for heads in shared) else shared,
        "moh_active_heads": active[0] if len(set(active)) == 1 else active,
    }
