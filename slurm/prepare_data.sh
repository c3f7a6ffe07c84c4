#!/usr/bin/env bash
# Prepare a dataset on many machines: sbatch slurm/prepare_data.sh CONFIG [section.key=value ...]
# Each task of the array encodes its share; the first one submits a last job that puts the dataset together.
# `--array=1` does the whole in one job.
#SBATCH --array=1-16%8
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out

# Slurm runs a copy of this file, apart from its neighbours, and knows where the original is.
script=$(readlink -f "${BASH_SOURCE[0]}")
if [ ! -e "${script%/*}/common.sh" ]; then
    script=$(scontrol show job "${SLURM_JOB_ID:-none}" | sed -n '/^ *Command=/{ s///p; q }')
    # Its arguments stand behind it.
    while [ ! -f "$script" ] && [ "$script" != "${script% *}" ]; do script=${script% *}; done
    script=$(readlink -f "$script")
    if [ ! -e "${script%/*}/common.sh" ]; then
        echo "error: ${script:-no script}: expected common.sh beside the script that is typed or given to sbatch. Take the" \
            "one in the repository's slurm/, or a copy of it that stands there." >&2
        exit 2
    fi
fi
# shellcheck source=common.sh
. "${script%/*}/common.sh"

parse "$@"
[ ${#arguments[@]} -gt 0 ] || fail 2 "expected a configuration: prepare_data.sh CONFIG [section.key=value ...]"

# As many workers as CPUs were asked for, also where Slurm does not bind tasks to cores. What the user says counts more.
work() { # TASKS TASK: the command of one task
    command=("$python" "$repository/pipelines/prepare_data.py" "${arguments[0]}"
        "data.workers=${SLURM_CPUS_PER_TASK:-$(requested cpus-per-task 1)}" "${arguments[@]:1}")
    [ "$1" = 1 ] || command+=("data.shard=$2/$1")
}

if ! in_job; then
    prepare_environment
    # A mistake shows before anything waits in the queue.
    if "$python" -c '' 2>/dev/null; then
        "$python" "$repository/pipelines/prepare_data.py" "${arguments[@]}" --dry-run >/dev/null || exit
    fi
    tasks=$(requested array 1 | sed 's/%.*//; s/.*[-,]//')
    work "$tasks" 1
    submit_one_process "${command[@]}"
    exit
fi

tasks=${SLURM_ARRAY_TASK_COUNT:-1}
if [ "$tasks" -gt 1 ]; then
    if [ "$SLURM_ARRAY_TASK_MIN" != 1 ] || [ "$SLURM_ARRAY_TASK_MAX" != "$tasks" ]; then
        fail 2 "--array must count from 1 without gaps, such as --array=1-16%8. Got $SLURM_ARRAY_TASK_MIN to" \
            "$SLURM_ARRAY_TASK_MAX, $tasks tasks."
    fi
    if [ "$SLURM_ARRAY_TASK_ID" = 1 ]; then
        submit_next "$SLURM_JOB_NAME-merge-$SLURM_ARRAY_JOB_ID" --array=1 \
            --dependency=afterok:"$SLURM_ARRAY_JOB_ID" -- "${given[@]}"
    fi
fi
work "$tasks" "${SLURM_ARRAY_TASK_ID:-1}"
one_process_job "${command[@]}"
