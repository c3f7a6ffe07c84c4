"""Runs one rank: trains, writes exit.json, and returns an exit code, whatever happened."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

from moh_megatron.cli import exit_code
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import Fault, UserError
from moh_megatron.monitor.records import last_step, write_exit
from moh_megatron.train.fault_tolerance.run_lock import RunFolderInUse
from moh_megatron.train.fault_tolerance.signals import EXIT_STOPPED, StopRequest
from moh_megatron.train.fault_tolerance.world import PARENT_VARIABLE, World

logger = logging.getLogger(__name__)


def run_rank(config: Config, world: World, stop: StopRequest) -> int:
    """Train as one rank of ``world``; returns 0 finished, 2 an error of the user, 75 stopped and saved, 1 otherwise."""
    code = exit_code(lambda: _train(config, world, stop))
    if code != 0:
        sys.stdout.flush()
        sys.stderr.flush()
        # Peers of a failed rank may wait for it in a collective, so nothing may keep this process from ending.
        os._exit(code)
    return code


def _train(config: Config, world: World, stop: StopRequest) -> int:
    # These imports take seconds, and the signal handlers must be installed before.
    logger.info("loading Megatron-core and DeepSpeed")
    from moh_megatron.parallel import groups
    from moh_megatron.parallel.failures import lost_a_peer
    from moh_megatron.train.loop import train

    run_dir = Path(config.run.dir)
    with suppress(OSError):  # The lock of the folder, which this run takes next, reports it.
        run_dir.mkdir(parents=True, exist_ok=True)
    try:
        outcome = train(config, world, stop)
    except Exception as error:
        code = 2 if isinstance(error, UserError) else 1
        lost = lost_a_peer(error)
        if lost:
            error = Fault(f"rank {world.rank} lost contact with another rank, whose message says why.")
        # Our launcher knows more about a lost peer, and a folder that another run uses is not this run's.
        if world.rank == 0 and not (lost and PARENT_VARIABLE in os.environ) and not isinstance(error, RunFolderInUse):
            write_exit(run_dir, code, str(error), last_step(run_dir / "metrics.jsonl"))
        raise error
    if world.rank == 0:
        write_exit(run_dir, outcome.code, outcome.reason, outcome.step)
        if outcome.code == EXIT_STOPPED:
            last = outcome.step or "none"
            logger.info(f"{run_dir}: {outcome.reason}. Last step: {last}. The same command goes on.")
    groups.destroy()
    return outcome.code
