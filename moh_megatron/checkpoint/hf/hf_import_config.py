"""Builds the configuration of an imported model from config.json, and checks what to import. Imports nothing slow."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from moh_megatron.checkpoint.hf.hf_config_reader import HFConfigReader
from moh_megatron.config.layer_heads import choice_of_heads, layer_heads
from moh_megatron.config.load import completed_config
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError
from moh_megatron.io.folders import refuse_inside, refuse_unless_new

_LONGEST_SEQUENCE = 2048
"""An import writes no longer train.sequence_length than this into the configuration on its own."""
_LEARNING_RATE = 1e-5
_NOT_COMPARED = ("max_position_embeddings", "init_method_std", "scaled_residual_init", "vocab_padding")
"""Keys of the model section that affect neither the weights nor what is computed from them."""


def check_target(save_dir: Path, hf_dir: Path) -> None:
    """Raise UserError unless ``save_dir`` is a new or empty folder outside ``hf_dir``."""
    refuse_inside(save_dir, hf_dir)
    refuse_unless_new(save_dir)


def refuse_official(reader: HFConfigReader, hf_dir: Path) -> None:
    """Raise UserError for an export in SkyworkAI's form, which cannot be told from a dense model otherwise."""
    if reader.form == "official":
        raise UserError(
            f"{hf_dir}: must be of a form whose config.json says how heads are routed. Got an export of --format "
            "official, which would be read as a dense model; use official-to-hf, and import what it makes."
        )


def require_official(reader: HFConfigReader, official_dir: Path) -> None:
    """Raise UserError for a folder that is known not to be in SkyworkAI's form."""
    if reader.is_moh:
        raise UserError(
            f"{reader.path}: must be of the official form, whose model_type is llama. Got moh_llama, a folder "
            "of this project, which says itself how its heads are routed; use hf-to-megatron."
        )
    if reader.form not in (None, "official"):
        raise UserError(
            f"{official_dir}: must be of the official form. Got an export of --format {reader.form} of a dense "
            "model; use hf-to-megatron."
        )


def import_config(hf_dir: Path, save_dir: Path, path: Path | None, overrides: Sequence[str], bf16: bool) -> Config:
    """Build the checkpoint's configuration from config.json, overridden by ``path`` and then ``overrides``.

    If ``parallel.tensor`` does not divide the vocabulary, the vocabulary is padded. The sections run, train and
    optimizer, which config.json does not have, get values that a training run replaces by its own; train.precision is
    bf16 where weights are, which ``bf16`` says.

    Raises:
        UserError: config.json is not of a LLaMA, the configuration is invalid or disagrees with config.json, or it
            states how the heads of a model that stays dense are routed.
    """
    reader = HFConfigReader(hf_dir)
    config = build_config(reader, save_dir, path, overrides, bf16)
    _refuse_differences(reader, build_config(reader, save_dir, None, (), bf16), config)
    return config


def build_config(
    reader: HFConfigReader, save_dir: Path, path: Path | None, overrides: Sequence[str], bf16: bool
) -> Config:
    sections = reader.sections()
    model = sections["model"]

    def defaults(stated: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
        _refuse_ignored(reader, stated.get("moh", {}))
        if reader.is_moh:
            _refuse_other_groups(reader, sections, stated.get("moh", {}).get("routing_groups"))
        tensor = stated.get("parallel", {}).get("tensor", 1)
        padding = -model["vocab_size"] % tensor if isinstance(tensor, int) and tensor > 0 else 0
        padded = {"vocab_size": model["vocab_size"] + padding, "vocab_padding": padding}
        longest = stated.get("model", {}).get("max_position_embeddings")
        length = min(_LONGEST_SEQUENCE, longest if isinstance(longest, int) else model["max_position_embeddings"])
        precision = "bf16" if bf16 else "fp32"
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

    return completed_config(defaults, str(reader.path), path, overrides)


def _refuse_ignored(reader: HFConfigReader, stated: Collection[str]) -> None:
    """Refuse moh keys of a dense model without moh.enabled, whose default is true elsewhere and false here."""
    ignored = [f"moh.{key}" for key in stated if key != "head_layout"]
    if ignored and not reader.is_moh and "enabled" not in stated:
        raise UserError(
            f"{reader.path}: this model is dense, and {', '.join(ignored)} would be ignored. Add moh.enabled=true to "
            "make it a MoH model, or moh.enabled=false to keep it dense."
        )


def _refuse_other_groups(reader: HFConfigReader, sections: Mapping[str, Mapping[str, Any]], stated: Any) -> None:
    """Refuse another moh.routing_groups than config.json's before the rules refuse the heads, which differ with it."""
    expected, query_groups = sections["moh"]["routing_groups"], sections["model"]["num_query_groups"]
    if stated in (1, "kv") and stated != expected and query_groups != 1:
        _refuse(reader, [f"  moh.routing_groups: {expected} in {reader.path.name}, {stated} in the configuration"])


def _refuse(reader: HFConfigReader, differences: Sequence[str]) -> NoReturn:
    remedy = "Leave these keys out: they are taken from there."
    raise UserError("\n".join([f"{reader.path} and the configuration disagree:", *differences, remedy]))


def _refuse_differences(reader: HFConfigReader, expected_config: Config, config: Config) -> None:
    expected, current = (_comparable(compared, reader.is_moh) for compared in (expected_config, config))
    different = [key for key, value in expected.items() if key in current and current[key] != value]
    # A null value follows from other keys: name those, if they differ.
    explicit = [key for key in different if getattr(config.model, key.removeprefix("model."), "") is not None]
    differences = [
        f"  {key}: {expected[key]} in {reader.path.name}, {current[key]} in the configuration"
        for key in explicit or different
    ]
    if differences:
        _refuse(reader, differences)


def _comparable(config: Config, with_moh: bool) -> dict[str, Any]:
    """Return the values that determine the weights and the computation; equivalent values compare equal."""
    model, moh = config.model, config.moh
    values = {f"model.{key}": value for key, value in asdict(model).items() if key not in _NOT_COMPARED}
    values |= {
        "model.vocab_size": model.tokens,
        "model.num_query_groups": model.query_groups,
        "model.kv_channels": model.head_dim,
    }
    if with_moh:
        values["moh.enabled"] = moh.enabled
    if with_moh and moh.enabled:
        layers = layer_heads(model, moh)
        values |= {f"moh.{name}": getattr(moh, name) for name in ("router", "gating", "balancing")}
        values |= choice_of_heads(model, moh)
        values["moh.shared_heads"] = _one_if_equal([layer.shared for layer in layers])
        values["moh.active_heads"] = _one_if_equal([layer.active for layer in layers])
    return values


def _one_if_equal(per_layer: list[Any]) -> Any:
    return per_layer[0] if len(set(per_layer)) == 1 else per_layer
