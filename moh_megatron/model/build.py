"""From a configuration to a Megatron-core GPTModel on this rank."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import init_method_normal
from torch import Tensor

from moh_megatron.config.head_layout import HeadLayout
from moh_megatron.config.layer_heads import heads_after, layer_heads
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError
from moh_megatron.model.core_attention import CausalAttention
from moh_megatron.model.dtypes import DTYPES
from moh_megatron.model.norm import RMSNorm
from moh_megatron.model.packed_gpt import PackedGPTModel
from moh_megatron.model.packing import document_ends, document_positions
from moh_megatron.model.padding import mask_padding
from moh_megatron.model.rope import inverse_frequencies
from moh_megatron.moh.attention import MoHSelfAttention
from moh_megatron.moh.backends.choice import choose_backend
from moh_megatron.moh.backends.flash import flash_refusal
from moh_megatron.moh.sparse_attention import refusal

_RECOMPUTE: dict[str, dict[str, object]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}


def transformer_config(config: Config) -> TransformerConfig:
    """Megatron-core's own configuration. Weights are drawn on the CPU, whole, and then sharded: the same seed gives
    the same model at every tensor-parallel size. Fusions that write ``main_grad`` or need CUDA are off: DeepSpeed
    reads ``.grad``."""
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

    The process groups must exist (``parallel.groups.initialize``). ``accumulation_steps`` scales the routers' losses
    as the engine scales the main one.
    """
    model = config.model
    model_class = PackedGPTModel if config.data.document_mask else GPTModel
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
        # Megatron-core's own scaling has LLaMA 3.1's constants built in.
        built.rotary_pos_emb.inv_freq = inverse_frequencies(model)
    if model.vocab_padding:
        mask_padding(built.output_layer, model.tokens)
    return built


def attention_backends(config: Config, device: torch.device, step: int | None = None) -> list[list[str]]:
    """Of each layer, what computes attention on each tensor-parallel rank, of one document as long as a sequence.

    ``auto`` as it resolves for the shares that are expected after ``step`` steps of the activation schedule (None: of
    the finished one).
    """
    model, moh, tensor = config.model, config.moh, config.parallel.tensor
    if moh.fixed_backend is not None:
        return [[moh.fixed_backend] * tensor] * model.num_layers
    layout = HeadLayout(model.num_attention_heads, model.query_groups, moh.head_layout)
    length, dtype = config.train.sequence_length, DTYPES[config.train.precision]
    return [
        [
            choose_backend(length=length, share=load * tensor / heads.count, dtype=dtype, device=device)
            for load in layout.expected_load(heads.shared, heads.active, tensor)
        ]
        for heads in heads_after(model, moh, step)
    ]


def attention_backend(config: Config, device: torch.device) -> str:
    """The backend that computes attention in training, when the activation schedule has run out.

    Layers and tensor-parallel ranks whose shares differ may take different ones: all are named then.
    """
    if config.moh.fixed_backend is not None:
        return config.moh.fixed_backend
    backends = sorted({each for layer in attention_backends(config, device) for each in layer})
    named = " or ".join(backends) + (", by the heads of a layer and rank" if len(backends) > 1 else "")
    return f"{named}, dense where documents are short" if config.data.document_mask and named != "dense" else named


def check_backend(config: Config, device: torch.device) -> None:
    """Raise UserError where ``moh.backend`` cannot compute in this precision on this device."""
    moh = config.moh
    if moh.enabled and (reason := refusal(moh.backend, DTYPES[config.train.precision], device)):
        raise UserError(f"moh.backend: {reason} Got {config.train.precision} on {device.type}; use auto or gathered.")


def attention_warning(config: Config, device: torch.device) -> str | None:
    """Why dense attention will be slow on this GPU; None where it is not, or where something else computes it."""
    if device.type != "cuda" or attention_backend(config, device) != "dense":
        return None
    model, tensor = config.model, config.parallel.tensor
    reason = flash_refusal(
        length=config.train.sequence_length,
        heads=model.num_attention_heads // tensor,
        groups=model.query_groups // tensor,
        head_dim=model.head_dim,
        dtype=DTYPES[config.train.precision],
        device=device,
    )
    return reason and f"attention runs without the flash kernel, slower and with more memory: {reason}"


def position_ids(tokens: Tensor) -> Tensor:
    """[B, S] positions for tokens [B, S]."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


def token_losses(model: torch.nn.Module, tokens: Tensor, eos_token_id: int | None = None) -> Tensor:
    """Cross-entropy of each next token, nats: tokens [B, S + 1] -> [B, S], the same on all tensor-parallel ranks.

    With ``eos_token_id``, for a model built with data.document_mask, attention stays inside each document and
    positions restart there.
    """
    inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    return model(*model_arguments(inputs, eos_token_id), labels=labels)


def model_arguments(inputs: Tensor, eos_token_id: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a model is called with for tokens [B, S]; ``eos_token_id`` as in ``token_losses``."""
    if eos_token_id is None:
        return inputs, position_ids(inputs), None
    # In the place of the mask: Megatron-core hands it to attention unread (see MoHSelfAttention).
    return inputs, document_positions(inputs, eos_token_id), document_ends(inputs, eos_token_id)


def moh_layers(model: torch.nn.Module) -> list[MoHSelfAttention]:
    """The MoH attention modules, first layer first; none in a dense model."""
    return [module for module in model.modules() if isinstance(module, MoHSelfAttention)]
