"""Tells the failure of another rank from a rank's own."""

from __future__ import annotations

import torch.distributed as dist


def lost_a_peer(error: BaseException) -> bool:
    """Return whether ``error`` only says that another rank is gone: NCCL, gloo or the store lost a connection."""
    if isinstance(error, dist.DistError):
        return True
    # gloo raises plain RuntimeErrors that name its source files.
    return type(error) is RuntimeError and "gloo" in str(error)
