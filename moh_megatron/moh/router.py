"""The routers as modules: the pure functions of ``routing.py``, with weights, biases, losses and tensor parallelism.

Every tensor-parallel rank routes over all heads and later uses the gates of its own heads. Legend: S sequence, B batch,
D hidden size, N query heads (n on this rank), E routed heads, H head size, TP tensor-parallel size.
"""

from __future__ import annotations

import abc

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moh_megatron.config.head_layout import HeadLayout, inverse
from moh_megatron.config.layer_heads import LayerHeads
from moh_megatron.config.parameter_count import router_biases, router_weight_rows
from moh_megatron.config.schema import MoHConfig
from moh_megatron.moh.losses import attach_loss, z_loss
from moh_megatron.moh.routing import (
    Logits,
    Routing,
    choose_by_norm,
    in_groups,
    norm_scores,
    query_norms,
    router_logits,
    token_mean,
    weigh_heads,
)
from moh_megatron.parallel.gradients import gather_last_dimension, gather_sequence, mean_over_ranks, sum_gradient


class Router(nn.Module, abc.ABC):
    """The base of both routers: the number of heads to choose, and the biases that balance them without a loss.

    ``loss_scale`` is the factor of a layer's auxiliary losses besides their coefficients: 1 / layers / gradient
    accumulation steps.
    """

    bias_steps: Tensor | None
    routed: Tensor
    """[E] the routed heads, ascending; a tensor of the device, because moving a list there would wait for it."""

    def __init__(self, moh: MoHConfig, heads: LayerHeads, loss_scale: float) -> None:
        super().__init__()
        self.moh, self.heads, self.loss_scale = moh, heads, loss_scale
        self.top_k = 0
        self.follow_schedule(0)
        # Integers: casting the model to bf16 leaves them unchanged, but would round small biases to zero.
        biases = router_biases(moh, heads)
        self.register_buffer("routed", torch.tensor(heads.routed, dtype=torch.int64), persistent=False)
        self.register_buffer("bias_steps", torch.zeros(biases, dtype=torch.int64) if biases else None)

    def follow_schedule(self, step: int) -> None:
        """Set the number of routed heads to the activation schedule's after ``step`` steps."""
        self.top_k = self.heads.top_k_at(step, self.moh.activation_schedule_steps)

    @property
    def active_heads(self) -> int:
        """The number of heads a token uses now, shared ones included."""
        return len(self.heads.shared) + self.top_k

    @property
    def bias(self) -> Tensor | None:
        """[E] fp32, added to the routed heads' scores for selection only; None with a balance loss."""
        return None if self.bias_steps is None else self.bias_steps.float() * self.moh.bias_update_rate

    @torch.no_grad()
    def update_bias(self, counts: Tensor) -> None:
        """Move each bias one step against its head's load, compared with the mean of its routing group.

        ``counts`` [N] are the tokens of each logical head.
        """
        if self.bias_steps is not None:
            load = in_groups(counts.index_select(0, self.routed), self.heads.groups)
            excess = load.sum(-1, keepdim=True) - load * load.shape[-1]
            self.bias_steps += excess.flatten().sign().to(torch.int64)

    @abc.abstractmethod
    def logits(self, x: Tensor, q: Tensor) -> Logits:
        """The logits of the gates and of the balance loss, without bias; arguments as in ``forward``."""

    @abc.abstractmethod
    def selection_scores(self, x: Tensor, q: Tensor) -> Tensor | None:
        """[..., E]: the scores by which routed heads are chosen, bias included; None without routed heads."""

    @abc.abstractmethod
    def forward(self, x: Tensor, q: Tensor) -> Routing:
        """Attention input x and queries q before RoPE -> gates and active [S, B, N], the same on every rank."""


