#!/usr/bin/env bash
# Evaluate a model, by validation loss and by the tasks of suites, in one process:
#   sbatch slurm/evaluate.sh MODEL [--suite FILE ...] [section.key=value ...]
# The arguments are those of moh-evaluate.
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

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
[ ${#arguments[@]} -gt 0 ] || fail 2 "expected the arguments of moh-evaluate: MODEL [--suite FILE ...] [section.key=value ...]"
command=("$repository/pipelines/evaluate.py" "${arguments[@]}")
if in_job; then
    one_process_job "${command[@]}"
else
    submit_one_process "${command[@]}"
fi
