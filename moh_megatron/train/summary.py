"""Writes summary.json: what a finished run was, and its results."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moh_megatron.config.layer_heads import active_share
from moh_megatron.config.parameter_count import parameter_count
from moh_megatron.io.json_file import write_json
from moh_megatron.model.attention_backend import attention_backend
from moh_megatron.monitor.records import read_records
from moh_megatron.train.session import Session
from moh_megatron.train.startup_clock import StartupClock
from moh_megatron.train.validation import Validation

logger = logging.getLogger(__name__)


def write_summary(
    session: Session,
    step: int,
    seconds: float,
    clock: StartupClock,
    train_loss: float | None,
    validation: Validation,
) -> None:
    """Write the summary to the run folder and log it; a run that was finished before keeps the summary it has.

    ``seconds`` is the training time since the run was last started, ``clock`` what its start took.
    Losses and entropies are in nats per token; ``hf_max_logit_diff`` is filled in by the export.
    """
    path = Path(session.config.run.dir) / "summary.json"
    if step == session.start_step and path.exists():
        logger.info(f"{path.parent}: finished before, nothing to do; the summary stays as it is")
        return
    config, world, baselines = session.config, session.world, session.data.baselines
    tokens = config.train.tokens_per_step
    summary = {
        "steps": step,
        "tokens": step * tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round((step - session.start_step) * tokens / seconds, 1) if seconds else None,
        "startup_seconds": {part: round(spent, 1) for part, spent in clock.seconds.items()},
        "skipped_steps": sum(record["skipped"] for record in read_records(path.parent / "metrics.jsonl")),
        "train_loss": train_loss,
        "val_loss": validation.loss,
        "unigram_entropy": baselines.get("unigram_entropy"),
        "bigram_entropy": baselines.get("bigram_entropy"),
        "parameters": parameter_count(config.model, config.moh).total,
        "layers": config.model.num_layers,
        "active_head_fraction": active_share(config.model, config.moh),
        "attention_backend": attention_backend(config, session.device),
        "tensor_parallel": config.parallel.tensor,
        "data_parallel": world.size // config.parallel.tensor,
        "zero_stage": config.parallel.zero_stage,
        "precision": config.train.precision,
        "hf_max_logit_diff": None,
        "sample_text": validation.sample,
    }
    write_json(path, summary)
    for line in summary_lines(summary):
        logger.info(f"  {line}")


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """The values of summary.json in words; what was not measured is left out."""
    work = f"{summary['steps']:,} steps, {summary['tokens']:,} tokens, {summary['seconds']:,.1f} s"
    if summary["tokens_per_second"] is not None:
        work += f", {summary['tokens_per_second']:,.0f} tokens a second"
    if summary["skipped_steps"]:
        work += f", {summary['skipped_steps']:,} steps skipped"
    lines = [f"training: {work}"]
    if startup := summary["startup_seconds"]:
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in startup.items())
        lines.append(f"start: {sum(startup.values()):.1f} s until the end of the first step: {parts}")
    losses = {
        "training": summary["train_loss"],
        "validation": summary["val_loss"],
        "counts of single tokens": summary["unigram_entropy"],
        "counts of pairs of tokens": summary["bigram_entropy"],
    }
    if known := ", ".join(f"{name} {value:.4f}" for name, value in losses.items() if value is not None):
        lines.append(f"loss in nats a token: {known}")
    lines.append(
        f"model: {summary['parameters']:,} parameters, {summary['layers']} layers, "
        f"{summary['active_head_fraction']:.0%} of the heads for each token, attention backend "
        f"{summary['attention_backend']}"
    )
    lines.append(
        f"layout: tensor-parallel size {summary['tensor_parallel']}, data-parallel size {summary['data_parallel']}, "
        f"ZeRO stage {summary['zero_stage']}, {summary['precision']}"
    )
    if summary["sample_text"]:
        lines.append(f"sample: {summary['sample_text']}")
    return lines
