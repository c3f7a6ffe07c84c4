"""Decides where a run starts: at its newest intact checkpoint, from another run's weights, or anew."""

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
from moh_megatron.config.layer_heads import choice_of_heads, layer_heads
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
"""Keys that must keep their values when a run is resumed: the model, what its attention sees, the order of the data."""

_BACKEND = "moh.backend"

_SAME_TO_ROUNDING = (
    _BACKEND,
    "parallel.sequence",
    "parallel.offload_optimizer",
    "train.recompute",
    "deepspeed",
)
"""Keys that select how the same result is computed, beside those of the topology."""

_MAY_CHANGE = (
    (("optimizer",), ""),
    (_SAME_TO_ROUNDING, "; losses agree to rounding, not bit for bit"),
    (("train.micro_batch_size",), "; the data stay the same, the balance loss is that of other micro-batches"),
)
"""Keys that may change, each group with what its change means for the loss curve."""

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
    "moh.routing_groups",
    "moh.gate_softmax",
    "moh.head_layout",
)
"""Keys in which another run's weights must agree."""

_CHOICE_KEYS = ("moh.routing_groups", "moh.gate_softmax")
"""Keys that decide among which heads a token chooses and the gates share their weight."""
_SHARED_KEYS = ("moh.shared_heads", "moh.shared_placement")
ROUTER_KEYS = ("moh.router", *_SHARED_KEYS, *_CHOICE_KEYS)
"""Keys without effect on a dense model; the head layout has one."""
_POSITIONS = ("model.rotary_base", "model.rope_scaling")


def _values(config: Config, keys: Iterable[str]) -> dict[str, Any]:
    everything = mapping_of(config)
    values: dict[str, Any] = {}
    for key in keys:
        section, _, name = key.partition(".")
        names = [name] if name else list(everything[section])
        values |= {f"{section}.{name}": everything[section][name] for name in names}
    return values


def _architecture(config: Config) -> dict[str, Any]:
    """The values that weights depend on, in one form for settings with the same meaning.

    A value given in place of an equal default makes no difference, nor does padding, nor an epsilon of the norms that
    was rounded to single precision (9.999999747378752e-06, in folders made from GGUF).
    """
    model = config.model
    default = model.head_dim * model.num_attention_heads == model.hidden_size
    return _values(config, _SAME_WEIGHTS) | {
        "model.num_query_groups": model.query_groups,
        "model.kv_channels": None if default else model.head_dim,
        "model.vocab_size": model.tokens,
        "model.norm_epsilon": float(str(np.float32(model.norm_epsilon))),
        **choice_of_heads(model, config.moh),
    }


def _shared_heads(config: Config) -> Any:
    """The shared heads of each layer, which a number and a placement or lists can say; those keys until measured."""
    if config.moh.shared_placement == "calibrated":
        return config.moh.shared_heads, config.moh.shared_placement
    return [layer.shared for layer in layer_heads(config.model, config.moh)]


