"""Derives from a configuration with data.sources one configuration for each source, for preparation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from moh_megatron.config.paths import data_dir
from moh_megatron.config.schema import Config
from moh_megatron.config.source_weights import ONLY
from moh_megatron.io.errors import UserError


def source_folders(config: Config) -> dict[str, Path]:
    """The folder of each prepared source by its name; without data.sources only data.dir."""
    folder = data_dir(config)
    if not config.data.sources:
        return {ONLY: folder}
    return {
        source.name: folder / source.name if source.dir is None else Path(source.dir) for source in config.data.sources
    }


def source_configs(config: Config, only: str | None = None) -> Iterator[tuple[str, Config]]:
    """(name, configuration of that source alone) of each source, or of ``only``. Raises UserError if it is unknown."""
    if only is not None and only not in (names := [source.name for source in config.data.sources]):
        raise UserError(f"--source: expected one of data.sources ({', '.join(names) or 'there are none'}). Got {only}.")
    if not config.data.sources:
        yield ONLY, config
    folders = source_folders(config)
    for source in config.data.sources:
        if only in (None, source.name):
            data = replace(
                config.data,
                inputs=source.inputs,
                dir=str(folders[source.name]),
                text_key=source.text_key or config.data.text_key,
                template=source.template or config.data.template,
                sources=(),
                weight_changes=(),
            )
            yield source.name, replace(config, data=data)
