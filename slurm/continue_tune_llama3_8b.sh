#!/usr/bin/env bash
# Continue-tune LLaMA3-8B into MoH, stage 1 and, when it has finished, stage 2:
#   sbatch slurm/continue_tune_llama3_8b.sh [CONFIG1 [section.key=value ...]] [-- CONFIG2 [section.key=value ...]]
# With nothing before `--` it runs only stage 2, which starts from the weights of stage 1, as its configuration says.
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# The ranks, not this shell, get the signal twenty minutes before the time limit: they save and end with 75.
#SBATCH --signal=USR1@1200

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
stage2=("$repository/configs/continue_tune/llama3_8b_stage2_moh75.yaml")
for index in "${!arguments[@]}"; do
    if [ "${arguments[index]}" = -- ]; then
        stage2=("${arguments[@]:index+1}")
        arguments=("${arguments[@]:0:index}")
        break
    fi
done
if [ "${given[0]:-}" = -- ]; then
    [ ${#stage2[@]} -gt 0 ] || fail 2 "expected the configuration of stage 2 behind --"
    arguments=("${stage2[@]}") stage2=()
elif [ ${#arguments[@]} = 0 ]; then
    arguments=("$repository/configs/continue_tune/llama3_8b_stage1.yaml")
fi
as_overrides arguments
as_overrides stage2
next=("${stage2[@]}")
if in_job; then
    train_job pipelines/continue_tune.py --prepare
else
    submit_training pipelines/continue_tune.py --prepare
fi
