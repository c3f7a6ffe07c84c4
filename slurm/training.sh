# shellcheck shell=bash
# A training job from start to end: the checks, the run, and whether the job starts again.
#
# <run.dir>/slurm/history.tsv has a line for each start of the job and each end:
#   time, job, number of the restart, event, exit code, step, nodes that failed (at a start: all nodes), reason
# Events: start, finished, refused (2), saved (75), stopped (by Slurm or the user), fault, lost (no end was written).

# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run_dir='' history=''
# The arguments of the run that starts when this one has finished.
next=()
# The exit code if USR1, the signal before the time limit, comes before a rank has its handlers: 128 + 10.
early_signal=138
soon="the signal for the time limit must leave a run time to start and to train. Ask for a longer --time, or set --signal \
to fewer seconds before its end"

record() { # EVENT CODE STEP NODES REASON: append a line to the history
    printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n' \
        "$(date +%FT%T)" "$SLURM_JOB_ID" "${SLURM_RESTART_COUNT:-0}" "$1" "$2" "${3:--}" "${4:--}" \
        "$(one_line "${5:--}")" >>"$history"
}

exit_value() { # NAME: print a value of the run's exit.json
    printf %b "$(sed -n 's/^ "'"$1"'": "\{0,1\}\(.*[^,"]\)"\{0,1\},\{0,1\}$/\1/p' "$run_dir/exit.json" 2>/dev/null)"
}

last_step() { tail -n 1 "$run_dir/metrics.jsonl" 2>/dev/null | sed -n 's/.*"step": \([0-9]*\).*/\1/p' || true; }

failed_twice() { # NODES: print those of these comma-separated nodes that failures of this job name at least twice
    awk -F'\t' -v job="$SLURM_JOB_ID" -v now="$1" '
        $2 == job && $4 ~ /^(fault|lost|stopped)$/ { split($7, names, ","); for (i in names) count[names[i]]++ }
        END { split(now, names, ","); for (i in names) if (count[names[i]] > 1) print names[i] }' "$history" |
        sort | paste -s -d,
}

# Two jobs must not write one run folder. Slurm knows whether the other job runs or waits to start again. The lock shows an
# earlier start of this job that lost contact with Slurm and still runs.
alone_in_run_folder() {
    local other event states=PENDING,RUNNING,SUSPENDED
    IFS=$'\t' read -r _ other _ event _ < <(tail -n 1 "$history") || true
    # A job that has recorded its end writes nothing more.
    [ "${event:-}" != start ] || states+=,COMPLETING
    case ${event:-} in
        '' | finished | refused) ;;
        *)
            if [ "$other" != "$SLURM_JOB_ID" ] && [ -n "$(squeue -h -j "$other" -t "$states" -o %i 2>/dev/null)" ]; then
                fail 2 "$run_dir: job $other trains in this folder, or waits to go on there. Wait for it" \
                    "(--dependency=afterany:$other), scancel it, or use another run.dir."
            fi
            ;;
    esac
    local code=0
    [ ! -e "$run_dir/.lock" ] || flock -E 75 -w "${MOH_LOCK_SECONDS:-600}" "$run_dir/.lock" true || code=$?
    if [ "$code" = 75 ]; then # another code means a file system without locks
        fail 2 "$run_dir: another process trains in this folder. Wait for it, or use another run.dir."
    fi
}

