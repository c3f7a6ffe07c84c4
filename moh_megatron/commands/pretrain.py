"""Pretrain a MoH (or dense) language model.

moh-pretrain CONFIG.yaml --nproc-per-node 8 [section.key=value ...]   this node's ranks
torchrun ... (or srun ...) pipelines/pretrain.py CONFIG.yaml [section.key=value ...]  one rank of many
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace

from moh_megatron.cli import config_parser, exit_code, parse_config
from moh_megatron.config.schema import Config
from moh_megatron.io.console import slow_imports, speak_for_rank, starting
from moh_megatron.train.fault_tolerance.signals import STOP_SIGNALS, StopRequest, die_with
from moh_megatron.train.fault_tolerance.world import PARENT_VARIABLE, World


def main() -> int:
    parser = config_parser("Pretrain a Mixture-of-Head (or dense) language model.")
    parser.add_argument(
        "--nproc-per-node",
        type=int,
        metavar="N",
        help="start N ranks on this node (default 1, unless torchrun or srun started this process as a rank)",
    )
    parser.add_argument("--profile", action="store_true", help="write a trace of a few steps: monitor.profile=true")
    args, config = parse_config(parser)
    if args.profile:
        config = replace(config, monitor=replace(config.monitor, profile=True))
    # Ranks get the arguments of the launcher, too; the variable RANK marks them.
    ranks = args.nproc_per_node
    world = World.from_environment(ranks)
    if world is not None:
        return run_as_rank(config, world)
    return run_as_launcher(config, 1 if ranks is None else ranks)


def run_as_rank(config: Config, world: World) -> int:
    """Train as one rank of a run."""
    # A signal to stop waits until the rank's handlers are installed, in place of ending it without an exit code.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    speak_for_rank(world.rank)
    stop = StopRequest.install()
    if launcher := os.environ.get(PARENT_VARIABLE):
        die_with(int(launcher))
    from moh_megatron.train.rank import run_rank

    return run_rank(config, world, stop)


def run_as_launcher(config: Config, ranks: int) -> int:
    """Start the ranks of this node and wait for them."""
    with slow_imports(starting(ranks)):
        from moh_megatron.train.launcher import launch_run

    # -P: nothing is imported from the current folder.
    return launch_run(["-P", "-m", "moh_megatron.commands.pretrain", *sys.argv[1:]], config, ranks)


def run() -> int:
    """Run the command and return its exit code."""
    return exit_code(main)


if __name__ == "__main__":
    sys.exit(run())
