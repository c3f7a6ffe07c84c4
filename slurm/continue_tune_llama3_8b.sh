#!/usr/bin/env bash
# Continue-tune LLaMA3-8B into MoH, stage 1 and, when it has finished, stage 2:
#   sbatch slurm/continue_tune_llama3_8b.sh [CONFIG1 [section.key=value ...]] [-- CONFIG2 [section.key=value ...]]
# With nothing before `--` only stage 2 is run. Stage 2 starts from stage 1's weights, as its configuration says.
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# To the ranks, not to this shell, twenty minutes before the time limit: they save and end with 75.
#SBATCH --signal=USR1@1200

# Slurm runs a copy of this file; it knows where the original is.
script=${BASH_SOURCE[0]}
if [ -n "${SLURM_JOB_ID:-}" ]; then
    script=$(scontrol show job "$SLURM_JOB_ID" |
        sed -n '/^ *Command=/{ s/^ *Command=\(.*\/continue_tune_llama3_8b\.sh\).*/\1/p; q }')
fi
script=$(readlink -f "$script")
# shellcheck source=training.sh
. "$(dirname "$script")/training.sh"

parse "$@"
stage2=("$repository/configs/continue_tune/llama3_8b_stage2_moh75.yaml")
for place in "${!arguments[@]}"; do
    if [ "${arguments[place]}" = -- ]; then
        stage2=("${arguments[@]:place+1}")
        arguments=("${arguments[@]:0:place}")
        break
    fi
done
if [ "${given[0]:-}" = -- ]; then
    arguments=("${stage2[@]}") stage2=()
elif [ ${#arguments[@]} = 0 ]; then
    arguments=("$repository/configs/continue_tune/llama3_8b_stage1.yaml")
fi
if in_job; then
    if [ ${#stage2[@]} -gt 0 ]; then
        submit_next "$SLURM_JOB_NAME-stage2-$SLURM_JOB_ID" --dependency=afterok:"$SLURM_JOB_ID" -- -- "${stage2[@]}"
    fi
    train_job pipelines/continue_tune.py --prepare
else
    submit_training pipelines/continue_tune.py
fi
