"""Configuration of a LLaMA whose attention is Mixture-of-Head (arXiv 2410.11842). Needs transformers alone."""

from transformers import LlamaConfig

ROUTERS = ("learned", "query_norm")
GATINGS = ("normalized", "paper")
BALANCE_LOSSES = ("scaled", "paper")


class MoHConfig(LlamaConfig):
    """A LlamaConfig with the settings of the heads' routing. The defaults are those of MoH-LLaMA3-8B.

    Attributes:
        moh_shared_heads: heads every token uses: the first ones of each layer.
        moh_active_heads: all heads a token uses, the shared ones included.
        moh_router: ``learned`` (eq. 5-6) or ``query_norm`` (by the L2 norm of each head's query, no parameters).
        moh_gating: gates of the learned router: ``normalized`` (1 each at uniform logits) or ``paper`` (eq. 5-6).
        moh_balance_loss: form of the balance loss the model was trained with, ``scaled`` or ``paper``.
        moh_balance_coefficient: its weight, beta of eq. 8.

    Raises:
        ValueError: a setting out of range.
    """

    model_type = "moh_llama"

    moh_shared_heads: int = 16
    moh_active_heads: int = 24
    moh_router: str = "query_norm"
    moh_gating: str = "normalized"
    moh_balance_loss: str = "scaled"
    moh_balance_coefficient: float = 0.01

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate_heads()

    def validate_heads(self):
        heads, shared, active = self.num_attention_heads, self.moh_shared_heads, self.moh_active_heads
        for name, value in (("moh_shared_heads", shared), ("moh_active_heads", active)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} must be an integer. Got {value!r}.")
        if not 0 <= shared <= heads:
            raise ValueError(f"moh_shared_heads must be from 0 to num_attention_heads ({heads}). Got {shared}.")
        if not (shared < active <= heads or shared == active == heads):
            raise ValueError(
                f"moh_active_heads must be greater than moh_shared_heads ({shared}) and at most num_attention_heads "
                f"({heads}). Got {active}."
            )
        for name, allowed in (
            ("moh_router", ROUTERS),
            ("moh_gating", GATINGS),
            ("moh_balance_loss", BALANCE_LOSSES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}. Got {getattr(self, name)!r}.")

    def validate_architecture(self):
        """Unlike LLaMA's: with an explicit head_dim the heads need not divide hidden_size."""
        heads, groups = self.num_attention_heads, self.num_key_value_heads or self.num_attention_heads
        if heads % groups:
            raise ValueError(f"num_key_value_heads must divide num_attention_heads ({heads}). Got {groups}.")