# If the last start has no recorded end, Slurm ended it with its node: one that is down, or was rebooted since. Slurm has
# restarted the job by itself, perhaps on a node that has now failed twice.
record_lost_start() {
    local started job event nodes since node booted lost=() names bad
    IFS=$'\t' read -r since job _ event _ _ nodes _ < <(tail -n 1 "$history") || return 0
    if [ "$event" != start ] || [ "$job" != "$SLURM_JOB_ID" ]; then return 0; fi
    started=$(date -d "$since" +%s)
    for node in ${nodes//,/ }; do
        booted=$(scontrol show node "$node" -o | sed -n 's/.*SlurmdStartTime=\([^ ]*\).*/\1/p' || true)
        booted=$(date -d "$booted" +%s 2>/dev/null || echo 0)
        if [ "$booted" -gt "$started" ] || [ -n "$(sinfo -h -n "$node" -t down,drain,fail -o %n)" ]; then
            lost+=("$node")
        fi
    done
    names=$(IFS=, && echo "${lost[*]}")
    record lost - "$(last_step)" "$names" "ended by Slurm: a node was lost, or the job was requeued"
    bad=$(failed_twice "$names")
    for node in ${bad//,/ }; do
        case " $MOH_NODES " in
            *" $node "*)
                say "node $node failed twice in this job: it starts again without $bad"
                requeue "$bad"
                ;;
        esac
    done
}

# A save must fit into the time that Slurm gives between signal and kill.
check_grace() {
    local partition grace kill need=${MOH_SAVE_SECONDS:-60}
    partition=$(scontrol show partition "$SLURM_JOB_PARTITION" -o 2>/dev/null) || return 0
    case $partition in *PreemptMode=OFF*) return 0 ;; esac
    grace=$(sed -n 's/.* GraceTime=\([0-9]*\).*/\1/p' <<<"$partition")
    kill=$(scontrol show config 2>/dev/null | sed -n 's/^KillWait *= *\([0-9]*\).*/\1/p' || true)
    if [ "${grace:-0}" -lt "$need" ]; then
        say "warning: partition $SLURM_JOB_PARTITION may preempt this job and then waits ${grace:-0} s (GraceTime) and" \
            "${kill:-30} s (KillWait) before it kills; a save is given $need s (MOH_SAVE_SECONDS). What was not saved is" \
            "trained again: lower checkpoint.interval, or ask for a longer GraceTime."
    fi
}

expanded() { # read names, each of which may stand for several nodes, such as n[1,3]; print one node a line
    local names
    names=$(paste -s -d,)
    # Without a name, scontrol prints the nodes of the job.
    [ -z "$names" ] || scontrol show hostnames "$names"
}

# Print the nodes that Slurm has lost, according to srun.
lost_nodes() {
    tail -c "+$begin" "$log" 2>/dev/null | sed -n 's/^srun: error: Node failure on \([^ ]*\).*/\1/p' | expanded |
        sort -u | paste -s -d, || true
}

# Print the nodes that a fault names: in the message of the ranks, or of srun where a signal ended a rank.
faulty_nodes() { # REASON
    {
        grep -oE 'rank [0-9]+ \([^,()]+, after step [0-9]+, [a-z]+\) (is missing|hangs)' <<<"$1" |
            sed 's/.*(\([^,]*\),.*/\1/'
        tail -c "+$begin" "$log" 2>/dev/null | sed -n \
            -e 's/^srun: error: Node failure on \([^ ]*\).*/\1/p' \
            -e 's/^srun: error: \([^ :]*\): tasks\{0,1\} [0-9,-]*: \(Killed\|Segmentation\|Bus error\|Illegal\).*/\1/p'
    } | expanded | sort -u | paste -s -d,
}

# Leave out the positions of ranks: the same failure on another node counts as the same.
without_positions() { sed 's/([^)]*)//g'; }

