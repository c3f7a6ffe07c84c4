"""Continues prompts with a trained model.

moh-generate CONFIG.yaml [generate.prompts='["Once"]' ...]   the model of the configuration's run, or generate.load
moh-generate MODEL [generate.prompts='["Once"]' ...]         that of a run folder, a checkpoint or an exported folder
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext

from moh_megatron.cli import add_trust_option, config_parser, exit_code, parse_config
from moh_megatron.config.examples import find_config
from moh_megatron.config.load import load_config
from moh_megatron.config.schema import Config
from moh_megatron.evaluate.early_checks import check_model_folder
from moh_megatron.io.console import print_result, slow_imports


def load(name: str, overrides: Sequence[str]) -> Config:
    """The configuration that ``name`` means; of a folder, the one of the model in it, which generate.load then names.

    Raises UserError.
    """
    path = find_config(name)
    if not path.is_dir():
        return load_config(name, overrides)
    with slow_imports():
        from moh_megatron.evaluate.generate import config_of_folder

    return config_of_folder(path, overrides)


def main() -> None:
    parser = config_parser(
        "Continue generate.prompts with an exported folder, or straight from a checkpoint.",
        also="; or a run folder, a checkpoint or an exported folder, whose model is asked",
    )
    add_trust_option(parser)
    arguments, config = parse_config(parser, load=load)
    check_model_folder(config)
    loaded = "moh_megatron.evaluate.generate" in sys.modules  # by ``load``, of a folder
    with nullcontext() if loaded else slow_imports():
        from moh_megatron.evaluate.generate import model_to_load, text_generator

    complete = text_generator(model_to_load(config), config, arguments.trust_remote_code)
    for prompt in config.generate.prompts:
        print_result(f"\n{complete(prompt)}")


def run() -> int:
    """Run the command and return its exit code."""
    return exit_code(main)


if __name__ == "__main__":
    sys.exit(run())
