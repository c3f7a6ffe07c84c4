"""Conversions that prove themselves: what was written is opened again and held against what it came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from moh_megatron.checkpoint import hf, hf_import, native
from moh_megatron.checkpoint.hf_import import HFSource, NewTensors
from moh_megatron.checkpoint.hf_settings import HFSettings
from moh_megatron.checkpoint.hf_source import open_weights
from moh_megatron.checkpoint.official import official_moh
from moh_megatron.checkpoint.sources import open_checkpoint
from moh_megatron.checkpoint.verify import (
    TOLERANCE,
    Comparison,
    compare,
    open_export,
    open_foreign,
    tokens_far_from_ties,
    trace_hf,
    trace_megatron,
)
from moh_megatron.checkpoint.whole import refuse_unless_new, whole_folder
from moh_megatron.config.count import parameter_count
from moh_megatron.config.errors import Fault
from moh_megatron.config.schema import Config
from moh_megatron.model.build import DTYPES
from moh_megatron.model.single import build_single_process

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
        weights = native.read_weights(checkpoint)
        if precision is not None:
            weights = {name: each.to(precision) if each.is_floating_point() else each for name, each in weights.items()}
        model = build_single_process(config, weights)
        tokens = tokens_far_from_ties(model, config)
        ours = trace_megatron(model, config, tokens)
        del model, weights
        reloaded = open_foreign(folder, config) if form == "official" else open_export(folder)
        comparison = compare(ours, trace_hf(reloaded, tokens))
        report(str(comparison))
        _require_agreement(comparison, f"{hf_dir}: the exported model's logits differ from the checkpoint's")
    return comparison.logits.largest


def hf_to_megatron(
    hf_dir: Path,
    save_dir: Path,
    path: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    new_tensors: NewTensors,
    report: Report,
    allow_pickle: bool = False,
    verify: bool = False,
) -> None:
    """Write the model of ``hf_dir`` as the checkpoint ``save_dir``; every tensor keeps its precision.

    Args:
        path, overrides: what the configuration states; with ``moh.enabled`` a dense model becomes a MoH model.
        new_tensors: gives what a MoH model needs beside the weights of a dense one.
        report: is told what the user should know.
        verify: open both sides in fp32 and compare them layer by layer. A dense model that becomes a MoH model is
            another one: its differences are told, and not refused.

    Raises:
        UserError: the folder is broken, or of another model than it says, or ``save_dir`` holds something.
        Fault: the two sides differ by ``TOLERANCE`` or more, or the disk refuses. Nothing is left behind then.
    """
    refuse_unless_new(save_dir)
    with whole_folder(save_dir) as folder:
        config, source = hf_import.write_import(
            folder, hf_dir, save_dir, path, overrides, new_tensors=new_tensors, report=report, allow_pickle=allow_pickle
        )
        if not verify:
            return
        model = build_single_process(config, native.read_weights(folder))
        tokens = tokens_far_from_ties(model, config)
        ours = trace_megatron(model, config, tokens)
        del model
        comparison = compare(ours, trace_hf(open_foreign(hf_dir, source), tokens))
        report(str(comparison))
        if source.moh == config.moh:
            _require_agreement(comparison, f"{save_dir}: the checkpoint's logits differ from those of {hf_dir}")


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


def _require_agreement(comparison: Comparison, what: str) -> None:
    largest = comparison.logits.largest
    if not largest < TOLERANCE:
        raise Fault(
            f"{what} by {largest:.3g}; less than {TOLERANCE:g} is required. Nothing was written. This is a bug: "
            f"please report it."
        )
