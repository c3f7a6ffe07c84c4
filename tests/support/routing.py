"""Draws tokens, router weights and queries from a seed."""

from __future__ import annotations

import torch

D = 12


def tokens(*shape, seed=1):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed))


def weights(shared: int, routed: int, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows):
        return torch.randn(rows, D, generator=generator, requires_grad=True)

    return matrix(shared) if shared > 1 else None, matrix(routed), matrix(2) if shared else None


def queries(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
