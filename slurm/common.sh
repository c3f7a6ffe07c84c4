# shellcheck shell=bash
# shellcheck disable=SC2034,SC2154  # variables shared by this file and those that source it
# Functions that the job scripts of this folder share. They set `script` to their own path and source this file; README.md
# lists the variables. A script that Slurm runs is a job; a script that is typed checks what it can and submits itself.
set -euo pipefail

repository=$(dirname "$(dirname "$script")")
python=${MOH_PYTHON:-$repository/.venv/bin/python}
max_restarts=${MAX_RESTARTS:-3}
restart_pause=${RESTART_PAUSE:-60}

# Print a text. A question mark stands for what a terminal would obey in place of showing it: reasons come from exit.json
# and from logs.
controls=$'\001-\010\013-\037\177'
plain() { printf '%s\n' "${*//[$controls]/?}"; }
say() { plain "[$(date +%FT%T)] $*" >&2; }
fail() { # CODE MESSAGE: the last line of the log gives the reason
    plain "error: ${*:2}" >&2
    exit "$1"
}

# Check the numbers in variables first: `[` treats as false what it cannot read, and in a job Python would fail on every
# node.
check_number() { # NAME PATTERN WHAT
    [[ ${!1:-0} =~ ^$2$ ]] || fail 2 "$1: expected $3 without a unit. Got ${!1}"
}
for name in MAX_RESTARTS RESTART_PAUSE MOH_SAVE_SECONDS MOH_WAIT_SECONDS MOH_LOCK_SECONDS; do
    check_number "$name" '[0-9]{1,9}' "a whole number"
done
for name in MOH_FREE_GIB MOH_MEETING_SECONDS MOH_GPU_MEMORY; do
    check_number "$name" '[0-9]{1,9}(\.[0-9]+)?' "a number"
done

# Arguments: first the flags of sbatch and --dry-run, then CONFIG and overrides.

flags=() given=() arguments=() dry_run=
parse() {
    # In a job, sbatch has read its flags: the arguments are those of the command.
    while ! in_job && [[ ${1:-} == -* && $1 != -- ]]; do
        case $1 in
            --dry-run) dry_run=1 ;;
            --help)
                sed -n '2,${ /^# /!q; s/^# //p }' "$script"
                exit
                ;;
            --*=* | --[a-z]*) flags+=("$1") ;;
            *) fail 2 "$1: expected a flag of sbatch in its long form, such as --nodes=2, before the configuration" ;;
        esac
        if [[ $1 != *=* && ${2:-} == [0-9]* && ! -e $2 ]]; then fail 2 "$1 $2: expected $1=$2"; fi
        shift
    done
    in_job || check_requests
    given=("$@") arguments=("$@")
}

# A task of an array needs both numbers: the job id of one task is also that of the array.
this_job=${SLURM_JOB_ID:-}
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || this_job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID

# A script that is typed inside an allocation (salloc, a notebook) is not that job, and neither is the job it submits: sbatch
# would take the allocation's variables as requests.
in_job() { [ "$script" != "$(readlink -f "$0")" ]; }
forget_job() {
    local configuration=${SLURM_CONF:-}
    unset "${!SLURM_@}"
    [ -z "$configuration" ] || export SLURM_CONF=$configuration
}
if ! in_job && [ -n "${SLURM_JOB_ID:-}" ]; then forget_job; fi

requested() { # FLAG DEFAULT: the request of #SBATCH lines, sbatch's variables and flags; the last one counts
    local found variable=SBATCH_${1^^}
    case $1 in
        time) variable=SBATCH_TIMELIMIT ;;
        array) variable=SBATCH_ARRAY_INX ;;
        nodes | ntasks | ntasks-per-node | cpus-per-task) variable=none ;; # sbatch has no variable for these
    esac
    variable=${variable//-/_}
    found=$({
        sed -n 's/^#SBATCH //p' "$script" | tr ' ' '\n'
        [ -z "${!variable:-}" ] || echo "--$1=${!variable}"
        printf '%s\n' "${flags[@]}"
    } | sed -n "s/^--$1=//p" | tail -n 1)
    echo "${found:-$2}"
}

