"""What training reads: one prepared dataset, or several that are mixed."""

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
"""Beyond so many epochs repeated text teaches much less than new text (arXiv 2305.16264)."""


@dataclass(frozen=True)
class Source:
    name: str
    folder: Path
    manifest: Manifest


@dataclass(frozen=True)
class PreparedData:
    """The sources in the order of the configuration; they share one tokenizer."""

    sources: tuple[Source, ...]

    @property
    def hash(self) -> str:
        """One hash for all tokens."""
        files = [
            record for each in self.sources for record in (*each.manifest.train.files, *each.manifest.validation.files)
        ]
        return hashlib.sha256(" ".join(record.sha256 for record in files).encode()).hexdigest()

    @property
    def baselines(self) -> dict[str, float]:
        """What counting gives on the validation text; known for a single source only."""
        return (self.sources[0].manifest.baselines or {}) if len(self.sources) == 1 else {}

    def tokenizer(self) -> Tokenizer:
        """Raises UserError where its files have changed since."""
        return load_dataset_tokenizer(self.sources[0].folder, self.sources[0].manifest)

    def check_fits(self, config: Config) -> None:
        """Raise UserError where a source cannot feed the configured model."""
        for each in self.sources:
            try:
                each.manifest.check_fits(config)
            except UserError as error:
                raise UserError(f"{each.folder}: {error}" if len(self.sources) > 1 else str(error)) from None

    def budget(self, config: Config) -> str:
        """How many tokens and epochs of each source the run takes; with a warning for those above MANY_EPOCHS."""
        drawn = dict.fromkeys((each.name for each in self.sources), 0.0)
        for phase in phases(config):
            for name, share in phase.shares.items():
                drawn[name] += share * (phase.stop - phase.start) * config.train.tokens_per_step
        total = sum(drawn.values())
        lines = ["source, share of the run, tokens, epochs:"]
        for each in self.sources:
            epochs = drawn[each.name] / each.manifest.train.tokens
            lines.append(
                f"  {each.name:16} {100 * drawn[each.name] / total:6.2f} %  {drawn[each.name]:18,.0f}  {epochs:8.2f}"
            )
            if epochs > MANY_EPOCHS:
                lines.append(
                    f"  warning: {each.name} is read {epochs:.1f} times, more than {MANY_EPOCHS}: give it more text, "
                    "less weight, or lower train.total_tokens"
                )
        return "\n".join(lines)


def load_prepared(config: Config) -> PreparedData:
    """The datasets of a configuration, after a look at the presence and size of their files.

    Raises UserError where one is missing or another tokenizer made it.
    """
    sources = tuple(Source(name, folder, load_manifest(folder)) for name, folder in source_folders(config).items())
    first = sources[0]
    for other in sources[1:]:
        if other.manifest.tokenizer != first.manifest.tokenizer:
            raise UserError(
                f"All sources must be prepared with the same tokenizer. {first.folder} was with "
                f"{first.manifest.tokenizer.sha256[:12]}, {other.folder} with {other.manifest.tokenizer.sha256[:12]}. "
                "Run pipelines/prepare_data.py CONFIG again with one tokenizer.path."
            )
    return PreparedData(sources)
