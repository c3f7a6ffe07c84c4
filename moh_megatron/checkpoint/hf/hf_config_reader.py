"""config.json of a LLaMA, as transformers 4 or 5 writes it, and of our exports -> sections of our configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moh_megatron.checkpoint.hf.hf_reader import CONFIG, MARKER, NOTE
from moh_megatron.io.errors import UserError
from moh_megatron.io.json_file import read_json, read_json_if_any

_REQUIRED = object()
_TYPES = ("llama", "moh_llama")
_ARCHITECTURES = ("LlamaForCausalLM", "MoHForCausalLM")
_TOO_LARGE = 2**31
_SCALINGS = ("default", "linear", "llama3")


class HFSettings:
    """The content of a folder's config.json; every message names the file and the field.

    Raises:
        UserError: it is missing, or of a model that is no LLaMA.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / CONFIG
        self.content = read_json(self.path, "the settings of a Hugging Face model")
        model_type, names = self.content.get("model_type"), self.content.get("architectures") or []
        known = model_type in _TYPES if model_type is not None else bool(names)
        if not known or not isinstance(names, list) or any(name not in _ARCHITECTURES for name in names):
            raise UserError(
                f"{self.path}: model_type must be {' or '.join(_TYPES)}, and architectures one of "
                f"{', '.join(_ARCHITECTURES)}. Got {model_type!r}, {names}: another architecture."
            )
        self.moh = model_type == "moh_llama"
        """Whether this is a Mixture-of-Head model that this project exported."""
        self.form: str | None = read_json_if_any(folder / MARKER, NOTE).get("form")
        """The --format of this project's export, or None: a folder of others, or of before it was recorded."""
        for name, only in (
            ("hidden_act", "silu"),
            ("attention_bias", False),
            ("mlp_bias", False),
            ("quantization_config", None),
            ("partial_rotary_factor", 1),
        ):
            if (got := self.content.get(name, only)) != only:
                raise UserError(f"{self.path}: {name} must be {only!r}; no other is supported. Got {got!r}.")

    def _number(self, name: str, kind: type, default: Any = _REQUIRED, within: dict[str, Any] | None = None) -> Any:
        content = self.content if within is None else within
        value = content.get(name)
        if value is None:
            if default is _REQUIRED:
                raise UserError(f"{self.path}: {name} is missing. Expected a number above 0.")
            return default
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        number = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        words = "a whole number" if kind is int else "a number"
        if not number or (kind is int and not whole):
            raise UserError(f"{self.path}: {name} must be {words} above 0. Got {value!r}.")
        if value >= _TOO_LARGE:
            raise UserError(f"{self.path}: {name} must be {words} below {_TOO_LARGE}. Got {value!r}.")
        return kind(value)

    def token_ids(self) -> dict[str, int | list[int]]:
        """Those of bos_token_id, eos_token_id and pad_token_id that name tokens.

        Raises:
            UserError: one is no entry of the vocabulary.
        """
        return check_token_ids(self.path, self.content, self._number("vocab_size", int))

    def sections(self) -> dict[str, dict[str, Any]]:
        """``model`` and ``moh`` of a configuration."""
        hidden, heads = self._number("hidden_size", int), self._number("num_attention_heads", int)
        groups = self._number("num_key_value_heads", int, heads)
        size = self._number("head_dim", int, None)
        tied = self.content.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            raise UserError(f"{self.path}: tie_word_embeddings must be true or false. Got {tied!r}.")
        theta, scaling = self._rope()
        model = {
            "num_layers": self._number("num_hidden_layers", int),
            "hidden_size": hidden,
            "ffn_hidden_size": self._number("intermediate_size", int),
            "num_attention_heads": heads,
            "num_query_groups": None if groups == heads else groups,
            "kv_channels": None if size is None or size * heads == hidden else size,
            "vocab_size": self._number("vocab_size", int),
            "max_position_embeddings": self._number("max_position_embeddings", int, 2048),
            "rotary_base": theta,
            "rope_scaling": scaling,
            "norm_epsilon": self._number("rms_norm_eps", float, 1e-6),
            "tie_word_embeddings": tied,
            "init_method_std": self._number("initializer_range", float, 0.02),
        }
        return {"model": model, "moh": self._moh() if self.moh else {"enabled": False}}

    def _moh(self) -> dict[str, Any]:
        rate = self.content.get("moh_bias_update_rate")
        named = {
            "shared_heads": "moh_shared_heads",
            "active_heads": "moh_active_heads",
            "router": "moh_router",
            "gating": "moh_gating",
            "balance_loss": "moh_balance_loss",
            "balance_coefficient": "moh_balance_coefficient",
        }
        if missing := [theirs for theirs in named.values() if theirs not in self.content]:
            raise UserError(f"{self.path}: {', '.join(missing)} missing. Every export of this project states them.")
        balanced = {"balancing": "loss"} if rate is None else {"balancing": "bias", "bias_update_rate": rate}
        return {"enabled": True, **{ours: self.content[theirs] for ours, theirs in named.items()}, **balanced}

    def _rope(self) -> tuple[float, dict[str, Any] | None]:
        """RoPE's base, and model.rope_scaling."""
        readings: dict[str, tuple[float, dict[str, Any] | None]] = {}
        for name in ("rope_scaling", "rope_parameters"):
            value = self.content.get(name) or {}
            if not isinstance(value, dict):
                raise UserError(f"{self.path}: {name} must be an object. Got {value!r}.")
            if value:
                readings[name] = self._rope_of(value)
        outside = self._number("rope_theta", float, None)
        found = list(readings.values()) or [(outside or 10000.0, None)]
        if any(each != found[0] for each in found) or outside not in (None, found[0][0]):
            said = ", ".join(
                f"{name} {self.content[name]}" for name in ("rope_theta", *readings) if name in self.content
            )
            raise UserError(f"{self.path}: says RoPE in two ways that differ: {said}. Leave the wrong one out.")
        return found[0]

    def _rope_of(self, given: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
        theta = self._number("rope_theta", float, self._number("rope_theta", float, 10000.0), given)
        kind = given.get("rope_type", given.get("type", "default"))
        partial = given.get("partial_rotary_factor", 1)
        if kind not in _SCALINGS or partial != 1:
            raise UserError(
                f"{self.path}: the RoPE scaling (rope_scaling or rope_parameters) must be of type "
                f"{', '.join(_SCALINGS)} over whole heads. Got rope_type {kind!r}, partial_rotary_factor {partial!r}."
            )
        if kind == "default":
            return theta, None
        scaling: dict[str, Any] = {"type": kind, "factor": self._number("factor", float, within=given)}
        if kind == "llama3":
            for name, number in (
                ("low_freq_factor", float),
                ("high_freq_factor", float),
                ("original_max_position_embeddings", int),
            ):
                scaling[name] = self._number(name, number, within=given)
        return theta, scaling


def check_token_ids(file: Path, content: dict[str, Any], entries: int) -> dict[str, int | list[int]]:
    """Those of bos_token_id, eos_token_id and pad_token_id in the ``content`` of ``file`` that name tokens.

    Raises:
        UserError: one is no entry of a vocabulary of ``entries``.
    """
    found: dict[str, int | list[int]] = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = content.get(name)
        if value is None or value == -1:  # what the first LLaMAs say for none
            continue
        ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if not ids or any(type(each) is not int or not 0 <= each < entries for each in ids):
            raise UserError(f"{file}: {name} must be a token from 0 to {entries - 1}. Got {value!r}.")
        found[name] = value
    return found
