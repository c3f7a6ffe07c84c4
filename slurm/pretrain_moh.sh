#!/usr/bin/env bash
# Pretrain on one or more nodes: sbatch slurm/pretrain_moh.sh [CONFIG [section.key=value ...]]
# Typed without sbatch, it checks everything and then submits itself; with --dry-run it only shows what it would do. See
# slurm/README.md.
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# The ranks, not this shell, get the signal ten minutes before the time limit: they save and end with 75.
#SBATCH --signal=USR1@600

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
# shellcheck source=training.sh
. "${script%/*}/training.sh"

parse "$@"
[ ${#arguments[@]} -gt 0 ] || arguments=("$repository/configs/pretrain/llm_s_moh75.yaml")
as_overrides arguments
if in_job; then
    train_job pipelines/pretrain.py
else
    submit_training pipelines/pretrain.py
fi
