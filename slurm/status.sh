#!/usr/bin/env bash
# Show the state of a run: slurm/status.sh RUN_FOLDER
set -euo pipefail

controls=$'\001-\010\013-\037\177' # what a terminal would obey in place of showing it
fail() {
    printf 'error: %s\n' "${*//[$controls]/?}" >&2
    exit 2
}
[ $# = 1 ] || fail "expected a run folder: slurm/status.sh RUN"
run=$1
history=$run/slurm/history.tsv
waits="a job makes it when it starts; squeue --me shows those that wait"
[ -d "$run" ] || fail "$run: expected a run folder, and there is none: $waits"
[ -f "$history" ] || fail "$run: no job has trained in this folder. What is missing is slurm/history.tsv: $waits"

IFS=$'\t' read -r _ job life event code _ _ reason < <(tail -n 1 "$history")
answer=$(squeue -h -j "$job" -t all -o '%T|%L|%N|%r' 2>&1) || answer="silent|||$answer"
IFS='|' read -r state left nodes why <<<"$answer"
newest=$(tail -n 1 "$run/metrics.jsonl" 2>/dev/null || true)
value() { sed -n 's/.*"'"$1"'": \([0-9.e+-]*\).*/\1/p' <<<"$newest"; }
setting() { awk -v section="$1:" -v key="$2:" '$0 !~ /^ / { inside = $1 == section } inside && $1 == key { print $2 }' \
    "$run/config.yaml" 2>/dev/null || true; }

step=$(value step) tokens=$(value tokens) rate=$(value tokens_per_second)
[ -z "$rate" ] || rate=$(LC_ALL=C printf %.1f "$rate")
total=$(setting train total_tokens)
row() { printf '%-18s %s\n' "$1" "${2//[$controls]/?}"; }
case ${state:-} in
    PENDING) row state "PENDING ($why)" ;;
    RUNNING | COMPLETING | SUSPENDED | CONFIGURING | STOPPED | SIGNALING) row state "$state on $nodes" ;;
    *)
        left=
        if [ "$event" != start ]; then
            row state "$event, exit code $code: $reason"
        elif [ -z "$state" ] || [[ $why == *"Invalid job id"* ]]; then
            row state "lost: it told no end, and Slurm does not know it any more"
        elif [ "$state" = silent ]; then
            row state "it told no end yet, and Slurm does not answer: $why"
        else
            row state "lost: it told no end, and Slurm says $state"
        fi
        ;;
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
