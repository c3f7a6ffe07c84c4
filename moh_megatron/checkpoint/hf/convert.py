"""Converts checkpoints and official folders to Hugging Face folders, and compares the result with its source."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from moh_megatron.checkpoint import layout
from moh_megatron.checkpoint.hf import hf_export, hf_folder, hf_import
from moh_megatron.checkpoint.hf.hf_config_reader import HFConfigReader
from moh_megatron.checkpoint.hf.hf_extras import HFExtras, read_extras
from moh_megatron.checkpoint.hf.hf_import_config import import_config, require_official
from moh_megatron.checkpoint.hf.hf_reader import open_weights
from moh_megatron.checkpoint.hf.skywork import skywork_moh_section
from moh_megatron.checkpoint.hf.weight_readers import HFSource
from moh_megatron.checkpoint.mapping import rules
from moh_megatron.checkpoint.weights import open_stored
from moh_megatron.config.schema import Config
from moh_megatron.model.tensors import DTYPES

logger = logging.getLogger(__name__)


def megatron_to_hf(
    checkpoint: Path,
    hf_dir: Path,
    dtype: str | None = None,
    *,
    form: hf_folder.Form = "moh",
    verify: bool = False,
) -> float | None:
    """Export ``checkpoint`` to ``hf_dir``; returns the largest absolute difference of the logits, if it was measured.

    Args:
        checkpoint: one complete checkpoint.
        dtype: fp32, bf16 or fp16; None keeps the precision of each tensor.
        form: see ``hf_export.write_folder``.
        verify: open both sides in fp32, the checkpoint's weights rounded to ``dtype`` first, and compare them layer by
            layer. Models of up to ``AUTO_VERIFY_PARAMETERS`` parameters are always compared.

    Raises:
        UserError: the checkpoint, its tokenizer and its configuration do not fit together, or ``hf_dir`` holds
            something other than an earlier export.
        Fault: the reloaded model differs by ``TOLERANCE`` or more, or writing fails; ``hf_dir`` is left unchanged.
    """
    config, manifest = layout.read_config(checkpoint), layout.read_state(checkpoint)
    precision = None if dtype is None else DTYPES[dtype]
    hf_folder.check_replaceable(hf_dir, checkpoint)
    with hf_export.atomic_export(hf_dir) as folder:
        with open_stored(checkpoint, config) as source:
            source.check_complete(config)
            hf_export.write_folder(
                folder,
                config,
                source,
                layout.tokenizer_folder(checkpoint),
                precision,
                step=manifest.step,
                tokens=manifest.tokens,
                form=form,
            )
        if not (verify or hf_import.auto_verify(config)):
            return None
        weights = layout.read_weights(checkpoint)
        return _verify_export(config, weights, precision, hf_dir, folder, form)


def official_to_hf(
    official_dir: Path,
    hf_dir: Path,
    dtype: str | None = None,
    *,
    allow_pickle: bool = False,
    verify: bool = False,
) -> float | None:
    """Convert a model in SkyworkAI's published form to a folder whose config.json states how heads are routed.

    Args:
        verify: open the folder in fp32, and compare it layer by layer with this project's own model of the same
            weights; see ``megatron_to_hf``, also for the returned value.

    Raises:
        UserError: the folder is broken, its weights do not fit its config.json, or ``hf_dir`` holds something other
            than an earlier export.
        Fault: the two differ by ``TOLERANCE`` or more, or writing fails.
    """
    precision = None if dtype is None else DTYPES[dtype]
    hf_folder.check_replaceable(hf_dir, official_dir)
    with open_weights(official_dir, allow_pickle=allow_pickle) as weights:
        reader = HFConfigReader(official_dir)
        require_official(reader, official_dir)
        heads = reader.sections()["model"]["num_attention_heads"]
        overrides = [f"moh.{key}={str(value).lower()}" for key, value in skywork_moh_section(heads).items()]
        config = import_config(official_dir, hf_dir, None, overrides, torch.bfloat16 in weights.dtypes)
        # Nothing distinguishes a folder of the official form from a dense LLaMA.
        logger.info(
            f"{official_dir} is read as a MoH model by query norm: the first {config.moh.shared_heads} of {heads} "
            f"heads shared, {config.moh.active_heads} active."
        )
        hf_import.check_weights(weights, {}, config)
        tokenizer = hf_import.find_tokenizer(official_dir, config)
        extras = HFExtras(tokenizer, read_extras(official_dir))
        hf_import.check_extras(official_dir, extras, config.model.tokens)
        source = HFSource(weights, {})
        with hf_export.atomic_export(hf_dir) as folder:
            hf_export.write_folder(folder, config, source, official_dir, precision, step=0, tokens=0)
            if not (verify or hf_import.auto_verify(config)):
                return None
            state = {rule.megatron: source.full_tensor(rule).clone() for rule in rules(config)}
            return _verify_export(config, state, precision, hf_dir, folder, "moh")


def _verify_export(
    config: Config,
    weights: Mapping[str, Tensor],
    precision: torch.dtype | None,
    hf_dir: Path,
    folder: Path,
    form: hf_folder.Form,
) -> float:
    """Compare ``weights``, rounded to ``precision``, with ``folder``, which is to become ``hf_dir``.

    Returns the largest difference of the logits; raises Fault if it is too large.
    """
    # Imported here, because Megatron-core takes long to load.
    from moh_megatron.checkpoint.hf import transformers_io
    from moh_megatron.checkpoint.hf import verify as verification

    if precision is not None:
        weights = {
            name: tensor.to(precision) if tensor.is_floating_point() else tensor for name, tensor in weights.items()
        }

    def reopen() -> PreTrainedModel:
        if form == "official":
            return transformers_io.open_without_folder_code(folder, config)
        return transformers_io.open_export(folder)

    comparison = verification.compare_forms(config, weights, reopen)
    logger.info(str(comparison))
    verification.require_agreement(comparison, f"{hf_dir}: the exported model's logits differ from the checkpoint's")
    return comparison.logits.largest
