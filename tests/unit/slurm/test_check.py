"""slurm/check.py: whether a job may resume the run in its folder."""

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


def test_run_folder_of_another_configuration_is_refused(tiny, fake_checkpoint, tmp_path):
    config = tiny({"run.dir": str(tmp_path)})
    check_resume(config, 1, DATA)
    fake_checkpoint(tmp_path / "checkpoints/step_00000005", config, step=5, data=DATA)
    check_resume(config, 1, DATA)
    with pytest.raises(UserError, match=r"run\.seed: expected 1234, got 5"):
        check_resume(tiny({"run.dir": str(tmp_path), "run.seed": 5}), 1, DATA)


def test_calibrated_heads_are_those_of_the_initial_checkpoint(tiny, fake_checkpoint, tmp_path):
    values = {"run.dir": str(tmp_path), "train.init_from": "dense"}
    chosen = {"moh.shared_heads": [[1, 6], [0, 3]]}
    fake_checkpoint(tmp_path / "start", tiny(values | chosen))
    provenance.write(tmp_path / "start", tiny(values | {"moh.shared_placement": "calibrated"}), "w" * 64, DATA)
    trained = tiny(values | chosen | {"train.init_from": str(tmp_path / "start")})
    fake_checkpoint(tmp_path / "checkpoints/step_00000005", trained, step=5, data=DATA)
    config = tiny(values | {"moh.shared_placement": "calibrated"})
    check_resume(config, 1, DATA)
    with pytest.raises(UserError, match=r"moh\.active_heads: expected 4, got 5"):
        check_resume(tiny(values | {"moh.shared_placement": "calibrated", "moh.active_heads": 5}), 1, DATA)


def test_run_folder_that_cannot_be_created_is_refused(tmp_path):
    CHECK["check_folder"](tmp_path / "new/run")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/run", Path("/proc/run")):
        with pytest.raises(UserError, match=f"^{folder}: .* run.dir must be a folder that can be written"):
            CHECK["check_folder"](folder)


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOTDIR, UserError), (errno.ESTALE, Fault)])
def test_failed_snapshot_has_the_same_message_in_every_start(monkeypatch, tmp_path, number, kind):
    def fail(config: object, folder: Path) -> None:
        raise OSError(number, os.strerror(number), str(folder))

    main = CHECK["main"]
    monkeypatch.setitem(main.__globals__, "snapshot", fail)
    arguments = ["configs/smoke.yaml", f"run.dir={tmp_path}", "--world-size", "2", "--no-data", "--snapshot"]
    messages = set()
    for start in ("7.0", "7.1"):
        monkeypatch.setattr("sys.argv", ["check.py", *arguments, start])
        with pytest.raises(kind) as caught:
            main()
        messages.add(str(caught.value))
    assert messages == {f"{tmp_path}: {os.strerror(number)}. run.dir must be a folder that can be written."}
