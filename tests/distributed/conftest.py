"""Real processes with gloo: each test module spawns its workers once and checks the results they save."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import TCPStore

TESTS = Path(__file__).parents[1]
WORKERS = Path(__file__).parent / "workers"
TIMEOUT_SECONDS = 570

Spawn = Callable[[str, int], list[Any]]


@pytest.fixture(scope="module")
def spawn(tmp_path_factory: pytest.TempPathFactory) -> Spawn:
    """Return spawn: spawn("name", 2) runs workers/name.py as two ranks and returns what each saved to its path."""

    def run(worker: str, world_size: int) -> list[Any]:
        folder = tmp_path_factory.mktemp(worker)
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        common = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "WORLD_SIZE": str(world_size),
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }
        processes = []
        for rank in range(world_size):
            log = (folder / f"log_{rank}").open("w")
            command = [sys.executable, str(WORKERS / f"{worker}.py"), str(folder / f"result_{rank}.pt")]
            environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        try:
            codes = [process.wait(TIMEOUT_SECONDS) for process in processes]
        finally:
            for process in processes:
                process.kill()
        logs = [(folder / f"log_{rank}").read_text()[-4000:] for rank in range(world_size)]
        assert codes == [0] * world_size, "\n".join(f"--- rank {rank}\n{log}" for rank, log in enumerate(logs))
        return [torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(world_size)]

    return run
