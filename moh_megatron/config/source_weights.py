"""The share of each source in the training sequences, step by step, and the rules of data.sources."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moh_megatron.config.schema import Config
from moh_megatron.config.violation import Violation

ONLY = "data"
"""The name of the only source of a configuration without data.sources."""


@dataclass(frozen=True)
class Phase:
    """The steps [start, stop), in which the shares stay the same."""

    start: int
    stop: int
    shares: dict[str, float]
    """The share of each source, in the order of the configuration; their sum is 1."""


def phases(config: Config) -> list[Phase]:
    """The phases of the run: a new one starts where weights change."""
    weights = {source.name: source.weight for source in config.data.sources} or {ONLY: 1.0}
    starts = [(0, dict(weights))]
    for change in config.data.weight_changes:
        weights = {**weights, **change.weights}
        starts.append((change.step, weights))
    stops = [min(start, config.train.steps) for start, _ in starts[1:]] + [config.train.steps]
    return [
        Phase(start, stop, {name: weight / sum(weights.values()) for name, weight in weights.items()})
        for (start, weights), stop in zip(starts, stops, strict=True)
        if start < stop
    ]


def shares_until(config: Config, step: int) -> list[tuple[int, dict[str, float]]]:
    """(start, shares) of the phases before ``step``, with consecutive phases of the same shares merged.

    The samples of the steps before ``step`` depend on nothing else.
    """
    found: list[tuple[int, dict[str, float]]] = []
    for phase in phases(config):
        if phase.start < step and (not found or found[-1][1] != phase.shares):
            found.append((phase.start, phase.shares))
    return found


def mean_by_shares(config: Config, step: int, losses: Mapping[str, float]) -> float | None:
    """The mean of the sources' ``losses``, weighted by their shares after ``step`` steps.

    Sources without held-out text are left out; None if no source with a share has a loss.
    """
    shares = shares_until(config, max(step, 1))[-1][1]
    share = sum(shares[name] for name in losses)
    return sum(shares[name] * loss for name, loss in losses.items()) / share if share else None


def blend_violations(config: Config) -> Iterator[Violation]:
    """Every rule of data.sources and data.weight_changes that ``config`` breaks."""
    data = config.data
    names = [source.name for source in data.sources]
    if names and data.inputs:
        yield Violation("data.inputs", "data.inputs must be empty with data.sources, which have their own. Got both.")
    if names and config.tokenizer.path is None:
        yield Violation(
            "tokenizer.path",
            "tokenizer.path must be set with data.sources: all share one tokenizer. Got null; make one with "
            "moh-prepare CONFIG --tokenizer DIR tokenizer.path=DIR and keep tokenizer.path=DIR.",
        )
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        yield Violation("data.sources", f"data.sources must have different names. Got {twice[0]} twice.")
    if names and not any(source.weight for source in data.sources):
        yield Violation("data.sources", "data.sources must have a weight above 0. Got 0 for all.")
    steps = [change.step for change in data.weight_changes]
    if steps != sorted(set(steps)):
        yield Violation("data.weight_changes", f"data.weight_changes must be in the order of their steps. Got {steps}.")
    weights = {source.name: source.weight for source in data.sources}
    for change in data.weight_changes:
        if unknown := [name for name in change.weights if name not in weights]:
            yield Violation(
                "data.weight_changes",
                f"data.weight_changes must name sources of data.sources ({', '.join(names) or 'there are none'}). "
                f"Got {unknown[0]}.",
            )
        weights = {**weights, **change.weights}
        if not any(weights.values()):
            yield Violation(
                "data.weight_changes",
                f"data.weight_changes must leave a weight above 0 at every step. Got none from step {change.step}.",
            )
