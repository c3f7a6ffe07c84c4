"""Takes one training step with the Triton kernels, in their interpreter, and the same step with dense attention."""

from __future__ import annotations

import os
import sys

os.environ["TRITON_INTERPRET"] = "1"

import tiny
import torch
import torch.distributed as dist

if __name__ == "__main__":
    tiny.start()
    results = {}
    for tensor in (1, 2):
        for backend in ("dense", "triton"):
            config = tiny.tiny_config(moh={"backend": backend}, parallel={"tensor": tensor})
            results[backend, f"tp{tensor}"] = tiny.gradients(tiny.fresh_model(config), tiny.tokens(1)[:, :17])
    torch.save(results, sys.argv[1])
    dist.destroy_process_group()
