"""A trained model that continues a prompt: an exported folder through Transformers, or a checkpoint as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from moh_megatron.checkpoint import layout
from moh_megatron.config.paths import hf_dir
from moh_megatron.config.schema import Config
from moh_megatron.data.tokenizer.tokenizer import load_tokenizer
from moh_megatron.io.errors import UserError

Continue = Callable[[str], str]
"""A prompt -> the prompt and what the model adds to it."""


def model_to_load(config: Config) -> Path:
    """generate.load, else the run's exported folder, else the run's newest checkpoint. Raises UserError."""
    if config.generate.load is not None:
        path = Path(config.generate.load)
        return path if _is_exported(path) else layout.resolve_checkpoint(path)
    if _is_exported(hf_dir(config)):
        return hf_dir(config)
    if not Path(config.run.dir).is_dir():
        raise UserError(
            f"{config.run.dir}: no such run folder. Train first (pipelines/pretrain.py), or set generate.load to an "
            f"exported folder or a checkpoint."
        )
    return layout.resolve_checkpoint(config.run.dir)


def _is_exported(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def open_model(path: Path, config: Config) -> Continue:
    """Load ``path``, sampling as the section generate says and run.seed seeds."""
    return _open_exported(path, config) if _is_exported(path) else _open_checkpoint(path, config)


def _open_exported(folder: Path, config: Config) -> Continue:
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    from moh_megatron.checkpoint.hf.hf_export import check_tokenizer

    check_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    settings = config.generate
    sampling = {"do_sample": settings.temperature > 0}
    if sampling["do_sample"]:
        sampling |= {"temperature": settings.temperature, "top_k": settings.top_k or 0}

    def complete(prompt: str) -> str:
        set_seed(config.run.seed)
        ids = tokenizer(prompt, add_special_tokens=False).input_ids or [tokenizer.eos_token_id]
        tokens = torch.tensor([ids])
        out = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=settings.max_new_tokens, **sampling
        )
        return prompt + tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)

    return complete


def _open_checkpoint(folder: Path, config: Config) -> Continue:
    from moh_megatron.model.generation import continue_text
    from moh_megatron.model.single import build_single_process

    trained = layout.read_config(folder)
    tokenizer = load_tokenizer(layout.tokenizer_folder(folder))
    model = build_single_process(trained, layout.read_weights(folder))
    settings = config.generate

    def complete(prompt: str) -> str:
        written = continue_text(
            model,
            tokenizer.encode(prompt) or [tokenizer.eos_token_id],
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k,
            stop_token=tokenizer.eos_token_id,
            context=trained.train.sequence_length,
            seed=config.run.seed,
            device=torch.device("cpu"),
        )
        return prompt + tokenizer.decode(written)

    return complete
