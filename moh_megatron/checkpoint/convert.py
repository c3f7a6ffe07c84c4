"""From a checkpoint to a Hugging Face folder that has proved itself against the model it came from."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tqdm import tqdm

from moh_megatron.checkpoint import hf, native
from moh_megatron.config.errors import Fault
from moh_megatron.config.schema import Config
from moh_megatron.model.build import DTYPES
from moh_megatron.model.single import build_single_process, logits, routing_margin

TOLERANCE = 1e-4
SEQUENCES = 2
LONGEST_SEQUENCE = 256
SEEDS = (0, 1, 2)


def verification_tokens(config: Config, seed: int) -> torch.Tensor:
    """Random tokens [B, S], the same for the same seed."""
    shape = (SEQUENCES, min(LONGEST_SEQUENCE, config.train.sequence_length))
    return torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def megatron_to_hf(checkpoint: Path, hf_dir: Path, dtype: str | None = None) -> float:
    """Export ``checkpoint`` to ``hf_dir`` and return the largest absolute difference of the logits.

    Both models compute in fp32 from the same weights, rounded to ``dtype`` first. Rounding differs between them in the
    last place, and a token whose next-best head is nearly as good may then choose another head. Of a few batches of
    random tokens the one whose routing is farthest from a tie is therefore taken, before anything is compared.

    Args:
        checkpoint: one complete checkpoint.
        dtype: fp32, bf16 or fp16; None takes the precision it was trained in.

    Raises:
        UserError: the checkpoint, its tokenizer and its configuration do not fit, or ``hf_dir`` holds something else.
        Fault: the reloaded model differs by ``TOLERANCE`` or more, or the disk refuses; ``hf_dir`` stays as it was.
    """
    config, progress = native.read_config(checkpoint), native.read_state(checkpoint)
    precision = DTYPES[dtype or config.train.precision]
    hf.check_replaceable(hf_dir)
    with tqdm(total=4, desc="export", unit="step", file=sys.stderr) as bar:
        weights = hf.cast(native.read_weights(checkpoint), precision)
        bar.update()
        with hf.replacing(hf_dir) as folder:
            hf.write_folder(
                folder,
                config,
                weights,
                native.tokenizer_folder(checkpoint),
                precision,
                step=progress.step,
                tokens=progress.tokens,
            )
            bar.update()
            model = build_single_process(config, weights, dtype=torch.float32)
            bar.update()
            batches = [verification_tokens(config, seed) for seed in SEEDS]
            tokens = max(batches, key=lambda batch: routing_margin(model, batch))
            difference = hf.verify_export(folder, logits(model, tokens), tokens)
            if not difference < TOLERANCE:
                raise Fault(
                    f"{hf_dir}: the exported model's logits differ from the checkpoint's by {difference:.3g}; less "
                    f"than {TOLERANCE:g} is required. Nothing was written. This is a bug: please report it."
                )
            bar.update()
    return difference
