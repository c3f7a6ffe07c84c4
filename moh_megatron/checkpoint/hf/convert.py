"""Conversions that prove themselves: what was written is opened again and held against what it came from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from moh_megatron.checkpoint import layout
from moh_megatron.checkpoint.hf import hf_export, hf_import
from moh_megatron.checkpoint.hf.hf_config_reader import HFSettings
from moh_megatron.checkpoint.hf.hf_extras import Companions, carried_by
from moh_megatron.checkpoint.hf.hf_reader import open_weights
from moh_megatron.checkpoint.hf.skywork import official_moh
from moh_megatron.checkpoint.hf.unasked import is_small
from moh_megatron.checkpoint.hf.weight_readers import HFSource, open_checkpoint
from moh_megatron.checkpoint.mapping import rules
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError
from moh_megatron.model.dtypes import DTYPES

logger = logging.getLogger(__name__)


def megatron_to_hf(
    checkpoint: Path,
    hf_dir: Path,
    dtype: str | None = None,
    *,
    form: hf_export.Form = "moh",
    verify: bool = False,
) -> float | None:
    """Export ``checkpoint`` to ``hf_dir``; returns the largest absolute difference of the logits, if it was measured.

    Args:
        checkpoint: one complete checkpoint.
        dtype: fp32, bf16 or fp16; None leaves each tensor its own.
        form: see ``hf_export.write_folder``.
        verify: open both sides in fp32, the checkpoint's weights rounded to ``dtype`` first, and compare them layer by
            layer; models of up to ``LARGEST_UNASKED`` parameters always are.

    Raises:
        UserError: the checkpoint, its tokenizer and its configuration do not fit, or ``hf_dir`` holds something else.
        Fault: the reloaded model differs by ``TOLERANCE`` or more, or the disk refuses; ``hf_dir`` stays as it was.
    """
    config, progress = layout.read_config(checkpoint), layout.read_state(checkpoint)
    precision = None if dtype is None else DTYPES[dtype]
    hf_export.check_replaceable(hf_dir, checkpoint)
    with hf_export.replacing(hf_dir) as folder:
        with open_checkpoint(checkpoint, config) as source:
            hf_export.write_folder(
                folder,
                config,
                source,
                layout.tokenizer_folder(checkpoint),
                precision,
                step=progress.step,
                tokens=progress.tokens,
                form=form,
            )
        if not (verify or is_small(config)):
            return None
        weights = layout.read_weights(checkpoint)
        return _proved(config, weights, precision, hf_dir, folder, form)


def official_to_hf(
    official_dir: Path,
    hf_dir: Path,
    dtype: str | None = None,
    *,
    allow_pickle: bool = False,
    verify: bool = False,
) -> float | None:
    """Write a model in SkyworkAI's published form as a folder that says itself how its heads are routed.

    Args:
        verify: open the folder in fp32, and compare it layer by layer with this project's own model of the same
            weights; see ``megatron_to_hf``, also for what is returned.

    Raises:
        UserError: the folder is broken, or of another model than it says, or ``hf_dir`` holds something else.
        Fault: the two differ by ``TOLERANCE`` or more, or the disk is full or refuses.
    """
    precision = None if dtype is None else DTYPES[dtype]
    hf_export.check_replaceable(hf_dir, official_dir)
    with open_weights(official_dir, allow_pickle=allow_pickle) as weights:
        settings = HFSettings(official_dir)
        if settings.moh:
            raise UserError(
                f"{settings.path}: must be of the official form, whose model_type is llama. Got moh_llama, a folder "
                "of this project, which says itself how its heads are routed; use hf-to-megatron."
            )
        if settings.form not in (None, "official"):
            raise UserError(
                f"{official_dir}: must be of the official form. Got an export of --format {settings.form} of a dense "
                "model; use hf-to-megatron."
            )
        heads = settings.sections()["model"]["num_attention_heads"]
        stated = [f"moh.{key}={str(value).lower()}" for key, value in official_moh(heads).items()]
        config = hf_import.import_config(official_dir, hf_dir, None, stated, weights.dtypes)
        # Nothing in a folder of others tells it from a dense LLaMA.
        logger.info(
            f"{official_dir} is read as a MoH model by query norm: the first {config.moh.shared_heads} of {heads} "
            f"heads shared, {config.moh.active_heads} active."
        )
        hf_import.check_weights(weights, {}, config)
        tokenizer = hf_import.find_tokenizer(official_dir, config)
        companions = Companions(tokenizer, carried_by(official_dir))
        hf_import.check_side_files(official_dir, companions, config.model.tokens)
        source = HFSource(weights, {})
        with hf_export.replacing(hf_dir) as folder:
            hf_export.write_folder(folder, config, source, official_dir, precision, step=0, tokens=0)
            if not (verify or is_small(config)):
                return None
            state = {rule.megatron: source.whole(rule).clone() for rule in rules(config)}
            return _proved(config, state, precision, hf_dir, folder, "moh")


def _proved(
    config: Config,
    weights: Mapping[str, Tensor],
    precision: torch.dtype | None,
    hf_dir: Path,
    folder: Path,
    form: hf_export.Form,
) -> float:
    """The largest difference of the logits between ``weights``, rounded, and ``folder``, which becomes ``hf_dir``."""
    # Imported here: Megatron-core takes longer to load than many a model to convert.
    from moh_megatron.checkpoint.hf import verify as proof

    if precision is not None:
        weights = {name: each.to(precision) if each.is_floating_point() else each for name, each in weights.items()}
    reopen = proof.open_export if form != "official" else lambda folder: proof.open_foreign(folder, config)
    comparison = proof.compare_forms(config, weights, lambda: reopen(folder))
    logger.info(str(comparison))
    proof.require_agreement(comparison, f"{hf_dir}: the exported model's logits differ from the checkpoint's")
    return comparison.logits.largest
