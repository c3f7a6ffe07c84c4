#!/usr/bin/env bash
# Judge a model: validation loss, and the tasks of suites, in one process: sbatch slurm/evaluate.sh MODEL [--suite FILE ...] [section.key=value ...]
# The arguments are those of pipelines/evaluate.py.
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

# Slurm runs a copy of this file; it knows where the original is.
script=${BASH_SOURCE[0]}
if [ -n "${SLURM_JOB_ID:-}" ]; then
    script=$(scontrol show job "$SLURM_JOB_ID" |
        sed -n '/^ *Command=/{ s/^ *Command=\(.*\/evaluate\.sh\).*/\1/p; q }')
fi
script=$(readlink -f "$script")
# shellcheck source=common.sh
. "$(dirname "$script")/common.sh"

parse "$@"
[ ${#arguments[@]} -gt 0 ] || fail 2 "expected the arguments of pipelines/evaluate.py: MODEL [--suite FILE ...] [section.key=value ...]"
in_job || { submit sbatch "${flags[@]}" "$script" "${given[@]}" && exit; }
one_process_job "$python" "$repository/pipelines/evaluate.py" "${arguments[@]}"