# sbatch accepts more forms; the scripts must know what the job may get.
check_request() { # FLAG PATTERN WHAT
    local value
    value=$(requested "$1" '')
    [[ -z $value || $value =~ ^($2)$ ]] || fail 2 "--$1: expected $3. Got $value"
}
check_requests() {
    local flag some='[1-9][0-9]*' index='[0-9]+' nodes tasks
    nodes="$some(-$some(:$some)?)?" tasks="$index(-$index(:$some)?)?"
    for flag in ntasks ntasks-per-node cpus-per-task; do
        check_request "$flag" "$some" "a whole number above 0"
    done
    for flag in gpus-per-node gpus-per-task; do
        check_request "$flag" '([^:,]+:)?[0-9]+' "a number, or one behind a type, such as h100:8"
    done
    check_request nodes "$nodes(,$nodes)*" "numbers of nodes, such as 2, 2-4 or 1,2,4"
    check_request array "$tasks(,$tasks)*(%$some)?" "numbers of tasks, such as 1-16%8"
    for flag in nodes array; do
        [ -n "$(numbers_of "$(requested "$flag" 1 | sed 's/%.*//')")" ] || fail 2 "--$flag: the first number is above the last"
    done
}

numbers_of() { # 4, 2-4, 2-8:2 or 1,2,4: prints one number a line, in order
    local part step
    for part in ${1//,/ }; do
        case $part in *:*) step=${part##*:} ;; *) step=1 ;; esac
        part=${part%:*}
        seq "${part%%-*}" "$step" "${part##*-}"
    done | sort -nu
}

# The environment of every process of a job; a job inherits that of its submitter.

prepare_environment() {
    # Site modules and setup files may not work in a shell that ends at the first error.
    set +euo pipefail
    # shellcheck disable=SC2086
    [ -z "${MOH_MODULES:-}" ] || module load $MOH_MODULES || fail 2 "MOH_MODULES: module load $MOH_MODULES failed with $?"
    # shellcheck disable=SC1090
    [ -z "${MOH_SETUP:-}" ] || . "$MOH_SETUP" || fail 2 "MOH_SETUP: $MOH_SETUP ended with exit code $?, expected 0"
    set -euo pipefail
    # Use the code of this repository, even if another version is installed.
    export PYTHONPATH=$repository${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
    # The submitting shell may carry variables of a rank that it once was.
    unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MOH_LAUNCHER_PID TORCHELASTIC_USE_AGENT_STORE
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    # Megatron-core overlaps tensor-parallel communication correctly only with one queue.
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
    # glibc hands large freed blocks back to the system, and faults their pages in again at every step.
    export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-8589934592}
    export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-8589934592}
    # With WARN, NCCL reports failed peers and devices only.
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    # A progress bar writes one line to the log file at each refresh.
    export TQDM_MININTERVAL=${TQDM_MININTERVAL:-30}
    if [ "${MOH_DEVICE:-auto}" = cpu ]; then export CUDA_VISIBLE_DEVICES=''; fi
}

tasks_per_node() { # --ntasks overrides --ntasks-per-node
    local total nodes
    if in_job; then total=$SLURM_NTASKS nodes=$SLURM_NNODES; else total=$(requested ntasks '') nodes=$(requested nodes 1); fi
    if [ -n "$total" ]; then echo $(((total + ${nodes%%[-,]*} - 1) / ${nodes%%[-,]*})); else requested ntasks-per-node 1; fi
}

