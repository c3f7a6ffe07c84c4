"""Checks the rules between keys: combinations of valid values that cannot work."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from moh_megatron.config.moh_rules import moh_violations
from moh_megatron.config.schema import Config
from moh_megatron.config.source_weights import blend_violations
from moh_megatron.config.violation import Violation, nearest_divisors, nearest_multiples
from moh_megatron.io.errors import UserError


def validate(config: Config) -> None:
    """Raise UserError with every violation of a rule, one per line."""
    if found := violations(config):
        raise UserError("\n".join(violation.message for violation in found))


def violations(config: Config) -> list[Violation]:
    """Every rule between keys that ``config`` breaks."""
    return [
        *_model(config),
        *moh_violations(config),
        *_parallel(config),
        *_batch(config),
        *_optimizer(config),
        *_data(config),
        *_evaluate(config),
    ]


def data_parallel_size(config: Config, world_size: int) -> int:
    """The number of data-parallel replicas of ``world_size`` processes. Raises UserError if it does not fit."""
    tensor = config.parallel.tensor
    if world_size < 1 or world_size % tensor:
        alternatives = nearest_divisors(tensor, math.gcd(max(world_size, 1), _tensor_limit(config)))
        raise UserError(
            f"The number of processes must be divisible by parallel.tensor ({tensor}). Got {world_size}; "
            f"start {nearest_multiples(world_size, tensor)}, or set parallel.tensor to {alternatives}."
        )
    return world_size // tensor


def gradient_accumulation_steps(config: Config, world_size: int) -> int:
    """The number of micro-batches of each replica in a step. Raises UserError if the batch cannot be divided."""
    replicas = data_parallel_size(config, world_size)
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    if batch % (micro * replicas):
        message = (
            f"train.global_batch_size must be divisible by train.micro_batch_size ({micro}) times the data-parallel "
            f"size ({replicas}). Got {batch}; nearest: {nearest_multiples(batch, micro * replicas)}"
        )
        if batch % replicas == 0:
            message += f"; or set train.micro_batch_size to {nearest_divisors(micro, batch // replicas)}"
        raise UserError(f"{message}.")
    return batch // (micro * replicas)


def _model(config: Config) -> Iterator[Violation]:
    model = config.model
    heads, groups = model.num_attention_heads, model.query_groups
    if model.kv_channels is None and model.hidden_size % heads:
        yield Violation(
            "model.hidden_size",
            f"model.hidden_size must be divisible by model.num_attention_heads ({heads}) unless model.kv_channels is "
            f"given. Got {model.hidden_size}; nearest: {nearest_multiples(model.hidden_size, heads)}.",
        )
    elif model.kv_channels is not None and model.kv_channels % 2:
        yield Violation(
            "model.kv_channels",
            f"model.kv_channels must be even: RoPE rotates pairs of channels. Got {model.kv_channels}; "
            f"nearest: {nearest_multiples(model.kv_channels, 2)}.",
        )
    elif model.head_dim % 2:
        yield Violation(
            "model.hidden_size",
            f"model.hidden_size / model.num_attention_heads, the size of a head, must be even: RoPE rotates pairs of "
            f"channels. Got {model.head_dim}; nearest hidden_size: {nearest_multiples(model.hidden_size, 2 * heads)}.",
        )
    if heads % groups:
        yield Violation(
            "model.num_query_groups",
            f"model.num_query_groups must divide model.num_attention_heads ({heads}). Got {groups}; "
            f"nearest: {nearest_divisors(groups, heads)}.",
        )
    if model.vocab_padding >= model.vocab_size:
        yield Violation(
            "model.vocab_padding",
            f"model.vocab_padding must be less than model.vocab_size ({model.vocab_size}), which counts it. "
            f"Got {model.vocab_padding}.",
        )
    scaling = model.rope_scaling
    if scaling is not None and scaling.low_freq_factor >= scaling.high_freq_factor:
        yield Violation(
            "model.rope_scaling",
            f"model.rope_scaling: high_freq_factor must be greater than low_freq_factor "
            f"({scaling.low_freq_factor:g}). Got {scaling.high_freq_factor:g}.",
        )
    context, sequence = model.max_position_embeddings, config.train.sequence_length
    if context is not None and context < sequence:
        yield Violation(
            "model.max_position_embeddings",
            f"model.max_position_embeddings must be at least train.sequence_length ({sequence}). Got {context}.",
        )


def _parallel(config: Config) -> Iterator[Violation]:
    parallel, model = config.parallel, config.model
    if parallel.pipeline != 1:
        yield Violation(
            "parallel.pipeline",
            "parallel.pipeline must be 1: pipeline parallelism is not supported; use tensor parallelism "
            f"(parallel.tensor) and ZeRO (parallel.zero_stage) instead. Got {parallel.pipeline}.",
        )
    if parallel.context != 1:
        yield Violation(
            "parallel.context",
            "parallel.context must be 1: context parallelism is not supported; use sequence parallelism "
            f"(parallel.sequence) and recomputation (train.recompute) instead. Got {parallel.context}.",
        )
    tensor = parallel.tensor
    unfit = [
        f"{key} ({value})"
        for key, value in (
            ("model.num_attention_heads", model.num_attention_heads),
            ("model.num_query_groups", model.num_query_groups),
        )
        if value is not None and value % tensor
    ]
    if unfit:
        yield Violation(
            "parallel.tensor",
            f"parallel.tensor must divide {' and '.join(unfit)}. Got {tensor}; "
            f"nearest: {nearest_divisors(tensor, _tensor_limit(config))}.",
        )
    else:
        for key, value in (("vocab_size", model.vocab_size), ("ffn_hidden_size", model.ffn_hidden_size)):
            if value % tensor:
                yield Violation(
                    f"model.{key}",
                    f"model.{key} must be divisible by parallel.tensor ({tensor}). Got {value}; "
                    f"nearest: {nearest_multiples(value, tensor)}.",
                )
    if parallel.sequence and tensor == 1:
        yield Violation(
            "parallel.sequence",
            "parallel.sequence needs parallel.tensor greater than 1. Got 1; set parallel.sequence to false.",
        )
    if parallel.sequence and config.train.sequence_length % tensor:
        yield Violation(
            "train.sequence_length",
            f"train.sequence_length must be divisible by parallel.tensor ({tensor}) with parallel.sequence. "
            f"Got {config.train.sequence_length}; "
            f"nearest: {nearest_multiples(config.train.sequence_length, tensor)}.",
        )
    if parallel.zero_stage == 0 and config.train.precision == "bf16":
        yield Violation(
            "parallel.zero_stage",
            "parallel.zero_stage must be 1, 2 or 3 with train.precision: bf16: DeepSpeed's stage 0 keeps no fp32 "
            "master weights then, and small updates are lost. Got 0.",
        )
    if parallel.offload_optimizer and parallel.zero_stage == 0:
        yield Violation(
            "parallel.offload_optimizer",
            "parallel.offload_optimizer needs parallel.zero_stage 1, 2 or 3: it is ZeRO's own optimizer state that "
            "moves to host memory, and stage 0 has none. Got stage 0.",
        )


def _batch(config: Config) -> Iterator[Violation]:
    batch, micro = config.train.global_batch_size, config.train.micro_batch_size
    if batch % micro:
        yield Violation(
            "train.global_batch_size",
            f"train.global_batch_size must be divisible by train.micro_batch_size ({micro}). Got {batch}; "
            f"nearest: {nearest_multiples(batch, micro)}.",
        )


def _optimizer(config: Config) -> Iterator[Violation]:
    optimizer, steps = config.optimizer, config.train.steps
    for key, value in (
        ("min_learning_rate", optimizer.min_learning_rate),
        ("warmup_learning_rate", optimizer.warmup_learning_rate),
    ):
        if value > optimizer.learning_rate:
            yield Violation(
                f"optimizer.{key}",
                f"optimizer.{key} must be at most optimizer.learning_rate ({optimizer.learning_rate:g}). "
                f"Got {value:g}.",
            )
    length = f"the run's {steps} steps (train.total_tokens / (train.global_batch_size x train.sequence_length))"
    if optimizer.warmup_steps >= steps:
        yield Violation(
            "optimizer.warmup_steps",
            f"optimizer.warmup_steps must be less than {length}. Got {optimizer.warmup_steps}.",
        )
    elif optimizer.schedule == "wsd" and optimizer.warmup_steps + math.ceil(steps * optimizer.decay_fraction) > steps:
        yield Violation(
            "optimizer.decay_fraction",
            f"optimizer.decay_fraction must leave room for optimizer.warmup_steps ({optimizer.warmup_steps}) in "
            f"{length}: at most {1 - optimizer.warmup_steps / steps:.3g}. Got {optimizer.decay_fraction:g}.",
        )


def _data(config: Config) -> Iterator[Violation]:
    yield from blend_violations(config)
    tokenizer = config.tokenizer
    if tokenizer.grow_to is not None and tokenizer.path is None:
        yield Violation(
            "tokenizer.path",
            "tokenizer.path must name the tokenizer to grow with tokenizer.grow_to. Got null; set one, or set "
            "tokenizer.grow_to to null.",
        )
    if tokenizer.grow_to is not None and tokenizer.grow_to > config.model.vocab_size:
        yield Violation(
            "tokenizer.grow_to",
            f"tokenizer.grow_to must be at most model.vocab_size ({config.model.vocab_size}). Got {tokenizer.grow_to}.",
        )
    if config.data.ngram_baselines and config.data.validation_fraction == 0:
        yield Violation(
            "data.validation_fraction",
            "data.validation_fraction must be greater than 0 with data.ngram_baselines, which measures held-out text. "
            "Got 0.",
        )


def _evaluate(config: Config) -> Iterator[Violation]:
    suite, interval = config.evaluate.suite, config.evaluate.interval
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", config.evaluate.device):
        yield Violation(
            "evaluate.device",
            f"evaluate.device must be cpu, cuda (or cuda:N) or auto. Got {config.evaluate.device}.",
        )
    if suite is not None and not interval:
        yield Violation(
            "evaluate.interval",
            "evaluate.interval must be the steps between evaluations with evaluate.suite. Got 0, which is never.",
        )
    if suite is None and interval:
        yield Violation(
            "evaluate.suite",
            f"evaluate.suite must name a file as in configs/eval with evaluate.interval ({interval}). Got null.",
        )


def _tensor_limit(config: Config) -> int:
    """The largest tensor-parallel size of the model; its divisors are the other possible sizes."""
    model = config.model
    return math.gcd(model.num_attention_heads, model.query_groups, model.vocab_size, model.ffn_hidden_size)
