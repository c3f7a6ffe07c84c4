"""From a Hugging Face folder to a checkpoint: a LLaMA, or a model that this project exported."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moh_megatron.checkpoint.hf_settings import HFSettings
from moh_megatron.checkpoint.hf_source import HFWeights, open_weights
from moh_megatron.checkpoint.mapping import check_names_and_shapes, rules
from moh_megatron.checkpoint.native import read_weights
from moh_megatron.checkpoint.native_writer import write_checkpoint
from moh_megatron.checkpoint.rows import runs
from moh_megatron.checkpoint.safetensors_io import Scratch
from moh_megatron.checkpoint.sources import HFSource, pieces
from moh_megatron.checkpoint.whole import refuse_unless_new, whole_folder
from moh_megatron.config.errors import UserError
from moh_megatron.config.load import completed_config
from moh_megatron.config.schema import Config, MoHConfig
from moh_megatron.data.tokenizer import TOKENIZER_JSON, Tokenizer, load_tokenizer

NewTensors = Callable[[Config], Iterable[tuple[str, Tensor]]]
"""What a MoH model holds beside its dense twin, under Hugging Face's names."""

_CONTEXT = 2048
"""The longest training sequence that an import writes down on its own."""
_LEARNING_RATE = 1e-5
_UNUSED = ".rotary_emb.inv_freq"
"""Old LLaMA-2 folders store RoPE's frequencies."""
_FREE = ("max_position_embeddings", "init_method_std", "scaled_residual_init")
"""Keys of the model section that say nothing about its weights or what it computes from them."""


def import_config(
    hf_dir: Path, save_dir: Path, path: Path | None, overrides: Sequence[str], dtypes: Collection[torch.dtype]
) -> Config:
    """The configuration of what ``hf_dir`` becomes: config.json's values below those of ``path`` and ``overrides``.

    Where ``parallel.tensor`` does not divide the vocabulary, it is padded. What config.json cannot know, the sections
    run, train and optimizer, gets values that a training run replaces by its own.

    Raises:
        UserError: config.json is of no LLaMA, or the configuration is wrong, or it disagrees with config.json.
    """
    settings = HFSettings(hf_dir)
    sections = settings.sections()
    model = sections["model"]

    def defaults(stated: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
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

    config = completed_config(defaults, str(settings.path), path, overrides)
    _refuse_differences(settings.path, model, config)
    return config


def _refuse_differences(file: Path, model: Mapping[str, Any], config: Config) -> None:
    here = asdict(config.model) | {
        "vocab_size": config.model.tokens,
        "num_query_groups": config.model.query_groups,
        "kv_channels": config.model.head_dim,
    }
    groups = model["num_query_groups"] or model["num_attention_heads"]
    size = model["kv_channels"] or model["hidden_size"] // model["num_attention_heads"]
    there = dict(model) | {"num_query_groups": groups, "kv_channels": size}
    if isinstance(here["rope_scaling"], dict) and isinstance(there["rope_scaling"], dict):
        there["rope_scaling"] = here["rope_scaling"] | there["rope_scaling"]
    differences = [
        f"  model.{key}: {value} in {file.name}, {here[key]} in the configuration"
        for key, value in there.items()
        if key not in _FREE and here[key] != value
    ]
    if differences:
        remedy = "Leave these keys out: they are taken from there."
        raise UserError("\n".join([f"{file} and the configuration disagree:", *differences, remedy]))


def hf_to_megatron(
    hf_dir: Path,
    save_dir: Path,
    path: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    new_tensors: NewTensors,
    report: Callable[[str], None],
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
        config, source = _write(
            folder, hf_dir, save_dir, path, overrides, new_tensors=new_tensors, report=report, allow_pickle=allow_pickle
        )
        if not verify:
            return
        # Imported here: the two models' libraries take longer to load than many a model to convert.
        from moh_megatron.checkpoint import verify as proof

        comparison = proof.compare_forms(config, read_weights(folder), lambda: proof.open_foreign(hf_dir, source))
        report(str(comparison))
        if source.moh.enabled == config.moh.enabled:
            proof.require_agreement(comparison, f"{save_dir}: the checkpoint's logits differ from those of {hf_dir}")


def _write(
    folder: Path,
    hf_dir: Path,
    save_dir: Path,
    path: Path | None,
    overrides: Sequence[str],
    *,
    new_tensors: NewTensors,
    report: Callable[[str], None],
    allow_pickle: bool,
) -> tuple[Config, Config]:
    """Fill the empty ``folder``; returns its configuration, and that of the model as it was: dense, perhaps."""
    with open_weights(hf_dir, allow_pickle=allow_pickle) as weights:
        config = import_config(hf_dir, save_dir, path, overrides, weights.dtypes)
        settings = HFSettings(hf_dir)
        tokenizer = _tokenizer(hf_dir, config, report)
        added = dict(new_tensors(config)) if config.moh.enabled and not settings.moh else {}
        check_weights(weights, added, config)
        source = HFSource(weights, added)
        dtypes = {rule.megatron: source.dtype(rule) for rule in rules(config)}
        write_checkpoint(folder, config, dtypes, pieces(source, config), tokenizer)
    return config, config if settings.moh else replace(config, moh=MoHConfig(enabled=False))


def has_tokenizer(hf_dir: Path) -> bool:
    """Whether a folder holds a tokenizer that ``load_tokenizer`` reads."""
    return any((hf_dir / name).is_file() for name in (TOKENIZER_JSON, "tokenizer.model"))


def _tokenizer(hf_dir: Path, config: Config, report: Callable[[str], None]) -> Tokenizer | None:
    if not has_tokenizer(hf_dir):
        report(f"warning: {hf_dir} has no tokenizer ({TOKENIZER_JSON} or tokenizer.model): only weights are converted.")
        return None
    tokenizer = load_tokenizer(hf_dir)
    if tokenizer.vocab_size > config.model.tokens:
        raise UserError(
            f"{tokenizer.file}: the tokenizer must have at most vocab_size ({config.model.tokens}) entries. "
            f"Got {tokenizer.vocab_size}: it is another model's."
        )
    return tokenizer


def check_weights(weights: HFWeights, added: Mapping[str, Tensor], config: Config) -> None:
    """Raise UserError unless ``weights`` and ``added`` are the tensors of ``config``."""
    tied = {"lm_head.weight"} if config.model.tie_word_embeddings else set()
    held = {name: entry for name, entry in weights.entries.items() if name not in tied and not name.endswith(_UNUSED)}
    table = rules(config)
    shapes = {name: shape for rule in table for name, shape in zip(rule.hf, rule.hf_shapes(), strict=True)}
    check_names_and_shapes({**added, **held}, shapes, f"{weights.folder} (as config.json describes it)")
    scratch = Scratch()
    for name in tied & weights.entries.keys():
        twins = (name, "model.embed_tokens.weight")
        same = weights.entries[name].shape == weights.entries[twins[1]].shape
        for start, stop in runs(config.model.tokens, 4 * config.model.hidden_size) if same else ():
            scratch.reset()
            head, embedding = (weights.rows(each, start, stop, scratch) for each in twins)
            same = same and torch.equal(head, embedding)
        if not same:
            raise UserError(
                f"{weights.folder}: {name} differs from {twins[1]}, but config.json says tie_word_embeddings: true. "
                f"Set it to false, or leave {name} out."
            )
