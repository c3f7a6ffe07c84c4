"""DeepSpeed's configuration: what our sections say, tuned by the user's ``deepspeed`` section. No torch here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, ValidationError

from moh_megatron.config.load import nearest
from moh_megatron.config.nesting import leaves, nested, within
from moh_megatron.config.parameter_count import rank_parameters
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError

_BUCKET_ELEMENTS = 200_000_000
"""What NCCL moves at once: large enough for full bandwidth, small enough to overlap with the backward pass."""

_NEVER = 2**62

_ELSEWHERE = {
    "optimizer": "the optimizer section",
    "scheduler": "optimizer.schedule",
    "bfloat16": "train.precision",
    "torch_autocast": "train.precision",
    "activation_checkpointing": "train.recompute",
    "tensor_parallel": "parallel.tensor",
    "sequence_parallel_size": "parallel.sequence",
    "zero_optimization.cpu_offload": "parallel.offload_optimizer",
    "zero_optimization.zenflow": "the optimizer section",
    "data_efficiency": "the data section",
    "hybrid_engine": "the train section",
    "expert_parallel": "the model section",
    "weight_quantization": "train.precision",
    "autotuning": "the command that starts a run",
}
"""Keys of DeepSpeed that would be ignored, do twice what another section does, or undo it."""

_STAGE_3 = ("offload_param", "cpu_offload_param", "zero_quantized_", "zero_hpz_partition_size")
"""Beginnings of keys of ``zero_optimization`` whose promise the other stages silently break; thresholds and sizes of
stage 3 promise nothing, and may stay while the stage changes."""


class _Derived(NamedTuple):
    value: Any
    owner: str
    """The key of ours that sets it."""


def _derived(config: Config, data_parallel: int, accumulation_steps: int) -> dict[str, _Derived]:
    """What other sections decide."""
    train, parallel = config.train, config.parallel
    bf16 = train.precision == "bf16"
    return {
        "train_batch_size": _Derived(
            train.micro_batch_size * data_parallel * accumulation_steps, "train.global_batch_size"
        ),
        "train_micro_batch_size_per_gpu": _Derived(train.micro_batch_size, "train.micro_batch_size"),
        "gradient_accumulation_steps": _Derived(accumulation_steps, "train.global_batch_size"),
        "gradient_allreduce_op": _Derived("mean", "train.global_batch_size"),
        "managed_gradient_accumulation": _Derived(True, "train.global_batch_size"),
        "prescale_gradients": _Derived(False, "train.global_batch_size"),
        "gradient_predivide_factor": _Derived(1.0, "train.global_batch_size"),
        "gradient_clipping": _Derived(config.optimizer.gradient_clipping, "optimizer.gradient_clipping"),
        "zero_optimization.compute_grad_norm": _Derived(True, "optimizer.gradient_clipping"),
        "bf16.enabled": _Derived(bf16, "train.precision"),
        "bf16.bf16_master_weights_and_grads": _Derived(False, "train.precision"),
        "bf16.bf16_optimizer_states": _Derived(False, "train.precision"),
        # Otherwise a gradient that is not finite reaches the weights.
        "bf16.check_grad_overflow": _Derived(True, "train.max_bad_steps"),
        "fp16.enabled": _Derived(False, "train.precision"),
        "data_types.grad_accum_dtype": _Derived("fp32", "train.precision"),
        "zero_optimization.stage": _Derived(parallel.zero_stage, "parallel.zero_stage"),
        "zero_optimization.offload_optimizer.device": _Derived(
            "cpu" if parallel.offload_optimizer else "none", "parallel.offload_optimizer"
        ),
        # The optimizer is torch's own, offloaded or not: DeepSpeed's is compiled for minutes on first use.
        "zero_force_ds_cpu_optimizer": _Derived(False, "parallel.offload_optimizer"),
        "zero_optimization.offload_optimizer.ratio": _Derived(1.0, "parallel.offload_optimizer"),
        "zero_optimization.offload_optimizer.super_offload": _Derived(False, "parallel.offload_optimizer"),
        "zero_allow_untested_optimizer": _Derived(True, "the optimizer section"),
        "zero_optimization.legacy_stage1": _Derived(False, "parallel.zero_stage"),
    }


def _tuning(config: Config, cuda: bool) -> dict[str, Any]:
    """What the user may set otherwise."""
    # Gradients may stay in the bucket they were reduced in: no larger than they are.
    bucket = min(_BUCKET_ELEMENTS, rank_parameters(config))
    return {
        "steps_per_print": _NEVER,
        # bf16 would round each rank's fp32 gradient before the sum over data parallelism.
        "communication_data_type": "fp32",
        "zero_optimization.contiguous_gradients": True,
        # gloo works on the thread that computes.
        "zero_optimization.overlap_comm": cuda,
        "zero_optimization.reduce_bucket_size": bucket,
        "zero_optimization.allgather_bucket_size": bucket,
        "zero_optimization.offload_optimizer.pin_memory": cuda,
    }


def deepspeed_config(config: Config, data_parallel: int, accumulation_steps: int, *, cuda: bool) -> dict[str, Any]:
    """The dictionary ``deepspeed.initialize`` is given.

    Raises:
        UserError: the ``deepspeed`` section contradicts another one.
    """
    derived, own = _derived(config, data_parallel, accumulation_steps), dict(leaves(config.deepspeed))
    if problems := dict.fromkeys([*_contradictions(derived, own), *_ignored(config.parallel.zero_stage, own)]):
        raise UserError("\n".join(problems))
    return nested(_tuning(config, cuda) | {path: each.value for path, each in derived.items()} | own)


def _contradictions(derived: dict[str, _Derived], own: dict[str, Any]) -> Iterator[str]:
    for path, value in own.items():
        for key, owner in _ELSEWHERE.items():
            if within(path, key):
                yield f"deepspeed.{path}: {owner} decides this; leave deepspeed.{key} out."
        for key, (expected, owner) in derived.items():
            if path != key and within(key, path):
                yield f"deepspeed.{path} must be a mapping of keys. Got {_plain(value)}."
            elif within(path, key) and (path != key or value != expected):
                yield (
                    f"deepspeed.{key} must be {_plain(expected)}, as {owner} makes it. "
                    f"Got {_plain(value) if path == key else 'a mapping'}; change {owner}, or leave the key out."
                )


def _ignored(stage: int, own: dict[str, Any]) -> Iterator[str]:
    for path in own:
        if stage < 3 and path.removeprefix("zero_optimization.").startswith(_STAGE_3) and "." in path:
            yield (
                f"deepspeed.{path}: only stage 3 reads it. Got parallel.zero_stage {stage}; set that to 3, or leave "
                f"the key out."
            )


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


class _Asked(dict[str, Any]):
    """A mapping that remembers which keys it was asked for; DeepSpeed has no list of those it knows."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__({key: _Asked(each) if isinstance(each, dict) else each for key, each in values.items()})
        self.asked: set[str] = set()

    def __copy__(self) -> _Asked:
        return self

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self


