"""From a Hugging Face folder to a checkpoint: a LLaMA, or a model that this project exported."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moh_megatron.checkpoint.hf.checkpoint_writer import write_checkpoint
from moh_megatron.checkpoint.hf.hf_config_reader import HFSettings
from moh_megatron.checkpoint.hf.hf_extras import TOKEN_IDS, Companions, carried_by
from moh_megatron.checkpoint.hf.hf_reader import MARKER, HFWeights, open_weights
from moh_megatron.checkpoint.hf.safetensors_stream import WEIGHT_TYPES, Scratch
from moh_megatron.checkpoint.hf.streaming import runs
from moh_megatron.checkpoint.hf.unasked import is_small
from moh_megatron.checkpoint.hf.weight_readers import HFSource, pieces
from moh_megatron.checkpoint.layout import read_weights
from moh_megatron.checkpoint.mapping import check_names_and_shapes, rules
from moh_megatron.config.layer_heads import layer_heads
from moh_megatron.config.load import completed_config
from moh_megatron.config.schema import Config
from moh_megatron.data.tokenizer.names import TOKENIZER_JSON
from moh_megatron.data.tokenizer.tokenizer import Tokenizer, has_tokenizer, load_tokenizer
from moh_megatron.io.atomic import atomic_folder, refuse_inside, refuse_unless_new
from moh_megatron.io.errors import UserError

logger = logging.getLogger(__name__)

NewTensors = Callable[[Config], Iterable[tuple[str, Tensor]]]
"""What a MoH model holds beside its dense twin, under Hugging Face's names."""

_CONTEXT = 2048
"""The longest training sequence that an import writes down on its own."""
_LEARNING_RATE = 1e-5
_USUAL_PADDING = 1024
"""So many rows beyond the tokenizer's entries are common, for round numbers and tokens to come."""
_UNUSED = ".rotary_emb.inv_freq"
"""Old LLaMA-2 folders store RoPE's frequencies."""
_FREE = ("max_position_embeddings", "init_method_std", "scaled_residual_init", "vocab_padding")
"""Keys of the model section that say nothing about its weights or what it computes from them."""


def import_config(
    hf_dir: Path, save_dir: Path, path: Path | None, overrides: Sequence[str], dtypes: Collection[torch.dtype]
) -> Config:
    """The configuration of what ``hf_dir`` becomes: config.json's values below those of ``path`` and ``overrides``.

    Where ``parallel.tensor`` does not divide the vocabulary, it is padded. What config.json cannot know, the sections
    run, train and optimizer, gets values that a training run replaces by its own.

    Raises:
        UserError: config.json is of no LLaMA, or the configuration is wrong, or it disagrees with config.json, or says
            how heads are routed of a model that stays dense.
    """
    settings = HFSettings(hf_dir)
    config = _completed(settings, save_dir, path, overrides, dtypes)
    _refuse_differences(settings, _completed(settings, save_dir, None, (), dtypes), config)
    return config


