#!/usr/bin/env bash
# Convert a checkpoint, in one process: sbatch slurm/convert.sh megatron-to-hf --load-dir DIR --hf-dir DIR [...]
# The arguments are those of pipelines/convert.py.
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --cpus-per-task=8
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out

# Slurm runs a copy of this file; it knows where the original is.
script=${BASH_SOURCE[0]}
if [ -n "${SLURM_JOB_ID:-}" ]; then
    script=$(scontrol show job "$SLURM_JOB_ID" |
        sed -n '/^ *Command=/{ s/^ *Command=\(.*\/convert\.sh\).*/\1/p; q }')
fi
script=$(readlink -f "$script")
# shellcheck source=common.sh
. "$(dirname "$script")/common.sh"

parse "$@"
[ ${#arguments[@]} -gt 0 ] || fail 2 "expected the arguments of pipelines/convert.py: megatron-to-hf --load-dir DIR --hf-dir DIR [...]"
in_job || { submit sbatch "${flags[@]}" "$script" "${given[@]}" && exit; }
one_process_job "$python" "$repository/pipelines/convert.py" "${arguments[@]}"