class LearnedRouter(Router):
    """The router of eq. 5-6. Its weights are replicated over the tensor-parallel ranks, their gradient summed once."""

    logical_order: Tensor
    w_shared: nn.Parameter | None
    w_routed: nn.Parameter | None
    w_alpha: nn.Parameter | None

    def __init__(
        self,
        moh: MoHConfig,
        heads: LayerHeads,
        loss_scale: float,
        *,
        hidden_size: int,
        init_std: float,
        dtype: torch.dtype,
        group: dist.ProcessGroup,
        sequence_parallel: bool,
    ) -> None:
        super().__init__(moh, heads, loss_scale)
        self.group, self.sequence_parallel = group, sequence_parallel
        rows = router_weight_rows(moh, heads)
        for name in ("w_shared", "w_routed", "w_alpha"):
            weight = torch.empty(rows.get(name, 0), hidden_size).normal_(std=init_std).to(dtype)
            parameter = nn.Parameter(weight, requires_grad=not moh.freeze_router)
            self.register_parameter(name, parameter if name in rows else None)
        self.register_buffer("logical_order", torch.tensor(inverse(heads.order)), persistent=False)

    def _weight(self, weight: nn.Parameter | None) -> Tensor | None:
        # Under sequence parallelism each rank routes its own positions, so the weight's gradient is a sum over ranks.
        return sum_gradient(weight, self.group) if self.sequence_parallel and weight is not None else weight

    def _mean(self, values: Tensor) -> Tensor:
        mean = token_mean(values)
        return mean_over_ranks(mean, self.group) if self.sequence_parallel else mean

    def _logits(self, x: Tensor) -> Logits:
        return router_logits(x, self._weight(self.w_shared), self._weight(self.w_routed), self._weight(self.w_alpha))

    def logits(self, x: Tensor, q: Tensor) -> Logits:
        """See ``Router``; x [..., D]."""
        return self._logits(x)

    def selection_scores(self, x: Tensor, q: Tensor) -> Tensor | None:
        """See ``Router``; x [..., D]."""
        scores = self._logits(x).routed
        return scores if scores is None or self.bias is None else scores + self.bias

    def forward(self, x: Tensor, q: Tensor) -> Routing:
        """x [S, B, D], or [S / TP, B, D] under sequence parallelism -> gates and active [S, B, N] on every rank."""
        moh, logits = self.moh, self._logits(x)
        gates, active, balance = weigh_heads(
            logits,
            top_k=self.top_k,
            gating=moh.gating,
            balance=moh.balance_loss,
            bias=self.bias,
            mean=self._mean,
            groups=self.heads.groups,
            gate_softmax=moh.gate_softmax,
        )
        gates = attach_loss(gates, balance, self.loss_scale * self.moh.balance_weight)
        if moh.z_loss_coefficient and logits.routed is not None:
            gates = attach_loss(gates, self._z_loss(logits.routed), self.loss_scale * moh.z_loss_coefficient)
        if self.sequence_parallel:
            gates = gather_sequence(gates, self.group)
            active = gather_sequence(active.to(gates.dtype), self.group).bool()
        else:
            gates = sum_gradient(gates, self.group)
        return Routing(gates.index_select(-1, self.logical_order), active.index_select(-1, self.logical_order), balance)

    def _z_loss(self, logits: Tensor) -> Tensor:
        loss = z_loss(in_groups(logits, self.heads.groups))
        return mean_over_ranks(loss, self.group) if self.sequence_parallel else loss


class QueryNormRouter(Router):
    """Routing without parameters, by query norms; each rank gathers the norms of the other ranks' heads."""

    physical_of_logical: Tensor

    def __init__(
        self, moh: MoHConfig, heads: LayerHeads, loss_scale: float, *, layout: HeadLayout, group: dist.ProcessGroup
    ) -> None:
        super().__init__(moh, heads, loss_scale)
        self.group = group
        self.register_buffer("physical_of_logical", torch.tensor(inverse(layout.head_order)), persistent=False)

    def _norms(self, q: Tensor) -> Tensor:
        """[S, B, n, H] -> [S, B, N], heads in logical order."""
        norms = gather_last_dimension(query_norms(q), self.group)
        return norms.index_select(-1, self.physical_of_logical)

    def logits(self, x: Tensor, q: Tensor) -> Logits:
        """See ``Router``; q [S, B, n, H], before RoPE. Only routed heads have logits."""
        norms = self._norms(q).index_select(-1, self.routed)
        return Logits(None, norm_scores(norms, self.heads.groups), None)

    def selection_scores(self, x: Tensor, q: Tensor) -> Tensor | None:
        """See ``Router``; q [S, B, n, H], before RoPE."""
        norms = self._norms(q).index_select(-1, self.routed)
        if self.bias is None:
            return norms
        return norm_scores(norms, self.heads.groups) + self.bias

    def forward(self, x: Tensor, q: Tensor) -> Routing:
        """q [S, B, n, H], before RoPE -> gates and active [S, B, N] on every rank."""
        gates, active, balance = choose_by_norm(
            self._norms(q),
            routed=self.routed,
            top_k=self.top_k,
            balance=self.moh.balance_loss,
            bias=self.bias,
            groups=self.heads.groups,
        )
        gates = attach_loss(gates, balance, self.loss_scale * self.moh.balance_weight)
        return Routing(sum_gradient(gates, self.group), active, balance)
