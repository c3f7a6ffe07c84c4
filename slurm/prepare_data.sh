#!/usr/bin/env bash
# Prepare a dataset on many machines: sbatch slurm/prepare_data.sh CONFIG [section.key=value ...]
# Each task of the array encodes its shard; the first one submits a last job that merges the shards.
# `--array=1` makes the dataset in one job.
#SBATCH --array=1-16%8
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=16
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.out

# Slurm runs a copy of this file without the files beside it, and knows the path of the original.
script=$(readlink -f "${BASH_SOURCE[0]}")
if [ ! -e "${script%/*}/common.sh" ]; then
    script=$(scontrol show job "${SLURM_JOB_ID:-none}" | sed -n '/^ *Command=/{ s///p; q }')
    # Slurm shows the path followed by the arguments.
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

if in_job; then
    tasks=${SLURM_ARRAY_TASK_COUNT:-1} first=${SLURM_ARRAY_TASK_MIN:-1} last=${SLURM_ARRAY_TASK_MAX:-1}
else
    mapfile -t numbers < <(numbers_of "$(requested array 1 | sed 's/%.*//')")
    tasks=${#numbers[@]} first=${numbers[0]} last=${numbers[-1]}
fi
if [ "$tasks" -gt 1 ] && [ "$first-$last" != "1-$tasks" ]; then
    fail 2 "--array must count from 1 without gaps, such as --array=1-16%8. Got $first to $last, $tasks tasks."
fi

# As many workers as requested CPUs, also where Slurm does not bind tasks to cores. The user's own value comes later and
# overrides this.
command=("$repository/pipelines/prepare_data.py" "${arguments[0]}"
    "data.workers=${SLURM_CPUS_PER_TASK:-$(requested cpus-per-task 1)}" "${arguments[@]:1}")
[ "$tasks" = 1 ] || command+=("data.shard=${SLURM_ARRAY_TASK_ID:-1}/$tasks")
if in_job; then
    if [ "$tasks" -gt 1 ] && [ "$SLURM_ARRAY_TASK_ID" = 1 ]; then
        submit_next "$SLURM_JOB_NAME-merge-$SLURM_ARRAY_JOB_ID" --array=1 \
            --dependency=afterok:"$SLURM_ARRAY_JOB_ID" -- "${given[@]}"
    fi
    one_process_job "${command[@]}"
else
    submit_one_process "${command[@]}"
fi