after_fault() { # CODE STEP NODES REASON: start again, unless it would fail again
    local code=$1 step=$2 nodes=$3 reason=$4 before same
    same=$(one_line "$reason" | without_positions)
    before=$(awk -F'\t' -v job="$SLURM_JOB_ID" '
        $2 == job && $4 == "fault" { found = $6 "\t" $8 }
        END { print found }' "$history" | without_positions)
    record fault "$code" "$step" "$nodes" "$reason"
    if [ "$step" != preflight ] && [ "$before" = "$step"$'\t'"$same" ]; then
        fail 1 "the run failed twice in the same way at step $step, and is not started again: $reason"
    fi
    local faults
    faults=$(awk -F'\t' -v job="$SLURM_JOB_ID" '$2 == job && $4 == "fault"' "$history" | wc -l)
    if [ "$faults" -gt "$max_restarts" ]; then
        fail 1 "the run failed $faults times (MAX_RESTARTS=$max_restarts), and is not started again: $reason"
    fi
    say "fault $faults, at step $step: $reason"
    say "starting again in $restart_pause s (at most $max_restarts times)"
    sleep "$restart_pause"
    requeue "$(failed_twice "$nodes")"
}

# The signal before the time limit may come so early that starts end without a step.
after_save() { # STEP REASON: start again, unless no start makes progress
    local starts
    record saved 75 "$1" '' "$2"
    say "$2, at step ${1:-none}; the job goes on when Slurm starts it again"
    starts=$(awk -F'\t' -v job="$SLURM_JOB_ID" -v step="${1:--}" '
        $2 != job || $4 == "start" { next }
        { starts = $4 == "saved" && $6 == step && $8 ~ /USR1/ ? starts + 1 : 0 }
        END { print starts }' "$history")
    # The first of them may have trained.
    if [ "$starts" -gt 1 ] && [ "$starts" -gt "$max_restarts" ]; then
        fail 1 "USR1 ended $starts lives in a row at step ${1:-0} (MAX_RESTARTS=$max_restarts), and the job is not started" \
            "again: $soon"
    fi
    [ "$starts" -lt 2 ] || sleep "$restart_pause"
    requeue ''
}

# Only overrides may follow the configuration; --profile is short for one.
as_overrides() { # ARRAY
    local -n words=$1
    local index
    for index in "${!words[@]}"; do
        case ${words[index]} in
            --profile) words[index]=monitor.profile=true ;;
            -*) fail 2 "${words[index]}: expected section.key=value. Flags of sbatch, and --dry-run, stand before the" \
                "configuration: $(basename "$script") --nodes=2 CONFIG; with sbatch, before the script" ;;
        esac
    done
}

check_ranks() { # require the same number of ranks on every node, and a GPU for each
    local total counts nodes tasks gpus
    if in_job; then total=$SLURM_NTASKS counts=$SLURM_NNODES; else total=$(requested ntasks '') counts=$(requested nodes 1); fi
    for nodes in $(numbers_of "$counts"); do
        [ $((${total:-$nodes} % nodes)) = 0 ] || fail 2 "every node needs as many ranks as the others. Got $total tasks on" \
            "$nodes nodes: leave --ntasks out and set --ntasks-per-node"
    done
    tasks=$(tasks_per_node) gpus=$(gpus_per_node)
    if [ "$gpus" -gt 0 ] && [ "$gpus" -lt "$tasks" ]; then
        fail 2 "every rank needs a GPU. Got --ntasks-per-node=$tasks with $gpus GPUs a node: set --ntasks-per-node and" \
            "--gpus-per-node to the same number"
    fi
}

check() { # ARGUMENTS [FLAGS]: print the run folder; one process runs it, in a job on its first node
    local on=()
    ! in_job || on=(on_one)
    "${on[@]}" "$python" "$repository/slurm/check.py" "$@" | tail -n 1
}

check_failed() { # CODE: end a job whose run folder is not known yet
    local reason
    reason=$(last_words)
    # The code is 2 as well where slurmd finds no Python.
    [ "$1" != 2 ] || [ -z "$reason" ] || fail 2 "$reason"
    [ "$1" != "$early_signal" ] || reason="USR1 came before the run could start: $soon"
    start_again "$1" "${reason:-$(reason_of_end)}"
}

