#!/usr/bin/env python
"""Prepare a dataset: train or copy the tokenizer, encode the text, write Megatron files and a manifest.

python pipelines/prepare_data.py CONFIG.yaml [section.key=value ...] [--dry-run]
"""

from __future__ import annotations

import sys

from moh_megatron.cli import config_parser, exit_code, parse_config
from moh_megatron.config.paths import data_dir


def main() -> None:
    _, config = parse_config(config_parser("Make the dataset of data.inputs in data.dir."))
    from moh_megatron.data.prepare import prepare

    manifest = prepare(config)
    print(manifest.summary())
    print(f"dataset: {data_dir(config)}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
