"""The model to be judged: a checkpoint as it is, or an exported folder through Transformers; one interface for both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moh_megatron.checkpoint import layout
from moh_megatron.checkpoint.hf.hf_export import check_tokenizer
from moh_megatron.checkpoint.hf.hf_reader import MARKER, NOTE
from moh_megatron.checkpoint.hf.transformers_io import open_causal_lm
from moh_megatron.config.load import load_config
from moh_megatron.config.schema import Config
from moh_megatron.io.errors import UserError
from moh_megatron.io.json_file import read_json, read_json_if_any
from moh_megatron.model.build import DTYPES, token_losses
from moh_megatron.model.single import build_single_process, logits


@dataclass(frozen=True)
class LoadedModel:
    """A model in this one process, in evaluation mode."""

    path: Path
    kind: str
    """``checkpoint`` or ``folder``."""
    step: int | None
    """Of training; None where nobody knows."""
    tokens: int | None
    config: Config | None
    """Of its training; an exported folder has none of its own."""
    tokenizer_dir: Path
    model: nn.Module
    logits: Callable[[Tensor], Tensor]
    """tokens [B, S] -> fp32 [B, S, V]."""
    losses: Callable[[Tensor, int | None], Tensor]
    """(tokens [B, S + 1], end of document or None) -> nats a token [B, S]."""
    context: int
    """Tokens it was made to see at once."""
    device: torch.device

    def described(self) -> dict[str, str | int | None]:
        """For results.json."""
        return {"path": str(self.path), "kind": self.kind, "step": self.step, "tokens": self.tokens}


def find_model(path: Path) -> Path:
    """The exported folder or the checkpoint meant by ``path``: itself, a folder of checkpoints or a run folder.

    Raises UserError where there is none.
    """
    return path if (path / "config.json").is_file() else layout.resolve_checkpoint(path)


def load_model(path: Path, device: torch.device, dtype: str = "fp32") -> LoadedModel:
    """Load what ``find_model`` found, computing in ``dtype``. Raises UserError where it does not load."""
    if (path / "config.json").is_file():
        return _open_folder(path, device, DTYPES[dtype])
    return _open_checkpoint(path, device, DTYPES[dtype])


def _open_checkpoint(path: Path, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    config, progress = layout.read_config(path), layout.read_state(path)
    model = build_single_process(config, layout.read_weights(path), dtype=dtype).to(device)

    @torch.inference_mode()
    def losses(tokens: Tensor, eos_token_id: int | None) -> Tensor:
        return token_losses(model, tokens.to(device), eos_token_id)

    return LoadedModel(
        path=path,
        kind="checkpoint",
        step=progress.step,
        tokens=progress.tokens,
        config=config,
        tokenizer_dir=layout.tokenizer_folder(path),
        model=model,
        logits=lambda tokens: logits(model, tokens.to(device)),
        losses=losses,
        context=config.model.max_position_embeddings or config.train.sequence_length,
        device=device,
    )


def _open_folder(path: Path, device: torch.device, dtype: torch.dtype) -> LoadedModel:
    check_tokenizer(path)
    model = open_causal_lm(path, dtype).to(device)
    marker = read_json_if_any(path / MARKER, NOTE)

    @torch.inference_mode()
    def scores(tokens: Tensor) -> Tensor:
        return model(tokens.to(device), use_cache=False).logits.float()

    def losses(tokens: Tensor, eos_token_id: int | None) -> Tensor:
        if eos_token_id is not None:
            raise UserError(
                f"{path}: an exported model attends across documents, and the configuration sets data.document_mask. "
                "Evaluate the checkpoint, or add data.document_mask=false."
            )
        predicted = scores(tokens[:, :-1])
        labels = tokens[:, 1:].to(device)
        return nn.functional.cross_entropy(predicted.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)

    return LoadedModel(
        path=path,
        kind="folder",
        step=marker.get("step"),
        tokens=marker.get("tokens"),
        config=None,
        tokenizer_dir=path,
        model=model,
        logits=scores,
        losses=losses,
        context=_context(path),
        device=device,
    )


def _context(path: Path) -> int:
    return read_json(path / "config.json", "the settings of a Hugging Face model").get("max_position_embeddings", 2048)


def training_config(path: Path, overrides: list[str]) -> Config:
    """The configuration a model was trained with, for the data it names: a checkpoint's own, or the run's for an
    exported folder that lies in it.

    Raises UserError where there is none.
    """
    for file in (path / layout.CONFIG, path.parent / layout.CONFIG):
        if file.is_file():
            return load_config(file, overrides)
    raise UserError(
        f"{path}: no training configuration lies in or beside it, so its validation data are unknown. Name the "
        "configuration with --config, or leave the validation loss out with --no-validation."
    )