def check_known(own: dict[str, Any], settings: dict[str, Any], parse: Callable[[dict[str, Any]], object]) -> None:
    """Raise UserError where DeepSpeed does not know a key of the user's, or refuses a value.

    Args:
        own: the ``deepspeed`` section.
        settings: the whole dictionary, ``own`` included.
        parse: DeepSpeed's reader of such a dictionary.
    """
    asked = _Asked(settings)
    try:
        parse(asked)
    except ValidationError as error:
        raise UserError("\n".join(_refusals(error, own))) from None
    except Exception as error:  # all but the user's part is known to be read: whatever it is, it is in there
        raise UserError(f"deepspeed: {error}") from None
    if problems := [*_unknown(own, asked, "deepspeed")]:
        raise UserError("\n".join(problems))


def _unknown(own: dict[str, Any], asked: _Asked, place: str) -> Iterator[str]:
    for key, value in own.items():
        if key not in asked.asked:
            yield f"{place}.{key}: unknown key; {nearest(key, sorted(asked.asked), f'{place} has the keys')}"
            continue
        inner = dict.get(asked, key)
        # What pydantic reads it reads whole, and refuses unknown keys itself.
        if isinstance(inner, _Asked) and inner.asked:
            yield from _unknown(value, inner, f"{place}.{key}")


def _refusals(error: ValidationError, own: dict[str, Any]) -> Iterator[str]:
    """pydantic's findings; it tells the model and the place inside it, not where in the section that stands."""
    for detail in error.errors(include_url=False):
        *above, name = map(str, detail["loc"])
        inner = ".".join([*above, name])
        place = next((path for path, _ in leaves(own) if f".{path}".endswith(f".{inner}")), inner)
        if detail["type"] == "extra_forbidden":
            known = nearest(name, _fields(error.title, above), f"{place.rpartition('.')[0]} has the keys")
            yield f"deepspeed.{place}: unknown key; {known}"
        else:
            yield f"deepspeed.{place}: {detail['msg']}. Got {_plain(detail['input'])}."


def _fields(title: str, above: list[str]) -> list[str]:
    """What the pydantic model called ``title`` accepts, inside its fields ``above``."""
    models = [BaseModel]
    while models[0].__name__ != title:
        models = [*models[1:], *models[0].__subclasses__()]
    model = models[0]
    for name in above:
        hint = model.model_fields[name].annotation
        model = next(each for each in (hint, *get_args(hint)) if isinstance(each, type) and issubclass(each, BaseModel))
    return [name for key, field in model.model_fields.items() for name in (key, field.alias) if name]
