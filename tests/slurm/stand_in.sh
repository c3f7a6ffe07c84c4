#!/usr/bin/env bash
# Replaces Python in tests of the job scripts, where no rank needs to train: $ACTS/SCRIPT.RESTART says what SCRIPT does in
# this start. $RUN is the run folder.
# shellcheck disable=SC2317,SC2329  # functions that an act calls
script=${1##*/}
if [ "$script" = check.py ]; then
    mkdir -p "$RUN/slurm/$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
    echo "$RUN"
fi
ended() { # CODE REASON STEP: end as rank 0 does
    if [ "$SLURM_PROCID" = 0 ]; then
        printf '{\n "code": %s,\n "reason": "%s",\n "step": %s\n}\n' "$1" "$2" "$3" >"$RUN/exit.json"
    fi
    exit "$1"
}
train() { # SECONDS: behave as a rank that saves when it is asked to stop
    trap 'ended 75 "received SIGTERM: saved" 7' TERM
    trap 'ended 75 "received SIGUSR1: saved" 7' USR1
    local until=$((SECONDS + $1))
    echo "${SLURM_RESTART_COUNT:-0}" >>"$RUN/trains"
    while [ "$SECONDS" -lt "$until" ]; do sleep 0.1; done
    ended 0 finished 30
}
# shellcheck source=/dev/null
[ ! -e "$ACTS/$script.${SLURM_RESTART_COUNT:-0}" ] || . "$ACTS/$script.${SLURM_RESTART_COUNT:-0}"
exit 0
