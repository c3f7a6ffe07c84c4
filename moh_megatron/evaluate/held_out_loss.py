"""Measures the loss on the held-out text of each source as training does, with its standard error over sequences."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moh_megatron.config.schema import Config
from moh_megatron.config.source_weights import mean_by_shares
from moh_megatron.data.batches import validation_batches
from moh_megatron.data.dataset import Sequences, build_validation_datasets
from moh_megatron.data.prepared_data import PreparedData, load_prepared
from moh_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from moh_megatron.evaluate.loaded_model import LoadedModel
from moh_megatron.io.console import progress_bar
from moh_megatron.io.errors import UserError
from moh_megatron.model.single import init_single_process


@dataclass(frozen=True)
class SourceLoss:
    """The held-out loss of one source."""

    loss: float
    """In nats a token."""
    standard_error: float | None
    """Standard error of the loss, from its spread over sequences; None for a single sequence."""
    perplexity: float
    sequences: int
    tokens: int


def validation_loss(loaded: LoadedModel, config: Config) -> dict[str, Any]:
    """The validation loss on the data that ``config`` names, over train.eval_samples sequences of each source.

    Returns ``sources``, a ``SourceLoss`` for each source as a mapping, and ``loss``, their mean weighted by the shares
    that the sources have at the model's step; None where no text is held out.

    Raises UserError where the data cannot be read or another tokenizer encoded them.
    """
    init_single_process(config.run.seed)
    data, tokenizer = _matching_data(config, loaded.tokenizer_dir)
    eos_token_id = tokenizer.eos_token_id if config.data.document_mask else None
    datasets = build_validation_datasets(config, data, tokenizer)
    losses = {name: _source_loss(loaded, dataset, config, name, eos_token_id) for name, dataset in datasets.items()}
    step = config.train.steps if loaded.step is None else loaded.step
    loss = mean_by_shares(config, step, {name: measured.loss for name, measured in losses.items()})
    return {"loss": loss, "sources": {name: asdict(measured) for name, measured in losses.items()}}


def check_validation_data(config: Config, tokenizer_dir: Path) -> None:
    """Raise UserError where ``validation_loss`` would, for a model whose tokenizer is in ``tokenizer_dir``.

    The check takes no model, so that it comes before one is loaded.
    """
    data, _ = _matching_data(config, tokenizer_dir)
    data.check_fits(config)


def _matching_data(config: Config, tokenizer_dir: Path) -> tuple[PreparedData, Tokenizer]:
    """The prepared data and their tokenizer, which must be the one in ``tokenizer_dir``."""
    data = load_prepared(config)
    tokenizer = data.tokenizer()
    own = load_tokenizer(tokenizer_dir)
    if own.sha256 != tokenizer.sha256:
        raise UserError(
            f"{tokenizer_dir}: the model's tokenizer must be the one that encoded {data.sources[0].folder} "
            f"({tokenizer.sha256[:12]}). Got {own.sha256[:12]}; prepare the data with the model's tokenizer."
        )
    return data, tokenizer


def _source_loss(
    loaded: LoadedModel, dataset: Sequences, config: Config, name: str, eos_token_id: int | None
) -> SourceLoss:
    means: list[float] = []
    batches = validation_batches(
        dataset, micro_batch_size=config.train.micro_batch_size, data_parallel_rank=0, data_parallel_size=1
    )
    with progress_bar(f"validation {name}", len(dataset), "sequence") as bar:
        for batch in batches:
            means += loaded.losses(batch.tokens, eos_token_id)[: batch.samples].double().mean(-1).tolist()
            bar.update(batch.samples)
    loss = statistics.fmean(means)
    error = statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None
    return SourceLoss(loss, error, math.exp(min(loss, 50)), len(means), len(means) * config.train.sequence_length)
