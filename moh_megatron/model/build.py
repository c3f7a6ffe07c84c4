"""Builds this rank's Megatron-core GPTModel from a configuration, and calls it.

Legend: S sequence, B batch, H head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import init_method_normal
from torch import Tensor

from moh_megatron.config.layer_heads import layer_heads
from moh_megatron.config.schema import Config, ModelConfig
from moh_megatron.io.console import warnings_hidden
from moh_megatron.model.core_attention import CausalAttention
from moh_megatron.model.norm import RMSNorm
from moh_megatron.model.packing import PackedGPTModel, document_ends, document_positions
from moh_megatron.model.tensors import DTYPES
from moh_megatron.moh.attention import MoHSelfAttention
from moh_megatron.parallel import groups

_RECOMPUTE: dict[str, dict[str, object]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(config: Config) -> TransformerConfig:
    """Megatron-core's own configuration.

    Full weights are drawn on the CPU and then sharded, so the same seed gives the same model at every tensor-parallel
    size. Fusions that write ``main_grad`` or need CUDA are off: DeepSpeed reads ``.grad``.
    """
    model, dtype = config.model, DTYPES[config.train.precision]
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.query_groups,
        kv_channels=model.head_dim,
        layernorm_epsilon=model.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=model.init_method_std,
        output_layer_init_method=None if model.scaled_residual_init else init_method_normal(model.init_method_std),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=config.parallel.tensor,
        sequence_parallel=config.parallel.sequence,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **_RECOMPUTE[config.train.recompute],  # type: ignore[arg-type]
    )


def _block_spec(config: Config, accumulation_steps: int) -> TransformerBlockSubmodules:
    layer = get_gpt_layer_local_spec(normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention: ModuleSpec = layer.submodules.self_attention
    attention.submodules.core_attention = CausalAttention
    if config.moh.enabled:
        attention.module = MoHSelfAttention
        attention.params = {
            **attention.params,
            "moh": config.moh,
            "heads": layer_heads(config.model, config.moh),
            "loss_scale": 1 / config.model.num_layers / accumulation_steps,
        }
    return TransformerBlockSubmodules(layer_specs=[layer] * config.model.num_layers, layer_norm=RMSNorm)  # pyright: ignore[reportArgumentType]


def build_model(config: Config, accumulation_steps: int = 1) -> GPTModel:
    """This rank's part of the model, freshly initialised from the current random state.

    The process groups must exist (``parallel.groups.initialize``). The routers' losses are divided by
    ``accumulation_steps``, as the engine divides the language-model loss.
    """
    model = config.model
    model_class = PackedGPTModel if config.data.document_mask else GPTModel
    with warnings_hidden(GPTModel.__module__):  # From 0.19 on it says that it gets no new features.
        built = model_class(
            config=transformer_config(config),
            transformer_layer_spec=_block_spec(config, accumulation_steps),  # pyright: ignore[reportArgumentType]
            vocab_size=model.vocab_size,
            max_sequence_length=model.max_position_embeddings or config.train.sequence_length,
            share_embeddings_and_output_weights=model.tie_word_embeddings,
            position_embedding_type="rope",
            rotary_base=model.rotary_base,  # type: ignore[arg-type]
        )
    if model.rope_scaling is not None:
        # Megatron-core's own scaling has the constants of LLaMA 3.1 built in.
        built.rotary_pos_emb.inv_freq = inverse_frequencies(model)
    if model.vocab_padding:
        mask_padding(built.output_layer, model.tokens)
    return built


def inverse_frequencies(model: ModelConfig) -> Tensor:
    """RoPE's frequencies [H / 2], fp32, in radians a position: base ** (-2 i / H), scaled by ``model.rope_scaling``.

    llama3 follows LLaMA 3.1: of a wave that fits ``turns`` times into the original context, the part
    (turns - low) / (high - low), clamped to [0, 1], keeps its frequency; the rest is divided by ``factor``.
    """
    size, scaling = model.head_dim, model.rope_scaling
    unscaled = 1.0 / model.rotary_base ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    if scaling is None:
        return unscaled
    if scaling.type == "linear":
        return unscaled / scaling.factor
    turns = scaling.original_max_position_embeddings * unscaled / (2 * math.pi)
    kept = ((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)
    return unscaled * kept + unscaled / scaling.factor * (1 - kept)


def mask_padding(output_layer: torch.nn.Module, tokens: int) -> None:
    """Set the logits of vocabulary entries from ``tokens`` on to minus infinity, on the ranks that hold them."""

    def mask(layer: torch.nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any]:
        logits, bias = output
        width = logits.shape[-1]
        entries = torch.arange(width, device=logits.device) + groups.tp_group().rank() * width
        return logits.masked_fill(entries >= tokens, -torch.inf), bias

    output_layer.register_forward_hook(mask)


def position_ids(tokens: Tensor) -> Tensor:
    """[B, S] positions for tokens [B, S]."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


def token_losses(model: torch.nn.Module, tokens: Tensor, eos_token_id: int | None = None) -> Tensor:
    """Cross-entropy of each next token, in nats: tokens [B, S + 1] -> [B, S], the same on all tensor-parallel ranks.

    With ``eos_token_id``, for a model built with data.document_mask, attention stays inside each document and
    positions restart at its start.
    """
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return model(*model_arguments(inputs, eos_token_id), labels=labels)


def model_arguments(inputs: Tensor, eos_token_id: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Token ids, positions and attention mask for inputs [B, S]; ``eos_token_id`` as in ``token_losses``."""
    if eos_token_id is None:
        return inputs, position_ids(inputs), None
    # cu_seqlens takes the place of the mask, which Megatron-core passes to attention unread (see MoHSelfAttention).
    return inputs, document_positions(inputs, eos_token_id), document_ends(inputs, eos_token_id)


def moh_layers(model: torch.nn.Module) -> list[MoHSelfAttention]:
    """The MoH attention modules in the order of the layers; none in a dense model."""
    return [module for module in model.modules() if isinstance(module, MoHSelfAttention)]
