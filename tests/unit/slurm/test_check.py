"""Whether a job goes on with the run that its folder holds."""

from __future__ import annotations

import errno
import os
import runpy
from pathlib import Path

import pytest

from moh_megatron.io.errors import Fault, UserError
from moh_megatron.upcycle import provenance

DATA = "d" * 64
CHECK = runpy.run_path(str(Path(__file__).parents[3] / "slurm/check.py"))
check_resume = CHECK["check_resume"]


def test_a_run_folder_of_another_configuration(tiny, fake_checkpoint, tmp_path):
    config = tiny({"run.dir": str(tmp_path)})
    check_resume(config, 1, DATA)
    fake_checkpoint(tmp_path / "checkpoints/step_00000005", config, step=5, data=DATA)
    check_resume(config, 1, DATA)
    with pytest.raises(UserError, match=r"run\.seed: 1234 there, 5 here"):
        check_resume(tiny({"run.dir": str(tmp_path), "run.seed": 5}), 1, DATA)


def test_heads_that_were_measured_are_those_of_the_start(tiny, fake_checkpoint, tmp_path):
    told = {"run.dir": str(tmp_path), "train.init_from": "dense"}
    chosen = {"moh.shared_heads": [[1, 6], [0, 3]]}
    fake_checkpoint(tmp_path / "start", tiny(told | chosen))
    provenance.write(tmp_path / "start", tiny(told | {"moh.shared_placement": "calibrated"}), "w" * 64, DATA)
    trained = tiny(told | chosen | {"train.init_from": str(tmp_path / "start")})
    fake_checkpoint(tmp_path / "checkpoints/step_00000005", trained, step=5, data=DATA)
    config = tiny(told | {"moh.shared_placement": "calibrated"})
    check_resume(config, 1, DATA)
    with pytest.raises(UserError, match=r"moh\.active_heads: 4 there, 5 here"):
        check_resume(tiny(told | {"moh.shared_placement": "calibrated", "moh.active_heads": 5}), 1, DATA)


def test_a_run_folder_that_cannot_be_made(tmp_path):
    CHECK["check_folder"](tmp_path / "new/run")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/run", Path("/proc/run")):
        with pytest.raises(UserError, match=f"^{folder}: .* run.dir must be a folder that can be written"):
            CHECK["check_folder"](folder)


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOTDIR, UserError), (errno.ESTALE, Fault)])
def test_a_snapshot_that_fails_says_the_same_in_every_life(monkeypatch, tmp_path, number, kind):
    def fails(config: object, folder: Path) -> None:
        raise OSError(number, os.strerror(number), str(folder))

    main = CHECK["main"]
    monkeypatch.setitem(main.__globals__, "snapshot", fails)
    words = ["configs/smoke.yaml", f"run.dir={tmp_path}", "--world-size", "2", "--no-data", "--snapshot"]
    said = set()
    for life in ("7.0", "7.1"):
        monkeypatch.setattr("sys.argv", ["check.py", *words, life])
        with pytest.raises(kind) as told:
            main()
        said.add(str(told.value))
    assert said == {f"{tmp_path}: {os.strerror(number)}. run.dir must be a folder that can be written."}
