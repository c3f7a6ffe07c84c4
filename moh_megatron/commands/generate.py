"""Continues prompts with a trained model.

moh-generate CONFIG.yaml [generate.prompts='["Once"]' ...]   the model of the configuration's run, or generate.load
moh-generate MODEL [generate.prompts='["Once"]' ...]         that of a run folder, a checkpoint or an exported folder
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from moh_megatron.cli import add_trust_option, config_parser, exit_code, parse_config
from moh_megatron.config.examples import find_config
from moh_megatron.config.load import load_config
from moh_megatron.config.schema import Config
from moh_megatron.evaluate.model_folder import config_of_folder, model_to_load
from moh_megatron.io.console import print_result, slow_imports


def load(name: str, overrides: Sequence[str]) -> Config:
    """The configuration that ``name`` means; of a folder, the one of the model in it, which generate.load then names.

    Raises UserError.
    """
    path = find_config(name)
    if not path.is_dir():
        return load_config(name, overrides)
    return config_of_folder(path, overrides)


def main() -> None:
    parser = config_parser(
        "Continue generate.prompts with an exported folder, or straight from a checkpoint.",
        also="; or a run folder, a checkpoint or an exported folder, whose model is asked",
    )
    add_trust_option(parser)
    arguments, config = parse_config(parser, load=load)
    model = model_to_load(config)
    with slow_imports():
        from moh_megatron.evaluate.generate import text_generator

    complete = text_generator(model, config, arguments.trust_remote_code)
    for prompt in config.generate.prompts:
        print_result(f"\n{complete(prompt)}")


def run() -> int:
    """Run the command and return its exit code."""
    return exit_code(main)


if __name__ == "__main__":
    sys.exit(run())