gpus_per_node() { # requested as `8`, as `h100:8` or not at all
    local per_node=${SLURM_GPUS_PER_NODE:-$(requested gpus-per-node 0)} per_task=${SLURM_GPUS_PER_TASK:-$(requested gpus-per-task 0)}
    if [ "${MOH_DEVICE:-auto}" = cpu ]; then
        echo 0
    elif [ "${per_node##*:}" -gt 0 ]; then
        echo "${per_node##*:}"
    else
        echo $((${per_task##*:} * $(tasks_per_node)))
    fi
}

# srun starts every process directly, so that signals and exit codes reach it and its caller.

srun_line=() inside=()
prepare_srun() {
    local mounts=${MOH_MOUNTS:-$repository:$repository,$PWD:$PWD} pair pairs
    # In blocks: the ranks of a node are consecutive, whatever SLURM_DISTRIBUTION of the submitter says.
    srun_line=(srun --kill-on-bad-exit=0 --wait="${MOH_WAIT_SECONDS:-120}" --distribution=block)
    # Since Slurm 22.05 srun does not inherit this from sbatch.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || srun_line+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
    # Every rank sees all GPUs of its node and takes the one of its local rank: NCCL needs to see those of its peers.
    [ "$(gpus_per_node)" = 0 ] || srun_line+=(--gpu-bind=none)
    case ${MOH_CONTAINER:-} in
        '') ;;
        *.sif)
            inside=(apptainer exec --nv)
            IFS=, read -ra pairs <<<"$mounts"
            for pair in "${pairs[@]}"; do inside+=(--bind "$pair"); done
            inside+=("$MOH_CONTAINER")
            ;;
        *)
            srun_line+=(--container-image="$MOH_CONTAINER" --container-mounts="$mounts" --container-workdir="$PWD"
                --no-container-mount-home)
            ;;
    esac
}

show() { # NAME WORD...: print a line of a dry run
    printf '%-7s %s\n' "$1:" "$(printf '%q ' "${@:2}")"
}

