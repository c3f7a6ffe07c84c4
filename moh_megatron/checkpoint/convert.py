"""Conversions that prove themselves: what was written is opened again and held against what it came from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moh_megatron.checkpoint import hf, hf_import, native
from moh_megatron.checkpoint.hf_settings import HFSettings
from moh_megatron.checkpoint.hf_source import open_weights
from moh_megatron.checkpoint.official import official_moh
from moh_megatron.checkpoint.sources import HFSource, open_checkpoint
from moh_megatron.config.count import parameter_count
from moh_megatron.config.schema import Config
from moh_megatron.model.dtypes import DTYPES

LARGEST_UNASKED = 100_000_000
"""Parameters up to which a model is verified whether asked or not: it takes the memory of the model in fp32."""

Report = Callable[[str], None]


def megatron_to_hf(
    checkpoint: Path,
    hf_dir: Path,
    dtype: str | None = None,
    *,
    form: hf.Form = "moh",
    verify: bool = False,
    report: Report = lambda message: None,
) -> float | None:
    """Export ``checkpoint`` to ``hf_dir``; returns the largest absolute difference of the logits, if it was measured.

    Args:
        checkpoint: one complete checkpoint.
        dtype: fp32, bf16 or fp16; None leaves each tensor its own.
        form: see ``hf.write_folder``.
        verify: open both sides in fp32, the checkpoint's weights rounded to ``dtype`` first, and compare them layer by
            layer; models of up to ``LARGEST_UNASKED`` parameters always are.
        report: is told what came of it.

    Raises:
        UserError: the checkpoint, its tokenizer and its configuration do not fit, or ``hf_dir`` holds something else.
        Fault: the reloaded model differs by ``TOLERANCE`` or more, or the disk refuses; ``hf_dir`` stays as it was.
    """
    config, progress = native.read_config(checkpoint), native.read_state(checkpoint)
    precision = None if dtype is None else DTYPES[dtype]
    tokenizer = native.tokenizer_folder(checkpoint)
    with hf.replacing(hf_dir) as folder:
        with open_checkpoint(checkpoint, config) as source:
            hf.write_folder(
                folder,
                config,
                source,
                tokenizer if tokenizer.is_dir() else None,
                precision,
                step=progress.step,
                tokens=progress.tokens,
                form=form,
            )
        if not (verify or _small(config)):
            return None
        # Imported here: Megatron-core takes longer to load than many a model to convert.
        from moh_megatron.checkpoint import verify as proof

        weights = native.read_weights(checkpoint)
        if precision is not None:
            weights = {name: each.to(precision) if each.is_floating_point() else each for name, each in weights.items()}
        reopen = proof.open_export if form != "official" else lambda folder: proof.open_foreign(folder, config)
        comparison = proof.compare_forms(config, weights, lambda: reopen(folder))
        report(str(comparison))
        proof.require_agreement(comparison, f"{hf_dir}: the exported model's logits differ from the checkpoint's")
    return comparison.logits.largest


def official_to_hf(official_dir: Path, hf_dir: Path, dtype: str | None = None, *, allow_pickle: bool = False) -> None:
    """Write a model in SkyworkAI's published form as a folder that says itself how its heads are routed.

    Raises:
        UserError: the folder is broken, or of another model than it says, or ``hf_dir`` holds something else.
        Fault: the disk is full or refuses.
    """
    precision = None if dtype is None else DTYPES[dtype]
    with open_weights(official_dir, allow_pickle=allow_pickle) as weights:
        heads = HFSettings(official_dir).sections()["model"]["num_attention_heads"]
        stated = [f"moh.{key}={str(value).lower()}" for key, value in official_moh(heads).items()]
        config = hf_import.import_config(official_dir, hf_dir, None, stated, weights.dtypes)
        hf_import.check_weights(weights, {}, config)
        tokenizer = official_dir if hf_import.has_tokenizer(official_dir) else None
        with hf.replacing(hf_dir) as folder:
            hf.write_folder(folder, config, HFSource(weights, {}), tokenizer, precision, step=0, tokens=0)


def _small(config: Config) -> bool:
    return parameter_count(config.model, config.moh).total <= LARGEST_UNASKED
