"""Writes the initial checkpoint of continue-tuning: the weights of another checkpoint, made to fit the model to tune.

<run.dir>/calibration.json   with moh.shared_placement: calibrated, how much each head matters to the dense model
<run.dir>/start/             the checkpoint: a dense model's weights with routers, or with rows for new tokens
<run.dir>/start/asked.json   what it was made of, and which heads were to be shared
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moh_megatron.checkpoint import layout
from moh_megatron.checkpoint.hf.checkpoint_writer import write_checkpoint
from moh_megatron.checkpoint.hf.hf_extras import HFExtras, read_extras
from moh_megatron.checkpoint.mapping import Rule, rules
from moh_megatron.checkpoint.weights import StoredWeights, open_stored
from moh_megatron.config.paths import checkpoint_dir
from moh_megatron.config.schema import Config
from moh_megatron.data.dataset import build_train_dataset
from moh_megatron.data.prepared_data import load_prepared
from moh_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from moh_megatron.io.atomic import atomic_folder
from moh_megatron.io.errors import Fault, UserError, refuse_differences
from moh_megatron.io.folders import refuse_unless_new
from moh_megatron.model.single import build_single_process, logits
from moh_megatron.parallel import groups
from moh_megatron.train.resume import check_same_tokenizer, require_same_weights
from moh_megatron.train.teacher import find_teacher
from moh_megatron.upcycle import provenance
from moh_megatron.upcycle.calibrate import (
    Calibration,
    calibrate,
    read_calibration,
    with_calibrated_heads,
    write_calibration,
)
from moh_megatron.upcycle.loss_and_kl import kl_divergence
from moh_megatron.upcycle.routers import initial_routers
from moh_megatron.upcycle.source import check_source, find_source, initial_checkpoint_folder, needs_no_change
from moh_megatron.upcycle.vocabulary import grown_rows, new_pieces

logger = logging.getLogger(__name__)

MAX_KL_DIVERGENCE = 1e-8
"""The largest KL divergence, in nats a token, between a dense model and its MoH model with all heads active."""
_CHECKED_TOKENS = 256


def prepare(config: Config) -> Config:
    """Write the initial checkpoint of ``config`` in this single process, unless it exists or is not needed.

    Returns the configuration to train with, as ``resolve`` does.

    Raises:
        UserError: train.init_from is missing or of another model, or distillation.teacher cannot be used; before
            anything is measured or written.
        Fault: the disk refuses, or the new model with all heads active does not equal the dense model.
    """
    folder = initial_checkpoint_folder(config)
    if provenance.exists(folder):
        if not layout.step_folders(checkpoint_dir(config)):
            _require_intact(folder, layout.problem_with(folder, weights_only=True))
        if provenance.is_measured(config):
            provenance.require_same(folder, config, load_prepared(config).hash)
        provenance.warn_of_other_weights(folder, config)
    else:
        source = find_source(config)
        source_config = layout.read_config(source)
        if needs_no_change(source_config, config):
            return config
        refuse_unless_new(folder, "name another run.dir")
        _require_same_model_as_run(config)
        check_source(source, source_config, config)
        find_teacher(config)
        data = load_prepared(config)
        data.check_fits(config)
        tokenizer = data.tokenizer()
        calibrated_config = _calibrate_shared_heads(config, source, source_config, tokenizer)
        with atomic_folder(folder, "run.dir") as partial:
            provenance.write(partial, config, layout.read_state(source).weights_sha256, data.hash)
            _write_checkpoint(partial, calibrated_config, source, source_config, tokenizer)
        logger.info(f"{folder}: made of {source}")
    return resolve(config)


def resolve(config: Config) -> Config:
    """``config`` with the initial checkpoint of ``prepare`` in train.init_from, and with its shared heads.

    Raises:
        UserError: the checkpoint is needed and does not exist, or it was made of something else or with other heads.
    """
    folder = initial_checkpoint_folder(config)
    if not provenance.exists(folder):
        source = find_source(config)
        if needs_no_change(layout.read_config(source), config):
            return config
        raise UserError(
            f"{folder}: the checkpoint to start from is not there. Make it first, in one process: "
            "moh-tune CONFIG --prepare, with the same overrides."
        )
    provenance.require_same(folder, config)
    _require_intact(folder, None if (folder / layout.CONFIG).is_file() else f"{layout.CONFIG} is missing")
    written_config = layout.read_config(folder)
    moh, train = config.moh, dataclasses.replace(config.train, init_from=str(folder))
    if provenance.is_measured(config):
        moh = dataclasses.replace(moh, shared_heads=written_config.moh.shared_heads, shared_placement="first")
    resolved = dataclasses.replace(config, moh=moh, train=train)
    require_same_weights(folder, resolved)
    return resolved


def _require_intact(folder: Path, problem: str | None) -> None:
    if problem is not None:
        raise UserError(f"{folder} is damaged: {problem}. Delete the folder to make it again.")


def _require_same_model_as_run(config: Config) -> None:
    """Raise UserError where the run has checkpoints of another model, which the initial checkpoint would contradict."""
    current = {"moh.enabled": config.moh.enabled, "model.vocab_size": config.model.tokens}
    for newest in layout.step_folders(checkpoint_dir(config))[:1]:
        saved_config = layout.read_config(newest)
        saved = {"moh.enabled": saved_config.moh.enabled, "model.vocab_size": saved_config.model.tokens}
        refuse_differences(f"{newest} was made with other values", saved, current, "Use the same, or another run.dir.")


def read_or_measure_calibration(
    config: Config, source: Path, source_config: Config, model: nn.Module, tokenizer: Tokenizer, file: Path
) -> Calibration:
    """The calibration in ``file``; without such a file, ``model``, the dense model of ``source``, is measured.

    Raises:
        UserError: the calibration in the file is of other weights or other text.
    """
    data = load_prepared(config)
    conditions: dict[str, Any] = {
        provenance.WEIGHTS: layout.read_state(source).weights_sha256[:12],
        provenance.DATA: data.hash[:12],
        **provenance.measured_with(config),
    }
    if file.exists():
        calibration = read_calibration(file)
        remedy = "Delete it to measure again."
        refuse_differences(f"{file} measured something else", calibration.conditions, conditions, remedy)
        return calibration
    dataset = build_train_dataset(config, data, tokenizer)
    tokens = torch.stack([dataset[index] for index in range(min(config.moh.calibration_sequences, len(dataset)))])
    device = next(model.parameters()).device
    calibration = calibrate(
        model, source_config, tokens.to(device), tokenizer.eos_token_id if config.data.document_mask else None
    )
    calibration = dataclasses.replace(calibration, conditions=conditions)
    write_calibration(file, calibration)
    return calibration


def _calibrate_shared_heads(config: Config, source: Path, source_config: Config, tokenizer: Tokenizer) -> Config:
    """``config`` with measured shared heads where moh.shared_placement is calibrated."""
    if not provenance.is_measured(config):
        return config
    check_same_tokenizer(source, tokenizer)
    # Attention crosses documents in the calibration where it does in training.
    source_config = dataclasses.replace(source_config, data=config.data)
    model = build_single_process(source_config, layout.read_weights(source)).to(groups.device(0))
    file = Path(config.run.dir) / "calibration.json"
    calibration = read_or_measure_calibration(config, source, source_config, model, tokenizer, file)
    # The training starts while this process waits: it must not keep memory of the first device.
    del model
    torch.cuda.empty_cache()
    logger.info(f"{file}: how much each head matters, measured on {calibration.tokens:,} tokens")
    return with_calibrated_heads(config, calibration)


def _write_checkpoint(folder: Path, config: Config, source: Path, source_config: Config, tokenizer: Tokenizer) -> None:
    with open_stored(source, source_config) as stored:
        table = rules(config)
        # Routers of the source are kept.
        missing = {rule.hf[0] for rule in table} - {rule.hf[0] for rule in rules(source_config)}
        routers = {name: tensor for name, tensor in (initial_routers(config) if missing else ()) if name in missing}
        dtypes = {
            rule.megatron: routers[rule.hf[0]].dtype if rule.hf[0] in routers else stored.dtype(rule) for rule in table
        }
        new_entries = _new_entries(source, source_config, config, tokenizer)

        def tensors() -> Iterator[tuple[str, Tensor]]:
            for rule in table:
                if rule.hf[0] in routers:
                    yield rule.megatron, routers[rule.hf[0]]
                else:
                    yield rule.megatron, _source_tensor(stored, rule, source_config, config, new_entries)

        hf_extras = HFExtras(tokenizer, read_extras(layout.tokenizer_folder(source)))
        write_checkpoint(folder, config, dtypes, tensors(), hf_extras)
        if config.moh.enabled and not source_config.moh.enabled:
            kl = check_equals_dense(folder, source)
            logger.info(f"with all heads active: KL from the dense model {kl:.3g} nats a token")


def _new_entries(source: Path, source_config: Config, config: Config, tokenizer: Tokenizer) -> dict[int, list[int]]:
    if source_config.model.tokens == config.model.tokens:
        check_same_tokenizer(source, tokenizer)
        return {}
    pieces = new_pieces(load_tokenizer(layout.tokenizer_folder(source)), tokenizer)
    if not pieces:
        raise UserError(
            f"model.vocab_size {config.model.tokens} is more than the {source_config.model.tokens} of {source}, and "
            "the data's tokenizer has no piece more than that model's. Grow it with tokenizer.grow_to and prepare the "
            "data with it, or leave the vocabulary as it is; model.vocab_padding adds rows that no token uses."
        )
    return pieces


def _source_tensor(
    stored: StoredWeights, rule: Rule, source_config: Config, config: Config, new_entries: dict[int, list[int]]
) -> Tensor:
    tensor = stored.full_tensor(rule)
    if rule.megatron not in ("embedding.word_embeddings.weight", "output_layer.weight"):
        return tensor
    rows = grown_rows(tensor[: source_config.model.tokens], new_entries, config.model.tokens)
    return torch.cat([rows, rows.new_zeros(config.model.vocab_padding, rows.shape[1])])


@torch.inference_mode()
def check_equals_dense(checkpoint: Path, source: Path) -> float:
    """KL divergence, in nats a token, of the MoH model in ``checkpoint``, all heads active, from the dense ``source``.

    Both models compute in fp32, on random tokens that both know, with the RoPE settings of ``source``, because a
    change of those is intended.

    Raises:
        Fault: it is above ``MAX_KL_DIVERGENCE``.
    """
    dense, written = layout.read_config(source), layout.read_config(checkpoint)
    all_active = dataclasses.replace(
        written,
        model=dataclasses.replace(
            written.model, rotary_base=dense.model.rotary_base, rope_scaling=dense.model.rope_scaling
        ),
        moh=dataclasses.replace(written.moh, active_heads=written.model.num_attention_heads),
    )
    generator = torch.Generator().manual_seed(written.run.seed)
    entries, length = dense.model.tokens, min(_CHECKED_TOKENS, written.train.sequence_length)
    tokens = torch.randint(entries, (1, length), generator=generator)
    # The models are built one after the other, so that only one is in memory.
    target, log_probs = (
        logits(build_single_process(config, layout.read_weights(folder)), tokens)[0, :, :entries].log_softmax(-1)
        for config, folder in ((dense, source), (all_active, checkpoint))
    )
    kl = float(kl_divergence(target, log_probs))
    if not kl < MAX_KL_DIVERGENCE:
        raise Fault(
            f"{source}: with all heads active the KL divergence of the MoH model made of it is {kl:.3g}; less "
            f"than {MAX_KL_DIVERGENCE:g} is required. Nothing was written. This is a bug: please report it."
        )
    return kl