as=() # how an srun line is used: empty runs it, `show srun` prints it
on_one() { "${as[@]}" "${srun_line[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 "${inside[@]}" "$@"; }
on_all() { "${as[@]}" "${srun_line[@]}" bash "$repository/slurm/rank.sh" "${inside[@]}" "$@"; }

# Ranks meet at the first node, on a port computed from the job's id, so that two jobs on one node do not collide. It lies
# below 32768, from where on the system chooses ports.
prepare_meeting() {
    MOH_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
    MOH_NODES=${MOH_NODES% }
    # A single node may not be able to resolve its own name.
    if [ "$SLURM_NNODES" = 1 ]; then MASTER_ADDR=127.0.0.1; else MASTER_ADDR=${MOH_NODES%% *}; fi
    MASTER_PORT=$((20000 + 2 * (SLURM_JOB_ID % 6000)))
    MOH_GPUS=$(gpus_per_node)
    # The ranks listen to messages with this secret only.
    MOH_RUN_TOKEN=${MOH_RUN_TOKEN:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')}
    export MOH_NODES MASTER_ADDR MASTER_PORT MOH_GPUS MOH_RUN_TOKEN
}

# Functions of a typed script.

submit() { # LINE...: run it, or print it in a dry run
    if [ -n "$dry_run" ]; then
        show sbatch "$@"
    else
        "$@"
    fi
}

show_srun() { # on_one|on_all COMMAND...: in a dry run, print the line that the job will run
    local as=(show srun)
    [ -n "$dry_run" ] || return 0
    SLURM_CPUS_PER_TASK=$(requested cpus-per-task '') prepare_srun
    "$@"
}

# The file of this job's output, and the position where this start begins, to read its messages again.
log='' begin=1
remember_log() {
    log=$(readlink -f /proc/$$/fd/2)
    begin=$(($(stat -c %s "$log" 2>/dev/null || echo 0) + 1))
}

one_line() { plain "${1//[$'\t\r\n']/ }"; }

# Print the last error message of this start, if there is one, leaving out those of srun: one of a script, of argparse or
# of an exception.
last_words() {
    tail -c "+$begin" "$log" 2>/dev/null | grep -vE '^(srun|slurm[a-z]*)[^ ]*: ' | awk '
        /^([^ :]+: )?error: / { text = substr($0, index($0, "error: ") + 7); more = 1; next }
        /^[A-Za-z_][A-Za-z0-9_.]*(Error|Exception)(: |$)/ { text = $0; more = 0; next }
        more && /^       / { text = text "\n" $0; next }
        { more = 0 }
        END { if (text != "") print text }' || true
}

reason_of_end() { # the last error message; if there is none, the last line, preferably not of srun
    local reason output line
    reason=$(last_words)
    if [ -z "$reason" ]; then
        output=$(tail -c "+$begin" "$log" 2>/dev/null | grep . || true)
        line=$(grep -v '^srun: ' <<<"$output" | tail -n 1 || true)
        line=${line:-$(tail -n 1 <<<"$output")}
        reason="no reason was given, and the log ends with: $line"
        case $line in *execve*"$python"*) reason="MOH_PYTHON, $python, cannot be run: $line" ;; esac
    fi
    echo "$reason"
}

# Run a command to its end, and record whether Slurm asked this shell to end meanwhile: Slurm sends TERM before scancel, a
# requeue, and the end of a grace time or of the time limit.
stopped=
supervise() {
    local code pid before
    trap 'stopped+=1' TERM
    # Slurm may signal every shell of the job: the one that waits for srun has its exit code, and must survive the signal.
    { trap : TERM && "$@"; } &
    pid=$!
    while
        before=$stopped code=0
        wait "$pid" || code=$?
        # wait returned because of a signal, or because the command ended just before it: wait again.
        [ "$before" != "$stopped" ]
    do :; done
    trap - TERM
    return "$code"
}

# Slurm keeps the number of tasks of the last start, and would wait for as many nodes even if --nodes=1-2 allows fewer. It
# counts them again when it starts the job. Only a pending job can be changed, so this is the last command of the shell,
# however it ends, also by TERM.
may_take_fewer_nodes() {
    [ -z "${SLURM_NTASKS_PER_NODE:-}" ] ||
        scontrol update JobId="$this_job" NumTasks="$SLURM_NTASKS_PER_NODE" 2>/dev/null || true
}

avoid() { # NODES: comma-separated names of nodes on which this pending job must not start
    local excluded
    [ -n "$1" ] || return 0
    excluded=$(scontrol show job "$this_job" -o | sed -n 's/.* ExcNodeList=\([^ ]*\).*/\1/p')
    [ "$excluded" != "(null)" ] || excluded=
    scontrol update JobId="$this_job" ExcNodeList="${excluded:+$excluded,}$1" ||
        say "warning: Slurm did not take the list of nodes to avoid, $1"
}

requeue() { # NODES: start this job again on other nodes
    # Slurm ends this shell, which must set the nodes to avoid first.
    trap '' TERM
    scontrol requeue "$this_job" || fail 1 "Slurm refused to requeue job $this_job. Submit it again."
    avoid "$1"
    exit 75
}

# After a failure without a run folder: the log has the failures of earlier starts.
start_again() { # CODE REASON: unless it would fail again
    local life=${SLURM_RESTART_COUNT:-0} reason failed before failures
    reason=$(one_line "$2")
    failed="failed with exit code $1: $reason"
    before=$(head -c "$((begin - 1))" "$log" 2>/dev/null |
        sed -n "s/^\[[^]]*\] job $this_job, life \([0-9]*: failed .*\); starting again in .*/\1/p" || true)
    if [ "$(tail -n 1 <<<"$before")" = "$((life - 1)): $failed" ]; then
        fail 1 "job $this_job failed twice in the same way, with exit code $1, and is not started again: $reason"
    fi
    failures=$(grep -c . <<<"$before" || true)
    # A log that is overwritten has no earlier failures.
    [ "$begin" -gt 1 ] || failures=$life
    if [ "$failures" -ge "$max_restarts" ]; then
        fail 1 "failed with exit code $1 after $failures restarts (MAX_RESTARTS), and is not started again: $reason"
    fi
    say "job $this_job, life $life: $failed; starting again in $restart_pause s"
    sleep "$restart_pause"
    requeue ''
}

# Submit the next job of a chain from inside this one: the same script, with the parts of this job's request that Slurm
# shows. It does not show --signal; SBATCH_SIGNAL in the environment applies to both.
submit_next() { # NAME FLAGS... -- ARGUMENTS...: unless an earlier start of this job has submitted it
    local output shown pair value name=$1 more=()
    shift
    [ -z "$(squeue -h --name="$name" -o %i)" ] || return 0
    while [ "$1" != -- ]; do more+=("$1") && shift; done
    shift
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || more+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
    [ -z "${SLURM_NTASKS_PER_NODE:-}" ] || more+=(--ntasks-per-node="$SLURM_NTASKS_PER_NODE")
    [ -z "${SLURM_GPUS_PER_NODE:-}" ] || more+=(--gpus-per-node="$SLURM_GPUS_PER_NODE")
    [ -z "${SLURM_GPUS_PER_TASK:-}" ] || more+=(--gpus-per-task="$SLURM_GPUS_PER_TASK")
    [ -z "${SLURM_JOB_QOS:-}" ] || more+=(--qos="$SLURM_JOB_QOS")
    more+=(--partition="$SLURM_JOB_PARTITION" --nodes="$SLURM_NNODES")
    shown=$(scontrol show job "$this_job" -o)
    for pair in time=TimeLimit account=Account mem=MinMemoryNode mem-per-cpu=MinMemoryCPU tmp=MinTmpDiskNode \
        constraint=Features reservation=Reservation exclude=ExcNodeList nodelist=ReqNodeList licenses=Licenses; do
        value=$(sed -n "s/.* ${pair#*=}=\([^ ]*\).*/\1/p" <<<"$shown")
        case $value in '' | 0 | '(null)') ;; *) more+=(--"${pair%=*}=$value") ;; esac
    done
    output=$(readlink -f /proc/$$/fd/1)
    (
        forget_job
        sbatch --job-name="$name" "${more[@]}" --output="${output%/*}/%x-%j.out" --kill-on-invalid-dep=yes "$script" "$@"
    )
}

