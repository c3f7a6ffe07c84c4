"""Reads config.json of a LLaMA (transformers 4 or 5), or of our exports, as sections of our configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moh_megatron.checkpoint.hf.hf_folder import CONFIG, MARKER, MARKER_CONTENT
from moh_megatron.io.errors import UserError
from moh_megatron.io.json_file import read_json, read_json_if_any

_REQUIRED = object()
_MODEL_TYPES = ("llama", "moh_llama")
_ARCHITECTURES = ("LlamaForCausalLM", "MoHForCausalLM")
_LIMIT = 2**31
_ROPE_TYPES = ("default", "linear", "llama3")


class HFConfigReader:
    """Reads a folder's config.json; every message names the file and the field.

    Raises:
        UserError: the file is missing, or describes a model that is no LLaMA.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / CONFIG
        self.content = read_json(self.path, "the settings of a Hugging Face model")
        model_type, names = self.content.get("model_type"), self.content.get("architectures") or []
        known = model_type in _MODEL_TYPES if model_type is not None else bool(names)
        if not known or not isinstance(names, list) or any(name not in _ARCHITECTURES for name in names):
            raise UserError(
                f"{self.path}: model_type must be {' or '.join(_MODEL_TYPES)}, and architectures one of "
                f"{', '.join(_ARCHITECTURES)}. Got {model_type!r}, {names}: another architecture."
            )
        self.is_moh = model_type == "moh_llama"
        """Whether this is a Mixture-of-Head model that this project exported."""
        self.form: str | None = read_json_if_any(folder / MARKER, MARKER_CONTENT).get("form")
        """The --format of an export, or None for a folder of others and for exports that do not record it."""
        for name, *supported in (
            ("hidden_act", "silu", "swish"),  # two names of one function
            ("attention_bias", False),
            ("mlp_bias", False),
            ("quantization_config", None),
            ("partial_rotary_factor", 1),
        ):
            if (got := self.content.get(name, supported[0])) not in supported:
                raise UserError(f"{self.path}: {name} must be {supported[0]!r}; no other is supported. Got {got!r}.")

    def _number(self, name: str, kind: type, default: Any = _REQUIRED, source: dict[str, Any] | None = None) -> Any:
        """The number ``name`` of ``source``, by default the whole file."""
        content = self.content if source is None else source
        value = content.get(name)
        if value is None:
            if default is _REQUIRED:
                raise UserError(f"{self.path}: {name} is missing. Expected a number above 0.")
            return default
        is_integer = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        is_positive = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
        expected = "a whole number" if kind is int else "a number"
        if not is_positive or (kind is int and not is_integer):
            raise UserError(f"{self.path}: {name} must be {expected} above 0. Got {value!r}.")
        if value >= _LIMIT:
            raise UserError(f"{self.path}: {name} must be {expected} below {_LIMIT}. Got {value!r}.")
        return kind(value)

    def token_ids(self) -> dict[str, int | list[int]]:
        """Return those of bos_token_id, eos_token_id and pad_token_id that name tokens.

        Raises:
            UserError: an id is not in the vocabulary.
        """
        return check_token_ids(self.path, self.content, self._number("vocab_size", int))

    def sections(self) -> dict[str, dict[str, Any]]:
        """Return the sections ``model`` and ``moh`` of a configuration."""
        hidden, heads = self._number("hidden_size", int), self._number("num_attention_heads", int)
        query_groups = self._number("num_key_value_heads", int, heads)
        head_dim = self._number("head_dim", int, None)
        tied = self.content.get("tie_word_embeddings", False)
        if not isinstance(tied, bool):
            raise UserError(f"{self.path}: tie_word_embeddings must be true or false. Got {tied!r}.")
        theta, scaling = self._rope()
        model = {
            "num_layers": self._number("num_hidden_layers", int),
            "hidden_size": hidden,
            "ffn_hidden_size": self._number("intermediate_size", int),
            "num_attention_heads": heads,
            "num_query_groups": None if query_groups == heads else query_groups,
            "kv_channels": None if head_dim is None or head_dim * heads == hidden else head_dim,
            "vocab_size": self._number("vocab_size", int),
            "max_position_embeddings": self._number("max_position_embeddings", int, 2048),
            "rotary_base": theta,
            "rope_scaling": scaling,
            "norm_epsilon": self._number("rms_norm_eps", float, 1e-6),
            "tie_word_embeddings": tied,
            "init_method_std": self._number("initializer_range", float, 0.02),
        }
        return {"model": model, "moh": self._moh(query_groups) if self.is_moh else {"enabled": False}}

    def _moh(self, query_groups: int) -> dict[str, Any]:
        rate = self.content.get("moh_bias_update_rate")
        keys = {
            "shared_heads": "moh_shared_heads",
            "active_heads": "moh_active_heads",
            "router": "moh_router",
            "gating": "moh_gating",
            "balance_loss": "moh_balance_loss",
            "balance_coefficient": "moh_balance_coefficient",
        }
        if missing := [hf_name for hf_name in keys.values() if hf_name not in self.content]:
            raise UserError(f"{self.path}: {', '.join(missing)} missing. Every export of this project states them.")
        balancing = {"balancing": "loss"} if rate is None else {"balancing": "bias", "bias_update_rate": rate}
        stated = {name: self.content[hf_name] for name, hf_name in keys.items()}
        return {"enabled": True, **stated, **balancing, **self._routing_groups(query_groups)}

    def _routing_groups(self, query_groups: int) -> dict[str, Any]:
        """The keys routing_groups and gate_softmax, which exports of earlier versions do not state."""
        groups, softmax = self.content.get("moh_routing_groups", 1), self.content.get("moh_gate_softmax", "layer")
        if type(groups) is not int or groups not in (1, query_groups):
            raise UserError(
                f"{self.path}: moh_routing_groups must be 1 or num_key_value_heads ({query_groups}). Got {groups!r}."
            )
        if groups > 1:
            return {"routing_groups": "kv", "gate_softmax": softmax}
        # The one group is the layer.
        return {"routing_groups": 1, "gate_softmax": "layer" if softmax == "group" else softmax}

    def _rope(self) -> tuple[float, dict[str, Any] | None]:
        """Return RoPE's base, and the value of model.rope_scaling."""
        readings: dict[str, tuple[float, dict[str, Any] | None]] = {}
        for name in ("rope_scaling", "rope_parameters"):
            value = self.content.get(name) or {}
            if not isinstance(value, dict):
                raise UserError(f"{self.path}: {name} must be an object. Got {value!r}.")
            if value:
                readings[name] = self._rope_from(value)
        top_level = self._number("rope_theta", float, None)
        found = list(readings.values()) or [(top_level or 10000.0, None)]
        if any(reading != found[0] for reading in found) or top_level not in (None, found[0][0]):
            stated = ", ".join(
                f"{name} {self.content[name]}" for name in ("rope_theta", *readings) if name in self.content
            )
            raise UserError(f"{self.path}: says RoPE in two ways that differ: {stated}. Leave the wrong one out.")
        return found[0]

    def _rope_from(self, rope: dict[str, Any]) -> tuple[float, dict[str, Any] | None]:
        theta = self._number("rope_theta", float, self._number("rope_theta", float, 10000.0), rope)
        kind = rope.get("rope_type", rope.get("type", "default"))
        partial = rope.get("partial_rotary_factor", 1)
        if kind not in _ROPE_TYPES or partial != 1:
            raise UserError(
                f"{self.path}: the RoPE scaling (rope_scaling or rope_parameters) must be of type "
                f"{', '.join(_ROPE_TYPES)} over whole heads. Got rope_type {kind!r}, partial_rotary_factor {partial!r}."
            )
        if kind == "default":
            return theta, None
        scaling: dict[str, Any] = {"type": kind, "factor": self._number("factor", float, source=rope)}
        if kind == "llama3":
            for name, number in (
                ("low_freq_factor", float),
                ("high_freq_factor", float),
                ("original_max_position_embeddings", int),
            ):
                scaling[name] = self._number(name, number, source=rope)
        return theta, scaling


def check_token_ids(file: Path, content: dict[str, Any], vocab_size: int) -> dict[str, int | list[int]]:
    """Return those of bos_token_id, eos_token_id and pad_token_id in the ``content`` of ``file`` that name tokens.

    Raises:
        UserError: an id is not in a vocabulary of ``vocab_size`` entries.
    """
    found: dict[str, int | list[int]] = {}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = content.get(name)
        if value is None or value == -1:  # The first LLaMAs write -1 for none.
            continue
        ids = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if not ids or any(type(token) is not int or not 0 <= token < vocab_size for token in ids):
            raise UserError(f"{file}: {name} must be a token from 0 to {vocab_size - 1}. Got {value!r}.")
        found[name] = value
    return found
