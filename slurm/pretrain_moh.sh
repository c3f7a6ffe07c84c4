#!/usr/bin/env bash
# Pretrain on one or more nodes: sbatch slurm/pretrain_moh.sh [CONFIG [section.key=value ...]]
# Typed without sbatch, the same line checks everything first; with --dry-run it only shows. slurm/README.md has the rest.
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# To the ranks, not to this shell, ten minutes before the time limit: they save and end with 75.
#SBATCH --signal=USR1@600

# Slurm runs a copy of this file; it knows where the original is.
script=${BASH_SOURCE[0]}
if [ -n "${SLURM_JOB_ID:-}" ]; then
    script=$(scontrol show job "$SLURM_JOB_ID" |
        sed -n '/^ *Command=/{ s/^ *Command=\(.*\/pretrain_moh\.sh\).*/\1/p; q }')
fi
script=$(readlink -f "$script")
# shellcheck source=training.sh
. "$(dirname "$script")/training.sh"

parse "$@"
[ ${#arguments[@]} -gt 0 ] || arguments=("$repository/configs/pretrain/llm_s_moh75.yaml")
if in_job; then
    train_job pipelines/pretrain.py
else
    submit_training pipelines/pretrain.py
fi
