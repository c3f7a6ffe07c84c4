"""Continues prompts with a trained model: moh-generate CONFIG.yaml [generate.prompts='["Once"]' ...]"""

from __future__ import annotations

import sys

from moh_megatron.cli import config_parser, exit_code, parse_config
from moh_megatron.io.console import print_result


def main() -> None:
    parser = config_parser("Continue generate.prompts with an exported folder, or straight from a checkpoint.")
    _, config = parse_config(parser)
    from moh_megatron.evaluate.generate import model_to_load, text_generator

    complete = text_generator(model_to_load(config), config)
    for prompt in config.generate.prompts:
        print_result(f"\n{complete(prompt)}")


def run() -> int:
    """Run the command and return its exit code."""
    return exit_code(main)


if __name__ == "__main__":
    sys.exit(run())
