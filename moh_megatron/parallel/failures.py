"""Telling another rank's failure from one's own."""

from __future__ import annotations

import torch.distributed as dist


def lost_a_peer(error: BaseException) -> bool:
    """Whether ``error`` only says that another rank is gone: a broken connection of NCCL, of gloo, or of the store."""
    if isinstance(error, dist.DistError):
        return True
    # gloo's own errors are plain RuntimeErrors that name its source files.
    return type(error) is RuntimeError and "gloo" in str(error)
