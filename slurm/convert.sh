#!/usr/bin/env bash
# Convert a checkpoint, in one process: sbatch slurm/convert.sh megatron-to-hf --load-dir DIR --hf-dir DIR [...]
# The arguments are those of moh-convert.
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
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
[ ${#arguments[@]} -gt 0 ] || fail 2 "expected the arguments of moh-convert: megatron-to-hf --load-dir DIR --hf-dir DIR [...]"
command=("$repository/pipelines/convert.py" "${arguments[@]}")
if in_job; then
    one_process_job "${command[@]}"
else
    submit_one_process "${command[@]}"
fi