def _completed(
    settings: HFSettings, save_dir: Path, path: Path | None, overrides: Sequence[str], dtypes: Collection[torch.dtype]
) -> Config:
    sections = settings.sections()
    model = sections["model"]

    def defaults(stated: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        _refuse_ignored(settings, stated.get("moh", {}))
        tensor = stated.get("parallel", {}).get("tensor", 1)
        padding = -model["vocab_size"] % tensor if isinstance(tensor, int) and tensor > 0 else 0
        padded = {"vocab_size": model["vocab_size"] + padding, "vocab_padding": padding}
        longest = stated.get("model", {}).get("max_position_embeddings")
        length = min(_CONTEXT, longest if isinstance(longest, int) else model["max_position_embeddings"])
        precision = "bf16" if torch.bfloat16 in dtypes else "fp32"
        return {
            "run": {"dir": str(save_dir)},
            "model": model | padded,
            "moh": sections["moh"],
            "train": {
                "sequence_length": length,
                "total_tokens": length,
                "global_batch_size": 1,
                "precision": precision,
            },
            "optimizer": {"learning_rate": _LEARNING_RATE},
        }

    return completed_config(defaults, str(settings.path), path, overrides)


def _refuse_ignored(settings: HFSettings, stated: Collection[str]) -> None:
    """Elsewhere models are MoH unless moh.enabled says no, here it is the other way round: easily forgotten."""
    ignored = [f"moh.{key}" for key in stated if key != "head_layout"]
    if ignored and not settings.moh and "enabled" not in stated:
        raise UserError(
            f"{settings.path}: this model is dense, and {', '.join(ignored)} would be ignored. Add moh.enabled=true to "
            "make it a MoH model, or moh.enabled=false to keep it dense."
        )


def _refuse_differences(settings: HFSettings, reference: Config, config: Config) -> None:
    there, here = (_stated(each, settings.moh) for each in (reference, config))
    different = [key for key, value in there.items() if key in here and here[key] != value]
    # What is null follows from other keys, and would be blamed for them.
    nulls = [key for key in different if getattr(config.model, key.removeprefix("model."), "") is None]
    differences = [
        f"  {key}: {there[key]} in {settings.path.name}, {here[key]} in the configuration"
        for key in [each for each in different if each not in nulls] or different
    ]
    if differences:
        remedy = "Leave these keys out: they are taken from there."
        raise UserError("\n".join([f"{settings.path} and the configuration disagree:", *differences, remedy]))


def _stated(config: Config, with_moh: bool) -> dict[str, Any]:
    """What says the model's weights and what it computes from them; what says the same has the same form."""
    model, moh = config.model, config.moh
    found = {f"model.{key}": value for key, value in asdict(model).items() if key not in _FREE}
    found |= {
        "model.vocab_size": model.tokens,
        "model.num_query_groups": model.query_groups,
        "model.kv_channels": model.head_dim,
    }
    if with_moh:
        found["moh.enabled"] = moh.enabled
    if with_moh and moh.enabled:
        layers = layer_heads(model, moh)
        found |= {f"moh.{name}": getattr(moh, name) for name in ("router", "gating", "balancing")}
        found["moh.shared_heads"] = _one_if_alike([each.shared for each in layers])
        found["moh.active_heads"] = _one_if_alike([each.active for each in layers])
    return found


def _one_if_alike(layers: list[Any]) -> Any:
    return layers[0] if len(set(layers)) == 1 else layers


def hf_to_megatron(
    hf_dir: Path,
    save_dir: Path,
    path: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    new_tensors: NewTensors,
    allow_pickle: bool = False,
    verify: bool = False,
) -> None:
    """Write the model of ``hf_dir`` as the checkpoint ``save_dir``; every tensor keeps its precision.

    Args:
        path, overrides: what the configuration states; with ``moh.enabled`` a dense model becomes a MoH model.
        new_tensors: gives what a MoH model needs beside the weights of a dense one.
        verify: open both sides in fp32 and compare them layer by layer; a dense model that becomes a MoH model, with
            all heads active. This is done unasked where a model of up to ``LARGEST_UNASKED`` parameters becomes one.

    Raises:
        UserError: the folder is broken, or of another model than it says, or ``save_dir`` holds something or
            lies in ``hf_dir``.
        Fault: the two sides differ by ``TOLERANCE`` or more, or the disk refuses. Nothing is left behind then.
    """
    refuse_inside(save_dir, hf_dir)
    refuse_unless_new(save_dir)
    with atomic_folder(save_dir) as folder:
        config, source = _write(
            folder, hf_dir, save_dir, path, overrides, new_tensors=new_tensors, allow_pickle=allow_pickle
        )
        upcycled = config.moh.enabled and not source.moh.enabled
        if not verify and not (upcycled and is_small(config)):
            if upcycled:
                logger.info(
                    "--verify compares a model of this size with the dense one, all heads active; it was not given."
                )
            return
        # Imported here: the two models' libraries take longer to load than many a model to convert.
        from moh_megatron.checkpoint.hf import verify as proof

        if upcycled:
            logger.info("with all heads active, against the dense model:")
            config = replace(config, moh=replace(config.moh, active_heads=config.model.num_attention_heads))
        comparison = proof.compare_forms(config, read_weights(folder), lambda: proof.open_foreign(hf_dir, source))
        logger.info(str(comparison))
        proof.require_agreement(comparison, f"{save_dir}: the checkpoint's logits differ from those of {hf_dir}")


def _write(
    folder: Path,
    hf_dir: Path,
    save_dir: Path,
    path: Path | None,
    overrides: Sequence[str],
    *,
    new_tensors: NewTensors,
    allow_pickle: bool,
) -> tuple[Config, Config]:
    """Fill the empty ``folder``; returns its configuration, and that of the model as config.json alone says it."""
    with open_weights(hf_dir, allow_pickle=allow_pickle) as weights:
        settings = HFSettings(hf_dir)
        if settings.form == "official":
            raise UserError(
                f"{hf_dir}: must be of a form whose config.json says how heads are routed. Got an export of --format "
                "official, which would be read as a dense model; use official-to-hf, and import what it makes."
            )
        config = import_config(hf_dir, save_dir, path, overrides, weights.dtypes)
        tokenizer = find_tokenizer(hf_dir, config)
        companions = Companions(tokenizer, carried_by(hf_dir))
        check_side_files(hf_dir, companions, config.model.tokens)
        added = dict(new_tensors(config)) if config.moh.enabled and not settings.moh else {}
        check_weights(weights, added, config)
        source = HFSource(weights, added)
        dtypes = {rule.megatron: source.dtype(rule) for rule in rules(config)}
        write_checkpoint(folder, config, dtypes, pieces(source, config), companions)
        return config, _completed(settings, save_dir, None, (), weights.dtypes)


def find_tokenizer(hf_dir: Path, config: Config) -> Tokenizer | None:
    """The tokenizer of a folder, or None with a warning.

    Raises:
        UserError: it is broken, or has more entries than the model's vocabulary, or many fewer.
    """
    if not has_tokenizer(hf_dir):
        logger.warning(f"{hf_dir} has no tokenizer ({TOKENIZER_JSON} or tokenizer.model): only weights are converted.")
        return None
    tokenizer = load_tokenizer(hf_dir)
    if tokenizer.vocab_size > config.model.tokens:
        raise UserError(
            f"{tokenizer.file}: the tokenizer must have at most vocab_size ({config.model.tokens}) entries. "
            f"Got {tokenizer.vocab_size}: it is another model's."
        )
    # In a run of this project the vocabulary may be of any size above the tokenizer's.
    if tokenizer.vocab_size + _USUAL_PADDING < config.model.tokens and not (hf_dir / MARKER).is_file():
        raise UserError(
            f"{tokenizer.file}: the tokenizer must have about vocab_size ({config.model.tokens}) entries, at most "
            f"{_USUAL_PADDING} fewer for padding. Got {tokenizer.vocab_size}: another model's. Without one in the "
            "folder the weights alone are converted."
        )
    return tokenizer


def check_side_files(hf_dir: Path, companions: Companions, entries: int) -> None:
    """Raise UserError where an export of a model of ``entries`` tokens could not keep what lies beside the weights."""
    tokenizer = companions.tokenizer
    if tokenizer is None and not companions.files.keys() - {TOKEN_IDS}:
        return
    # Imported here: Transformers takes longer to load than many a model to convert.
    from moh_megatron.checkpoint.hf import hf_tokenizer

    hf_tokenizer.check_generation(hf_dir, entries)
    if tokenizer is not None:
        hf_tokenizer.check_tokenizer(tokenizer, entries)


def check_weights(weights: HFWeights, added: Mapping[str, Tensor], config: Config) -> None:
    """Raise UserError unless ``weights`` and ``added`` are the tensors of ``config``."""
    tied = {"lm_head.weight"} if config.model.tie_word_embeddings else set()
    held = {name: entry for name, entry in weights.entries.items() if name not in tied and not name.endswith(_UNUSED)}
    table = rules(config)
    shapes = {name: shape for rule in table for name, shape in zip(rule.hf, rule.hf_shapes(), strict=True)}
    check_names_and_shapes({**added, **held}, shapes, f"{weights.folder} (as config.json describes it)")
    for name, dtype in ((name, rule.dtype) for rule in table for name in rule.hf if name in held):
        got = held[name].dtype
        if got != dtype if dtype is not None else not got.is_floating_point:
            raise UserError(f"{weights.place(name)} must be of {dtype or WEIGHT_TYPES}. Got {got}.")
    scratch = Scratch()
    for name in tied & weights.entries.keys():
        twins = (name, "model.embed_tokens.weight")
        head, embedding = (weights.entries[each] for each in twins)
        same = (head.shape, head.dtype) == (embedding.shape, embedding.dtype)
        for start, stop in runs(config.model.tokens, 4 * config.model.hidden_size) if same else ():
            scratch.reset()
            same = same and torch.equal(*(weights.rows(each, start, stop, scratch) for each in twins))
        if not same:
            raise UserError(
                f"{weights.folder}: {name} differs from {twins[1]}, but config.json says tie_word_embeddings: true. "
                f"Set it to false, or leave {name} out."
            )
