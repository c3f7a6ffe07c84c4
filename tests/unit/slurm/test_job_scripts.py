"""The job scripts without Slurm: what they print and refuse, and whether README.md describes them."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

REPOSITORY = Path(__file__).parents[3]
FOLDER = REPOSITORY / "slurm"
SCRIPTS = sorted(FOLDER.glob("*.sh"))
NEIGHBOURS = runpy.run_path(str(FOLDER / "preflight.py"))["neighbours"]
README = (FOLDER / "README.md").read_text(encoding="utf-8")


def typed(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a script as a user types it, outside a job."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MOH_"))}
    return subprocess.run(
        [str(FOLDER / script), *arguments],
        cwd=REPOSITORY,
        env=kept | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_script_is_valid_bash(script):
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


def test_readme_describes_every_variable():
    read = set()
    for file in [*SCRIPTS, *FOLDER.glob("*.py")]:
        text = file.read_text(encoding="utf-8")
        read |= set(re.findall(r"\$\{([A-Z][A-Z_]+):?[-+]", text))
        read |= set(re.findall(r'environ\.get\("([A-Z_]+)"', text))
    set_by_slurm_and_scripts = {"MOH_GPUS", "MOH_NODES", "PYTHONPATH"}
    needed = {name for name in read if not name.startswith("SLURM_")} - set_by_slurm_and_scripts
    rows = re.findall(r"^\| (`[A-Z].*?) \|", README, re.MULTILINE)
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == needed


def test_readme_names_every_script():
    named = set(re.findall(r"^\| `(\w+\.sh)", README, re.MULTILINE))
    helpers = {"common.sh", "training.sh", "rank.sh"}
    assert named | helpers == {script.name for script in SCRIPTS}
    assert named == {script.name for script in SCRIPTS if os.access(script, os.X_OK)} - helpers


@pytest.mark.parametrize("script", [script.name for script in SCRIPTS if "#SBATCH --" in script.read_text()])
def test_script_assumes_nothing_about_the_site(script):
    requests = re.findall(r"^#SBATCH (.*)", (FOLDER / script).read_text(encoding="utf-8"), re.MULTILINE)
    assert requests
    assert not [flag for flag in requests if re.match(r"--(partition|account|qos|container|constraint|time)", flag)]


def test_dry_run_shows_the_commands_and_the_plan():
    config = "configs/pretrain/llm_b_moh75.yaml"
    done = typed("pretrain_moh.sh", "--dry-run", "--nodes=8", config, "train.total_tokens=2e11", MOH_GPU_MEMORY="80")
    assert done.returncode == 0, done.stderr
    sbatch, srun, *plan = done.stdout.splitlines()
    submitted = shlex.split(sbatch)
    assert submitted[:2] == ["sbatch:", "sbatch"]
    assert "--dependency=singleton" in submitted
    assert submitted[-4:] == ["--nodes=8", str(FOLDER / "pretrain_moh.sh"), config, "train.total_tokens=2e11"]
    ranks = shlex.split(srun)
    assert ranks[1] == "srun"
    assert {"--cpus-per-task=8", "--gpu-bind=none", "--kill-on-bad-exit=0"} < set(ranks)
    assert ranks[-2:] == [config, "train.total_tokens=2e11"]
    assert plan[1].startswith("64 ranks: TP 1 x DP 64")
    assert "It fits 80.00 GiB" in done.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "missing"),
    [
        ("pretrain_moh.sh", ["configs/pretrain/llm_s_moh75.yaml", "data.dir=nowhere"], "No prepared data at nowhere"),
        ("evaluate.sh", ["nope"], "MODEL: nope is not there"),
        ("prepare_data.sh", ["configs/smoke.yaml", "tokenizer.path=nope", "data.inputs=[nope.jsonl]"], "nope"),
    ],
)
def test_a_dry_run_warns_of_what_the_real_call_refuses(script, arguments, missing):
    done = typed(script, "--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    assert f"warning: {missing}" in done.stderr or (missing == "nope" and "nope" in done.stderr)
    assert "Without --dry-run this is refused" in done.stderr
    assert "sbatch: sbatch" in done.stdout
    elsewhere = typed(script, "--dry-run", *arguments, MOH_NO_DATA_HERE="1")
    assert elsewhere.returncode == 0, elsewhere.stderr
    assert "not checked here, as MOH_NO_DATA_HERE is set" in elsewhere.stderr
    assert "nope" not in elsewhere.stderr


def test_a_dry_run_refuses_settings_that_depend_on_no_data():
    suite = ["evaluate.suite=none.yaml", "evaluate.interval=5", "checkpoint.interval=5"]
    done = typed("pretrain_moh.sh", "--dry-run", "configs/pretrain/llm_s_moh75.yaml", *suite)
    assert done.returncode == 2
    assert "none.yaml: no such file" in done.stderr


def test_suite_is_accepted_by_its_name():
    command = [sys.executable, "slurm/check_process.py", "pipelines/evaluate.py", "configs", "--suite", "offline"]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run(command, cwd=REPOSITORY, env=environment, check=False).returncode == 0


def test_name_of_a_container_chooses_apptainer_or_pyxis():
    config = "configs/pretrain/llm_s_moh75.yaml"
    sif = typed("pretrain_moh.sh", "--dry-run", config, MOH_CONTAINER="/images/moh.sif", MOH_MOUNTS="/a:/a,/b:/c")
    assert "apptainer exec --nv --bind /a:/a --bind /b:/c /images/moh.sif" in sif.stdout
    spaced = typed(
        "pretrain_moh.sh", "--dry-run", config, MOH_CONTAINER="/images/moh.sif", MOH_MOUNTS="/my run:/a,/b:/c"
    )
    assert "--bind /my\\ run:/a --bind /b:/c" in spaced.stdout
    pyxis = typed("pretrain_moh.sh", "--dry-run", config, MOH_CONTAINER="nvcr.io/moh", MOH_MOUNTS="/a:/a")
    assert "--container-image=nvcr.io/moh --container-mounts=/a:/a" in pyxis.stdout


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("pretrain_moh.sh", ["configs/none.yaml"], "configs/none.yaml"),
        ("pretrain_moh.sh", ["configs/smoke.yaml", "train.total_token=5"], "did you mean 'total_tokens'?"),
        ("pretrain_moh.sh", ["--ntasks-per-node=3", "configs/smoke.yaml"], "parallel.tensor"),
        ("pretrain_moh.sh", ["-N2", "configs/smoke.yaml"], "-N2: expected a flag of sbatch in its long form"),
        ("pretrain_moh.sh", ["configs/pretrain/llm_s_moh75.yaml", "data.dir=nowhere"], "No prepared data at nowhere"),
        ("prepare_data.sh", [], "expected a configuration"),
        ("prepare_data.sh", ["configs/smoke.yaml", "data.input=x"], "did you mean 'inputs'?"),
        (
            "prepare_data.sh",
            ["configs/smoke.yaml", "tokenizer.path=null"],
            "data.shard needs an existing tokenizer",
        ),
        ("prepare_data.sh", ["--array=1", "configs/smoke.yaml", "data.inputs=[nosuch.jsonl]"], "nosuch.jsonl"),
        ("convert.sh", ["bogus", "--nope"], "invalid choice: 'bogus'"),
        ("convert.sh", ["megatron-to-hf", "--load-dir", "nope", "--hf-dir", "hf"], "--load-dir: nope is not there"),
        ("convert.sh", ["hf-to-megatron", "--hf-dir", "nope", "--save-dir", "new"], "--hf-dir: nope is not there"),
        ("evaluate.sh", ["nope"], "MODEL: nope is not there"),
        ("evaluate.sh", ["configs", "--suite", "none.yaml"], "--suite: none.yaml is not there"),
        ("evaluate.sh", ["configs", "--suite", "ofline"], "Did you mean the suite offline?"),
        ("convert.sh", [], "expected the arguments of moh-convert"),
        ("evaluate.sh", [], "expected the arguments of moh-evaluate"),
        ("status.sh", ["nowhere"], "expected a run folder"),
    ],
)
def test_refused_before_the_queue(script, arguments, message):
    done = typed(script, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@given(st.integers(2, 40), st.integers(0, 1))
def test_partners_of_a_round_agree(nodes, round_number):
    neighbours = NEIGHBOURS
    for node in range(nodes):
        pair = neighbours(round_number, node, nodes)
        assert node in pair
        assert all(neighbours(round_number, other, nodes) == pair for other in pair)
        assert len(pair) == 1 or (pair[1] - pair[0]) % nodes == 1
    links = {frozenset(neighbours(number, node, nodes)) for number in (0, 1) for node in range(nodes)}
    met = {node for link in links if len(link) > 1 for node in link}
    assert met == set(range(nodes))


def test_snapshot_records_the_run_without_secrets(tmp_path):
    command = [sys.executable, FOLDER / "check.py", "configs/smoke.yaml", f"run.dir={tmp_path}", "--world-size", "2"]
    secrets = dict.fromkeys(["HF_TOKEN", "SLURM_JWT", "MOH_API_KEY", "NCCL_PASSWORD"], "s3cret")
    done = subprocess.run(
        [*map(str, command), "--no-data", "--snapshot", "7.0"],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "NCCL_DEBUG": "WARN", "MOH_NODES": "a b"} | secrets,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == str(tmp_path)
    snapshot = tmp_path / "slurm" / "7.0"
    job = json.loads((snapshot / "job.json").read_text(encoding="utf-8"))
    assert job["nodes"] == ["a", "b"]
    assert job["environment"]["NCCL_DEBUG"] == "WARN"
    assert "s3cret" not in (snapshot / "job.json").read_text(encoding="utf-8")
    assert job["packages"]["torch"]
    assert f"dir: {tmp_path}" in (snapshot / "config.yaml").read_text(encoding="utf-8")
