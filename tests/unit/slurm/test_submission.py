"""Typed scripts: what they submit, show and refuse before the queue."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[3] / "slurm"
SUBMITTED = ("pretrain_moh.sh", "continue_tune_llama3_8b.sh", "prepare_data.sh", "convert.sh", "evaluate.sh")


def shown(output: str, command: str) -> list[list[str]]:
    """Return the words of each line of a dry run that shows ``command``."""
    return [shlex.split(line)[1:] for line in output.splitlines() if line.startswith(f"{command}:")]


def test_all_scripts_find_their_folder_in_the_same_way():
    heads = {(FOLDER / name).read_text().split("# Slurm runs a copy")[1].split("# shellcheck")[0] for name in SUBMITTED}
    assert len(heads) == 1


@pytest.mark.parametrize("script", SUBMITTED)
def test_refusal_by_sbatch_ends_the_script(job, script):
    done = job.type(script, "--nodes=9999", "CONFIG", REFUSED="sbatch")
    assert done.returncode == 1
    assert len(job.called("sbatch")) == 1
    assert not job.called("srun")


@pytest.mark.parametrize("script", SUBMITTED)
def test_script_typed_in_an_allocation_submits_a_new_job(job, script):
    inside = {"SLURM_JOB_ID": "5", "SLURM_NNODES": "1", "SLURM_GPUS_PER_NODE": "1", "SHOWN": "   Command=(null)"}
    done = job.type(script, "CONFIG", **inside, SLURM_CONF="/etc/slurm.conf")
    assert done.returncode == 0, done.stderr
    assert len(job.called("sbatch")) == 1
    assert job.called("sees") == ["sees SLURM_CONF"]


@pytest.mark.parametrize("name", ["pretrain_moh.sh", "ours.sh"])
def test_copy_of_a_script_in_the_same_folder_works(job, tmp_path, name):
    folder = tmp_path / "a b/slurm"
    shutil.copytree(FOLDER, folder)
    copy = folder / name
    if name == "ours.sh":
        shutil.move(folder / "pretrain_moh.sh", copy)
    assert job.type(copy, "CONFIG").returncode == 0
    assert job.called("sbatch")[0].endswith(f"{copy} CONFIG")
    job.act(pretrain_0="ended 0 finished 30")
    assert job.start("pretrain_moh.sh", "CONFIG", SHOWN=f"JobId=7\n   Command={copy} CONFIG a/b.sh") == 0
    assert f"{folder.parent}/pipelines/pretrain.py CONFIG" in job.called("srun")[-1]


@pytest.mark.parametrize("command", ["(null)", "/nowhere/pretrain_moh.sh CONFIG", ""])
def test_job_whose_script_is_in_another_folder_is_refused(job, command):
    assert job.start("pretrain_moh.sh", "CONFIG", SHOWN=f"JobId=7\n   Command={command}") == 2
    assert "expected common.sh beside the script" in job.log.read_text()


def test_stage_2_is_checked_before_the_queue(job):
    job.act(
        check_0='echo "$*" >>"$RUN/checked"; case "$*" in *TWO*) echo "error: TWO: no such file" >&2; exit 2 ;; esac'
    )
    done = job.type("continue_tune_llama3_8b.sh", "ONE", "--", "TWO")
    assert (done.returncode, done.stderr) == (2, "error: TWO: no such file\n")
    assert not job.called("sbatch")
    assert "TWO --world-size 64 --no-data" in (job.run / "checked").read_text()


def test_dashes_without_configurations_are_refused(job):
    done = job.type("continue_tune_llama3_8b.sh", "--dry-run", "--")
    assert (done.returncode, done.stderr) == (2, "error: expected the configuration of stage 2 behind --\n")


def test_fault_of_the_checks_ends_the_script_with_1(job):
    job.act(check_0='echo "error: /runs: Stale file handle" >&2; exit 1')
    assert job.type("pretrain_moh.sh", "CONFIG").returncode == 1
    assert not job.called("sbatch")


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        (["--nodes=2-4"], "16 24 32"),
        (["--nodes=1,2,4"], "8 16 32"),
        (["--nodes=1-4:2"], "8 24"),
        (["--nodes=2", "--ntasks=12"], "12"),
        (["--ntasks-per-node=4", "--gpus-per-node=0", "--gpus-per-task=1"], "4"),
    ],
)
def test_every_possible_number_of_ranks_is_checked(job, flags, sizes):
    job.act(check_0='echo "$*" >"$RUN/checked"')
    done = job.type("pretrain_moh.sh", *flags, "CONFIG")
    assert done.returncode == 0, done.stderr
    assert (job.run / "checked").read_text().strip().endswith(f"CONFIG --world-size {sizes}")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--time=10"], "--time=10 is over before --signal=USR1@600, 600 s before its end"),
        (["--time=0:20:00", "--signal=USR1@1200"], "is over before"),
        (["--time=1", "--signal=USR1"], "60 s before its end"),
        (["--gpus-per-node=h100:4"], "Got --ntasks-per-node=8 with 4 GPUs a node"),
        (["--nodes=2", "--ntasks=3", "--ntasks-per-node=2"], "Got 3 tasks on 2 nodes"),
        (["--nodes=2-4", "--ntasks=16"], "Got 16 tasks on 3 nodes"),
        (["--nodes=4-2"], "--nodes: the first number is above the last"),
        (["--nodes=two"], "--nodes: expected numbers of nodes, such as 2, 2-4 or 1,2,4. Got two"),
        (["--ntasks-per-node=x"], "--ntasks-per-node: expected a whole number above 0. Got x"),
        (
            ["--gpus-per-node=h100"],
            "--gpus-per-node: expected a number, or one behind a type, such as h100:8. Got h100",
        ),
        (["--nodes", "2"], "--nodes 2: expected --nodes=2"),
        (["--signal=B:USR1@300"], "Leave out B: so that the ranks do: --signal=USR1@300"),
    ],
)
def test_request_that_cannot_work_is_refused(job, flags, message):
    done = job.type("pretrain_moh.sh", *flags, "CONFIG")
    assert done.returncode == 2
    assert message in done.stderr
    assert not job.called("sbatch")


@pytest.mark.parametrize("limit", ["11", "10:01", "0:10:01", "1-0", "0-1:00", "0-0:11:00", "UNLIMITED"])
def test_time_limit_that_leaves_time_to_train_is_accepted(job, limit):
    assert job.type("pretrain_moh.sh", f"--time={limit}", "CONFIG").returncode == 0


@pytest.mark.parametrize(
    ("array", "message"),
    [
        ("2-3", "must count from 1 without gaps, such as --array=1-16%8. Got 2 to 3, 2 tasks"),
        ("1-8:2", "Got 1 to 7, 4 tasks"),
        ("foo", "--array: expected numbers of tasks, such as 1-16%8. Got foo"),
    ],
)
def test_array_that_cannot_be_sharded_is_refused(job, array, message):
    done = job.type("prepare_data.sh", f"--array={array}", "CONFIG")
    assert done.returncode == 2
    assert message in done.stderr
    assert not job.called("sbatch")
    done = job.type("prepare_data.sh", "--dry-run", "CONFIG", SBATCH_ARRAY_INX="1,2,3%2")
    assert shown(done.stdout, "srun")[0][-1] == "data.shard=1/3"


def test_arguments_of_one_process_are_checked_before_the_queue(job):
    act = 'echo "${*:2}" >>"$RUN/checked"; echo "error: no" >&2; exit 2'
    job.act(check_process_0=act)
    for variables in ({}, {"MOH_NO_DATA_HERE": "1"}):
        done = job.type("evaluate.sh", "runs/one", **variables)
        assert (done.returncode, done.stderr) == (2, "error: no\n")
    assert not job.called("sbatch")
    pipeline = FOLDER.parent / "pipelines/evaluate.py"
    checked = (job.run / "checked").read_text().splitlines()
    assert checked == [f"{pipeline} runs/one", f"--no-data {pipeline} runs/one"]


def test_variables_of_sbatch_count_as_requests(job):
    assert job.type("pretrain_moh.sh", "--time=5", "CONFIG", SBATCH_SIGNAL="USR1@60").returncode == 0
    # A flag overrides a variable.
    done = job.type("pretrain_moh.sh", "--signal=USR1@300", "CONFIG", SBATCH_SIGNAL="USR1@60", SBATCH_TIMELIMIT="5")
    assert "--time=5 is over before --signal=USR1@300" in done.stderr


def test_job_name_follows_from_the_run_folder_without_python(job):
    def name(*arguments: str, **variables: str) -> str:
        assert job.type("pretrain_moh.sh", *arguments, **variables).returncode == 0
        (found,) = [word for word in job.called("sbatch")[-1].split() if word.startswith("--job-name=")]
        return found

    image = {"MOH_PYTHON": "/only/in/the/image"}
    assert name("ONE.yaml", f"run.dir={job.run}", **image) == name("ONE.yaml")
    assert name("ONE.yaml", "run.dir=a", "run.dir=b/", **image) == name("TWO.yaml", "run.dir=b", **image)
    assert name("ONE.yaml", **image) == name("ONE.yaml", **image) != name("TWO.yaml", **image)


def test_help_shows_the_comment_at_the_top(job):
    done = job.type("convert.sh", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("Convert a checkpoint, in one process: sbatch slurm/convert.sh megatron-to-hf")
    assert not job.calls


def test_dry_run_without_python_shows_no_plan(job):
    done = job.type("pretrain_moh.sh", "--dry-run", "CONFIG", MOH_PYTHON="/nowhere/python")
    assert done.returncode == 0, done.stderr
    assert "no plan is made" in done.stderr
    assert len(shown(done.stdout, "sbatch")) == len(shown(done.stdout, "srun")) == 1


def test_dry_run_of_two_stages_shows_both(job):
    done = job.type("continue_tune_llama3_8b.sh", "--dry-run", "--nodes=2", "ONE", "a.b=1", "--", "TWO")
    first, second = shown(done.stdout, "sbatch")
    assert first[-6:] == ["--nodes=2", str(FOLDER / "continue_tune_llama3_8b.sh"), "ONE", "a.b=1", "--", "TWO"]
    assert second[-5:] == [
        "--dependency=afterok:JOB",
        "--nodes=2",
        str(FOLDER / "continue_tune_llama3_8b.sh"),
        "--",
        "TWO",
    ]
    prepare, ranks = shown(done.stdout, "srun")
    assert "--ntasks=1" in prepare
    assert prepare[-3:] == ["ONE", "a.b=1", "--prepare"]
    assert ranks[-2:] == ["ONE", "a.b=1"]
    assert not job.called("sbatch") + job.called("srun")


@pytest.mark.parametrize(
    ("script", "arguments", "command"),
    [
        ("convert.sh", ["official-to-hf", "--hf-dir", "a b"], "convert.py official-to-hf --hf-dir 'a b'"),
        ("evaluate.sh", ["runs/one", "--limit", "5"], "evaluate.py runs/one --limit 5"),
        ("prepare_data.sh", ["CONFIG", "a.b=1"], "prepare_data.py CONFIG data.workers=16 a.b=1 data.shard=1/16"),
    ],
)
def test_dry_run_of_one_process_shows_its_command(job, script, arguments, command):
    done = job.type(script, "--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    (srun,) = shown(done.stdout, "srun")
    assert "--ntasks=1" in srun
    words = shlex.split(command)
    assert srun[-len(words) + 1 :] == words[1:]
    assert srun[-len(words)].endswith(words[0])
    assert len(shown(done.stdout, "sbatch")) == 1
    assert not job.called("sbatch") + job.called("srun")


@pytest.mark.parametrize(
    ("variable", "value"),
    [("MAX_RESTARTS", "3x"), ("RESTART_PAUSE", "1min1"), ("MOH_FREE_GIB", "20GB"), ("MOH_WAIT_SECONDS", "2.5")],
)
def test_variable_that_is_not_a_number_is_refused_in_script_and_job(job, variable, value):
    done = job.type("pretrain_moh.sh", "CONFIG", **{variable: value})
    assert done.returncode == 2
    assert re.fullmatch(f"error: {variable}: expected a (whole )?number without a unit. Got {value}\n", done.stderr)
    assert job.start("convert.sh", "official-to-hf", **{variable: value}) == 2
    assert job.log.read_text() == done.stderr
    assert not job.called("sbatch") + job.called("srun")
    assert job.type("pretrain_moh.sh", "CONFIG", **{variable: ""}).returncode == 0
