#!/usr/bin/env bash
# Builds the wheel of the tracked files, installs it in a new environment outside the repository, and runs the console
# commands from an empty folder: each one's --help, then the README's quickstart with short trainings.
# The requirements are those of .venv.
set -euo pipefail

repository=$(cd "$(dirname "$0")/.." && pwd)
python=$repository/.venv/bin/python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

step() { printf '\n== %s\n' "$*"; }

step "wheel"
mkdir "$work/source" "$work/empty"
git -C "$repository" ls-files -z | tar -C "$repository" --null -T - -c | tar -C "$work/source" -x
"$python" -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$work" "$work/source"
"$python" -m venv --without-pip "$work/environment"
bin=$work/environment/bin
"$python" -m pip --python "$bin/python" install --quiet --no-deps "$work"/moh_megatron-*.whl
packages=$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
# Python does not read the .pth files of a folder that is named so: .venv's link to the repository has no effect.
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$packages/requirements.pth"

cd "$work/empty"
export PATH="$bin:$PATH"
python -c '
import sys
from pathlib import Path
import moh_megatron
found = Path(moh_megatron.__file__)
sys.exit(None if found.is_relative_to(sys.prefix) else f"error: {found} is imported, not the installed package")'
for command in prepare pretrain tune convert generate evaluate plan report; do
    "moh-$command" --help >/dev/null
    "moh-$command" --version
done

short=(train.total_tokens=2e4 optimizer.warmup_steps=1 train.eval_interval=0 train.eval_samples=4 --nproc-per-node 2)

step "pretraining"
moh-prepare smoke
moh-pretrain smoke "${short[@]}"
moh-report runs/smoke
moh-plan llm_s_moh75 --world-size 8 --gpu-memory 80 >/dev/null

step "continue-tuning"
moh-pretrain smoke run.dir=runs/dense data.dir=runs/smoke/data moh.enabled=false "${short[@]}" --quiet
moh-tune smoke run.dir=runs/tuned data.dir=runs/smoke/data train.init_from=runs/dense moh.router=query_norm \
    moh.shared_placement=calibrated moh.calibration_sequences=1 "${short[@]}" --quiet

step "export"
moh-convert megatron-to-hf --load-dir runs/smoke --hf-dir runs/smoke/hf
moh-generate smoke generate.prompts='["It was a truth"]' generate.max_new_tokens=8
moh-evaluate runs/smoke/hf train.eval_samples=4

step "docs/first_run.md: own text, own model"
mkdir my_texts
python -c '
import gzip, json
from moh_megatron.config.examples import shipped_file
with gzip.open(shipped_file("configs/data/austen.jsonl.gz"), "rt", encoding="utf-8") as lines:
    for number, line in zip(range(12), lines):
        with open(f"my_texts/{number}.txt", "w", encoding="utf-8") as text:
            text.write(json.loads(line)["text"])'
brief=(train.total_tokens=1e4 optimizer.warmup_steps=1 --quiet)
moh-prepare minimal
moh-pretrain minimal "${brief[@]}"
moh-convert megatron-to-hf --load-dir runs/first --hf-dir runs/first/hf
moh-generate minimal generate.prompts='["It was"]' generate.max_new_tokens=8
moh-pretrain minimal run.dir=runs/first_dense data.dir=runs/first/data moh.enabled=false "${brief[@]}"
moh-tune minimal run.dir=runs/first_tuned data.dir=runs/first/data train.init_from=runs/first_dense \
    moh.router=query_norm "${brief[@]}"

step "serving: the README's program"
# shellcheck disable=SC2016
sed -n '/^```python$/,/^```$/p' "$repository/README.md" | sed '/^```/d' | python -
printf '\nwheel: every command works from an empty folder, %s s\n' "$SECONDS"
