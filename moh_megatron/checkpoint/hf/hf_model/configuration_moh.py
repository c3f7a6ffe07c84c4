"""Defines the configuration of a LLaMA with Mixture-of-Head attention (arXiv 2410.11842). Needs transformers alone."""

from transformers import LlamaConfig

ROUTERS = ("learned", "query_norm")
GATINGS = ("normalized", "paper")
BALANCE_LOSSES = ("scaled", "paper")
GATE_SOFTMAXES = ("layer", "group")


class MoHConfig(LlamaConfig):
    """A LlamaConfig with the settings of head routing. The defaults are those of MoH-LLaMA3-8B.

    Attributes:
        moh_shared_heads: the heads that every token uses: a number, which means the first ones of each layer, or a list
            of heads for each layer.
        moh_active_heads: the number of heads that a token uses, shared ones included, or a list with an entry for each
            layer.
        moh_routing_groups: where heads compete: 1, in the whole layer, or num_key_value_heads, in each KV group, of
            which a token then uses equally many heads. Folders written before this setting existed mean 1.
        moh_router: ``learned`` (eq. 5-6) or ``query_norm`` (by the L2 norm of each head's query, no parameters).
        moh_gating: gates of the learned router: ``normalized`` (1 each at uniform logits) or ``paper`` (eq. 5-6).
        moh_gate_softmax: the heads that the learned router's gates share their weight among: those of the ``layer``, or
            those of each routing ``group``.
        moh_balance_loss: form of the balance loss that the model was trained with, ``scaled`` or ``paper``.
        moh_balance_coefficient: weight of the balance loss, beta of eq. 8.
        moh_bias_update_rate: for heads that were balanced by a bias, what one step of ``bias_steps`` adds to the score
            that heads are chosen by; None for all others.

    Raises:
        ValueError: a setting is out of range.
    """

    model_type = "moh_llama"

    moh_shared_heads: int | list = 16
    moh_active_heads: int | list = 24
    moh_routing_groups: int = 1
    moh_router: str = "query_norm"
    moh_gating: str = "normalized"
    moh_gate_softmax: str = "layer"
    moh_balance_loss: str = "scaled"
    moh_balance_coefficient: float = 0.01
    moh_bias_update_rate: float | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate_heads()

    def heads_of(self, layer: int) -> tuple[list[int], int]:
        """Return the shared heads of one layer, in ascending order, and the number of heads a token uses in it."""
        shared, active = self.moh_shared_heads, self.moh_active_heads
        return (
            list(range(shared)) if isinstance(shared, int) else sorted(shared[layer]),
            active if isinstance(active, int) else active[layer],
        )

    def validate_heads(self):
        heads, layers = self.num_attention_heads, self.num_hidden_layers
        for name in ("moh_shared_heads", "moh_active_heads"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | list | tuple):
                raise ValueError(f"{name} must be an integer, or a list with an entry for each layer. Got {value!r}.")
            if not isinstance(value, int) and len(value) != layers:
                raise ValueError(f"{name} must have an entry for each layer ({layers}). Got {len(value)}.")
        if isinstance(self.moh_shared_heads, int) and not 0 <= self.moh_shared_heads <= heads:
            raise ValueError(
                f"moh_shared_heads must be from 0 to num_attention_heads ({heads}). Got {self.moh_shared_heads}."
            )
        for layer in range(layers):
            shared, active = self.heads_of(layer)
            if len(set(shared)) != len(shared) or any(not 0 <= head < heads for head in shared):
                raise ValueError(f"moh_shared_heads[{layer}] must be distinct heads below {heads}. Got {shared}.")
            if not (len(shared) < active <= heads or len(shared) == active == heads):
                raise ValueError(
                    f"moh_active_heads must be greater than moh_shared_heads ({len(shared)}) and at most "
                    f"num_attention_heads ({heads}). Got {active} in layer {layer}."
                )
        self.validate_groups()
        for name, allowed in (
            ("moh_router", ROUTERS),
            ("moh_gating", GATINGS),
            ("moh_gate_softmax", GATE_SOFTMAXES),
            ("moh_balance_loss", BALANCE_LOSSES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}. Got {getattr(self, name)!r}.")

    def validate_groups(self):
        """Every routing group must have as many shared heads, and as many active ones, as the others."""
        groups, heads = self.moh_routing_groups, self.num_attention_heads
        kv_groups = self.num_key_value_heads or heads
        if type(groups) is not int or groups not in (1, kv_groups):
            raise ValueError(f"moh_routing_groups must be 1 or num_key_value_heads ({kv_groups}). Got {groups!r}.")
        if heads % groups:
            raise ValueError(f"num_attention_heads must be a multiple of moh_routing_groups ({groups}). Got {heads}.")
        width = heads // groups
        for layer in range(self.num_hidden_layers):
            shared, active = self.heads_of(layer)
            held = [sum(head // width == group for head in shared) for group in range(groups)]
            if len(set(held)) > 1:
                raise ValueError(
                    f"moh_shared_heads must be equally many in each of the {groups} routing groups of {width} heads. "
                    f"Got {held} in layer {layer}, of the shared heads {shared}."
                )
            if active % groups:
                raise ValueError(
                    f"moh_active_heads must be a multiple of moh_routing_groups ({groups}). Got {active} in layer "
                    f"{layer}."
                )

    def validate_architecture(self):
        """Unlike in LlamaConfig, the number of heads need not divide hidden_size: head_dim is explicit."""
        heads, groups = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        if heads % groups:
            raise ValueError(f"num_key_value_heads must divide num_attention_heads ({heads}). Got {groups}.")
