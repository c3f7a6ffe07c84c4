"""How a job reacts to the end of its processes, over several starts, and what it requests from Slurm."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

STAGES = Path(__file__).parents[3] / "slurm/continue_tune_llama3_8b.sh"
PRETRAIN = "pretrain_moh.sh"
SAVED = "ended 75 'received SIGUSR1: saved' {}"
HEAD = "ended 1 'rank 1 (n1, after step {0}, train) is missing' {0}"


def test_job_trains_to_the_end(job):
    job.act(pretrain_0="ended 0 finished 30")
    assert job.run_to_end(PRETRAIN, "CONFIG", "a.b=1") == 0
    assert job.events == ["start", "finished"]
    sruns = job.called("srun")
    assert all("--distribution=block" in call for call in sruns)
    assert sruns[-1].endswith("/pipelines/pretrain.py CONFIG a.b=1")


def test_address_and_port_follow_from_the_job_id(job):
    write = 'echo "$MASTER_ADDR $MASTER_PORT" >>"$RUN/meeting"; exit 0'
    job.act(preflight_0=write, pretrain_0=write)
    job.start(PRETRAIN, "CONFIG", SLURM_JOB_ID="12345")
    job.start(PRETRAIN, "CONFIG", SLURM_JOB_ID="12346", SLURM_NNODES="2", SLURM_JOB_NODELIST="n[1,3]")
    meetings = [line.split() for line in (job.run / "meeting").read_text().splitlines()]
    # In each job, first that of the preflight, then that of the ranks.
    assert meetings == [["127.0.0.1", "20691"], ["127.0.0.1", "20690"], ["n1", "20693"], ["n1", "20692"]]


def test_restarted_job_resumes_even_with_resume_never(job):
    job.act(pretrain_0=SAVED.format(7), pretrain_1="ended 0 finished 30")
    assert job.run_to_end(PRETRAIN, "CONFIG", "train.resume=never") == 0
    ranks = [call for call in job.called("srun") if "pretrain.py" in call]
    assert ranks[0].endswith("CONFIG train.resume=never")
    assert ranks[1].endswith("CONFIG train.resume=never train.resume=auto")


@pytest.mark.parametrize(("script", "starts"), [("preflight", 2), ("pretrain", 2), ("check", 2)])
def test_signal_before_the_ranks_are_up_ends_the_job_after_max_restarts(job, script, starts):
    job.act(**{f"{script}_{restart}": "kill -USR1 $$" for restart in range(9)})
    assert job.run_to_end(PRETRAIN, "CONFIG", MAX_RESTARTS="1") == 1
    assert len(job.called("scontrol requeue")) == starts - 1
    assert "Ask for a longer --time" in job.last


def test_saves_without_progress_end_the_job_after_max_restarts(job):
    job.act(**{f"pretrain_{restart}": SAVED.format(7) for restart in range(9)})
    assert job.run_to_end(PRETRAIN, "CONFIG", MAX_RESTARTS="2") == 1
    assert job.events == ["start", "saved"] * 3
    assert "USR1 ended 3 lives in a row at step 7" in job.last


def test_saves_with_progress_and_preemptions_are_not_counted(job):
    job.act(**{f"pretrain_{restart}": SAVED.format(restart) for restart in range(2)}, pretrain_2="ended 0 finished 30")
    assert job.run_to_end(PRETRAIN, "CONFIG", MAX_RESTARTS="0") == 0
    # Preemptions are not counted either.
    job.act(**{f"pretrain_{restart}": "ended 75 'received SIGTERM: saved' 7" for restart in range(2)})
    assert job.run_to_end(PRETRAIN, "CONFIG", MAX_RESTARTS="0") == 0


def test_same_reason_of_several_lines_is_recognised(job):
    job.act(
        **{f"pretrain_{restart}": r"ended 1 'CUDA error: unspecified\\n\\nlaunch\\tfailure' 9" for restart in range(3)}
    )
    assert job.run_to_end(PRETRAIN, "CONFIG") == 1
    assert job.events == ["start", "fault"] * 2
    assert "failed twice in the same way at step 9" in job.log.read_text()


def test_exception_of_a_traceback_is_the_reason(job):
    output = r"Traceback (most recent call last):\n  x\nModuleNotFoundError: No module named megatron\n"
    act = f"printf '{output}' >&2; exit 1"
    job.act(pretrain_0=act, pretrain_1=act)
    assert job.run_to_end(PRETRAIN, "CONFIG") == 1
    assert job.history[1][7] == "ModuleNotFoundError: No module named megatron"


def test_nodes_that_srun_names_together_are_recorded_separately(job):
    act = "echo 'srun: error: n[1,3]: tasks 0-3: Killed' >&2; exit 137"
    job.act(pretrain_0=act, pretrain_1="ended 0 finished 30")
    assert job.run_to_end(PRETRAIN, "CONFIG") == 0
    assert job.history[1][6] == "n1,n3"


def test_node_that_slurm_loses_twice_is_avoided(job):
    # The grandparent of the process is the shell of the job.
    lose_node = 'echo "srun: error: Node failure on n1" >&2; kill -TERM $(cut -d" " -f4 /proc/$PPID/stat); sleep 0.1; '
    act = lose_node + "ended 75 'received SIGTERM: saved' 7"
    job.act(pretrain_0=act, pretrain_1=act)
    for restart in range(2):
        job.start(PRETRAIN, "CONFIG", restart=restart)
    assert job.events == ["start", "stopped"] * 2
    assert [line[6] for line in job.history if line[3] == "stopped"] == ["n1", "n1"]
    assert job.called("scontrol update JobId=7 ExcNodeList") == ["scontrol update JobId=7 ExcNodeList=n1"]


@pytest.mark.parametrize(
    ("event", "state", "code"),
    [("saved", "PENDING", 2), ("fault", "RUNNING", 2), ("start", "COMPLETING", 2), ("finished", "PENDING", 0)],
)
def test_run_folder_of_another_unfinished_job_is_refused(job, event, state, code):
    (job.run / "slurm").mkdir()
    (job.run / "slurm/history.tsv").write_text(f"2026-01-01T00:00:00\t6\t0\t{event}\t75\t7\t-\t-\n")
    job.act(pretrain_0="ended 0 finished 30")
    assert job.start(PRETRAIN, "CONFIG", QUEUE="6", QUEUED_AS=state) == code
    if code:
        assert job.last.startswith(f"error: {job.run}: job 6 trains in this folder, or waits to go on there.")
        assert job.events == [event]


def test_run_folder_that_is_removed_ends_the_job(job):
    job.act(pretrain_0='rm -rf "$RUN"; exit 1')
    assert job.run_to_end(PRETRAIN, "CONFIG") == 1
    assert "history.tsv is gone: somebody removed the run folder of job 7 while it ran" in job.last


@pytest.mark.parametrize("refused", ["", "scontrol update"])
def test_node_is_avoided_only_once(job, refused):
    job.act(**{f"pretrain_{restart}": HEAD.format(restart) for restart in range(2)}, pretrain_2="ended 0 finished 30")
    # The job starts on n1 again, as if the user had removed the list, or Slurm had refused it.
    assert job.run_to_end(PRETRAIN, "CONFIG", REFUSED=refused or "none") == 0
    assert job.events == ["start", "fault", "start", "fault", "start", "finished"]
    assert len(job.called("scontrol update JobId=7 ExcNodeList=n1")) == 1


def test_more_ranks_than_gpus_are_refused(job):
    gpus = {"SLURM_GPUS_PER_NODE": "h100:4", "SLURM_NTASKS": "8"}
    assert job.run_to_end(PRETRAIN, "CONFIG", **gpus) == 2
    assert "Got --ntasks-per-node=8 with 4 GPUs a node" in job.last
    assert not job.called("srun")
    assert job.run_to_end(PRETRAIN, "CONFIG", **gpus | {"MOH_DEVICE": "cpu"}) == 0
    assert job.run_to_end(PRETRAIN, "CONFIG", **gpus | {"SLURM_GPUS_PER_NODE": "0", "SLURM_GPUS_PER_TASK": "1"}) == 0
    assert "--gpu-bind=none" in job.called("srun")[-1]


def test_unequal_numbers_of_ranks_are_refused(job):
    assert job.run_to_end(PRETRAIN, "CONFIG", SLURM_NNODES="2", SLURM_NTASKS="3", SLURM_JOB_NODELIST="n[1,3]") == 2
    assert "Got 3 tasks on 2 nodes" in job.last
    assert not job.called("srun")


def test_job_is_restarted_after_a_fault_of_the_checks(job):
    job.act(check_1='echo "error: /runs: Stale file handle" >&2; exit 1', pretrain_0=SAVED.format(7))
    job.act(pretrain_2="ended 0 finished 30")
    assert job.run_to_end(PRETRAIN, "CONFIG") == 0
    assert job.events == ["start", "saved", "start", "finished"]


@pytest.mark.parametrize("program", ["slurmstepd", "slurmstepd-n1"])
def test_missing_python_is_reported_and_tried_again_once(job, program):
    # This is the message of slurmd; its exit code is that of a user error.
    message = f"{program}: error: execve(): {job.variables['MOH_PYTHON']}: No such file or directory"
    act = f'echo "{message}" >&2; exit 2'
    job.act(check_0=act, pretrain_1="ended 0 finished 30")
    assert job.run_to_end(PRETRAIN, "CONFIG") == 0
    job.act(check_0=act, check_1=act)
    assert job.run_to_end(PRETRAIN, "CONFIG") == 1
    assert "failed twice in the same way, with exit code 2" in job.last
    assert job.last.endswith(f"MOH_PYTHON, {job.variables['MOH_PYTHON']}, cannot be run: {message}")
    job.act(convert_0=act)
    assert job.run_to_end("convert.sh", "official-to-hf") == 0


def test_last_line_of_srun_is_the_reason_where_there_is_no_other(job):
    act = "echo 'srun: error: Unable to create step: Invalid job' >&2; exit 1"
    job.act(convert_0=act, convert_1=act)
    assert job.run_to_end("convert.sh", "official-to-hf") == 1
    assert job.last.endswith("the log ends with: srun: error: Unable to create step: Invalid job")


def test_job_that_slurm_stops_waits_for_the_save(job):
    # Slurm signals the shells of the job, but not srun.
    act = "kill -TERM $PPID $(cut -d' ' -f4 /proc/$PPID/stat); sleep 0.3; ended 75 'received SIGTERM: saved' 7"
    job.act(pretrain_0=act)
    assert job.start(PRETRAIN, "CONFIG") == 75
    assert job.history[1][3:6] == ["stopped", "75", "-"]
    assert job.history[1][7] == "received SIGTERM: saved"
    assert job.last.endswith("stopped: received SIGTERM: saved")


def test_job_that_slurm_ends_after_its_ranks_may_take_fewer_nodes(job):
    # This happens when a node is lost: the watchdog ends the other ranks before Slurm notices.
    failed = 'until grep -q "[[:space:]]fault[[:space:]]" "$RUN/slurm/history.tsv"; do sleep 0.05; done'
    end_job = f"job=$(cut -d' ' -f4 /proc/$PPID/stat); ({failed}; kill -TERM $job) & "
    job.act(pretrain_0=end_job + "ended 1 'rank 2 (n2, after step 7, train) is missing' 7")
    assert job.start(PRETRAIN, "CONFIG", RESTART_PAUSE="30", SLURM_NTASKS_PER_NODE="2") == -signal.SIGTERM
    assert job.events == ["start", "fault"]
    assert job.calls[-1] == "scontrol update JobId=7 NumTasks=2"


def test_user_error_in_the_checks_ends_the_job(job):
    job.act(check_0='echo "error: moh.active_heads must be 3" >&2; exit 2')
    assert job.run_to_end(PRETRAIN, "CONFIG") == 2
    assert job.last == "error: moh.active_heads must be 3"
    assert job.events == []


def test_only_overrides_may_follow_the_configuration(job):
    job.act(pretrain_0="ended 0 finished 30")
    assert job.run_to_end(PRETRAIN, "CONFIG", "--profile") == 0
    assert all(call.endswith("CONFIG monitor.profile=true") for call in job.called("srun") if "pretrain.py" in call)
    assert job.run_to_end(PRETRAIN, "--nodes=2", "CONFIG") == 2
    assert "--nodes=2: expected section.key=value" in job.last


def test_job_of_one_process_gets_all_its_arguments(job):
    assert job.run_to_end("evaluate.sh", "--no-validation", "RUN") == 0
    assert job.called("srun")[-1].endswith("evaluate.py --no-validation RUN")


def test_usage_error_of_one_process_ends_the_job(job):
    output = r"usage: evaluate.py MODEL\nevaluate.py: error: unrecognized arguments: x\n"
    job.act(evaluate_0=f"printf '{output}' >&2; exit 2")
    assert job.run_to_end("evaluate.sh", "RUN") == 2
    assert job.last == "error: unrecognized arguments: x"
    job.act(evaluate_0="echo nothing useful; exit 2")
    assert job.run_to_end("evaluate.sh", "RUN") == 2
    assert job.last.endswith("the log ends with: nothing useful")


def test_process_that_fails_twice_in_the_same_way_ends_the_job(job):
    act = 'echo "error: a disk is full" >&2; exit 1'
    job.act(**{f"convert_{restart}": act for restart in range(9)})
    assert job.run_to_end("convert.sh", "official-to-hf") == 1
    assert len(job.called("srun")) == 2
    assert job.last.endswith("failed twice in the same way, with exit code 1, and is not started again: a disk is full")


def test_process_that_keeps_failing_ends_the_job_after_max_restarts(job):
    job.act(**{f"convert_{restart}": f'echo "error: {restart}" >&2; exit 1' for restart in range(9)})
    assert job.run_to_end("convert.sh", "official-to-hf", MAX_RESTARTS="2") == 1
    assert len(job.called("srun")) == 3
    assert "after 2 restarts (MAX_RESTARTS), and is not started again: 2" in job.last


def test_modules_and_setup_file_run_without_strict_mode(job, tmp_path):
    setup = tmp_path / "setup.sh"
    setup.write_text('[ -z "$PS1_THAT_NOBODY_SET" ]\nfalse\nmodule() { [ "$*" = "load cuda/12.4 gcc" ]; }\n')
    setup_variable = {"MOH_SETUP": str(setup)}
    assert job.run_to_end("convert.sh", "official-to-hf", **setup_variable) == 0
    setup.write_text("return 3\n")
    assert job.run_to_end("convert.sh", "official-to-hf", **setup_variable) == 2
    assert job.last == f"error: MOH_SETUP: {setup} ended with exit code 3, expected 0"
    assert job.run_to_end("convert.sh", "official-to-hf", MOH_MODULES="cuda/12.4") == 2
    assert "MOH_MODULES: module load cuda/12.4 failed" in job.last


def test_next_job_requests_what_this_one_requested(job):
    job.act(continue_tune_0="ended 0 finished 30")
    shown = (
        "JobId=7 Account=lab TimeLimit=2-00:00:00 ReqNodeList=(null) ExcNodeList=n9 MinMemoryNode=500G "
        "MinTmpDiskNode=0 Features=h100&ib Reservation=spring Licenses=(null)"
    )
    shown += f"\n   Command={STAGES}"
    assert job.start("continue_tune_llama3_8b.sh", "ONE", "--", "TWO", "c.d=2", SHOWN=shown) == 0
    (submitted,) = job.called("sbatch")
    words = submitted.split()
    assert {"--time=2-00:00:00", "--account=lab", "--mem=500G", "--constraint=h100&ib", "--exclude=n9"} < set(words)
    assert {"--reservation=spring", "--dependency=afterok:7", "--partition=main", "--nodes=1"} < set(words)
    assert not [word for word in words if word.startswith(("--tmp", "--licenses", "--nodelist"))]
    assert words[-3:] == ["--", "TWO", "c.d=2"]


def test_user_error_in_stage_2_is_reported_before_stage_1_trains(job):
    act = 'case "$*" in *TWO*) echo "error: TWO: no such file" >&2; exit 2 ;; esac'
    job.act(check_0=act)
    assert job.run_to_end("continue_tune_llama3_8b.sh", "ONE", "--", "TWO") == 2
    assert job.last == "error: TWO: no such file"
    assert not job.called("sbatch")
