"""Prepares a dataset: trains or copies the tokenizer, encodes the text, writes Megatron files and a manifest.

moh-prepare CONFIG.yaml [section.key=value ...] [--dry-run]
moh-prepare CONFIG.yaml data.shard=3/16     prepares one shard in a Slurm array; run it without data.shard afterwards
moh-prepare CONFIG.yaml --tokenizer DIR     makes only the tokenizer
moh-prepare CONFIG.yaml --source NAME       prepares one of data.sources; without it all, one after another
"""

from __future__ import annotations

import argparse
import sys

from moh_megatron.cli import config_parser, exit_code, parse_config, path_argument
from moh_megatron.config.paths import data_dir
from moh_megatron.config.schema import Config
from moh_megatron.io.console import print_result


def parse_arguments() -> tuple[argparse.Namespace, Config]:
    """The command's arguments and its configuration."""
    parser = config_parser("Make the dataset of data.inputs in data.dir.")
    parser.add_argument(
        "--tokenizer", type=path_argument, metavar="DIR", help="make only the tokenizer, in the new folder DIR"
    )
    parser.add_argument("--source", metavar="NAME", help="only this one of data.sources")
    return parse_config(parser)


def main() -> None:
    """Prepare what the arguments name and print a summary."""
    args, config = parse_arguments()
    from moh_megatron.data.prepare.pipeline import prepare, prepare_shard, prepare_tokenizer
    from moh_megatron.data.prepared_data import load_prepared
    from moh_megatron.data.source_configs import source_configs

    if args.tokenizer is not None:
        tokenizer = prepare_tokenizer(config, args.tokenizer.expanduser())
        print_result(f"{args.tokenizer}: {tokenizer.vocab_size:,} entries, sha256 {tokenizer.sha256}")
        return
    for name, source in source_configs(config, args.source):
        if config.data.shard is not None:
            shard, shards = map(int, config.data.shard.split("/"))
            prepare_shard(source, shard, shards)
            print_result(
                f"{name}: shard {config.data.shard} is finished; run the command without data.shard to merge the shards"
            )
        else:
            print_result(prepare(source).summary())
            print_result(f"dataset: {data_dir(source)}")
    if config.data.sources and config.data.shard is None and args.source is None:
        print_result(load_prepared(config).budget(config))


def run() -> int:
    """Run the command and return its exit code."""
    return exit_code(main)


if __name__ == "__main__":
    sys.exit(run())
