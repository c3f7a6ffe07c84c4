"""Where a run starts: at its newest good checkpoint, from another run's weights, or anew."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from moh_megatron.checkpoint.layout import (
    problem_with,
    read_config,
    read_state,
    resolve_checkpoint,
    step_folders,
    tokenizer_folder,
    topology_of,
)
from moh_megatron.checkpoint.manifest import FORMAT_VERSION, Manifest
from moh_megatron.config.load import mapping_of
from moh_megatron.config.paths import checkpoint_dir
from moh_megatron.config.schema import Config
from moh_megatron.config.source_weights import shares_until
from moh_megatron.data.tokenizer.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from moh_megatron.io.errors import Fault, UserError, refuse_differences

logger = logging.getLogger(__name__)

_SAME_RUN = (
    "model",
    "moh",
    "distillation.weight",
    "data.document_mask",
    "run.seed",
    "train.sequence_length",
    "train.global_batch_size",
    "train.total_tokens",
    "train.precision",
)
"""What must not change when a run goes on: the model, what its attention sees, and the order of the data."""

_ANY_BACKEND = "moh.backend"

_SAME_TO_ROUNDING = (
    _ANY_BACKEND,
    "parallel.sequence",
    "parallel.offload_optimizer",
    "train.recompute",
    "deepspeed",
)
"""What computes the same by another way, beside what a topology tells."""

_TOLD = (
    (("optimizer",), ""),
    (_SAME_TO_ROUNDING, "; losses agree to rounding, not bit for bit"),
    (("train.micro_batch_size",), "; the data stay the same, the balance loss is that of other micro-batches"),
)
"""What may change, and what that means for the loss curve."""

_SAME_WEIGHTS = (
    *(
        f"model.{name}"
        for name in (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "vocab_size",
            "tie_word_embeddings",
            "norm_epsilon",
        )
    ),
    "moh.enabled",
    "moh.router",
    "moh.shared_heads",
    "moh.shared_placement",
    "moh.head_layout",
)
"""What another run's weights must agree in."""

_OF_ROUTERS = ("moh.router", "moh.shared_heads", "moh.shared_placement")
"""What makes no difference to a dense model; where its heads lie does."""
_POSITIONS = ("model.rotary_base", "model.rope_scaling")


def _values(config: Config, keys: Iterable[str]) -> dict[str, Any]:
    everything = mapping_of(config)
    values: dict[str, Any] = {}
    for key in keys:
        section, _, name = key.partition(".")
        names = [name] if name else list(everything[section])
        values |= {f"{section}.{each}": everything[section][each] for each in names}
    return values


def _architecture(config: Config) -> dict[str, Any]:
    """What weights depend on: null in place of a value that says the same makes no difference, nor does padding, nor
    an epsilon of the norms that went through single precision (9.999999747378752e-06, in folders made from GGUF)."""
    model = config.model
    usual = model.head_dim * model.num_attention_heads == model.hidden_size
    return _values(config, _SAME_WEIGHTS) | {
        "model.num_query_groups": model.query_groups,
        "model.kv_channels": None if usual else model.head_dim,
        "model.vocab_size": model.tokens,
        "model.norm_epsilon": float(str(np.float32(model.norm_epsilon))),
    }


def newest_good(config: Config) -> Path | None:
    """The checkpoint to go on from, or None to start anew. A warning names damaged ones that are passed over.

    Raises:
        UserError: the run folder holds checkpoints and train.resume is never.
        Fault: it holds checkpoints, and every one of them is damaged.
    """
    root = checkpoint_dir(config)
    folders = step_folders(root)
    if not folders:
        return None
    if config.train.resume == "never":
        raise UserError(
            f"{root} already holds checkpoints and train.resume is never. "
            f"Set run.dir to a new folder, or train.resume=auto to go on from {folders[0].name}."
        )
    for folder in folders:
        problem = problem_with(folder)
        if problem is None:
            return folder
        logger.warning(f"{folder} is passed over: {problem}")
    raise Fault(f"every checkpoint in {root} is damaged. Move the folder away to start anew.")