def newest_good(config: Config) -> Path | None:
    """The checkpoint to resume from, or None to start anew. A warning names each damaged one that is passed over.

    Raises:
        UserError: the run folder holds checkpoints and train.resume is never.
        Fault: the run folder holds checkpoints, and all of them are damaged.
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

    The settings of the optimizer and the micro-batches may change; a warning says so, because they change the loss
    curve. The parallelism may change, too: the losses then agree to rounding, not bit for bit.
    """
    manifest = read_state(checkpoint)
    if manifest.format_version != FORMAT_VERSION:
        raise UserError(
            f"{checkpoint} has format version {manifest.format_version}, whose optimizer state this program cannot "
            f"read: it needs version {FORMAT_VERSION}. Finish the run with the release that wrote it, or start a new "
            f"one from its weights with train.init_from={checkpoint}."
        )
    written_by = read_config(checkpoint)
    saved, current = _values(written_by, _SAME_RUN), _values(config, _SAME_RUN)
    for values, origin in ((saved, written_by), (current, config)):
        del values[_BACKEND]
        # The weights say which teacher it is: its path may have changed.
        values["distillation.teacher"] = "null" if origin.distillation.teacher is None else "given"
    saved["data"], current["data"] = manifest.data[:12], data[:12]
    if config.data.sources:
        saved["shares of the sources so far"] = shares_until(written_by, manifest.step)
        current["shares of the sources so far"] = shares_until(config, manifest.step)
    remedy = "Use the same, or another run.dir"
    if _values(written_by, _SAME_WEIGHTS) == _values(config, _SAME_WEIGHTS):
        remedy += f"; train.init_from={checkpoint} starts a new run from its weights"
    refuse_differences(f"{checkpoint} was made with other values", saved, current, f"{remedy}.")
    topology = topology_of(config, world_size)
    if topology != manifest.topology:
        logger.info(f"{checkpoint.name} was written at {manifest.topology}; it is resharded to {topology}")
    for keys, note in _MAY_CHANGE:
        saved, current = _values(written_by, keys), _values(config, keys)
        for key in sorted(saved.keys() | current):
            before, now = saved.get(key, "not set"), current.get(key, "not set")
            if before != now:
                logger.warning(f"{key} is {now} from here on; it was {before} up to {checkpoint.name}{note}")
    return manifest


def check_same_tokenizer(checkpoint: Path, tokenizer: Tokenizer) -> None:
    """Raise UserError where ``checkpoint`` was trained with another tokenizer than the data's."""
    folder = tokenizer_folder(checkpoint)
    if not has_tokenizer(folder):  # It was imported from a folder without one.
        return
    saved = load_tokenizer(folder)
    if (saved.sha256, saved.eos_token_id) != (tokenizer.sha256, tokenizer.eos_token_id):
        raise UserError(
            f"{checkpoint} was made with another tokenizer, {saved.sha256[:12]}, than the data, "
            f"{tokenizer.sha256[:12]}. "
            f"Prepare the data with tokenizer.path={folder}."
        )


def weights_to_start_from(config: Config) -> Path | None:
    """The checkpoint of train.init_from, checked to fit this model. Raises UserError."""
    if config.train.init_from is None:
        return None
    checkpoint = resolve_checkpoint(config.train.init_from)
    require_same_weights(checkpoint, config)
    return checkpoint


def require_same_weights(checkpoint: Path, config: Config, apart_from: Collection[str] = ()) -> None:
    """Raise UserError where the weights of ``checkpoint`` do not fit ``config``, without comparing ``apart_from``.

    A warning says where positions are encoded otherwise: that is wanted for a longer context, and otherwise a model
    has to learn again where its words are.
    """
    written_by = read_config(checkpoint)
    if not (written_by.moh.enabled and config.moh.enabled):
        apart_from = {*apart_from, *ROUTER_KEYS}
    elif _shared_heads(written_by) == _shared_heads(config):
        apart_from = {*apart_from, *_SHARED_KEYS}
    saved, current = (
        {key: value for key, value in _architecture(origin).items() if key not in apart_from}
        for origin in (written_by, config)
    )
    remedy = ["train.init_from needs weights of the same architecture."]
    if any(saved.get(key) != current.get(key) for key in _CHOICE_KEYS):
        remedy.append(
            "Routers choose otherwise with other routing groups or gates: set the values of the checkpoint, or start "
            "from the dense model it was made of."
        )
    refuse_differences(f"{checkpoint} was made with other values", saved, current, *remedy)
    saved, current = _values(written_by, _POSITIONS), _values(config, _POSITIONS)
    for key in _POSITIONS:
        if saved[key] != current[key]:
            logger.warning(
                f"{key} is {current[key]}, and {checkpoint} was made with {saved[key]}: the model starts as "
                "another one than it was. Set the same, unless this is to extend its context."
            )
