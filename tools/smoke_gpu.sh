#!/usr/bin/env bash
# Runs `make smoke` on GPUs, in bf16 over NCCL. `make smoke-gpu` calls it with overrides as arguments and with BIN and RUN
# in the environment. One GPU runs one rank; several run two ranks with half of the heads each.
set -euo pipefail

gpus=$("$BIN/python" -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" -eq 0 ]; then
    echo "error: torch sees no GPU here. Check nvidia-smi and that torch is a CUDA build; make smoke needs none." >&2
    exit 2
fi
ranks=$((gpus > 1 ? 2 : 1))
"$BIN/python" -m pytest -m gpu
RANKS=$ranks bash tools/smoke.sh "parallel.tensor=$ranks" train.precision=bf16 "$@"
"$BIN/python" tools/check_smoke.py "$RUN"
