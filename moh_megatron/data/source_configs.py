"""One configuration for each corpus of data.sources, as prepare_data sees it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from moh_megatron.config.paths import data_dir
from moh_megatron.config.schema import Config
from moh_megatron.config.source_weights import ONLY
from moh_megatron.io.errors import UserError


def source_folders(config: Config) -> dict[str, Path]:
    """The folder of each prepared source by name; without data.sources the one of data.dir."""
    folder = data_dir(config)
    if not config.data.sources:
        return {ONLY: folder}
    return {each.name: folder / each.name if each.dir is None else Path(each.dir) for each in config.data.sources}


def source_configs(config: Config, only: str | None = None) -> Iterator[tuple[str, Config]]:
    """(name, a configuration of that corpus alone). Raises UserError where ``only`` names none."""
    if only is not None and only not in (names := [each.name for each in config.data.sources]):
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
