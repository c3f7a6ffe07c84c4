"""Makes DeepSpeed's configuration from our sections and the user's ``deepspeed`` section. Imports no torch."""

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
"""Bucket of NCCL: large enough for full bandwidth, small enough to overlap with the backward pass."""

_NEVER = 2**62

_DECIDED_ELSEWHERE = {
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
"""Keys of DeepSpeed that would be ignored, or would repeat or undo what another section does."""

_STAGE_3 = ("offload_param", "cpu_offload_param", "zero_quantized_", "zero_hpz_partition_size")
"""Prefixes of keys of ``zero_optimization`` that the other stages silently ignore. Thresholds and sizes of stage 3 are
not among them: they have no effect in other stages, and may stay while the stage changes."""


class _Derived(NamedTuple):
    value: Any
    owner: str
    """Our key that sets the value."""


def _derived(config: Config, data_parallel: int, accumulation_steps: int) -> dict[str, _Derived]:
    """The values that other sections decide."""
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
        # Otherwise a gradient that is not finite would reach the weights.
        "bf16.check_grad_overflow": _Derived(True, "train.max_bad_steps"),
        "fp16.enabled": _Derived(False, "train.precision"),
        "data_types.grad_accum_dtype": _Derived("fp32", "train.precision"),
        "zero_optimization.stage": _Derived(parallel.zero_stage, "parallel.zero_stage"),
        "zero_optimization.offload_optimizer.device": _Derived(
            "cpu" if parallel.offload_optimizer else "none", "parallel.offload_optimizer"
        ),
        # The optimizer is torch's, offloaded or not: DeepSpeed compiles its own for minutes on first use.
        "zero_force_ds_cpu_optimizer": _Derived(False, "parallel.offload_optimizer"),
        "zero_optimization.offload_optimizer.ratio": _Derived(1.0, "parallel.offload_optimizer"),
        "zero_optimization.offload_optimizer.super_offload": _Derived(False, "parallel.offload_optimizer"),
        "zero_allow_untested_optimizer": _Derived(True, "the optimizer section"),
        "zero_optimization.legacy_stage1": _Derived(False, "parallel.zero_stage"),
    }


def _tuning(config: Config, cuda: bool) -> dict[str, Any]:
    """Values that the user may set otherwise."""
    # Gradients may stay in the bucket in which they were reduced, so it is not larger than they are.
    bucket = min(_BUCKET_ELEMENTS, rank_parameters(config))
    return {
        "steps_per_print": _NEVER,
        # bf16 would round the fp32 gradient of each rank before the sum over data parallelism.
        "communication_data_type": "fp32",
        "zero_optimization.contiguous_gradients": True,
        # gloo communicates on the thread that computes.
        "zero_optimization.overlap_comm": cuda,
        "zero_optimization.reduce_bucket_size": bucket,
        "zero_optimization.allgather_bucket_size": bucket,
        "zero_optimization.offload_optimizer.pin_memory": cuda,
    }


def deepspeed_config(config: Config, data_parallel: int, accumulation_steps: int, *, cuda: bool) -> dict[str, Any]:
    """The dictionary for ``deepspeed.initialize``.

    Raises:
        UserError: the ``deepspeed`` section contradicts another one.
    """
    derived, own = _derived(config, data_parallel, accumulation_steps), dict(leaves(config.deepspeed))
    if problems := dict.fromkeys([*_contradictions(derived, own), *_ignored(config.parallel.zero_stage, own)]):
        raise UserError("\n".join(problems))
    return nested(_tuning(config, cuda) | {path: setting.value for path, setting in derived.items()} | own)


def _contradictions(derived: dict[str, _Derived], own: dict[str, Any]) -> Iterator[str]:
    for path, value in own.items():
        for key, owner in _DECIDED_ELSEWHERE.items():
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


class _RecordingDict(dict[str, Any]):
    """A mapping that records which of its keys are read, since DeepSpeed has no list of the keys that it knows."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__(
            {key: _RecordingDict(value) if isinstance(value, dict) else value for key, value in values.items()}
        )
        self.keys_read: set[str] = set()

    def __copy__(self) -> _RecordingDict:
        return self

    def __getitem__(self, key: str) -> Any:
        self.keys_read.add(key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        self.keys_read.add(str(key))
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def get(self, key: str, default: Any = None) -> Any:
        self.keys_read.add(key)
        return super().get(key, default)

    def keys(self) -> Any:
        return self


def check_known(own: dict[str, Any], settings: dict[str, Any], parse: Callable[[dict[str, Any]], object]) -> None:
    """Raise UserError where DeepSpeed does not know one of the user's keys, or refuses a value.

    Args:
        own: the ``deepspeed`` section.
        settings: the complete dictionary, ``own`` included.
        parse: DeepSpeed's function that reads such a dictionary.
    """
    recording = _RecordingDict(settings)
    try:
        parse(recording)
    except ValidationError as error:
        raise UserError("\n".join(_refusals(error, own))) from None
    except Exception as error:  # Everything else is known to be accepted, so the user's section is the cause.
        raise UserError(f"deepspeed: {error}") from None
    if problems := [*_unknown(own, recording, "deepspeed")]:
        raise UserError("\n".join(problems))


def _unknown(own: dict[str, Any], settings: _RecordingDict, path: str) -> Iterator[str]:
    for key, value in own.items():
        if key not in settings.keys_read:
            yield f"{path}.{key}: unknown key; {nearest(key, sorted(settings.keys_read), f'{path} has the keys')}"
            continue
        inner = dict.get(settings, key)
        # pydantic reads its mappings completely, and refuses unknown keys itself.
        if isinstance(inner, _RecordingDict) and inner.keys_read:
            yield from _unknown(value, inner, f"{path}.{key}")


def _refusals(error: ValidationError, own: dict[str, Any]) -> Iterator[str]:
    """The errors of pydantic, which names the model and the field in it, but not the path in the section."""
    for detail in error.errors(include_url=False):
        *above, name = map(str, detail["loc"])
        inner = ".".join([*above, name])
        path = next((path for path, _ in leaves(own) if f".{path}".endswith(f".{inner}")), inner)
        if detail["type"] == "extra_forbidden":
            known = nearest(name, _fields(error.title, above), f"{path.rpartition('.')[0]} has the keys")
            yield f"deepspeed.{path}: unknown key; {known}"
        else:
            yield f"deepspeed.{path}: {detail['msg']}. Got {_plain(detail['input'])}."


def _fields(title: str, above: list[str]) -> list[str]:
    """The fields that the pydantic model ``title`` accepts at the path ``above``."""
    models = [BaseModel]
    while models[0].__name__ != title:
        models = [*models[1:], *models[0].__subclasses__()]
    model = models[0]
    for name in above:
        hint = model.model_fields[name].annotation
        model = next(kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and issubclass(kind, BaseModel))
    return [name for key, field in model.model_fields.items() for name in (key, field.alias) if name]
