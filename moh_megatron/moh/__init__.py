"""Mixture-of-Head attention. The names exported here need neither Megatron-core nor a process group."""

from moh_megatron.config.head_layout import HeadLayout
from moh_megatron.moh.losses import attach_loss, balance_loss, z_loss
from moh_megatron.moh.routing import Routing, learned_routing, query_norm_routing
from moh_megatron.moh.sparse import sparse_attention

__all__ = [
    "HeadLayout",
    "Routing",
    "attach_loss",
    "balance_loss",
    "learned_routing",
    "query_norm_routing",
    "sparse_attention",
    "z_loss",
]
