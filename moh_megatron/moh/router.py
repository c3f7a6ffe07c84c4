"""The routers as modules: the pure functions of ``routing.py`` plus what tensor parallelism asks of them.

Every tensor-parallel rank routes over all heads and later uses the gates of its own. Legend: S sequence, B batch,
D hidden size, N query heads (n on this rank), H head size, TP tensor-parallel size.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moh_megatron.config.count import router_weight_rows
from moh_megatron.config.schema import MoHConfig
from moh_megatron.moh.layout import HeadLayout
from moh_megatron.moh.losses import attach_loss
from moh_megatron.moh.routing import Routing, learned_routing, norm_routing, query_norms, token_mean
from moh_megatron.parallel.gradients import gather_last_dimension, gather_sequence, mean_over_ranks, sum_gradient


class LearnedRouter(nn.Module):
    """Eq. 5-6 with weights replicated over tensor parallelism; their gradient is summed over it exactly once."""

    w_shared: nn.Parameter | None
    w_routed: nn.Parameter | None
    w_alpha: nn.Parameter | None

    def __init__(
        self,
        moh: MoHConfig,
        *,
        heads: int,
        hidden_size: int,
        init_std: float,
        dtype: torch.dtype,
        group: dist.ProcessGroup,
        sequence_parallel: bool,
    ) -> None:
        super().__init__()
        self.moh, self.group, self.sequence_parallel = moh, group, sequence_parallel
        rows = router_weight_rows(moh, heads)
        for name in ("w_shared", "w_routed", "w_alpha"):
            weight = torch.empty(rows.get(name, 0), hidden_size).normal_(std=init_std).to(dtype)
            self.register_parameter(name, nn.Parameter(weight) if name in rows else None)

    def _weight(self, weight: nn.Parameter | None) -> Tensor | None:
        # Under sequence parallelism each rank routes its own positions: the weight's gradient is a sum over ranks.
        return sum_gradient(weight, self.group) if self.sequence_parallel and weight is not None else weight

    def _mean(self, values: Tensor) -> Tensor:
        mean = token_mean(values)
        return mean_over_ranks(mean, self.group) if self.sequence_parallel else mean

    @property
    def top_k(self) -> int:
        """Routed heads a token uses."""
        return (self.moh.active_heads or 0) - (self.moh.shared_heads or 0)

    def routed_scores(self, x: Tensor, q: Tensor) -> Tensor | None:
        """[..., E]: what the routed heads are ranked by; None where there are none."""
        return None if self.w_routed is None else F.linear(x.float(), self.w_routed.float())

    def forward(self, x: Tensor, q: Tensor, balance_weight: float) -> Routing:
        """x [S, B, D], or [S / TP, B, D] under sequence parallelism -> gates and active [S, B, N] on every rank."""
        moh = self.moh
        gates, active, balance = learned_routing(
            x,
            self._weight(self.w_shared),
            self._weight(self.w_routed),
            self._weight(self.w_alpha),
            top_k=self.top_k,
            gating=moh.gating,
            balance=moh.balance_loss,
            mean=self._mean,
        )
        gates = attach_loss(gates, balance, balance_weight)
        if self.sequence_parallel:
            gates = gather_sequence(gates, self.group)
            active = gather_sequence(active.to(gates.dtype), self.group).bool()
        else:
            gates = sum_gradient(gates, self.group)
        return Routing(gates, active, balance)


class QueryNormRouter(nn.Module):
    """Parameter-free routing; each rank knows its own heads' norms, and gathers the others'."""

    physical_of_logical: Tensor

    def __init__(self, moh: MoHConfig, *, layout: HeadLayout, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.moh, self.group = moh, group
        order = sorted(range(layout.heads), key=layout.head_order.__getitem__)
        self.register_buffer("physical_of_logical", torch.tensor(order), persistent=False)

    @property
    def top_k(self) -> int:
        """Routed heads a token uses."""
        return (self.moh.active_heads or 0) - (self.moh.shared_heads or 0)

    def _norms(self, q: Tensor) -> Tensor:
        """[S, B, n, H] -> [S, B, N], heads in logical order."""
        norms = gather_last_dimension(query_norms(q), self.group)
        return norms.index_select(-1, self.physical_of_logical)

    def routed_scores(self, x: Tensor, q: Tensor) -> Tensor | None:
        """[S, B, E]: what the routed heads are ranked by."""
        return self._norms(q)[..., self.moh.shared_heads or 0 :]

    def forward(self, x: Tensor, q: Tensor, balance_weight: float) -> Routing:
        """q [S, B, n, H], before RoPE -> gates and active [S, B, N] on every rank."""
        gates, active, balance = norm_routing(
            self._norms(q),
            shared_heads=self.moh.shared_heads or 0,
            top_k=self.top_k,
            balance=self.moh.balance_loss,
        )
        gates = attach_loss(gates, balance, balance_weight)
        return Routing(sum_gradient(gates, self.group), active, balance)
