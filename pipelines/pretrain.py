#!/usr/bin/env python
"""Pretrain a MoH (or dense) language model.

python pipelines/pretrain.py CONFIG.yaml --nproc-per-node 8 [section.key=value ...]   this node's ranks
torchrun ... (or srun ...) pipelines/pretrain.py CONFIG.yaml [section.key=value ...]  one rank of many
"""

from __future__ import annotations

import os
import sys

from moh_megatron.cli import config_parser, exit_code, parse_config
from moh_megatron.config.schema import Config
from moh_megatron.train.signals import StopRequest, die_with
from moh_megatron.train.world import PARENT_VARIABLE, World


def main() -> int:
    parser = config_parser("Pretrain a Mixture-of-Head (or dense) language model.")
    parser.add_argument(
        "--nproc-per-node",
        type=int,
        default=1,
        metavar="N",
        help="start N ranks on this node (default 1); ignored in a process that torchrun or srun started as a rank",
    )
    args, config = parse_config(parser)
    world = World.from_environment()
    return launch_node(config, args.nproc_per_node) if world is None else rank(config, world)


def rank(config: Config, world: World) -> int:
    from moh_megatron.train.rank import run_rank

    stop = StopRequest.install()
    if launcher := os.environ.get(PARENT_VARIABLE):
        die_with(int(launcher))
    return run_rank(config, world, stop)


def launch_node(config: Config, ranks: int) -> int:
    from moh_megatron.train.launcher import supervise

    return supervise(__file__, sys.argv[1:], config, ranks)


if __name__ == "__main__":
    sys.exit(exit_code(main))
