"""Loads the prepared data that a run reads: one dataset, or several that are mixed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from moh_megatron.config.schema import Config
from moh_megatron.config.source_weights import phases
from moh_megatron.data.dataset_manifest import Manifest, load_dataset_tokenizer, load_manifest
from moh_megatron.data.source_configs import source_folders
from moh_megatron.data.tokenizer.tokenizer import Tokenizer
from moh_megatron.io.errors import UserError

MANY_EPOCHS = 4
"""The number of epochs above which repeated text teaches much less than new text (arXiv 2305.16264)."""


@dataclass(frozen=True)
class Source:
    """One prepared dataset."""

    name: str
    folder: Path
    manifest: Manifest


@dataclass(frozen=True)
class PreparedData:
    """The sources in the order of the configuration; they share one tokenizer."""

    sources: tuple[Source, ...]

    @property
    def hash(self) -> str:
        """A hash of the tokens of all sources."""
        manifests = [source.manifest for source in self.sources]
        files = [record for manifest in manifests for record in (*manifest.train.files, *manifest.validation.files)]
        return hashlib.sha256(" ".join(record.sha256 for record in files).encode()).hexdigest()

    @property
    def baselines(self) -> dict[str, float]:
        """The n-gram baselines of the validation text; known for a single source only."""
        return (self.sources[0].manifest.baselines or {}) if len(self.sources) == 1 else {}

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of all sources. Raises UserError if its files have changed since."""
        return load_dataset_tokenizer(self.sources[0].folder, self.sources[0].manifest)

    def check_fits(self, config: Config) -> None:
        """Raise UserError if a source does not fit the configured model."""
        for source in self.sources:
            try:
                source.manifest.check_fits(config)
            except UserError as error:
                raise UserError(f"{source.folder}: {error}" if len(self.sources) > 1 else str(error)) from None

    def budget(self, config: Config) -> str:
        """A table of the tokens and epochs that the run takes of each source, with a warning above MANY_EPOCHS."""
        drawn = dict.fromkeys((source.name for source in self.sources), 0.0)
        for phase in phases(config):
            for name, share in phase.shares.items():
                drawn[name] += share * (phase.stop - phase.start) * config.train.tokens_per_step
        total = sum(drawn.values())
        lines = ["source, share of the run, tokens, epochs:"]
        for source in self.sources:
            tokens = drawn[source.name]
            epochs = tokens / source.manifest.train.tokens
            lines.append(f"  {source.name:16} {100 * tokens / total:6.2f} %  {tokens:18,.0f}  {epochs:8.2f}")
            if epochs > MANY_EPOCHS:
                lines.append(
                    f"  warning: {source.name} is read {epochs:.1f} times, more than {MANY_EPOCHS}: give it more text, "
                    "less weight, or lower train.total_tokens"
                )
        return "\n".join(lines)


def load_prepared(config: Config) -> PreparedData:
    """Load the datasets of a configuration, and check that their files exist with the recorded sizes.

    Raises UserError if one is missing or was made with another tokenizer.
    """
    sources = tuple(Source(name, folder, load_manifest(folder)) for name, folder in source_folders(config).items())
    first = sources[0]
    for other in sources[1:]:
        if other.manifest.tokenizer != first.manifest.tokenizer:
            raise UserError(
                f"All sources must be prepared with the same tokenizer. {first.folder} was with "
                f"{first.manifest.tokenizer.sha256[:12]}, {other.folder} with {other.manifest.tokenizer.sha256[:12]}. "
                "Run moh-prepare CONFIG again with one tokenizer.path."
            )
    return PreparedData(sources)
