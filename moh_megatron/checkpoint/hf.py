"""Write a model as a Hugging Face folder that needs no package of ours, and check what was written."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from tokenizers import Tokenizer as Encoder
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from moh_megatron.checkpoint.hf_model import configuration_moh
from moh_megatron.checkpoint.hf_model.configuration_moh import MoHConfig
from moh_megatron.checkpoint.mapping import to_hf
from moh_megatron.checkpoint.model_card import model_card
from moh_megatron.config.errors import Fault, UserError
from moh_megatron.config.heads import layer_heads
from moh_megatron.config.schema import Config
from moh_megatron.data.tokenizer import TOKENIZER_CONFIG, TOKENIZER_JSON, Tokenizer, load_tokenizer

MARKER = "moh_megatron.json"
"""Names the files of an export, so that a later one may replace them and nothing else."""
MAX_SHARD_SIZE = "5GB"
_CODE = ("configuration_moh.py", "modeling_moh.py")
_AUTO_MAP = {"AutoConfig": "configuration_moh.MoHConfig", "AutoModelForCausalLM": "modeling_moh.MoHForCausalLM"}
_PROBE = "The quick brown fox, 1234 times:\n\tnaïve  façade — 漢字 🙂 </s> <0x41>."


def check_replaceable(hf_dir: Path) -> None:
    """Raise UserError unless ``hf_dir`` is absent, empty, or holds an earlier export and nothing else."""
    if not hf_dir.exists():
        return
    remedy = "Name another folder, or move this one away."
    if not hf_dir.is_dir():
        raise UserError(f"{hf_dir}: must be a folder to export into. Got a file. {remedy}")
    present = {entry.name for entry in hf_dir.iterdir()}
    if not present:
        return
    try:
        ours = {MARKER, *json.loads((hf_dir / MARKER).read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{hf_dir}: must be empty or an earlier export. Got a folder of something else. {remedy}"
        ) from None
    if stray := sorted(present - ours):
        raise UserError(f"{hf_dir}: holds files that are not of the earlier export: {', '.join(stray[:5])}. {remedy}")


@contextmanager
def replacing(hf_dir: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of ``hf_dir`` when the block ends well and vanishes when it does not.

    Raises:
        UserError: ``hf_dir`` holds something other than an earlier export.
        Fault: the disk is full or refuses.
    """
    check_replaceable(hf_dir)
    try:
        hf_dir.parent.mkdir(parents=True, exist_ok=True)
        # The folder keeps its name inside the temporary one: transformers names its copy of the code after it.
        workplace = Path(tempfile.mkdtemp(prefix=f".{hf_dir.name}.", dir=hf_dir.parent))
    except OSError as error:
        raise Fault(
            f"{hf_dir}: cannot write beside it ({error}). Name a folder on a disk that can be written."
        ) from error
    try:
        new, old = workplace / hf_dir.name, workplace / "replaced"
        new.mkdir()
        yield new
        if hf_dir.exists():
            hf_dir.rename(old)
        try:
            new.rename(hf_dir)
        except OSError:
            if old.exists():
                old.rename(hf_dir)
            raise
    except (OSError, SafetensorError) as error:
        raise Fault(
            f"{hf_dir}: the export could not be written ({error}). Free some space, or name another disk."
        ) from error
    finally:
        shutil.rmtree(workplace, ignore_errors=True)


def hf_config(config: Config, dtype: torch.dtype, eod: int, pad: int) -> LlamaConfig:
    """config.json's content: a MoHConfig, or a plain LlamaConfig for a dense model."""
    model, moh = config.model, config.moh
    fields: dict[str, Any] = {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_position_embeddings or config.train.sequence_length,
        "initializer_range": model.init_method_std,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        "tie_word_embeddings": model.tie_word_embeddings,
        # A document starts behind the token that ended the one before it.
        "bos_token_id": eod,
        "eos_token_id": eod,
        # Transformers never trains the embedding of the padding token, so the end token must not be it.
        "pad_token_id": None if pad == eod else pad,
        "dtype": dtype,
    }
    if moh.enabled:
        fields |= {
            **_heads(config),
            "moh_router": moh.router,
            "moh_gating": moh.gating,
            "moh_balance_loss": moh.balance_loss,
            "moh_balance_coefficient": moh.balance_weight,
            "moh_bias_update_rate": moh.bias_update_rate if moh.balancing == "bias" else None,
            "architectures": ["MoHForCausalLM"],
            "auto_map": _AUTO_MAP,
        }
    try:
        return MoHConfig(**fields) if moh.enabled else LlamaConfig(**fields, architectures=["LlamaForCausalLM"])
    except (ValueError, StrictDataclassError) as error:
        raise UserError(f"Transformers cannot express this model: {error}") from error