# Run a job that needs one process and can be repeated from its beginning.
one_process_job() { # PIPELINE ARGUMENT...
    local code=0 reason
    remember_log
    prepare_environment
    prepare_srun
    supervise on_one "$python" "$@" || code=$?
    if [ "$code" = 0 ] || [ -n "$stopped" ]; then exit "$code"; fi
    reason=$(reason_of_end)
    [ "$code" != 2 ] || [[ $reason == "MOH_PYTHON, "* ]] || fail 2 "$reason"
    start_again "$code" "$reason"
}

# Submit a typed script if its arguments and the inputs they name are valid.
submit_one_process() { # PIPELINE ARGUMENT...
    local check_flags=()
    prepare_environment
    if [ -n "${MOH_NO_DATA_HERE:-}" ]; then
        check_flags=(--no-data)
    elif [ -n "$dry_run" ]; then
        check_flags=(--report)
    fi
    if "$python" -c '' 2>/dev/null; then
        "$python" "$repository/slurm/check_process.py" "${check_flags[@]}" "$@" || exit
        [ -z "${MOH_NO_DATA_HERE:-}" ] || say "not checked here, as MOH_NO_DATA_HERE is set: whether the inputs are there"
    else
        say "warning: $python does not run here; the arguments are checked when the job starts"
    fi
    submit sbatch "${flags[@]}" "$script" "${given[@]}"
    show_srun on_one "$python" "$@"
}
