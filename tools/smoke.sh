#!/usr/bin/env bash
# Runs the chain from text to generated text on RANKS processes, two by default. `make smoke` calls it with overrides as
# arguments and with BIN and RUN in the environment.
set -euo pipefail

config=configs/smoke.yaml
ranks=${RANKS:-2}
case " $*" in
    *" run.dir="*)
        echo "error: run.dir stands in ARGS; name the run folder as make smoke RUN=DIR instead" >&2
        exit 2
        ;;
esac
export HF_HUB_OFFLINE=1

# Wrong overrides are refused before anything is moved.
"$BIN/python" pipelines/prepare_data.py "$config" --dry-run "run.dir=$RUN" "$@" >/dev/null
if [ -e "$RUN" ]; then
    aside="$RUN.$(date +%Y%m%d-%H%M%S)"
    echo "moving the earlier $RUN to $aside"
    mv "$RUN" "$aside"
fi

step() { printf '\n== %s\n' "$*"; }

step "1/4 text -> tokenizer and Megatron files"
"$BIN/python" pipelines/prepare_data.py "$config" "run.dir=$RUN" "$@"
step "2/4 training, processes: $ranks"
"$BIN/python" pipelines/pretrain.py "$config" --nproc-per-node "$ranks" "run.dir=$RUN" "$@"
step "3/4 checkpoint -> Hugging Face folder, reloaded and compared"
"$BIN/python" pipelines/convert.py megatron-to-hf --load-dir "$RUN" --hf-dir "$RUN/hf" --summary "$RUN/summary.json"
step "4/4 text from the exported model"
"$BIN/python" pipelines/generate.py "$config" "run.dir=$RUN" "$@"
step "done in $SECONDS s: $RUN/summary.json; .venv/bin/tensorboard --logdir $(dirname "$RUN")"