def _heads(config: Config) -> dict[str, Any]:
    """Numbers where every layer is alike and shares its first heads, else a list for each layer."""
    layers = layer_heads(config.model, config.moh)
    shared, active = [list(each.shared) for each in layers], [each.active for each in layers]
    first = list(range(len(shared[0])))
    return {
        "moh_shared_heads": len(first) if all(each == first for each in shared) else shared,
        "moh_active_heads": active[0] if len(set(active)) == 1 else active,
    }


def cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """``state`` in another precision; integers stay as they are.

    Raises:
        UserError: a tensor is not finite, or not any more; the message names it.
    """
    result = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    for name, tensor in result.items():
        if not tensor.isfinite().all():
            cause = f"too large for {dtype}: choose another dtype" if state[name].isfinite().all() else "broken weights"
            raise UserError(f"{name}: every value must be finite. Got inf or NaN ({cause}).")
    return result


def _write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(folder)
    file = folder / TOKENIZER_CONFIG
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    # Other classes rebuild the tokenizer from its vocabulary; this one takes tokenizer.json as it is.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    encoder = Encoder.from_file(str(folder / TOKENIZER_JSON))
    settings.setdefault("eos_token", encoder.id_to_token(tokenizer.eod))
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    expected = encoder.encode(_PROBE, add_special_tokens=False).ids
    # Without trust_remote_code a terminal is asked about the model's code, which the tokenizer does not even need.
    read_back = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    if (got := read_back(_PROBE, add_special_tokens=False)["input_ids"]) != expected:
        raise Fault(
            f"{folder}: transformers reads {TOKENIZER_JSON} otherwise than it was trained: {got}, not {expected}."
        )


def write_folder(
    folder: Path,
    config: Config,
    state: Mapping[str, Tensor],
    tokenizer_dir: Path,
    dtype: torch.dtype,
    *,
    step: int,
    tokens: int,
) -> None:
    """Fill an empty ``folder`` with what AutoModelForCausalLM and AutoTokenizer open; ``replacing`` puts it in place.

    Args:
        state: whole tensors under Megatron-core's names, see ``mapping.to_hf``.
        tokenizer_dir: holds the tokenizer's files.
        dtype: precision of the written weights.
        step, tokens: training so far, for the model card.

    Raises:
        UserError: weights, tokenizer and configuration do not fit.
    """
    tokenizer = load_tokenizer(tokenizer_dir)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{tokenizer_dir}: the tokenizer must have at most model.vocab_size ({config.model.vocab_size}) entries. "
            f"Got {tokenizer.vocab_size}: it is another model's."
        )
    # Parts of one fused matrix may share its memory, which safetensors does not write.
    parts = {name: part.clone() for name, part in to_hf(cast(state, dtype), config).items()}
    save_torch_state_dict(parts, folder, max_shard_size=MAX_SHARD_SIZE)
    hf_config(config, dtype, tokenizer.eod, tokenizer.pad).save_pretrained(folder)
    ends = {"bos_token_id": tokenizer.eod, "eos_token_id": tokenizer.eod, "pad_token_id": tokenizer.pad}
    GenerationConfig(**ends).save_pretrained(folder)
    if config.moh.enabled:
        for name in _CODE:
            shutil.copyfile(Path(configuration_moh.__file__).with_name(name), folder / name)
    _write_tokenizer(tokenizer, folder)
    card = model_card(config, dtype=str(dtype).removeprefix("torch."), step=step, tokens=tokens)
    (folder / "README.md").write_text(card, encoding="utf-8")
    marker = {
        "format": 1,
        "step": step,
        "tokens": tokens,
        "tokenizer_sha256": tokenizer.sha256,
        "files": sorted(os.listdir(folder)),
    }
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")


def check_tokenizer(folder: Path) -> None:
    """Raise UserError where an exported folder holds another tokenizer than it was written with."""
    marker = json.loads((folder / MARKER).read_text(encoding="utf-8")) if (folder / MARKER).is_file() else {}
    expected = marker.get("tokenizer_sha256")
    if expected is not None and (got := load_tokenizer(folder).sha256) != expected:
        raise UserError(
            f"{folder / TOKENIZER_JSON}: expected sha256 {expected}, the tokenizer the model learned with. Got {got}. "
            "Export the model again."
        )


@torch.inference_mode()
def verify_export(hf_dir: Path, reference_logits: Tensor, tokens: Tensor) -> float:
    """Reload ``hf_dir`` in fp32 and return its largest absolute difference from ``reference_logits`` [B, S, V].

    ``tokens`` is [B, S]. NaN on either side gives NaN.
    """
    model = AutoModelForCausalLM.from_pretrained(hf_dir, trust_remote_code=True, dtype=torch.float32)
    difference = torch.zeros(())
    for row, reference in zip(tokens, reference_logits, strict=True):
        logits = model(row[None], use_cache=False).logits[0]
        difference = torch.maximum(difference, (logits - reference.float()).abs().max())
    return difference.item()