def check_same_run(checkpoint: Path, config: Config, world_size: int, data: str) -> Manifest:
    """Raise UserError, naming both values, where ``config`` is not the run that wrote ``checkpoint``.

    The optimizer's settings and the micro-batches may change; the log says so, because the loss curve then is
    another one. So may the parallelism: then the losses agree to rounding, not bit for bit.
    """
    manifest = read_state(checkpoint)
    if manifest.format_version != FORMAT_VERSION:
        raise UserError(
            f"{checkpoint} has format version {manifest.format_version}, whose optimizer state this program cannot "
            f"read: it needs version {FORMAT_VERSION}. Finish the run with the release that wrote it, or start a new "
            f"one from its weights with train.init_from={checkpoint}."
        )
    written_by = read_config(checkpoint)
    there, here = (_values(each, _SAME_RUN) for each in (written_by, config))
    del there[_ANY_BACKEND], here[_ANY_BACKEND]
    # Which one it is, its weights say: it may lie elsewhere by now.
    for values, each in ((there, written_by), (here, config)):
        values["distillation.teacher"] = "null" if each.distillation.teacher is None else "given"
    there["data"], here["data"] = manifest.data[:12], data[:12]
    if config.data.sources:
        there["shares of the sources so far"] = shares_until(read_config(checkpoint), manifest.step)
        here["shares of the sources so far"] = shares_until(config, manifest.step)
    remedy = "Use the same, or another run.dir"
    if _values(written_by, _SAME_WEIGHTS) == _values(config, _SAME_WEIGHTS):
        remedy += f"; train.init_from={checkpoint} starts a new run from its weights"
    refuse_differences(f"{checkpoint} was made with other values", there, here, f"{remedy}.")
    topology = topology_of(config, world_size)
    if topology != manifest.topology:
        logger.info(f"{checkpoint.name} was written at {manifest.topology}; it is resharded to {topology}")
    for keys, note in _TOLD:
        before, now = _values(written_by, keys), _values(config, keys)
        for key in sorted(before.keys() | now):
            was, is_now = before.get(key, "not set"), now.get(key, "not set")
            if was != is_now:
                logger.warning(f"{key} is {is_now} from here on; it was {was} up to {checkpoint.name}{note}")
    return manifest


def check_same_tokenizer(checkpoint: Path, tokenizer: Tokenizer) -> None:
    """Raise UserError where ``checkpoint`` learned with another tokenizer than the data's: its ids mean other text."""
    folder = tokenizer_folder(checkpoint)
    if not has_tokenizer(folder):  # imported from a folder that had none
        return
    there = load_tokenizer(folder)
    if (there.sha256, there.eos_token_id) != (tokenizer.sha256, tokenizer.eos_token_id):
        raise UserError(
            f"{checkpoint} was made with another tokenizer, {there.sha256[:12]}, than the data, "
            f"{tokenizer.sha256[:12]}. "
            f"Prepare the data with tokenizer.path={tokenizer_folder(checkpoint)}."
        )


def weights_to_start_from(config: Config) -> Path | None:
    """The checkpoint of train.init_from, checked to fit this model. Raises UserError."""
    if config.train.init_from is None:
        return None
    checkpoint = resolve_checkpoint(config.train.init_from)
    require_same_weights(checkpoint, config)
    return checkpoint


def require_same_weights(checkpoint: Path, config: Config, apart_from: Collection[str] = ()) -> None:
    """Raise UserError where the weights of ``checkpoint`` do not fit ``config``, some of its keys left aside.

    A warning is given where positions are told apart in another way: wanted for a longer context, else a model that
    has to learn anew where its words are.
    """
    written_by = read_config(checkpoint)
    if not written_by.moh.enabled and not config.moh.enabled:
        apart_from = {*apart_from, *_OF_ROUTERS}
    there, here = (
        {key: value for key, value in _architecture(each).items() if key not in apart_from}
        for each in (written_by, config)
    )
    remedy = "train.init_from needs weights of the same architecture."
    refuse_differences(f"{checkpoint} was made with other values", there, here, remedy)
    there, here = (_values(each, _POSITIONS) for each in (written_by, config))
    for key in _POSITIONS:
        if there[key] != here[key]:
            logger.warning(
                f"warning: {key} is {here[key]}, and {checkpoint} was made with {there[key]}: the model starts as "
                "another one than it was. Set the same, unless this is to extend its context."
            )
