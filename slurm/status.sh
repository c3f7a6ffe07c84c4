#!/usr/bin/env bash
# What a run is doing: slurm/status.sh RUN_FOLDER
set -euo pipefail

if [ $# != 1 ] || [ ! -d "$1" ]; then
    echo "error: expected a run folder: slurm/status.sh RUN" >&2
    exit 2
fi
run=$1
history=$run/slurm/history.tsv
[ -f "$history" ] || { echo "error: $run: no job has trained in this folder" >&2; exit 2; }

IFS=$'\t' read -r _ job life event code _ _ reason < <(tail -n 1 "$history")
IFS='|' read -r state left nodes why < <(squeue -h -j "$job" -o '%T|%L|%N|%r' 2>/dev/null) || true
newest=$(tail -n 1 "$run/metrics.jsonl" 2>/dev/null || true)
value() { sed -n 's/.*"'"$1"'": \([0-9.e+-]*\).*/\1/p' <<<"$newest"; }
setting() { awk -v section="$1:" -v key="$2:" '$0 !~ /^ / { inside = $1 == section } inside && $1 == key { print $2 }' \
    "$run/config.yaml" 2>/dev/null || true; }

step=$(value step) tokens=$(value tokens) rate=$(value tokens_per_second)
total=$(setting train total_tokens)
row() { printf '%-18s %s\n' "$1" "$2"; }
case ${state:-} in
    '') row state "$event${code:+, exit code $code}: $reason" ;;
    PENDING) row state "PENDING ($why)" ;;
    *) row state "$state on $nodes" ;;
esac
row job "$job"
row restarts "$life ($(awk -F'\t' -v job="$job" '$2 == job && $4 == "fault"' "$history" | wc -l) after faults)"
row step "${step:-none yet}${tokens:+, $tokens of $total tokens}"
row tokens/s "${rate:-unknown}"
if [ -n "$tokens" ] && [ -n "$rate" ]; then
    row "left to train" "$(awk -v left="$((${total%.*} - tokens))" -v rate="$rate" 'BEGIN {
        seconds = left > 0 && rate > 0 ? left / rate : 0
        printf "%d:%02d:%02d", seconds / 3600, seconds % 3600 / 60, seconds % 60 }')"
fi
row "left of the job" "${left:-none}"
row "last checkpoint" "$(cat "$run/checkpoints/latest" 2>/dev/null || echo none)"