train_job() { # PIPELINE [FLAGS]: one start of the run; with flags, one process calls the pipeline with them first
    local code=0 start reason step nodes
    trap may_take_fewer_nodes EXIT
    remember_log
    prepare_environment
    prepare_srun
    prepare_meeting
    check_ranks
    start=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
    if [ "${start#*.}" -gt 0 ]; then
        # Whatever the user set for the first start: go on from what an earlier start saved.
        arguments+=(train.resume=auto)
    elif [ ${#next[@]} -gt 0 ]; then
        check "${next[@]}" --world-size "$SLURM_NTASKS" --no-data >/dev/null || check_failed $?
    fi
    run_dir=$(check "${arguments[@]}" --world-size "$SLURM_NTASKS" --snapshot "$start") || check_failed $?
    history=$run_dir/slurm/history.tsv
    touch "$history"
    alone_in_run_folder
    record_lost_start
    if [ ${#next[@]} -gt 0 ]; then
        submit_next "$SLURM_JOB_NAME-stage2-$SLURM_JOB_ID" --dependency=afterok:"$SLURM_JOB_ID" -- -- "${next[@]}"
    fi
    record start - "$(last_step)" "${MOH_NODES// /,}" "$(printf '%s ' "${arguments[@]}")"
    check_grace

    rm -f "$run_dir/exit.json"
    local report=$run_dir/slurm/$start/preflight.tsv
    MASTER_PORT=$((MASTER_PORT + 1)) supervise on_all "$python" "$repository/slurm/preflight.py" "${arguments[@]}" \
        --report "$report" || code=$?
    if [ "$code" != 0 ]; then
        reason=$(paste -s -d';' "$report" 2>/dev/null | tr '\t' ' ' || true)
        reason="preflight: ${reason:-no answer from node ${MOH_NODES%% *}, exit code $code}"
        nodes=$(cut -f1 "$report" 2>/dev/null | sort -u | paste -s -d, || true)
        handle_failure "$code" preflight "$nodes" "$reason"
    fi

    if [ $# -gt 1 ]; then
        supervise on_one "$python" "$repository/$1" "${arguments[@]}" "${@:2}" || code=$?
        [ "$code" = 0 ] || handle_failure "$code" start '' "$(reason_of_end)"
    fi

    supervise on_all "$python" "$repository/$1" "${arguments[@]}" || code=$?
    reason=$(exit_value reason)
    [ -n "$reason" ] || reason=$(last_words)
    reason=${reason:-srun ended with $code, and no rank said why}
    step=$(exit_value step)
    [ "${step:-null}" != null ] || step=$(last_step)
    if [ "$code" = 0 ]; then
        record finished 0 "$step" '' "$reason"
        say "finished: $run_dir"
        exit 0
    fi
    handle_failure "$code" "${step:--}" "$(faulty_nodes "$reason")" "$reason"
}

handle_failure() { # CODE STEP NODES REASON: decide what an exit code other than 0 means for the job
    local code=$1 step=$2 nodes=$3 reason=$4
    [ -e "$history" ] || fail 1 "$history is gone: somebody removed the run folder of job $SLURM_JOB_ID while it ran, and it" \
        "is not started again"
    [ -z "$stopped" ] || end_stopped "$code"
    [ "$code" != 2 ] || end_refused "$reason"
    # srun returns the largest code of the ranks, which is 75 also if another rank failed.
    if [ "$code" = 75 ] && [ "$(exit_value code)" = 75 ]; then
        after_save "$step" "$reason"
    fi
    if [ "$code" = "$early_signal" ] && [ ! -e "$run_dir/exit.json" ]; then
        after_save "$(last_step)" "USR1 came before the ranks were there: nothing to save"
    fi
    after_fault "$code" "$step" "$nodes" "$reason"
}

end_stopped() { # CODE: Slurm or the user wants this job to end, and decides whether it starts again
    local nodes
    nodes=$(lost_nodes)
    record stopped "$1" "$(last_step)" "$nodes" "$(exit_value reason)"
    say "stopped: $(exit_value reason)"
    avoid "$(failed_twice "$nodes")"
    exit "$1"
}

end_refused() { # REASON: a user error; the job does not start again
    record refused 2 "$(last_step)" '' "$1"
    fail 2 "$1"
}

# A typed script: checks, sbatch, and in a dry run the plan.

# Print the number of ranks for every number of nodes that the job may get, with --nodes=4, --nodes=2-4 or --nodes=1,2,4.
world_sizes() {
    local total
    total=$(requested ntasks '')
    if [ -n "$total" ]; then
        echo "$total"
    else
        numbers_of "$(requested nodes 1)" | awk -v tasks="$(tasks_per_node)" '{ print $1 * tasks }'
    fi
}

seconds_of() { # TIME as MINUTES, M:S, H:M:S, D-H, D-H:M, D-H:M:S; anything else, such as UNLIMITED, is 0
    awk -v text="$1" 'BEGIN {
        if (text !~ /^[0-9]+(-[0-9]+)?(:[0-9]+)*$/) { print 0; exit }
        days = sub(/-/, ":", text); count = split(text, part, ":")
        if (days) print part[1] * 86400 + part[2] * 3600 + part[3] * 60 + part[4]
        else if (count > 2) print part[1] * 3600 + part[2] * 60 + part[3]
        else print part[1] * 60 + part[2] }'
}

check_signal() { # require time to train between the start and the signal
    local limit signal lead
    limit=$(requested time '') signal=$(requested signal '')
    case ${signal%%@*} in
        *B*:*) fail 2 "--signal=$signal: only the script would hear it. Leave out B: so that the ranks do: --signal=${signal##*:}" ;;
    esac
    case $signal in *@*) lead=${signal##*@} ;; *) lead=60 ;; esac
    if [ -n "$signal" ] && [ "$(seconds_of "$limit")" -gt 0 ] && [ "$(seconds_of "$limit")" -le "$lead" ]; then
        fail 2 "--time=$limit is over before --signal=$signal, $lead s before its end: $soon"
    fi
}

submit_training() { # PIPELINE [FLAGS]: as train_job
    local sizes name checks plan=1 word
    prepare_environment
    check_signal
    check_ranks
    mapfile -t sizes < <(world_sizes)
    checks=(--world-size "${sizes[@]}")
    if "$python" -c '' 2>/dev/null; then
        [ ${#next[@]} = 0 ] || check "${next[@]}" "${checks[@]}" --no-data >/dev/null || exit
        if [ -n "${MOH_NO_DATA_HERE:-}" ]; then
            checks+=(--no-data)
        elif [ -n "$dry_run" ]; then
            checks+=(--report)
        fi
        run_dir=$(check "${arguments[@]}" "${checks[@]}") || exit
        [ -z "${MOH_NO_DATA_HERE:-}" ] || say "not checked here, as MOH_NO_DATA_HERE is set: the data, and the run folder"
    else
        say "warning: $python does not run here; the configuration is checked when the job starts, and no plan is made"
        plan=
        # Without an override of run.dir, the path of the configuration stands for it.
        run_dir=$(realpath -ms "${arguments[0]}")
        for word in "${arguments[@]:1}"; do
            case $word in run.dir=*) run_dir=$(realpath -ms "${word#*=}") ;; esac
        done
    fi
    # The name follows from the run folder: with singleton, only one of its jobs runs at a time.
    name=moh-$(basename "$run_dir" .yaml)-$(cksum <<<"$run_dir" | cut -d' ' -f1)
    submit sbatch --job-name="$name" --dependency=singleton "${flags[@]}" "$script" "${given[@]}"
    [ -n "$dry_run" ] || return 0
    [ $# = 1 ] || show_srun on_one "$python" "$repository/$1" "${arguments[@]}" "${@:2}"
    show_srun on_all "$python" "$repository/$1" "${arguments[@]}"
    [ ${#next[@]} = 0 ] ||
        show sbatch sbatch --job-name="$name-stage2-JOB" --dependency=afterok:JOB "${flags[@]}" "$script" -- "${next[@]}"
    [ -n "$plan" ] || return 0
    echo
    "$python" "$repository/tools/plan.py" "${arguments[@]}" --world-size "${sizes[-1]}" \
        ${MOH_GPU_MEMORY:+--gpu-memory "$MOH_GPU_MEMORY"}
}
