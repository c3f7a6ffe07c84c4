"""Continues the training of a model: a dense one as MoH, or with a larger vocabulary, or as it is.

moh-tune CONFIG.yaml --nproc-per-node 8 [section.key=value ...]   write the initial checkpoint, then train
moh-tune CONFIG.yaml --prepare                   only write it, in one process; then
torchrun ... (or srun ...) pipelines/continue_tune.py CONFIG.yaml         one rank of many

The initial checkpoint, <run.dir>/start, is made once, from the checkpoint train.init_from; moh-convert makes that
of a Hugging Face folder. Training and resuming are those of moh-pretrain.
"""

from __future__ import annotations

import os
import signal
import sys

from moh_megatron.cli import at_least, config_parser, exit_code, parse_config
from moh_megatron.config.schema import Config
from moh_megatron.io.console import errors_only, slow_imports, speak_for_rank, starting
from moh_megatron.train.fault_tolerance.signals import STOP_SIGNALS, StopRequest, die_with
from moh_megatron.train.fault_tolerance.world import PARENT_VARIABLE, World
from moh_megatron.upcycle.source import check_tuning


def main() -> int:
    parser = config_parser("Tune a model on: dense into MoH, with a larger vocabulary, or as it is.")
    parser.add_argument(
        "--nproc-per-node", type=at_least(1), metavar="N", help="start N ranks on this node (default 1)"
    )
    parser.add_argument("--prepare", action="store_true", help="write the initial checkpoint, and stop")
    args, config = parse_config(parser)
    # The ranks get the arguments of the launcher; RANK in the environment tells them apart from it.
    world = None if args.prepare else World.from_environment(args.nproc_per_node)
    if world is not None:
        return run_as_rank(config, world)
    check_tuning(config, trains=not args.prepare)
    with slow_imports():
        from moh_megatron.upcycle.initial_checkpoint import prepare

    config = prepare(config)
    return 0 if args.prepare else run_as_launcher(config, args.nproc_per_node or 1)


def run_as_rank(config: Config, world: World) -> int:
    """Train as one rank of a run."""
    # Until the handlers are installed, a request to stop waits instead of killing.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    stop = StopRequest.install()
    if launcher := os.environ.get(PARENT_VARIABLE):
        die_with(int(launcher))
    speak_for_rank(world.rank)
    from moh_megatron.train.rank import run_rank

    with slow_imports():
        from moh_megatron.upcycle.initial_checkpoint import resolve

    # The launcher, or the training when it loads the weights, shows the same warnings.
    with errors_only():
        config = resolve(config)
    return run_rank(config, world, stop)


def run_as_launcher(config: Config, ranks: int) -> int:
    """Start the ranks of this node and wait for them."""
    with slow_imports(starting(ranks)):
        from moh_megatron.train.launcher import launch_run

    # -P: nothing is imported from the folder the user stands in.
    return launch_run(["-P", "-m", "moh_megatron.commands.continue_tune", *sys.argv[1:]], config, ranks)


def run() -> int:
    """Run the command and return its exit code."""
    return exit_code(main)


if __name__ == "__main__":
    sys.exit(run())
