"""Finds and loads a trained model: a checkpoint, or an exported folder through Transformers, with one interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moh_megatron.checkpoint import layout
from moh_megatron.checkpoint.hf.hf_export import check_exported_tokenizer
from moh_megatron.checkpoint.hf.hf_folder import MARKER, MARKER_CONTENT
from moh_megatron.checkpoint.hf.transformers_io import open_causal_lm
from moh_megatron.config.schema import Config
from moh_megatron.evaluate.model_folder import is_exported, tokenizer_folder
from moh_megatron.io.errors import UserError
from moh_megatron.io.json_file import read_json, read_json_if_any
from moh_megatron.model.build import token_losses
from moh_megatron.model.single import build_single_process, logits
from moh_megatron.model.tensors import DTYPES


@dataclass(frozen=True)
class LoadedModel:
    """A model in this single process, in evaluation mode."""

    path: Path
    kind: str
    """``checkpoint`` or ``folder``, an exported one."""
    step: int | None
    """The training step; None where it is unknown, as for ``tokens``."""
    tokens: int | None
    """How many tokens it was trained on."""
    config: Config | None
    """The configuration of its training; None for an exported folder."""
    tokenizer_dir: Path
    model: nn.Module
    logits: Callable[[Tensor], Tensor]
    """tokens [B, S] -> fp32 [B, S, V]."""
    losses: Callable[[Tensor, int | None], Tensor]
    """(tokens [B, S + 1], id of the token between documents or None) -> nats a token [B, S]."""
    context: int
    """The longest sequence, in tokens, that it was made for."""
    device: torch.device
    trust_remote_code: bool = False
    """Whether code in an exported folder may run."""

    def described(self) -> dict[str, str | int | None]:
        """What results.json says about the model."""
        return {"path": str(self.path), "kind": self.kind, "step": self.step, "tokens": self.tokens}


def load_model(
    path: Path, device: torch.device, dtype: str | None = "fp32", trust_remote_code: bool = False
) -> LoadedModel:
    """Load the model that ``find_model`` found.

    It computes in ``dtype``; where that is None, an exported folder in the precision of its weights and a checkpoint in
    fp32. Code in an exported folder runs only with ``trust_remote_code``. Raises UserError where it does not load.
    """
    if is_exported(path):
        return _load_exported(path, device, DTYPES[dtype] if dtype is not None else None, trust_remote_code)
    return _load_checkpoint(path, device, DTYPES[dtype or "fp32"])


def _load_checkpoint(path: Path, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    config, manifest = layout.read_config(path), layout.read_state(path)
    model = build_single_process(config, layout.read_weights(path), dtype=dtype).to(device)

    @torch.inference_mode()
    def losses(tokens: Tensor, eos_token_id: int | None) -> Tensor:
        return token_losses(model, tokens.to(device), eos_token_id)

    return LoadedModel(
        path=path,
        kind="checkpoint",
        step=manifest.step,
        tokens=manifest.tokens,
        config=config,
        tokenizer_dir=tokenizer_folder(path),
        model=model,
        logits=lambda tokens: logits(model, tokens.to(device)),
        losses=losses,
        context=config.model.max_position_embeddings or config.train.sequence_length,
        device=device,
    )


def _load_exported(path: Path, device: torch.device, dtype: torch.dtype | None, trust_remote_code: bool) -> LoadedModel:
    check_exported_tokenizer(path)
    model = open_causal_lm(path, dtype, trust_remote_code).to(device)
    marker = read_json_if_any(path / MARKER, MARKER_CONTENT)

    @torch.inference_mode()
    def exported_logits(tokens: Tensor) -> Tensor:
        return model(tokens.to(device), use_cache=False).logits.float()

    def losses(tokens: Tensor, eos_token_id: int | None) -> Tensor:
        if eos_token_id is not None:
            raise UserError(
                f"{path}: an exported model attends across documents, and the configuration sets data.document_mask. "
                "Evaluate the checkpoint, or add data.document_mask=false."
            )
        predicted = exported_logits(tokens[:, :-1])
        labels = tokens[:, 1:].to(device)
        return nn.functional.cross_entropy(predicted.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)

    return LoadedModel(
        path=path,
        kind="folder",
        step=marker.get("step"),
        tokens=marker.get("tokens"),
        config=None,
        tokenizer_dir=tokenizer_folder(path),
        model=model,
        logits=exported_logits,
        losses=losses,
        context=_context(path),
        device=device,
        trust_remote_code=trust_remote_code,
    )


def _context(path: Path) -> int:
    return read_json(path / "config.json", "the settings of a Hugging Face model").get("max_position_embeddings", 2048)
