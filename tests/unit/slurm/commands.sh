#!/usr/bin/env bash
# Replaces the Slurm command of the name it is called with: records the call in $CALLS, and Slurm's variables that sbatch
# sees, and answers as Slurm does. $SHOWN is the output of `scontrol show job`; $QUEUE is that of squeue, if it is asked for
# jobs in the state $QUEUED_AS; $REFUSED is a command that Slurm refuses.
name=${0##*/}
echo "$name $*" >>"$CALLS"
case "${REFUSED:-none}" in
    "$name" | "$name $1")
        echo "$name: error: refused" >&2
        exit 1
        ;;
esac
case "$name $1" in
    srun\ *)
        while [[ $1 == --* ]]; do shift; done
        export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_STEP_ID=0
        exec "$@"
        ;;
    'scontrol show')
        case $2 in
            hostnames) tr , '\n' <<<"${3/n\[1,3\]/n1,n3}" ;;
            job) echo "${SHOWN:-}" ;;
        esac
        ;;
    sbatch\ *) echo "sees ${!SLURM_@}" >>"$CALLS" ;;
    squeue\ *) case $* in *"${QUEUED_AS:-}"*) echo "${QUEUE:-}" ;; esac ;;
esac
exit 0
