# shellcheck shell=bash
# The life of a training job: what is checked, how it ends, and whether it starts again.
#
# <run.dir>/slurm/history.tsv has a line for each beginning and each end of a life:
#   time, job, life, event, exit code, step, nodes that failed (of a beginning: all nodes), reason
# Events: start, finished, refused (2), saved (75), stopped (by Slurm or the user), fault, lost (no end was written).

# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

run_dir='' history=''
# The exit code where USR1, the sign that the time limit is near, came before a rank could listen: 128 + 10.
unheard=138

record() { # EVENT CODE STEP NODES REASON
    local reason=${5:--}
    printf '%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n' \
        "$(date +%FT%T)" "$SLURM_JOB_ID" "${SLURM_RESTART_COUNT:-0}" "$1" "$2" "${3:--}" "${4:--}" \
        "${reason//[$'\t\n']/ }" >>"$history"
}

exit_value() { # NAME: of the run's exit.json, a line a value
    printf %b "$(sed -n 's/^ "'"$1"'": "\{0,1\}\(.*[^,"]\)"\{0,1\},\{0,1\}$/\1/p' "$run_dir/exit.json" 2>/dev/null)"
}

last_step() { tail -n 1 "$run_dir/metrics.jsonl" 2>/dev/null | sed -n 's/.*"step": \([0-9]*\).*/\1/p' || true; }

failed_twice() { # nodes that this job's faults name at least twice, comma-separated
    awk -F'\t' -v job="$SLURM_JOB_ID" '
        $2 == job && ($4 == "fault" || $4 == "lost") { split($7, names, ","); for (i in names) count[names[i]]++ }
        END { for (name in count) if (name != "-" && count[name] > 1) print name }' "$history" | sort | paste -s -d,
}

# Two jobs must not write one run folder. Slurm knows whether the other one lives; the lock is the word of a life of this
# very job that has lost contact with Slurm, and not yet its own.
alone_in_run_folder() {
    local other
    other=$(awk -F'\t' '{ job = $4 == "start" ? $2 : "" } END { print job }' "$history")
    if [ -n "$other" ] && [ "$other" != "$SLURM_JOB_ID" ] &&
        [ -n "$(squeue -h -j "$other" -t RUNNING,COMPLETING,SUSPENDED -o %i 2>/dev/null)" ]; then
        fail 2 "$run_dir: job $other trains in this folder. Wait for it (--dependency=singleton), or use another run.dir."
    fi
    local code=0
    [ ! -e "$run_dir/.lock" ] || flock -E 75 -w "${MOH_LOCK_SECONDS:-600}" "$run_dir/.lock" true || code=$?
    if [ "$code" = 75 ]; then # another code: a file system without locks
        fail 2 "$run_dir: another process trains in this folder. Wait for it, or use another run.dir."
    fi
}

# A life without an end was ended by Slurm with its node: which one is down, or was started meanwhile?
account_for_lost_life() {
    local started job event nodes since node booted lost=()
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
    record lost - "$(last_step)" "$(IFS=, && echo "${lost[*]}")" "ended by Slurm: a node was lost, or the job was requeued"
}

avoid_bad_nodes() {
    local bad node
    bad=$(failed_twice)
    for node in ${bad//,/ }; do
        case " $MOH_NODES " in
            *" $node "*)
                say "node $node failed twice in this job: it starts again without $bad"
                requeue "$bad"
                ;;
        esac
    done
}

# A save must fit into the time that Slurm gives before it kills.
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

# The nodes that a fault names: in the ranks' own words, or by srun where a signal ended a rank.
blamed() { # REASON
    {
        grep -oE 'rank [0-9]+ \([^,()]+, after step [0-9]+, [a-z]+\) (is missing|hangs)' <<<"$1" |
            sed 's/.*(\([^,]*\),.*/\1/'
        tail -c "+$begin" "$log" 2>/dev/null | sed -n \
            -e 's/^srun: error: Node failure on \([^ ]*\).*/\1/p' \
            -e 's/^srun: error: \([^ :]*\): tasks\{0,1\} [0-9,-]*: \(Killed\|Segmentation\|Bus error\|Illegal\).*/\1/p'
    } | sort -u | paste -s -d,
}

# The same failure on another node is the same failure.
without_places() { sed 's/([^)]*)//g'; }

after_fault() { # CODE STEP NODES REASON: start again, unless that is in vain
    local code=$1 step=$2 nodes=$3 reason=$4 before same
    same=$(without_places <<<"$reason")
    before=$(awk -F'\t' -v job="$SLURM_JOB_ID" '
        $2 == job && $4 == "fault" { found = $6 "\t" $8 }
        END { print found }' "$history" | without_places)
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
    requeue "$(failed_twice)"
}

train_job() { # PIPELINE [FLAGS]: one life of the run; with flags, the pipeline is called with them by one process first
    local code=0 life reason step nodes
    remember_log
    prepare_environment
    prepare_srun
    prepare_meeting
    life=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
    run_dir=$(on_one "$python" "$repository/slurm/check.py" "${arguments[@]}" \
        --world-size "$SLURM_NTASKS" --snapshot "$life" | tail -n 1) || code=$?
    [ "$code" != "$unheard" ] || requeue ''
    [ "$code" = 0 ] || fail "$code" "$(last_words)"
    history=$run_dir/slurm/history.tsv
    touch "$history"
    alone_in_run_folder
    account_for_lost_life
    avoid_bad_nodes
    record start - "$(last_step)" "${MOH_NODES// /,}" "$(printf '%s ' "${arguments[@]}")"
    check_grace

    rm -f "$run_dir/exit.json"
    local report=$run_dir/slurm/$life/preflight.tsv
    MASTER_PORT=$((MASTER_PORT + 1)) supervise on_all "$python" "$repository/slurm/preflight.py" "${arguments[@]}" \
        --report "$report" || code=$?
    if [ "$code" != 0 ]; then
        reason=$(paste -s -d';' "$report" 2>/dev/null | tr '\t' ' ' || true)
        reason="preflight: ${reason:-no answer from node ${MOH_NODES%% *}, exit code $code}"
        nodes=$(cut -f1 "$report" 2>/dev/null | sort -u | paste -s -d, || true)
        judge "$code" preflight "$nodes" "$reason"
    fi

    if [ $# -gt 1 ]; then
        supervise on_one "$python" "$repository/$1" "${arguments[@]}" "${@:2}" || code=$?
        [ "$code" = 0 ] || judge "$code" start '' "$(last_words)"
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
    judge "$code" "${step:--}" "$(blamed "$reason")" "$reason"
}

judge() { # CODE STEP NODES REASON: what the end of a step other than 0 means for the job
    local code=$1 step=$2 nodes=$3 reason=$4
    [ -z "$stopped" ] || end_stopped "$code"
    [ "$code" != 2 ] || end_refused "$reason"
    # srun returns the largest of the ranks' codes: 75 also where another rank failed.
    if [ "$code" = 75 ] && [ "$(exit_value code)" = 75 ]; then
        record saved 75 "$step" '' "$reason"
        say "$reason at step $step; the job goes on when Slurm starts it again"
        requeue ''
    fi
    if [ "$code" = "$unheard" ] && [ ! -e "$run_dir/exit.json" ]; then
        record saved 75 "$step" '' "USR1 came before the ranks were there: nothing to save"
        requeue ''
    fi
    after_fault "$code" "$step" "$nodes" "$reason"
}

end_stopped() { # CODE: Slurm, or the user, wants this job to end, and knows what comes next
    record stopped "$1" "$(last_step)" '' "$(exit_value reason)"
    say "stopped: $(exit_value reason)"
    may_take_fewer_nodes
    exit "$1"
}

end_refused() { # REASON: the user's to mend; never in vain a second time
    record refused 2 "$(last_step)" '' "$1"
    fail 2 "$1"
}

# A typed script: checks, the plan, then sbatch.
submit_training() { # PIPELINE
    local nodes tasks world name
    prepare_environment
    nodes=$(requested nodes 1)
    tasks=$(requested ntasks-per-node 1)
    world=$((${nodes##*-} * tasks))
    name=moh
    if "$python" -c '' 2>/dev/null; then
        local checks=(--world-size "$world")
        if [ -n "$dry_run" ] || [ -n "${MOH_NO_DATA_HERE:-}" ]; then checks+=(--no-data); fi
        run_dir=$("$python" "$repository/slurm/check.py" "${arguments[@]}" "${checks[@]}" | tail -n 1) || exit 2
        # One name for one run folder: singleton keeps its jobs apart.
        name=moh-$(basename "$run_dir")-$(cksum <<<"$run_dir" | cut -d' ' -f1)
    else
        say "warning: $python does not run here; the configuration is checked when the job starts"
    fi
    submit sbatch --job-name="$name" --dependency=singleton "${flags[@]}" "$script" "${given[@]}"
    if [ -n "$dry_run" ]; then
        SLURM_CPUS_PER_TASK=$(requested cpus-per-task '') prepare_srun
        echo "srun:   $(printf '%q ' "${srun_line[@]}" bash "$repository/slurm/rank.sh" "${inside[@]}" "$python" \
            "$repository/$1" "${arguments[@]}")"
        echo
        "$python" "$repository/tools/plan.py" "${arguments[@]}" --world-size "$world" \
            ${MOH_GPU_MEMORY:+--gpu-memory "$MOH_GPU_MEMORY"}
    fi
}
