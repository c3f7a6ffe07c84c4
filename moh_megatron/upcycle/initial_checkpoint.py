"""Where continue-tuning starts: a checkpoint of the model to tune, made of another one's weights.

<run.dir>/calibration.json   with moh.shared_placement: calibrated, what each head is worth to the dense model
<run.dir>/start/             the checkpoint: a dense model's weights with routers, or with rows for new tokens
<run.dir>/start/asked.json   what it was made of, and which heads were asked to be shared
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
from moh_megatron.checkpoint.weights import Stored, opened
from moh_megatron.config.paths import checkpoint_dir
from moh_megatron.config.schema import Config
from moh_megatron.data.dataset import build_train_dataset
from moh_megatron.data.prepared import load_prepared
from moh_megatron.data.tokenizer.tokenizer import Tokenizer, load_tokenizer
from moh_megatron.io.atomic import atomic_folder, refuse_unless_new
from moh_megatron.io.errors import Fault, UserError, refuse_differences
from moh_megatron.model.single import build_single_process, logits
from moh_megatron.parallel import groups
from moh_megatron.train.resume import check_same_tokenizer, require_same_weights
from moh_megatron.train.teacher import find_teacher
from moh_megatron.upcycle import provenance
from moh_megatron.upcycle.calibrate import Calibration, calibrate, read_calibration, settled, write_calibration
from moh_megatron.upcycle.loss_and_kl import divergence
from moh_megatron.upcycle.routers import check_gates, initial_routers
from moh_megatron.upcycle.vocabulary import grown_rows, new_pieces

logger = logging.getLogger(__name__)

LARGEST_DIVERGENCE = 1e-8
"""Nats a token between a dense model and the MoH model made of it, with every head active."""
_CHECKED_TOKENS = 256
_MAY_DIFFER = ("model.vocab_size", "model.vocab_padding", "moh.enabled")
_ROUTING = ("moh.router", "moh.shared_heads", "moh.shared_placement")


def start_folder(config: Config) -> Path:
    """The checkpoint that ``prepare`` writes."""
    return Path(config.run.dir) / "start"


def prepare(config: Config) -> Config:
    """Make what is missing of ``config``'s start, in this one process; returns what training is given.

    Raises:
        UserError: train.init_from is missing, or of another model, or distillation.teacher cannot teach; before
            anything is measured or written.
        Fault: the disk refuses, or the new model with all heads active is not the dense one.
    """
    if provenance.is_made(start_folder(config)):
        if not layout.step_folders(checkpoint_dir(config)):
            _require_whole(start_folder(config), layout.problem_with(start_folder(config), weights_only=True))
        if provenance.is_measured(config):
            provenance.require_same(start_folder(config), config, load_prepared(config).hash)
        provenance.warn_of_other_weights(start_folder(config), config)
    else:
        source = _source(config)
        there = layout.read_config(source)
        if _fits(there, config):
            return config
        refuse_unless_new(start_folder(config), "name another run.dir")
        _require_it_would_go_on(config)
        check_source(source, there, config)
        find_teacher(config)
        data = load_prepared(config)
        data.check_fits(config)
        tokenizer = data.tokenizer()
        settled_config = _settle_heads(config, source, there, tokenizer)
        with atomic_folder(start_folder(config)) as folder:
            provenance.write(folder, config, layout.read_state(source).weights_sha256, data.hash)
            _write(folder, settled_config, source, there, tokenizer)
        logger.info(f"{start_folder(config)}: made of {source}")
    return resolve(config)


def resolve(config: Config) -> Config:
    """``config`` as training is given it: from the start that ``prepare`` made, with its shared heads.

    Raises:
        UserError: there is none, and one is needed; or it was made of something else, or with other heads.
    """
    if not provenance.is_made(start_folder(config)):
        source = _source(config)
        if _fits(layout.read_config(source), config):
            return config
        raise UserError(
            f"{start_folder(config)}: the checkpoint to start from is not there. Make it first, in one process: "
            "pipelines/continue_tune.py CONFIG --prepare, with the same overrides."
        )
    start = start_folder(config)
    provenance.require_same(start, config)
    _require_whole(start, None if (start / layout.CONFIG).is_file() else f"{layout.CONFIG} is missing")
    made = layout.read_config(start)
    moh, train = config.moh, dataclasses.replace(config.train, init_from=str(start))
    if provenance.is_measured(config):
        moh = dataclasses.replace(moh, shared_heads=made.moh.shared_heads, shared_placement="first")
    resolved = dataclasses.replace(config, moh=moh, train=train)
    require_same_weights(start, resolved)
    return resolved


def _source(config: Config) -> Path:
    if config.train.init_from is None:
        raise UserError("train.init_from must name the checkpoint to tune. Got null; see pipelines/convert.py.")
    return layout.resolve_checkpoint(config.train.init_from)


def _require_whole(start: Path, problem: str | None) -> None:
    if problem is not None:
        raise UserError(f"{start} is damaged: {problem}. Delete the folder to make it again.")


def _require_it_would_go_on(config: Config) -> None:
    """Raise UserError where the run has begun as another model: a start made now would stand in its way."""
    here = {"moh.enabled": config.moh.enabled, "model.vocab_size": config.model.tokens}
    for newest in layout.step_folders(checkpoint_dir(config))[:1]:
        there = layout.read_config(newest)
        known = {"moh.enabled": there.moh.enabled, "model.vocab_size": there.model.tokens}
        refuse_differences(f"{newest} was made with other values", known, here, "Use the same, or another run.dir.")


def _fits(there: Config, config: Config) -> bool:
    """Whether training can start from the checkpoint as it is, or says itself why not."""
    becomes_moh = config.moh.enabled and not there.moh.enabled
    return not becomes_moh and there.model.tokens == config.model.tokens


def check_source(source: Path, there: Config, config: Config) -> None:
    """Raise UserError where no model of ``config`` can be made of the checkpoint ``source`` of ``there``."""
    may_differ = _MAY_DIFFER if there.moh.enabled else _MAY_DIFFER + _ROUTING
    require_same_weights(source, config, apart_from=may_differ)
    if there.moh.enabled and not config.moh.enabled:
        raise UserError(f"{source}: must be of a dense model to go on as one. Got moh.enabled: true.")
    if not there.moh.enabled:
        check_gates(config)
    if there.model.tokens > config.model.tokens:
        raise UserError(
            f"model.vocab_size must hold the {there.model.tokens} entries of {source}. Got {config.model.tokens}."
        )
    if provenance.is_measured(config) and there.model.tokens < config.model.tokens:
        raise UserError(
            f"moh.shared_placement: calibrated measures {source}, which knows {there.model.tokens} tokens. Got "
            f"model.vocab_size {config.model.tokens}: let the vocabulary grow in a run before, or share other heads."
        )


def calibration_of(
    config: Config, source: Path, there: Config, model: nn.Module, tokenizer: Tokenizer, file: Path
) -> Calibration:
    """The measurement in ``file``; where there is none it is made, of the dense ``model`` of ``there``, and written.

    Raises:
        UserError: the one in the file is of other weights than those of ``source``, or on other text.
    """
    data = load_prepared(config)
    of: dict[str, Any] = {
        provenance.WEIGHTS: layout.read_state(source).weights_sha256[:12],
        provenance.DATA: data.hash[:12],
        **provenance.measured_with(config),
    }
    if file.exists():
        found = read_calibration(file)
        refuse_differences(f"{file} measured something else", found.of, of, "Delete it to measure again.")
        return found
    dataset = build_train_dataset(config, data, tokenizer)
    tokens = torch.stack([dataset[index] for index in range(min(config.moh.calibration_sequences, len(dataset)))])
    device = next(model.parameters()).device
    calibration = calibrate(
        model, there, tokens.to(device), tokenizer.eos_token_id if config.data.document_mask else None
    )
    calibration = dataclasses.replace(calibration, of=of)
    write_calibration(file, calibration)
    return calibration


def _settle_heads(config: Config, source: Path, there: Config, tokenizer: Tokenizer) -> Config:
    if not provenance.is_measured(config):
        return config
    check_same_tokenizer(source, tokenizer)
    # Documents are kept apart here where training keeps them apart.
    there = dataclasses.replace(there, data=config.data)
    model = build_single_process(there, layout.read_weights(source)).to(groups.device(0))
    file = Path(config.run.dir) / "calibration.json"
    calibration = calibration_of(config, source, there, model, tokenizer, file)
    # Training follows while this process waits: it must not keep the first device's memory.
    del model
    torch.cuda.empty_cache()
    logger.info(f"{file}: what each head is worth, over {calibration.tokens:,} tokens")
    return settled(config, calibration)


def _write(folder: Path, config: Config, source: Path, there: Config, tokenizer: Tokenizer) -> None:
    with opened(source, there) as stored:
        table = rules(config)
        # A source that has routers keeps them.
        missing = {rule.hf[0] for rule in table} - {rule.hf[0] for rule in rules(there)}
        routers = {name: each for name, each in (initial_routers(config) if missing else ()) if name in missing}
        dtypes = {
            rule.megatron: routers[rule.hf[0]].dtype if rule.hf[0] in routers else stored.dtype(rule) for rule in table
        }
        grown = _new_pieces(source, there, config, tokenizer)

        def pieces() -> Iterator[tuple[str, Tensor]]:
            for rule in table:
                if rule.hf[0] in routers:
                    yield rule.megatron, routers[rule.hf[0]]
                else:
                    yield rule.megatron, _taken(stored, rule, there, config, grown)

        hf_extras = HFExtras(tokenizer, read_extras(layout.tokenizer_folder(source)))
        write_checkpoint(folder, config, dtypes, pieces(), hf_extras)
        if config.moh.enabled and not there.moh.enabled:
            logger.info(f"with all heads active: KL from the dense model {check(folder, source):.3g} nats a token")


def _new_pieces(source: Path, there: Config, config: Config, tokenizer: Tokenizer) -> dict[int, list[int]]:
    if there.model.tokens == config.model.tokens:
        check_same_tokenizer(source, tokenizer)
        return {}
    pieces = new_pieces(load_tokenizer(layout.tokenizer_folder(source)), tokenizer)
    if not pieces:
        raise UserError(
            f"model.vocab_size {config.model.tokens} is more than the {there.model.tokens} of {source}, and the data's "
            "tokenizer has no piece more than that model's. Grow it with tokenizer.grow_to and prepare the data with "
            "it, or leave the vocabulary as it is; model.vocab_padding adds rows that no token uses."
        )
    return pieces


def _taken(stored: Stored, rule: Rule, there: Config, config: Config, grown: dict[int, list[int]]) -> Tensor:
    whole = stored.whole(rule)
    if rule.megatron not in ("embedding.word_embeddings.weight", "output_layer.weight"):
        return whole
    rows = grown_rows(whole[: there.model.tokens], grown, config.model.tokens)
    return torch.cat([rows, rows.new_zeros(config.model.vocab_padding, rows.shape[1])])


@torch.inference_mode()
def check(checkpoint: Path, source: Path) -> float:
    """KL, nats a token, between the dense model of ``source`` and the MoH model made of it, with all heads active.

    Both in fp32, on random tokens that both have, with the positions of ``source``: what another RoPE changes is meant.

    Raises:
        Fault: it is above ``LARGEST_DIVERGENCE``.
    """
    there, made = layout.read_config(source), layout.read_config(checkpoint)
    everything = dataclasses.replace(
        made,
        model=dataclasses.replace(
            made.model, rotary_base=there.model.rotary_base, rope_scaling=there.model.rope_scaling
        ),
        moh=dataclasses.replace(made.moh, active_heads=made.model.num_attention_heads),
    )
    generator = torch.Generator().manual_seed(made.run.seed)
    entries, length = there.model.tokens, min(_CHECKED_TOKENS, made.train.sequence_length)
    tokens = torch.randint(entries, (1, length), generator=generator)
    # One after the other in memory.
    wanted, here = (
        logits(build_single_process(config, layout.read_weights(folder)), tokens)[0, :, :entries].log_softmax(-1)
        for config, folder in ((there, source), (everything, checkpoint))
    )
    distance = float(divergence(wanted, here))
    if not distance < LARGEST_DIVERGENCE:
        raise Fault(
            f"{source}: with all heads active the KL divergence of the MoH model made of it is {distance:.3g}; less "
            f"than {LARGEST_DIVERGENCE:g} is required. Nothing was written. This is a bug: please report it."
        )
    return distance
