#!/usr/bin/env python
"""Pretrain a MoH (or dense) language model.

python pipelines/pretrain.py CONFIG.yaml --nproc-per-node 8 [section.key=value ...]   this node's ranks
torchrun ... pipelines/pretrain.py CONFIG.yaml [section.key=value ...]                one rank of many
"""

from __future__ import annotations

import argparse
import os
import sys

from moh_megatron.cli import config_parser, exit_code, parse_config
from moh_megatron.config.schema import Config
from moh_megatron.train.signals import StopRequest, die_with
from moh_megatron.train.world import World


def main() -> int:
    parser = config_parser("Pretrain a Mixture-of-Head (or dense) language model.")
    parser.add_argument("--nproc-per-node", type=int, metavar="N", help="start N ranks on this node")
    args, config = parse_config(parser)
    if "RANK" in os.environ or args.nproc_per_node is None:
        return rank(config)
    return launch_node(args, config)


def rank(config: Config) -> int:
    from moh_megatron.train.rank import run_rank

    stop = StopRequest.install()
    if launcher := os.environ.get("MOH_LAUNCHER_PID"):
        die_with(int(launcher))
    return run_rank(config, World.from_environment(), stop)


def launch_node(args: argparse.Namespace, config: Config) -> int:
    from moh_megatron.train.launcher import supervise

    return supervise(__file__, sys.argv[1:], config, args.nproc_per_node)


if __name__ == "__main__":
    sys.exit(exit_code(main))
